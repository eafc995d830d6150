"""Polishing of deployed students: polish itself, and distill with polish="group_elastic_net"."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import (  # noqa: E402
    ConvLayout,
    DenseLayout,
    build_student,
    capture,
    stored_size,
    student_neurons,
)
from cvxdistill.solvers import GatedOperator, evaluate_gates, hidden_features  # noqa: E402
from cvxdistill.solvers.random_order import random_order  # noqa: E402

POLISH = {"polish": "group_elastic_net"}
LAYOUTS = {
    "dense": DenseLayout((5,), (3,)),
    "tokens": DenseLayout((4, 5), (4, 3), per_position=True),
    "conv": ConvLayout((2, 6, 6), (3, 3, 3), (3, 3), (2, 2), (1, 1)),
}


def random_student(layout, *, gated=6, free=3, seed=0, full=False, shared=False, dtype=None):
    """A student of units behind gates (distinct or shared) and of units that are always on."""
    rng = np.random.default_rng(seed)
    d, c = layout.n_features, layout.n_outputs
    free = 2 * max(d, c) if full else free
    m = gated + free
    G = np.hstack([rng.standard_normal((d, gated)), np.zeros((d, 1))])
    gate = np.concatenate([np.arange(gated) // (2 if shared else 1), np.full(free, gated)])
    W1, W2 = rng.standard_normal((d, m)), rng.standard_normal((m, c))
    return build_student(
        layout, W1, W2, gate, G, rng.standard_normal(c), dtype=dtype or torch.float64
    ).eval()


def outputs_of(student, inputs):
    with torch.no_grad():
        return student(torch.from_numpy(inputs)).numpy()


SHAPES = pytest.mark.parametrize(
    "shape",
    [
        {},
        {"shared": True},
        {"free": 0},
        {"gated": 0},
        {"full": True},
        {"gated": 0, "full": True},
        {"gated": 0, "free": 0},
    ],
    ids=str,
)


@SHAPES
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_units_read_from_a_module_predict_what_it_does(layout, shape):
    student = random_student(layout, **shape)
    neurons, G, b = student_neurons(student)
    inputs = np.random.default_rng(1).standard_normal((7, *layout.input_shape))
    X = layout.rows(inputs)[:]
    Z = hidden_features(GatedOperator(X, evaluate_gates(X, G)), neurons) @ neurons.W2 + b
    np.testing.assert_allclose(
        Z, layout.targets(outputs_of(student, inputs)), atol=1e-10 * np.abs(Z).max()
    )
    again = build_student(layout, neurons.W1, neurons.W2, neurons.gate, G, b, dtype=student.dtype)
    assert again.parameters_stored == student.parameters_stored
    assert (student.n_gates, student.parameters_stored) == stored_size(layout, neurons.gate, G)
    np.testing.assert_allclose(
        outputs_of(again, inputs), outputs_of(student, inputs), atol=1e-10 * np.abs(Z).max()
    )


def test_a_matrix_is_as_many_units_as_its_rank():
    layout = DenseLayout((40,), (10,))
    for units, expected in ((7, 7), (8, 8), (9, 9), (20, 10)):
        student = random_student(layout, gated=0, free=units)
        assert (student.linear_rank == 0) == (units > 7)
        assert len(student_neurons(student).neurons) == expected


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_features_are_the_modules_hidden_layer(layout):
    student = random_student(layout, free=0)
    hidden = []
    student.second.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    inputs = np.random.default_rng(1).standard_normal((7, *layout.input_shape))
    outputs_of(student, inputs)
    channels_last = hidden[0].movedim(1, -1) if isinstance(layout, ConvLayout) else hidden[0]
    X = layout.rows(inputs)[:]
    neurons, G, _ = student_neurons(student)
    H = hidden_features(GatedOperator(X, evaluate_gates(X, G)), neurons)
    np.testing.assert_allclose(H, channels_last.reshape(-1, 6).numpy(), atol=1e-12)


def noisy_targets(layout, student, n=300, noise=0.3, dtype=np.float64):
    """Inputs, and outputs of a student whose last gated units are switched off, with noise."""
    rng = np.random.default_rng(5)
    inputs = rng.standard_normal((n, *layout.input_shape)).astype(dtype)
    Y = outputs_of(student, inputs)
    return inputs, (Y + noise * rng.standard_normal(Y.shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_deployed_student_becomes_a_smaller_one(layout, dtype):
    big = random_student(layout, gated=12, free=3, dtype=dtype)
    neurons, G, b = student_neurons(big)
    W2 = neurons.W2 * np.where(np.arange(15) % 3 == 0, 3.0, 0.0)[:, None]
    planted = build_student(layout, neurons.W1, W2, neurons.gate, G, b, dtype=dtype).eval()
    numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
    inputs, outputs = noisy_targets(layout, planted, dtype=numpy_dtype)
    before = {name: tensor.clone() for name, tensor in big.state_dict().items()}
    result = cvxdistill.polish(big, torch.from_numpy(inputs), torch.from_numpy(outputs))
    small, after = result.network, result.polishing.after
    assert small is not big and small.dtype == dtype and not small.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in big.state_dict().items())
    assert small.parameters_stored == after.parameters < big.parameters_stored
    assert small.n_gates == after.n_gates
    assert result.polishing.before.parameters == big.parameters_stored
    assert result.polishing.before.n_neurons == 15 and after.n_neurons <= 15
    order = random_order(np.random.default_rng(0), 300)[:30]
    for student, point in ((big, result.polishing.before), (small, after)):
        Z, Y = outputs_of(student, inputs[order]), outputs[order]
        error = np.linalg.norm(Z - Y) / np.linalg.norm(Y)
        assert point.error == pytest.approx(error, rel=1e-4 if dtype == torch.float32 else 1e-9)
    best = cvxdistill.polish(big, inputs, outputs, max_neurons=5)
    np.testing.assert_array_equal(best.polishing.units, np.arange(0, 15, 3))


def test_rows_of_a_layout_do_as_well_as_inputs():
    layout = LAYOUTS["conv"]
    student = random_student(layout)
    inputs, outputs = noisy_targets(layout, student)
    held = noisy_targets(layout, student, n=40)
    direct = cvxdistill.polish(student, inputs, outputs, validation_data=held, max_neurons=4)
    X, Y = layout.rows(inputs), layout.targets(outputs)
    held = layout.rows(held[0])[:], layout.targets(held[1])
    for rows in (X, X[:]):
        other = cvxdistill.polish(student, rows, Y, validation_data=held, max_neurons=4)
        assert other.polishing.after == direct.polishing.after
    bare = X[:]
    bare[:, -1] = 0
    with pytest.raises(ValueError, match="last column of rows X must be ones"):
        cvxdistill.polish(student, bare, Y)


def test_bad_input_for_a_student_is_refused():
    student = random_student(LAYOUTS["dense"])
    X, Y = np.zeros((9, 5)), np.zeros((9, 3))
    with pytest.raises(ValueError, match="gates is for Neurons"):
        cvxdistill.polish(student, X, Y, gates=np.ones((5, 2)))
    with pytest.raises(ValueError, match=r"X must have shape \(N, 5\) or \(n, 6\)"):
        cvxdistill.polish(student, X[:, 1:], Y)
    with pytest.raises(ValueError, match=r"Y must have shape \(9, 3\), the block's outputs"):
        cvxdistill.polish(student, X, Y[:, 1:])
    with pytest.raises(TypeError, match="must be a GatedStudent or Neurons, got Linear"):
        cvxdistill.polish(nn.Linear(5, 3), X, Y)


class Net(nn.Module):
    """A block of one hidden layer, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
        self.body = nn.Sequential(nn.Linear(10, 60), nn.ReLU(), nn.Linear(60, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


OPTIONS = {"verbose": 0, "max_iter": 200, "n_gates": 8, "random_state": 0}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(1500, 6)


@pytest.fixture(scope="module")
def plain(net):
    return cvxdistill.distill(*(net[0], "body", net[1]), n_neurons=64, student="gated", **OPTIONS)


@pytest.fixture(scope="module")
def few(net):
    return cvxdistill.distill(
        *(net[0], "body", net[1]), n_neurons=64, student="gated", max_neurons=20, **POLISH,
        **OPTIONS,
    )  # fmt: skip


def test_distill_polishes_what_it_would_have_chosen(net, plain):
    result = cvxdistill.distill(net[0], "body", net[1], n_neurons=64, student="gated",
                                **POLISH, **OPTIONS)  # fmt: skip
    (polished,) = result.report.polished
    assert polished.before.parameters == plain.report.parameters
    assert polished.before.error == pytest.approx(plain.report.error, rel=1e-5)
    assert result.report.error <= plain.report.error * (1 + 1e-6)
    assert result.report.parameters <= plain.report.parameters
    assert result.report.chosen in (polished.before, polished.after)


def test_distill_without_a_size_is_never_worse_with_polishing(net):
    options = {**OPTIONS, "alpha": 1e-3}
    plain = cvxdistill.distill(net[0], "body", net[1], **options)
    result = cvxdistill.distill(net[0], "body", net[1], **POLISH, **options)
    assert result.report.error <= plain.report.error * (1 + 1e-6)
    assert result.report.parameters <= plain.report.parameters
    assert [c.kind for c in result.candidates[: len(plain.candidates)]] == [
        c.kind for c in plain.candidates
    ]


def test_distill_to_a_number_of_neurons(net, plain, few):
    report = few.report
    assert report.chosen.kind == "gated, polished"
    assert report.chosen.n_neurons <= 20 < plain.report.chosen.n_neurons
    assert report.parameters < plain.report.parameters
    (polished,) = report.polished
    assert polished.changed and polished.after is report.chosen is few.candidates[-1]
    assert polished.after.n_neurons == polished.polishing.after.n_neurons
    text = str(report)
    assert f"Polished, gated: {polished.polishing.before.n_neurons} -> " in text
    assert f"held-out error {polished.before.error:.4f} -> {report.error:.4f}" in text
    assert "*  gated, polished" in text
    assert report.to_frame()["kind"].tolist() == [c.kind for c in few.candidates]
    assert "polish" in report.seconds


def test_the_polished_module_has_the_numbers_of_the_report(net, few):
    model, X = net
    captured = capture(model, "body", X, verbose=0)
    held_out = np.sort(random_order(np.random.default_rng(0), 1500)[:150])
    Y = captured.outputs[held_out]
    Z = outputs_of(few.student, captured.inputs[held_out])
    error = np.linalg.norm(Z - Y) / np.linalg.norm(Y)
    assert few.report.error == pytest.approx(error, rel=1e-4)
    assert few.report.polished[0].polishing.after.error == pytest.approx(error, rel=1e-4)
    assert few.report.parameters == sum(t.numel() for t in few.student.state_dict().values())
    assert few.model.body is few.student


def test_a_polished_student_is_saved_and_loaded(few, tmp_path):
    few.save(tmp_path / "student.safetensors")
    loaded = cvxdistill.load_student(tmp_path / "student.safetensors")
    z = np.random.default_rng(0).standard_normal((7, 10)).astype(np.float32)
    np.testing.assert_array_equal(outputs_of(loaded, z), outputs_of(few.student, z))


def test_linear_students_are_polished_too(net):
    result = cvxdistill.distill(net[0], "body", net[1], student="linear", max_neurons=3,
                                **POLISH, **OPTIONS)  # fmt: skip
    assert result.report.chosen.n_neurons <= 3
    assert any(c.kind == "linear, polished" for c in result.candidates)


def test_streamed_rows_give_the_same_polished_student(net):
    options = {"student": "linear", "max_neurons": 3, **POLISH, **OPTIONS}
    held = cvxdistill.distill(net[0], "body", net[1], **options)
    streamed = cvxdistill.distill(net[0], "body", net[1], memory_limit=0, **options)
    assert streamed.report.chosen.n_neurons == held.report.chosen.n_neurons
    assert streamed.report.error == pytest.approx(held.report.error, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"polish": "lasso"}, "polish must be one of"),
        ({"max_neurons": 3}, "max_neurons is for polishing"),
        ({"max_neurons": 0, **POLISH}, "max_neurons must be a positive integer"),
    ],
)
def test_bad_options_of_distill_are_refused(net, changes, message):
    with pytest.raises(ValueError, match=message):
        cvxdistill.distill(net[0], "body", net[1], verbose=0, **changes)
