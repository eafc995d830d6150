from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters.layout import DenseLayout, infer_layout  # noqa: E402
from cvxdistill.adapters.student import GatedStudent, build_student, table1_parameters  # noqa: E402

CONV = infer_layout((3, 7, 6), (4, 4, 3))
DENSE = infer_layout((5,), (4,))


def random_network(layout, gate, n_gates, seed=0, always_on=()):
    """Weights of a network on the layout's rows; gates in ``always_on`` are on for every input."""
    rng = np.random.default_rng(seed)
    d, c, m = layout.n_features, layout.n_outputs, len(gate)
    G = rng.standard_normal((d, n_gates))
    G[:, list(always_on)] = 0
    G[-1, list(always_on)] = rng.random(len(always_on)).round()
    W1 = rng.standard_normal((d, m)) / np.sqrt(d)
    return W1, rng.standard_normal((m, c)), np.asarray(gate, dtype=int), G, rng.standard_normal(c)


def predict(layout, inputs, W1, W2, gate, G, intercept):
    """The formula of the convex program, in float64."""
    X = layout.rows(inputs.astype(np.float64))[:]
    D = X @ G >= 0
    return sum(
        ((D[:, gate[h]] * (X @ W1[:, h]))[:, None] * W2[h] for h in range(len(gate))),
        np.tile(intercept, (len(X), 1)),
    )


def random_inputs(layout, n=4):
    return np.random.default_rng(9).standard_normal((n, *layout.input_shape)).astype(np.float32)


LAYOUTS = {
    "k1": infer_layout((3, 7, 6), (4, 7, 6), kernel_size=1),
    "k2": infer_layout((3, 2, 2), (4, 1, 1)),
    "k3": infer_layout((3, 7, 7), (4, 7, 7)),
    "k3 stride 2": CONV,
    "k5": infer_layout((2, 7, 9), (4, 7, 9), kernel_size=5),
    "k5 stride 2": infer_layout((2, 9, 8), (4, 5, 4), kernel_size=5),
    "rectangular": infer_layout((2, 9, 8), (4, 5, 8), kernel_size=(5, 1)),
    "no padding": infer_layout((2, 9, 8), (4, 7, 6)),
    "dense": DENSE,
    "tokens": infer_layout((6, 5), (6, 3)),
    "flattened": infer_layout((2, 3, 4), (5,)),
    "flattened to a shape": infer_layout((7,), (2, 3)),
    "to a number": infer_layout((7,), ()),
}
NETWORKS = {
    "one gate a unit": ([3, 0, 4], ()),
    "shared gates": ([4, 0, 2, 4, 0], ()),
    "low rank linear path": ([1, 0, 2, 2], (1,)),
    "linear only": ([1], (1,)),
    "full linear only": ([1, 3, 1] * 9, (1, 3)),
    "full linear path": ([1, 3, 1] * 9 + [0, 2, 0], (1, 3)),
    "no units": ([], ()),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_module_predicts_what_the_convex_program_predicts(layout, network):
    gate, always = network
    weights = random_network(layout, gate, 5, always_on=always)
    inputs = random_inputs(layout)
    student = build_student(layout, *weights)
    output = student(torch.from_numpy(inputs))
    assert output.shape == (4, *layout.output_shape) and output.dtype == torch.float32
    Y = layout.targets(output.detach().numpy())
    np.testing.assert_allclose(Y, predict(layout, inputs, *weights), rtol=1e-5, atol=1e-5)


def test_in_double_precision_it_agrees_to_rounding():
    weights = random_network(CONV, [0, 1, 1], 3)
    inputs = random_inputs(CONV)
    student = build_student(CONV, *weights, dtype=torch.float64)
    Y = CONV.targets(student(torch.from_numpy(inputs).double()).detach().numpy())
    np.testing.assert_allclose(Y, predict(CONV, inputs, *weights), atol=1e-13)


def test_a_pre_activation_of_zero_is_on_as_in_the_patterns():
    G = np.array([[1.0], [0.0]])
    layout = infer_layout((1,), (1,))
    student = build_student(layout, np.array([[0.0], [1.0]]), np.ones((1, 1)), [0], G, [0.0])
    assert student(torch.tensor([[0.0], [-1.0]])).tolist() == [[1.0], [0.0]]


def test_shared_gates_are_stored_once_and_unused_gates_not_at_all():
    student = build_student(CONV, *random_network(CONV, [6, 1, 6, 6], 8))
    assert student.gate.out_channels == 2 and student.gate_index.tolist() == [0, 1, 0, 0]
    assert student.gate_index.dtype == torch.int64
    d, c = CONV.n_features, CONV.n_outputs
    assert student.parameters_stored == 2 * d + 4 * d + 4 * c + c + 4
    assert student.trainable == 4 * d + 4 * c + c
    distinct = build_student(CONV, *random_network(CONV, [6, 1, 3], 8))
    assert "gate_index" not in distinct.state_dict()


def test_always_on_gates_are_not_stored_and_make_the_smaller_linear_map():
    d, c = CONV.n_features, CONV.n_outputs
    low = build_student(CONV, *random_network(CONV, [0, 0], 1, always_on=[0]))
    assert low.linear_rank == 2 and low.gate is None
    assert low.parameters_stored == low.trainable == 2 * (d - 1) + 2 * c + c
    full = build_student(CONV, *random_network(CONV, [0] * 4, 1, always_on=[0]))
    assert full.linear_rank == 0
    assert full.parameters_stored == (d - 1) * c + c
    constant = build_student(CONV, *random_network(CONV, [], 0))
    assert constant.parameters_stored == c


def test_a_zero_gate_with_a_negative_bias_is_never_on():
    W1, W2, gate, G, b = random_network(CONV, [0], 1, always_on=[0])
    G[-1] = -1
    student = build_student(CONV, W1, W2, gate, G, b)
    output = student(torch.from_numpy(random_inputs(CONV)))
    expected = torch.from_numpy(b).float()[:, None, None].expand_as(output)
    torch.testing.assert_close(output, expected)


def test_gates_do_not_learn_and_the_rest_does():
    student = build_student(CONV, *random_network(CONV, [1, 0, 1, 2], 3, always_on=[2]))
    student(torch.from_numpy(random_inputs(CONV))).square().sum().backward()
    learning = {name for name, p in student.named_parameters() if p.requires_grad}
    assert {name for name, p in student.named_parameters() if p.grad is not None} == learning
    assert not any(name.startswith("gate") for name in learning)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == student.trainable
    student.requires_grad_(False)
    assert student.trainable > 0


def test_table_1_of_the_paper_is_reproduced():
    widths = [(64, 64, 60), (64, 128, 128), (128, 256, 256), (256, 512, 256)]
    counts = [table1_parameters(*row) for row in widths]
    assert counts == [73_328, 164_608, 656_896, 1_312_768]
    assert table1_parameters(64, 64, 60, k=3) == 73_328
    # A constructed student differs by its biases in the place of the batch norms.
    for (c_in, c_out, m), count in zip(widths, counts, strict=True):
        layout = infer_layout((c_in, 4, 4), (c_out, 4, 4))
        student = GatedStudent(layout, n_units=m, n_gates=m)
        assert student.parameters_stored == count - (4 * m + 2 * c_out) + (2 * m + c_out)


STUDENTS = {
    "conv": lambda: build_student(
        CONV, *random_network(CONV, [2, 0, 2, 1], 3, always_on=[1])
    ),
    "dense": lambda: build_student(DENSE, *random_network(DENSE, [2, 0, 2], 3)),
    "flattened": lambda: build_student(
        LAYOUTS["flattened"], *random_network(LAYOUTS["flattened"], [2, 0], 3)
    ),
    "linear": lambda: build_student(CONV, *random_network(CONV, [0], 1, always_on=[0])),
    "constant": lambda: build_student(DENSE, *random_network(DENSE, [], 1)),
}  # fmt: skip


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())
def test_it_exports_for_any_batch_size(make):
    student = make()
    x = torch.from_numpy(random_inputs(student.layout, 3))
    shapes = {"input": {0: torch.export.Dim("n")}}
    program = torch.export.export(student, (x,), dynamic_shapes=shapes)
    more = torch.from_numpy(random_inputs(student.layout, 7))
    torch.testing.assert_close(program.module()(more), student(more))


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())
def test_it_traces_without_graph_breaks(make):
    student = make()
    x = torch.from_numpy(random_inputs(student.layout))
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), student(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("make", STUDENTS.values(), ids=STUDENTS.keys())
def test_it_copies_pickles_and_loads_its_state_dict(make):
    student = make()
    x = torch.from_numpy(random_inputs(student.layout))
    fresh = GatedStudent(
        student.layout,
        n_units=student.n_units,
        n_gates=student.n_gates,
        linear_rank=student.linear_rank,
        shared_gates=student.shared_gates,
    )
    fresh.load_state_dict(student.state_dict())
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student)), fresh):
        assert torch.equal(twin(x), student(x))
        assert twin.trainable == student.trainable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_come_in_and_go_out_alike(dtype):
    student = STUDENTS["conv"]()
    x = torch.from_numpy(random_inputs(student.layout))
    output = student(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output, student(x.to(dtype).float()).to(dtype))
    assert student.to(dtype)(x).dtype == torch.float32
    assert student.to(dtype)(x.to(dtype)).dtype == dtype


def test_tokens_may_change_in_number():
    layout = LAYOUTS["tokens"]
    student = build_student(layout, *random_network(layout, [0, 1], 2))
    x = torch.randn(2, 11, 5)
    torch.testing.assert_close(student(x)[:, :6], student(x[:, :6]))


def test_it_stands_in_for_a_block_that_is_called_with_a_name_and_flags():
    student = STUDENTS["dense"]()
    x = torch.from_numpy(random_inputs(DENSE))
    assert torch.equal(student(hidden=x), student(x))
    assert torch.equal(student(x, None, use_cache=False), student(x))
    assert torch.equal(student(None, hidden=x), student(x))
    with pytest.raises(TypeError, match="exactly one tensor, but was called with: Tensor, Tensor"):
        student(x, x)
    with pytest.raises(TypeError, match="exactly one tensor, got none"):
        student()


def test_building_draws_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    STUDENTS["conv"]()
    assert torch.equal(torch.get_rng_state(), before)


def test_its_repr_says_the_shapes_and_sizes():
    text = repr(STUDENTS["conv"]())
    assert "(3, 7, 6) -> (4, 4, 3), units=3, gates=2" in text
    assert "linear_rank=1" in text and "Conv2d(3, 2, kernel_size=(3, 3)" in text


W1, W2, GATE, G, B = random_network(DENSE, [0, 2], 3)
NAN = np.where(np.arange(4) == 1, np.nan, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"W1": W1[:-1]}, ValueError, r"W1 must have shape \(6, m\), got \(5, 2\)"),
        ({"W2": W2[:, :3]}, ValueError, r"W2 must have shape \(2, 4\), got \(2, 3\)"),
        ({"G": G[0]}, ValueError, r"G must have shape \(6, p\), got \(3,\)"),
        ({"gate": [0]}, ValueError, r"gate must have shape \(2,\), got \(1,\)"),
        ({"gate": [0, 3]}, ValueError, r"gate must lie in \[0, 3\).*got 0 to 3"),
        ({"gate": [-1, 0]}, ValueError, r"gate must lie in"),
        ({"gate": [0.0, 1.0]}, TypeError, "gate must hold integers, got dtype float64"),
        ({"intercept": NAN}, ValueError, "intercept contains NaN"),
        ({"W1": W1.astype(str)}, TypeError, "W1 must hold real numbers"),
        ({"dtype": torch.int32}, TypeError, "dtype must be a floating dtype, got torch.int32"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"W1": W1, "W2": W2, "gate": GATE, "G": G, "intercept": B} | change
    with pytest.raises(error, match=message):
        build_student(DENSE, **arguments)


def test_a_layout_per_position_and_a_flat_one_differ():
    flat = DenseLayout((6, 5), (6, 3))
    assert flat.n_features == 31
    student = build_student(flat, *random_network(flat, [0], 1))
    assert student(torch.randn(2, 6, 5)).shape == (2, 6, 3)
    assert isinstance(student.first, nn.Linear) and student.first.in_features == 30
