"""distill with the nuclear penalty: from streamed sums, and fitted to what follows a block."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import (  # noqa: E402
    ConvLayout,
    DenseLayout,
    Examples,
    find_following,
    find_span,
    infer_layout,
    load_student,
)
from cvxdistill.solvers import (  # noqa: E402
    RFISTA,
    GatedReLUProblem,
    GatedStatistics,
    LowRankNewton,
    LowRankProblem,
)
from cvxdistill.solvers.random_order import random_order  # noqa: E402
from cvxdistill.streamed_block import stream  # noqa: E402

N = 120
ALPHA = 0.02


def block(*layers: nn.Module) -> nn.Sequential:
    """With numbers to spare, so that students are smaller."""
    made = nn.Sequential(*layers)
    made.register_parameter("ballast", nn.Parameter(torch.zeros(20_000)))
    return made


def dense() -> nn.Module:
    torch.manual_seed(0)
    body = block(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    stem = nn.Sequential(nn.Linear(6, 5), nn.Tanh())
    return nn.Sequential(OrderedDict(stem=stem, body=body, fc=nn.Linear(4, 6))).eval()


def conv() -> nn.Module:
    torch.manual_seed(0)
    body = block(nn.Conv2d(2, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    stem = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh())
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    ends = {"norm": norm, "pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(OrderedDict(stem=stem, body=body, **ends, fc=nn.Linear(4, 3))).eval()


def tokens() -> nn.Module:
    torch.manual_seed(0)
    body = block(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(OrderedDict(stem=nn.Linear(6, 5), body=body, fc=nn.Linear(4, 3))).eval()


CASES = {
    "dense": (dense, torch.randn(N, 6, generator=torch.Generator().manual_seed(1))),
    "conv": (conv, torch.randn(N, 1, 6, 6, generator=torch.Generator().manual_seed(2))),
    "tokens": (tokens, torch.randn(N, 7, 6, generator=torch.Generator().manual_seed(3))),
}
LAYOUTS = {
    "dense": DenseLayout((5,), (4,)),
    "conv": ConvLayout((2, 6, 6), (4, 3, 3), (3, 3), (2, 2), (1, 1)),
    "tokens": DenseLayout((5,), (4,), per_position=True),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> tuple[str, nn.Module, torch.Tensor]:
    build, data = CASES[request.param]
    return request.param, build(), data


def distill(model: nn.Module, data: Any, **options: Any) -> cvxdistill.Distillation:
    settings = {"penalty": "nuclear", "verbose": 0, "alpha": ALPHA, "gates": "gaussian"} | options
    return cvxdistill.distill(model, "body", data, **settings)


def fitted_examples(count: int = N, fraction: float = 0.1) -> np.ndarray:
    return random_order(np.random.default_rng(0), count) >= round(fraction * count)


def recorded(model: nn.Module, data: torch.Tensor, name: str = "body") -> tuple[Any, Any]:
    """By hooks of our own: what the body takes, and what this module gives."""
    found = {}
    handles = [
        model.body.register_forward_pre_hook(lambda _, args: found.update(given=args[0].clone())),
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output: found.update(made=output.clone())
        ),
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found["given"], found["made"]


def matrices(kind: str, given: torch.Tensor, made: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a constant one, and targets, by torch."""
    if kind == "conv":
        patches = nn.functional.unfold(given, 3, stride=2, padding=1)
        X, Y = patches.transpose(1, 2).flatten(0, 1), made.flatten(2).transpose(1, 2).flatten(0, 1)
    else:
        X, Y = given.reshape(-1, given.shape[-1]), made.reshape(-1, made.shape[-1])
    return np.hstack([X.numpy(), np.ones((len(X), 1), np.float32)]), Y.numpy()


def gates(kind: str, p: int = 4) -> np.ndarray:
    d = {"dense": 6, "conv": 19, "tokens": 6}[kind]
    return np.random.default_rng(5).standard_normal((d, p)).astype(np.float32)


def patterns(X: np.ndarray, G: np.ndarray) -> np.ndarray:
    """The gate that is always on, and these."""
    return np.hstack([np.ones((len(X), 1), bool), X @ G >= 0])


def fitted_rows(case, G: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind, model, data = case
    given, made = recorded(model, data[fitted_examples()])
    X, Y = matrices(kind, given, made)
    return X, Y, patterns(X, G)


@pytest.mark.parametrize("student", ["linear", "gated"])
def test_without_refit_the_student_gives_the_solvers_prediction(case, student):
    kind, model, data = case
    G = gates(kind)
    options = {"tol": 1e-6, "max_iter": 200}
    result = distill(
        model, data, student=student, gates=G, refit=False, n_neurons=64, max_rows=None, **options
    )
    X, Y, D = fitted_rows(case, G)
    D = D[:, :1] if student == "linear" else D
    problem = LowRankProblem(GatedStatistics.from_data(X, Y, D))
    solution = LowRankNewton(max_neurons=64, **options).solve(problem, ALPHA)
    assert result.report.chosen.kind == student and result.report.rows == len(X)
    units = solution.neurons
    prediction = (D[:, units.gate] * (X @ units.W1)) @ units.W2 + solution.intercept
    given, _ = recorded(model, data[fitted_examples()])
    with torch.no_grad():
        got = matrices(kind, given, result.student(given))[1]
    np.testing.assert_allclose(got, prediction, atol=1e-5)
    assert result.report.duality_gap == pytest.approx(solution.relative_gap, abs=1e-6)
    assert result.report.duality_gap <= 1e-6


def test_the_gap_is_within_tol_of_the_optimum_by_proximal_gradients(case):
    kind, model, data = case
    G = gates(kind)
    tol = 1e-4
    result = distill(
        model, data, student="gated", gates=G, refit=False, n_neurons=64, max_rows=None, tol=tol
    )
    X, Y, D = fitted_rows(case, G)
    problem = GatedReLUProblem(
        X.astype(float), Y.astype(float), D, penalty="nuclear", fit_intercept=True
    )
    solution = RFISTA(tol=1e-6, max_iter=3000).solve(problem, ALPHA)
    best = solution.objective
    assert result.report.duality_gap <= tol
    ours = LowRankProblem(GatedStatistics.from_data(X, Y, D))
    ours = LowRankNewton(tol=tol, max_neurons=64).solve(ours, ALPHA)
    assert best * (1 - 2e-6) <= ours.objective <= best * (1 + tol + 2e-6)
    given, _ = recorded(model, data[fitted_examples()])
    with torch.no_grad():
        got = matrices(kind, given, result.student(given))[1]
    # The loss is strongly convex in the prediction: it is as near as the gap says.
    far = got - problem.predict(solution.V, solution.intercept)
    assert (far**2).sum() / (2 * len(X)) <= (tol + 2e-6) * best


def test_streamed_sums_are_those_of_recorded_activations(case):
    kind, model, data = case
    G = np.hstack([np.zeros((len(gates(kind)), 1), np.float32), gates(kind)])
    rng = np.random.default_rng(0)
    examples = Examples(data, model, batch_size=17, max_examples=None, mask="auto", rng=rng)
    given, _ = recorded(model, data[~fitted_examples()])
    held_out = matrices("tokens", given, given)[1] if kind == "tokens" else given.numpy()
    span = find_span(model, "body", data[:2])
    block = stream(
        model, examples, span, LAYOUTS[kind], None, G, (held_out, held_out), 0.1, None, rng, 0
    )
    X, Y, D = fitted_rows(case, gates(kind))
    A = (D[:, :, None] * X[:, None, :].astype(float)).reshape(len(X), -1)
    sums, Y = block.statistics, Y.astype(float)
    assert sums.n == len(X)
    np.testing.assert_allclose(sums.gram, A.T @ A, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sums.cross.reshape(A.shape[1], -1), A.T @ Y, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sums.feature_sums.ravel(), A.sum(axis=0), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sums.target_sums, Y.sum(axis=0), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(sums.target_squares, (Y**2).sum(axis=0), rtol=1e-5)
    linear = block.linear_statistics
    np.testing.assert_array_equal(linear.gram, sums.gram[: linear.d, : linear.d])
    assert linear.p == 1 and linear.n == sums.n


def pooled_features(given: torch.Tensor, G: np.ndarray) -> np.ndarray:
    """Averages over the positions of gated patches (N, p, d), from their definition."""
    X, _ = matrices("conv", given, given)
    A = patterns(X, G)[:, :, None] * X[:, None, :].astype(float)
    return A.reshape(len(given), -1, *A.shape[1:]).mean(axis=1)


@pytest.mark.parametrize("name", ["pool", "fc"])
def test_streamed_sums_are_pooled_where_the_network_pools_later(name):
    build, data = CASES["conv"]
    model, G = build(), gates("conv")
    rng = np.random.default_rng(0)
    examples = Examples(data, model, batch_size=17, max_examples=None, mask="auto", rng=rng)
    following = find_following(model, "body", f"after:{name}", data[:2])
    span = find_span(model, "body", data[:2])
    given, _ = recorded(model, data[~fitted_examples()])
    every = np.hstack([np.zeros((19, 1), np.float32), G])
    held_out = (given.numpy(), given.numpy())
    block = stream(
        model, examples, span, LAYOUTS["conv"], following, every, held_out, 0.1, None, rng, 0
    )
    given, made = recorded(model, data[fitted_examples()], name)
    A = pooled_features(given, G).reshape(len(given), -1)
    Y = made.flatten(1).numpy().astype(float)
    assert block.statistics.n == len(given)
    np.testing.assert_allclose(block.statistics.gram, A.T @ A, rtol=1e-4, atol=1e-4)
    cross = block.statistics.cross.reshape(A.shape[1], -1)
    np.testing.assert_allclose(cross, A.T @ Y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(block.statistics.target_sums, Y.sum(axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["pool", "fc"])
def test_matched_students_minimise_the_error_after_pooling(name):
    cp = pytest.importorskip("cvxpy")
    build, data = CASES["conv"]
    model, G, tol = build(), gates("conv", 2), 1e-6
    result = distill(
        model, data, match=f"after:{name}", student="gated", gates=G, refit=False, n_neurons=64,
        tol=tol, max_rows=None, penalty=None,
    )  # fmt: skip
    given, made = recorded(model, data[fitted_examples()], name)
    A, Y = pooled_features(given, G), made.flatten(1).numpy().astype(float)
    V = [cp.Variable((A.shape[2], Y.shape[1])) for _ in range(A.shape[1])]
    b = cp.Variable((1, Y.shape[1]))
    Z = sum(A[:, j] @ V[j] for j in range(len(V))) + np.ones((len(Y), 1)) @ b
    objective = cp.sum_squares(Z - Y) / (2 * len(Y)) + ALPHA * sum(cp.normNuc(v) for v in V)
    best = cp.Problem(cp.Minimize(objective)).solve(solver=cp.CLARABEL)
    with torch.no_grad():
        got = recorded(result.model, data[fitted_examples()], name)[1].flatten(1).numpy()
    assert result.report.match == f"after:{name}" and result.report.rows == len(Y)
    assert result.report.duality_gap <= tol
    assert ((got - Z.value) ** 2).sum() / (2 * len(Y)) <= 2 * tol * best + 1e-8
    # A map that is no inverse: the pooled error is small, that of the positions is not.
    assert ((Z.value - Y) ** 2).sum() > 0


@pytest.mark.parametrize(("kind", "name"), [("conv", "fc"), ("conv", "norm"), ("dense", "fc")])
@pytest.mark.parametrize("refit", [True, False])
def test_the_error_is_that_after_the_module_on_held_out_examples(kind, name, refit):
    build, data = CASES[kind]
    model = build()
    result = distill(
        model, data, match=f"after:{name}", refit=refit, n_gates=4, n_neurons=8, penalty=None
    )
    wanted, got = (
        recorded(m, data[~fitted_examples()], name)[1].numpy() for m in (model, result.model)
    )
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    assert result.report.error == pytest.approx(error, rel=1e-4)
    assert result.report.held_out == 12 and result.report.examples == N
    assert f"after:{name}" in str(result.report)


def test_refitted_second_layers_are_least_squares_after_pooling():
    build, data = CASES["conv"]
    model = build()
    result = distill(
        model, data, match="after:fc", student="linear", n_neurons=3, penalty=None, max_rows=None
    )
    given, made = recorded(model, data[fitted_examples()], "fc")
    A, Y = pooled_features(given, gates("conv", 1))[:, 0], made.numpy().astype(float)
    got = recorded(result.model, data[fitted_examples()], "fc")[1].numpy().astype(float)
    # The hidden units span what the student gives: nothing of the residual is left along it.
    residual = Y - got
    np.testing.assert_allclose(residual.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose((got - got.mean(axis=0)).T @ residual / len(Y), 0, atol=1e-4)
    assert np.linalg.matrix_rank(got - got.mean(axis=0), tol=1e-3) <= 3
    assert np.linalg.norm(A @ np.linalg.lstsq(A, got, rcond=None)[0] - got) < 1e-3


def test_matching_what_follows_is_better_there_than_matching_the_outputs():
    model = dense()
    model.body = block(nn.Linear(5, 4))
    # Two of four outputs are loud and thrown away.
    model.body[0].weight.data[:2] *= 30
    model.fc.weight.data[:, :2] = 0
    data = CASES["dense"][1]
    errors = {}
    for match in ("outputs", "after:fc"):
        result = distill(model, data, match=match, student="linear", n_neurons=2, alpha=1e-5)
        wanted, got = (recorded(m, data, "fc")[1] for m in (model, result.model))
        errors[match] = float((got - wanted).norm() / (wanted - wanted.mean(0)).norm())
    assert errors["after:fc"] < 0.01 and errors["outputs"] > 0.3


def test_held_out_examples_are_not_fitted(case):
    kind, model, data = case
    changed = data.clone()
    changed[~fitted_examples()] = 3 * torch.randn_like(changed[~fitted_examples()])
    options = {"gates": gates(kind), "n_neurons": 6, "batch_size": 13}
    first, second = (distill(model, part, **options) for part in (data, changed))
    assert len(first.candidates) == len(second.candidates) > 1
    for a, b in zip(first.candidates, second.candidates, strict=True):
        mine, other = a.student.state_dict(), b.student.state_dict()
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert first.report.error != second.report.error
    # The fitted ones are.
    changed = data.clone()
    changed[fitted_examples()] *= 2
    third = distill(model, changed, **options)
    given, _ = recorded(model, data[:20])
    with torch.no_grad():
        mine, other = (r.candidates[0].student(given) for r in (first, third))
    assert not torch.allclose(mine, other, atol=1e-3)


@pytest.mark.parametrize("match", ["outputs", "after:fc"])
def test_students_are_saved_and_loaded(case, match, tmp_path):
    kind, model, data = case
    if kind == "tokens" and match != "outputs":
        with pytest.raises(ValueError, match="after:fc"):
            distill(model, data, match=match)
        return
    result = distill(model, data, match=match, n_gates=4, n_neurons=6)
    result.save(tmp_path / "student.safetensors")
    loaded = load_student(tmp_path / "student.safetensors")
    given, _ = recorded(model, data)
    with torch.no_grad():
        assert torch.equal(loaded(given), result.student(given))
    assert result.model.body is result.student
    assert result.report.parameters == result.student.parameters_stored


@pytest.mark.parametrize("most", [None, 20, 333])
def test_rows_are_sampled_up_to_max_rows(case, most):
    kind, model, data = case
    result = distill(model, data, student="linear", max_rows=most, n_neurons=4, batch_size=19)
    available = {"dense": 1, "conv": 9, "tokens": 7}[kind] * 108
    wanted = available if most is None else min(most, available)
    assert result.report.rows == wanted
    assert ("sampled" in str(result.report)) == (wanted < result.report.available_rows)


def test_long_sequences_have_more_held_out_tokens_than_there_are_examples():
    data = torch.randn(12, 90, 6, generator=torch.Generator().manual_seed(0))
    result = distill(tokens(), data, student="linear", n_neurons=4)
    assert result.report.rows == 11 * 90 and result.report.held_out == 1
    result = distill(tokens(), data, student="linear", n_neurons=4, max_rows=500, batch_size=2)
    assert result.report.rows == 500


def test_masked_tokens_are_neither_fitted_nor_held_out():
    data = CASES["tokens"][1]
    keep = np.arange(7)[None] < np.random.default_rng(0).integers(1, 8, (N, 1))
    noise = data.clone()
    noise[~torch.from_numpy(keep)] = 100.0
    results = [distill(tokens(), d, mask=keep, n_gates=3, n_neurons=5) for d in (data, noise)]
    first, second = results
    assert first.report.rows == second.report.rows == keep[fitted_examples()].sum()
    assert first.report.error == second.report.error
    for name, tensor in first.student.state_dict().items():
        assert torch.equal(tensor, second.student.state_dict()[name])


def test_a_path_of_alphas_gives_the_best_of_each_size(case):
    kind, model, data = case
    result = distill(model, data, gates=gates(kind), alpha=None)
    for kind in ("linear", "gated"):
        found = [c for c in result.candidates if c.kind == kind]
        assert len({c.n_neurons for c in found}) == len(found) > 1
        assert len({c.alpha for c in found}) >= 1
    # 10 ** -3 of the largest alpha at least: hardly any penalty.
    assert result.report.error < 0.3
    assert str(result.report) and result.report.to_frame()["chosen"].sum() == 1


def test_the_model_is_left_as_it_was(case):
    _, model, data = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    distill(model, data, n_gates=3, n_neurons=3)
    with pytest.raises(ValueError):
        distill(model, data, memory_limit=1)
    assert all(module.training for module in model.modules())
    model.eval()
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sums_that_do_not_fit_are_refused_with_the_most_that_would():
    build, data = CASES["conv"]
    # 5 gates and the one that is always on, of 19 features, in float64.
    needed = (6 * 19) ** 2 * 8
    with pytest.raises(ValueError, match=r"at most n_gates=4 fit"):
        distill(build(), data, n_gates=5, memory_limit=needed - 1)
    result = distill(build(), data, n_gates=5, memory_limit=needed, n_neurons=2)
    assert result.report.rows
    with pytest.raises(ValueError, match=r"raise it"):
        distill(build(), data, n_gates=5, memory_limit=100)
    distill(build(), data, student="linear", memory_limit=19**2 * 8, n_neurons=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"polish": "group_elastic_net"}, ValueError, "has no polish"),
        ({"l1_ratio": 0.5}, ValueError, "l1_ratio"),
        ({"match": "after:fc", "penalty": "gate"}, ValueError, "goes with penalty='nuclear'"),
        ({"match": 3}, TypeError, "match must be"),
        ({"match": "fc"}, ValueError, "match must be .*'after:NAME'"),
        ({"match": "after:nothing"}, ValueError, "names no module"),
        ({"match": "after:stem"}, ValueError, "runs before"),
        ({"kernel_size": 3}, ValueError, "kernel_size=3 is for blocks that map images"),
        ({"gates": np.ones((3, 2))}, ValueError, "gates must be finite and of shape"),
        ({"student": "round"}, ValueError, "student must be one of"),
        ({"alpha": -1.0}, ValueError, "alpha must be positive"),
        ({"max_examples": 1}, ValueError, "at least 2 examples"),
    ],
)
def test_what_has_no_meaning_is_refused(options, error, message):
    build, data = CASES["dense"]
    with pytest.raises(error, match=message):
        distill(build(), data, **options)


def test_data_that_are_not_finite_are_refused():
    build, data = CASES["dense"]
    for where in (fitted_examples(), ~fitted_examples()):
        spoiled = data.clone()
        spoiled[np.flatnonzero(where)[0]] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinity"):
            distill(build(), spoiled)


def test_layouts_are_those_of_the_block(case):
    kind, model, data = case
    result = distill(model, data, student="linear", n_neurons=2)
    assert result.report.layout == LAYOUTS[kind]
    given, made = recorded(model, data[:3])
    assert result.student(given).shape == made.shape
    if kind != "tokens":
        assert infer_layout(tuple(given.shape[1:]), tuple(made.shape[1:])) == LAYOUTS[kind]
