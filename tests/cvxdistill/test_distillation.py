"""distill: on small networks whose blocks a student can or cannot express."""

import copy
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import capture  # noqa: E402
from cvxdistill.solvers.random_order import random_order  # noqa: E402

QUIET = {"verbose": 0, "max_iter": 300}


class GatedBlock(nn.Module):
    """A block that is a gated ReLU network: three gates, each with its own linear map."""

    def __init__(self, d: int, c: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, 3)
        self.maps = nn.Parameter(torch.randn(3, d, c) / d**0.5)
        # Padding, so that students are smaller than the block.
        self.ballast = nn.Parameter(torch.zeros(5000))

    def forward(self, x):
        on = (self.gate(x) >= 0).to(x.dtype)
        return torch.einsum("ng,nd,gdc->nc", on, x, self.maps)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 12), nn.Tanh())
        self.body = GatedBlock(12, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x)))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 64, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 16, 1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return DenseNet().eval(), torch.randn(600, 6)


@pytest.fixture(scope="module")
def conv():
    torch.manual_seed(0)
    return ConvNet().eval(), torch.randn(200, 1, 8, 8)


def teacher_gates_of(block: GatedBlock) -> np.ndarray:
    weight, bias = block.gate.weight.detach().numpy(), block.gate.bias.detach().numpy()
    return np.vstack([weight.T, bias])


@pytest.fixture(scope="module")
def gated(dense):
    model, X = dense
    return cvxdistill.distill(
        model, "body", X, gates=teacher_gates_of(model.body), tol=1e-4, **QUIET
    )


def test_a_gated_block_is_recovered_from_its_own_gates(gated):
    assert gated.report.chosen.kind == "gated"
    assert gated.report.error < 0.04
    best_linear = min(c.error for c in gated.candidates if c.kind == "linear")
    assert best_linear > 5 * gated.report.error


def test_the_student_takes_the_blocks_place_and_the_model_is_left_alone(dense, gated):
    model, X = dense
    assert isinstance(model.body, GatedBlock)
    assert gated.model.body is gated.student
    with torch.no_grad():
        expected, got = model(X), gated.model(X)
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_inplace_changes_the_model_itself(dense):
    model = copy.deepcopy(dense[0])
    result = cvxdistill.distill(model, "body", dense[1], student="linear", inplace=True, verbose=0)
    assert result.model is model
    assert model.body is result.student


def test_without_refit_the_student_gives_the_convex_programmes_prediction(dense):
    model, X = dense
    G = teacher_gates_of(model.body)
    alpha = 1e-3
    result = cvxdistill.distill(
        model, "body", X, student="gated", gates=G, alpha=alpha, refit=False, n_neurons=100,
        tol=1e-6, max_rows=None, **QUIET,
    )  # fmt: skip
    from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns

    captured = capture(model, "body", X, verbose=0)
    order = random_order(np.random.default_rng(0), 600)
    fitted = np.sort(order[60:])
    rows = np.hstack([captured.inputs, np.ones((600, 1), np.float32)])[fitted]
    gates = np.hstack([np.zeros((13, 1)), G]).astype(np.float32)
    D, _ = activation_patterns(rows, gates)
    Y = captured.outputs[fitted]
    center = Y.mean(axis=0, dtype=float).astype(np.float32)
    problem = GatedReLUProblem(rows, Y - center, D, penalty="gate", fit_intercept=True)
    solution = RFISTA(tol=1e-6, max_iter=300, metric="plain").solve(problem, alpha)
    with torch.no_grad():
        got = result.student(torch.from_numpy(captured.inputs[fitted])).numpy()
    prediction = problem.predict(solution.V, solution.intercept) + center
    np.testing.assert_allclose(got, prediction, atol=1e-5)


def test_reported_error_and_parameters_are_those_of_the_student(dense, gated):
    model, X = dense
    captured = capture(model, "body", X, verbose=0)
    held_out = np.sort(random_order(np.random.default_rng(0), 600)[:60])
    with torch.no_grad():
        Z = gated.student(torch.from_numpy(captured.inputs[held_out])).numpy()
    Y = captured.outputs[held_out]
    assert gated.report.error == pytest.approx(np.linalg.norm(Z - Y) / np.linalg.norm(Y), rel=1e-4)
    stored = sum(t.numel() for t in gated.student.state_dict().values())
    assert gated.report.parameters == stored
    assert gated.report.model_parameters_after == sum(
        t.numel() for t in gated.model.state_dict().values()
    )


def test_auto_takes_the_smallest_student_within_two_percent_of_the_best(gated):
    best = min(c.error for c in gated.candidates)
    good = [c for c in gated.candidates if c.error <= 1.02 * best]
    assert gated.report.chosen is min(good, key=lambda c: c.parameters)
    assert len(gated.candidates) > 4


def test_convolutional_block_with_teacher_gates(conv):
    model, X = conv
    result = cvxdistill.distill(model, "body", X, n_gates=16, **QUIET)
    assert result.report.gate_source == "teacher"
    assert result.report.chosen.kind == "gated"
    linear = min(c.error for c in result.candidates if c.kind == "linear")
    assert result.report.error < linear
    with torch.no_grad():
        assert result.model(X).shape == (200, 5)
    text = str(result.report)
    assert "linear" in text and "gates: teacher" in text and "sampled" not in text


def test_rows_are_sampled_and_the_report_says_so(conv):
    model, X = conv
    result = cvxdistill.distill(model, "body", X, student="linear", max_rows=200, verbose=0)
    assert result.report.rows == 200
    assert result.report.available_rows == 180 * 16
    assert "200 rows of 2,880, sampled" in str(result.report)


def test_streamed_rows_give_the_same_student(conv):
    model, X = conv
    options = {"student": "linear", "verbose": 0, "n_neurons": 4}
    held = cvxdistill.distill(model, "body", X, **options)
    streamed = cvxdistill.distill(model, "body", X, memory_limit=0, **options)
    assert streamed.report.error == pytest.approx(held.report.error, rel=1e-4)


def test_labels_and_loaders_change_nothing(dense):
    model, X = dense
    options = {"student": "linear", "verbose": 0}
    direct = cvxdistill.distill(model, "body", X, **options)
    loader = [(X[i : i + 100], torch.zeros(100)) for i in range(0, 600, 100)]
    batched = cvxdistill.distill(model, "body", loader, **options)
    assert batched.report.error == pytest.approx(direct.report.error, rel=1e-5)


def test_same_seed_same_student(dense):
    model, X = dense
    first, second, other = (
        cvxdistill.distill(model, "body", X, student="gated", alpha=0.01, n_neurons=4,
                           gates="gaussian", n_gates=5, random_state=seed, **QUIET)
        for seed in (3, 3, 4)
    )  # fmt: skip
    state = first.student.state_dict()
    for name, tensor in second.student.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert first.report.error != other.report.error


def test_save_and_load_give_the_same_outputs(gated, tmp_path):
    gated.save(tmp_path / "student.safetensors")
    loaded = cvxdistill.load_student(tmp_path / "student.safetensors")
    z = torch.randn(7, 12)
    with torch.no_grad():
        assert torch.equal(loaded(z), gated.student(z))


def test_report_frame_has_a_row_for_each_candidate(gated):
    frame = gated.report.to_frame()
    assert len(frame) == len(gated.candidates)
    assert frame["chosen"].sum() == 1
    assert {"linear", "gated"} == set(frame["kind"])
    assert (frame["duality_gap"] < 0.01).all()


def test_silence_and_progress(conv, capsys):
    model, X = conv
    cvxdistill.distill(model, "body", X, alpha=0.1, n_gates=2, n_neurons=2, **QUIET)
    assert capsys.readouterr() == ("", "")
    cvxdistill.distill(model, "body", X, alpha=0.1, n_gates=2, n_neurons=2, max_iter=50)
    shown = capsys.readouterr().err
    assert "capture body" in shown and "RFISTA" in shown


def test_a_failing_call_leaves_the_model_as_it_was(conv):
    model, X = conv
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="kernel_size"):
        cvxdistill.distill(model, "body", X, kernel_size=2, stride=1, padding=0, inplace=True,
                           verbose=0)  # fmt: skip
    assert isinstance(model.body, nn.Sequential)
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


BAD = {
    "unknown block": ({"block": "bdy"}, ValueError, "body"),
    "student": ({"student": "quadratic"}, ValueError, "student must be one of"),
    "gates name": ({"gates": "sparse"}, ValueError, "gates must be"),
    "gates shape": ({"gates": np.ones((3, 2))}, ValueError, "gates must be finite and of shape"),
    "gates nan": ({"gates": np.full((13, 2), np.nan)}, ValueError, "gates must be finite"),
    "n_gates": ({"n_gates": 0}, ValueError, "n_gates must be a positive integer"),
    "n_neurons": ({"n_neurons": 2.5}, ValueError, "n_neurons must be a positive integer"),
    "max_rows": ({"max_rows": -1}, ValueError, "max_rows must be a positive integer"),
    "alpha": ({"alpha": 0.0}, ValueError, "alpha must be positive"),
    "alpha type": ({"alpha": "small"}, TypeError, "alpha must be a number"),
    "l1_ratio type": ({"l1_ratio": "half"}, TypeError, "l1_ratio must be a number"),
    "tol": ({"tol": 0.0}, ValueError, "tol must be positive"),
    "validation": ({"validation_fraction": 1.0}, ValueError, "validation_fraction must lie"),
    "penalty": ({"penalty": "lasso"}, ValueError, "penalty must be one of"),
    "l1_ratio": ({"l1_ratio": 2.0}, ValueError, "l1_ratio must lie"),
    "dense kernel": ({"kernel_size": 3}, ValueError, "kernel_size=3 is for blocks that map images"),
    "one example": ({"data": torch.zeros(1, 6)}, ValueError, "at least 2 examples"),
    "nan data": ({"data": torch.full((5, 6), torch.nan)}, ValueError, "NaN or inf"),
    "no data": ({"data": []}, ValueError, "no examples"),
    "model": ({"model": lambda x: x}, TypeError, "Module"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_a_message(dense, case):
    changes, error, message = case
    arguments = {"model": dense[0], "block": "body", "data": dense[1], "verbose": 0, **changes}
    with pytest.raises(error, match=message):
        cvxdistill.distill(
            arguments.pop("model"), arguments.pop("block"), arguments.pop("data"), **arguments
        )


def test_a_block_too_small_to_shrink_is_refused_with_the_smallest_possible(conv):
    model, X = conv
    with pytest.raises(ValueError, match=r"no student is smaller|No student is smaller.*takes"):
        cvxdistill.distill(model, "body.1", X, verbose=0)


def test_early_exit_computes_nothing_behind_the_block(dense):
    model, X = dense
    calls = itertools.count()

    class Counting(nn.Module):
        def forward(self, x):
            # The recording first walks the model without computing, on the meta device.
            if x.device.type != "meta":
                next(calls)
            return x

    watched = nn.Sequential(model.stem, model.body, Counting())
    cvxdistill.distill(watched, "1", X, student="linear", verbose=0)
    assert next(calls) == 0


class Stages(nn.Module):
    """Two strided stages, a pooling and a layer, which run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.stage1 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.relu = nn.ReLU(inplace=True)
        self.stage2 = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stage2(self.relu(self.stage1(self.stem(x))))
        return self.head(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    return Stages().eval(), torch.randn(200, 1, 12, 12)


@pytest.mark.parametrize(
    ("block", "between", "shapes"),
    [
        ("stage1:stage2", ("relu",), ((8, 12, 12), (32, 3, 3))),
        ("stage2:head", ("pool",), ((16, 6, 6), (5,))),
    ],
)
def test_a_span_is_distilled_into_one_student(stages, block, between, shapes):
    model, X = stages
    before = copy.deepcopy(model.state_dict())
    result = cvxdistill.distill(model, block, X, n_neurons=4, n_gates=8, alpha=1e-2, **QUIET)
    assert result.span.between == between and result.report.block == block
    assert (result.student.layout.input_shape, result.student.layout.output_shape) == shapes
    replaced = [getattr(model, name) for name in result.span.names]
    assert result.report.block_parameters == sum(
        p.numel() for m in replaced for p in m.parameters()
    )
    assert getattr(result.model, result.span.first) is result.student
    stored = sum(p.numel() for p in result.model.parameters()) + sum(
        b.numel() for name, b in result.model.named_buffers() if name.endswith("gate_index")
    )
    assert result.report.model_parameters_after == stored
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    with torch.no_grad():
        error = (result.model(X) - model(X)).norm() / model(X).norm()
    assert error < 0.5
    changed = copy.deepcopy(model)
    again = cvxdistill.distill(
        changed, block, X, n_neurons=4, n_gates=8, alpha=1e-2, inplace=True, **QUIET
    )
    assert again.model is changed
    with torch.no_grad():
        torch.testing.assert_close(changed(X), result.model(X))


def test_a_strided_span_takes_its_gates_from_its_first_layer(stages):
    model, X = stages
    result = cvxdistill.distill(
        model, "stage1:stage2", X, n_neurons=2, n_gates=4, alpha=1e-2, kernel_size=7, **QUIET
    )
    assert result.report.gate_source == "teacher"


def test_a_span_that_is_none_is_refused(stages):
    model, X = stages
    with pytest.raises(ValueError, match="'stage2' runs before 'pool': write 'stage2:pool'"):
        cvxdistill.distill(model, "pool:stage2", X, verbose=0)


def test_the_model_with_a_students_span_exports(stages):
    model, X = stages
    result = cvxdistill.distill(
        model, "stage1:stage2", X, n_neurons=2, n_gates=4, alpha=1e-2, **QUIET
    )
    exported = torch.export.export(result.model.eval(), (X[:4],)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(X[:4]), result.model(X[:4]))
