"""Students in half and in int8: what rounding may cost, what is stored, and what comes back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
from torch import nn  # noqa: E402

from cvxdistill.adapters import (  # noqa: E402
    DenseLayout,
    Int8Layer,
    build_linear_student,
    build_student,
    find_span,
    infer_layout,
    load_compressed,
    load_student,
    quantize_student,
    save_compressed,
    save_student,
    stored_dtype,
    swap_block,
)
from cvxdistill.adapters.quantization import (  # noqa: E402
    EXACT_TERMS,
    quantize_examples,
    quantize_weight,
)

LAYOUTS = {
    "conv": infer_layout((3, 7, 6), (4, 4, 6), kernel_size=(3, 5)),
    "dense": infer_layout((5,), (4,)),
    "tokens": infer_layout((6, 5), (6, 3)),
    "flattened": infer_layout((2, 3, 4), ()),
}
GATES = {"shared": [0, 1, 0], "linear": [2], "both": [0, 1, 2], "constant": [], "full": [2] * 40}


def gated(layout, gate, seed=0):
    rng = np.random.default_rng(seed)
    G = rng.standard_normal((layout.n_features, 3))
    G[:, 2] = 0
    W1 = rng.standard_normal((layout.n_features, len(gate)))
    W2 = rng.standard_normal((len(gate), layout.n_outputs))
    b = rng.standard_normal(layout.n_outputs)
    return build_student(layout, W1, W2, np.array(gate, int), G, b).eval()


def linear(ranks=(2, 5), channels=3, c=8):
    rng = np.random.default_rng(0)
    r1, r2 = ranks
    return build_linear_student(
        infer_layout((channels, 6, 6), (c, 6, 6)),
        None if r1 is None else rng.standard_normal((channels, r1)),
        rng.standard_normal(((r1 or channels) * 9, r2 or c)),
        None if r2 is None else rng.standard_normal((r2, c)),
        rng.standard_normal(c),
    )


def sparse(channels=3, c=8):
    rng = np.random.default_rng(0)
    places = rng.random((channels * 9, c)) < 0.2
    W = np.where(places, rng.standard_normal(places.shape), 0)
    layout = infer_layout((channels, 6, 6), (c, 6, 6))
    return build_linear_student(layout, None, W, None, rng.standard_normal(c), places=places)


STUDENTS = {
    **{f"{a}, {b}": gated(LAYOUTS[a], GATES[b]) for a in LAYOUTS for b in GATES},
    "ranks 2 and 5": linear(),
    "rank 5": linear((None, 5)),
    "channels 2": linear((2, None)),
    "plain": linear((None, None)),
    "sparse": sparse(),
}


def inputs(student, n=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *student.layout.input_shape, generator=generator)


matrices = st.tuples(st.integers(1, 7), st.integers(1, 40), st.integers(0, 10**6), st.floats(-8, 8))


@settings(deadline=None)
@given(matrices)
def test_a_weight_is_off_by_at_most_half_of_its_channels_scale(shape):
    out, wide, seed, exponent = shape
    rng = np.random.default_rng(seed)
    # Heavy tails, and rows of zeros.
    W = torch.from_numpy(rng.standard_t(2, (out, wide)) * 10**exponent).float()
    W[rng.random(out) < 0.2] = 0
    q, scale = quantize_weight(W)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (out,)
    assert q.abs().max() <= 127
    off = (W.double() - scale.double()[:, None] * q.double()).abs()
    assert (off <= scale.double()[:, None] * (0.5 + 1e-4)).all()
    assert (q[W == 0] == 0).all()


@settings(deadline=None, max_examples=50)
@given(matrices, st.booleans())
def test_an_output_is_off_by_at_most_what_both_roundings_allow(shape, convolves):
    m, d, seed, exponent = shape
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(d, m, (2, 3), stride=(1, 2), padding=1) if convolves else nn.Linear(d, m)
    x = torch.randn(5, d, 4, 5, generator=generator) if convolves else torch.randn(5, d)
    x = x * 10**exponent
    with torch.no_grad():
        found = Int8Layer(layer)(x).double()
        exact = copy.deepcopy(layer).double()
        wanted = exact(x.double())
        # |s_X s_W q_X q_W - X W| <= |X| s_W / 2 + s_X / 2 |W| + s_X s_W / 4, summed over features.
        axes = (1, 2, 3) if convolves else (1,)
        s_X = x.double().abs().amax(axes, keepdim=True) / 127
        s_W = exact.weight.abs().flatten(1).amax(1) / 127
        steps = s_W.reshape(-1, *[1] * (exact.weight.ndim - 1)).expand_as(exact.weight)
        bound = copy.deepcopy(exact)
        bound.bias.zero_()
        bound.weight.copy_(steps / 2)
        allowed = bound(x.double().abs())
        bound.weight.copy_(exact.weight.abs() / 2 + steps / 4)
        allowed = allowed + bound(s_X.expand_as(x))
    assert ((found - wanted).abs() <= allowed * 1.001 + 1e-6 * wanted.abs().max()).all()


@pytest.mark.parametrize("d", [EXACT_TERMS, 4 * EXACT_TERMS + 7])
def test_sums_are_exact_where_float32_alone_would_round(d):
    layer = nn.Linear(d, 3, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(100, 128, (3, d), generator=generator))
        layer.weight[:, 0] = 127  # scales are 1
    x = torch.randint(100, 128, (4, d), generator=generator).float()
    x[:, 0] = 127
    quantised = Int8Layer(layer)
    assert torch.equal(quantised.scale, torch.ones(3))
    whole = x.long() @ layer.weight.detach().long().T
    assert (whole > 2**23).all()
    # An integer above 2^24 is rounded once.
    assert torch.equal(quantised(x).detach(), whole.float())


def test_rows_of_zeros_and_of_nothing_representable():
    layer = Int8Layer(nn.Linear(4, 3))
    x = torch.zeros(2, 4)
    x[1] = torch.tensor([1e-44, 0, 0, 0])
    q, step = quantize_examples(x, (-1,))
    assert torch.isfinite(q).all() and (step > 0).all() and q.abs().max() <= 127
    assert torch.equal(layer(x)[0], layer.bias)
    assert layer(torch.zeros(0, 4)).shape == (0, 3)
    assert not torch.isfinite(layer(torch.full((1, 4), torch.inf))).any()


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_quantised_students_are_close_and_the_original_is_untouched(name, dtype):
    student = STUDENTS[name]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    x = inputs(student)
    with torch.no_grad():
        wanted = student(x)
        quantised = quantize_student(student, dtype)
        found = quantised(x)
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    error = (found - wanted).norm() / wanted.norm()
    # Gates stay as they are in int8; in half one near zero may flip.
    assert error <= (0.03 if dtype == "int8" else 0.005)
    for key, value in student.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    assert quantised(x.half()).dtype == torch.float16


@pytest.mark.parametrize("name", STUDENTS)
def test_numbers_and_bytes_are_counted_as_stored(name, tmp_path):
    student = STUDENTS[name]
    half, small = (quantize_student(student, dtype) for dtype in ("float16", "int8"))
    layers = [module for module in small.modules() if isinstance(module, Int8Layer)]
    scales = sum(layer.scale.numel() for layer in layers)
    of_sparse = small.core.places if name == "sparse" else None
    weights = sum(
        layer.weight.numel() if of_sparse is None else int(of_sparse.sum()) for layer in layers
    )
    assert small.parameters_stored == student.parameters_stored + scales
    assert half.parameters_stored == student.parameters_stored
    assert half.trainable == student.trainable
    # Weights of few places take no gradient in any precision.
    assert small.trainable == student.trainable - (weights if of_sparse is None else 0)
    assert small.bytes_stored == student.bytes_stored - 3 * weights + 4 * scales
    state = student.state_dict().values()
    index = sum(t.numel() * t.element_size() for t in state if not t.is_floating_point())
    assert half.bytes_stored - index == (student.bytes_stored - index) / 2
    if hasattr(student, "n_units"):
        for some in (student, half, small):
            save_student(some, tmp_path / "student")
            assert 0 < (tmp_path / "student").stat().st_size - some.bytes_stored < 2000
    assert f"bytes={small.bytes_stored}" in repr(small)
    assert bool(layers) == ("Int8Layer" in repr(small))


def test_no_answer_depends_on_the_other_examples():
    student = quantize_student(STUDENTS["conv, both"], "int8")
    x = inputs(student)
    x[0] *= 1000
    with torch.no_grad():
        together = student(x)
        alone = torch.cat([student(one[None]) for one in x])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)


def test_gates_are_not_rounded():
    student = STUDENTS["conv, shared"]
    quantised = quantize_student(student, "int8")
    assert torch.equal(quantised.gate.weight, student.gate.weight)
    assert not quantised.gate.weight.requires_grad
    assert isinstance(quantised.first, Int8Layer) and isinstance(quantised.second, Int8Layer)


def test_a_layer_in_a_model_that_is_cast_to_half_does_not_compute_in_half():
    torch.manual_seed(0)
    layer = Int8Layer(nn.Linear(1000, 3))
    x = torch.rand(4, 1000)
    with torch.no_grad():
        wanted = layer(x)
        cast = copy.deepcopy(layer).half()
        # Sums of integers here are beyond what half can hold.
        found = cast(x.half())
    assert found.dtype == torch.float16 and cast.weight.dtype == torch.int8
    assert (found.float() - wanted).norm() <= 0.01 * wanted.norm()


@pytest.mark.parametrize("name", [name for name in STUDENTS if "," in name])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_files_bring_quantised_students_back_bit_for_bit(name, dtype, tmp_path):
    student = quantize_student(STUDENTS[name], dtype)
    save_student(student, tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    check_same(student, loaded)
    x = inputs(student)
    assert torch.equal(student(x), loaded(x))
    assert stored_dtype(loaded) == stored_dtype(student) and repr(loaded) == repr(student)


def check_same(module, other):
    assert list(module.state_dict()) == list(other.state_dict())
    for name, tensor in module.state_dict().items():
        got = other.state_dict()[name]
        assert tensor.dtype == got.dtype and torch.equal(tensor, got)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv2(torch.relu(self.conv1(x))).mean(dim=(2, 3)))


@pytest.mark.parametrize("which", ["conv1", "conv2"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_files_bring_compressed_models_back_bit_for_bit(which, dtype, tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(5, 3, 6, 6)
    spans = [find_span(net, name, x) for name in ("conv1", "conv2")]
    model = swap_block(net, spans[0], linear())
    model = swap_block(model, spans[1], sparse(8))
    # One of them stays as it is.
    setattr(model, which, quantize_student(getattr(model, which), dtype))
    save_compressed(model, spans, tmp_path / "small")
    loaded = load_compressed(Net().eval(), tmp_path / "small")
    check_same(model, loaded)
    assert torch.equal(model(x), loaded(x))
    dtypes = {"conv1": "float32", "conv2": "float32"} | {which: dtype}
    assert {name: stored_dtype(getattr(loaded, name)) for name in dtypes} == dtypes


def test_what_cannot_be_quantised_is_refused():
    student = STUDENTS["dense, both"]
    with pytest.raises(TypeError, match="a GatedStudent or a LinearStudent, got Linear"):
        quantize_student(nn.Linear(2, 2), "int8")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int4'"):
        quantize_student(student, "int4")
    with pytest.raises(ValueError, match="in int8 already"):
        quantize_student(quantize_student(student, "int8"), "float16")
    large = gated(DenseLayout((5,), (4,)), [0])
    with torch.no_grad():
        large.first.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"up to 1\.0e\+05, are too large for float16"):
        quantize_student(large, "float16")
