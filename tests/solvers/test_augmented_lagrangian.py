"""The augmented Lagrangian method against cvxpy with Clarabel, and its parts written out."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cvxdistill.solvers.augmented_lagrangian import AugmentedLagrangian
from cvxdistill.solvers.augmented_subproblem import Subproblem, row_scale
from cvxdistill.solvers.relu_problem import ReLUProblem

SMALL = {"n": 20, "d": 3, "p": 5}
CASES = [
    *itertools.product(("neuron", "gate"), (1, 2), (False, True), (1.0, 0.5), ("squared",)),
    *itertools.product(("nuclear", "feature", "l1"), (2,), (True,), (0.5,), ("squared",)),
    *itertools.product(("neuron",), (2,), (True,), (1.0,), ("huber", "multinomial")),
    *itertools.product(("gate",), (1,), (True,), (1.0,), ("logistic",)),
    ("l1", 2, False, 1.0, "squared"),
    ("ridge", 1, True, 1.0, "squared"),
]


@pytest.fixture(scope="session")
def make_relu(make_problem):
    return lambda **options: make_problem(programme=ReLUProblem, **{**SMALL, **options})


def scores(problem, V):
    """s_ij x_i . w / ||x_i|| for the columns w of V (2, p, d, c), of shape (2, p, n, c)."""
    X = problem.operator.X / np.linalg.norm(problem.operator.X, axis=1, keepdims=True)
    return (2 * problem.operator.D.T[:, :, None] - 1) * (X @ V)


def worst_cosine(problem, V):
    """The largest cosine on the wrong side of a row, over all columns that are not zero."""
    lengths = np.linalg.norm(V, axis=2, keepdims=True)
    return -(scores(problem, V) / np.where(lengths > 0, lengths, 1)).min()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def solved(request, make_relu, solve_with_cvxpy):
    penalty, c, fit_intercept, l1_ratio, loss = request.param
    options = {"penalty": penalty, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    problem = make_relu(c=c, seed=c, loss=loss, **options)
    alpha = 0.05 if penalty == "ridge" else 0.1 * problem.alpha_max()
    solution = AugmentedLagrangian(tol=1e-6, check_every=20).solve(problem, alpha)
    X, D = problem.operator.X, problem.operator.D
    best, _ = solve_with_cvxpy(X, problem.Y, D, alpha, loss=loss, relu=True, **options)
    return problem, solution, best, alpha


def test_the_network_is_as_good_as_that_of_cvxpy(solved):
    problem, solution, best, alpha = solved
    V, X = solution.V, problem.operator.X
    network = np.maximum(X @ V[0], 0).sum(axis=0) - np.maximum(X @ V[1], 0).sum(axis=0)
    value = problem.loss.value(network + solution.intercept)
    value += alpha * problem.regularizer.value(V.reshape(-1, *V.shape[2:]))
    assert solution.converged
    assert value == pytest.approx(best, rel=2e-6)
    assert solution.objective == pytest.approx(value, rel=1e-10)


def test_weights_lie_in_their_cones_and_the_violation_reported_is_the_true_one(solved):
    problem, solution, _, _ = solved
    worst = max(worst_cosine(problem, solution.V), 0.0)
    assert solution.violation < 1e-10 and worst < 1e-10
    assert solution.violation == pytest.approx(worst, abs=1e-14)
    assert solution.trace.violation.max() > 1e-3  # the method itself moves outside


def test_duality_gap_bounds_the_error_all_along_the_solve(solved):
    _, solution, best, _ = solved
    errors = solution.trace.objective - best
    assert len(solution.trace) >= 3 and errors[0] > 1e-3 * best
    assert np.all(solution.trace.gap * solution.trace.objective >= errors - 1e-7 * best)


def test_without_a_penalty_it_stops_at_a_kkt_point(make_relu, solve_with_cvxpy):
    problem = make_relu(n=40, p=3, penalty="none", fit_intercept=True)
    solution = AugmentedLagrangian(tol=1e-6).solve(problem, 1.0)
    X, D = problem.operator.X, problem.operator.D
    options = {"penalty": "none", "fit_intercept": True, "relu": True}
    best, _ = solve_with_cvxpy(X, problem.Y, D, 1.0, **options)
    assert solution.converged and np.isinf(solution.duality_gap)
    assert solution.kkt_residual <= 1e-6
    assert solution.objective == pytest.approx(best, rel=1e-4)


def test_sample_weights_scaled_features_and_row_sources_are_seen(
    make_relu, rows_only, solve_with_cvxpy
):
    rng = np.random.default_rng(0)
    plain = make_relu(c=2)
    X, D, w = plain.operator.X * np.array([1.0, 30.0, 0.1]), plain.operator.D, rng.random(20) + 0.1
    norms = np.linalg.norm(X, axis=0)
    options = {"fit_intercept": True, "sample_weight": w}
    problem = ReLUProblem(X, plain.Y, D, normalize=True, **options)
    alpha = 0.1 * problem.alpha_max()
    best, _ = solve_with_cvxpy(X / norms, plain.Y, D, alpha, relu=True, **options)
    solver = AugmentedLagrangian(tol=1e-6)
    solution = solver.solve(problem, alpha)
    assert solution.converged
    assert solution.objective == pytest.approx(best, rel=2e-6)
    from_rows = ReLUProblem(rows_only(X), plain.Y, D, normalize=True, **options)
    assert solver.solve(from_rows, alpha).objective == pytest.approx(best, rel=2e-6)


def test_in_float32_it_gets_to_the_precision_of_float32(make_relu, solve_with_cvxpy):
    problem = make_relu(dtype=np.float32, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solution = AugmentedLagrangian(tol=1e-4).solve(problem, alpha)
    X, Y = problem.operator.X.astype(float), problem.Y.astype(float)
    best, _ = solve_with_cvxpy(X, Y, problem.operator.D, alpha, fit_intercept=True, relu=True)
    errors = solution.trace.objective - best
    assert solution.V.dtype == np.float32 and solution.converged
    assert np.all(solution.trace.gap * solution.trace.objective >= errors - 1e-6 * best)
    assert worst_cosine(problem, solution.V.astype(float)) < 1e-6


def test_at_alpha_max_nothing_is_active(make_relu):
    problem = make_relu(fit_intercept=True)
    solution = AugmentedLagrangian().solve(problem, 1.001 * problem.alpha_max())
    assert solution.converged and not solution.V.any()


def test_a_warm_start_from_the_solution_is_quicker_than_a_cold_one(make_relu):
    problem = make_relu(fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solver = AugmentedLagrangian(tol=1e-6, check_every=10)
    cold = solver.solve(problem, alpha)
    warm = solver.solve(problem, alpha, warm_start=cold)
    near = solver.solve(problem, 0.9 * alpha, warm_start=cold)
    far = solver.solve(problem, 0.9 * alpha)
    assert warm.converged and near.converged
    assert warm.n_iter < cold.n_iter / 5 and near.n_iter < far.n_iter
    assert near.objective == pytest.approx(far.objective, rel=1e-5)


def test_it_keeps_the_time_limit_and_says_nothing(make_relu, capfd):
    problem = make_relu(n=200, d=10, p=30)
    solver = AugmentedLagrangian(tol=0, max_iter=10**9, time_limit=0.3)
    solution = solver.solve(problem, 0.01 * problem.alpha_max())
    assert solution.status == "time limit" and solution.seconds < 5
    assert solution.violation < 1e-10 and np.isfinite(solution.relative_gap)
    assert capfd.readouterr() == ("", "")


def test_what_it_cannot_do_is_refused(make_problem, make_relu):
    gated = make_problem()
    with pytest.raises(ValueError, match=r"AugmentedLagrangian solves.*GatedReLUProblem.*RFISTA"):
        AugmentedLagrangian().solve(gated, 0.1)
    with pytest.raises(ValueError, match="accuracy must be positive and finite, got 0"):
        AugmentedLagrangian(accuracy=0)
    with pytest.raises(ValueError, match="tol"):
        AugmentedLagrangian(tol=-1.0)


@pytest.mark.parametrize("loss", ["squared", "huber", "multinomial", "logistic"])
@pytest.mark.parametrize("options", [{}, {"fit_intercept": True}, {"normalize": True}])
def test_the_subproblem_is_the_loss_plus_the_penalty_of_the_scores(make_relu, loss, options):
    """The gradient by finite differences, the Bregman distance from values, both written out."""
    problem = make_relu(c=1 if loss == "logistic" else 2, loss=loss, **options)
    A, c = problem.operator, problem.n_outputs
    rng = np.random.default_rng(0)
    blocks, delta = np.array([0, 2, A.p + 1, A.p + 3]), 0.7
    columns = (blocks[:, None] * c + np.arange(c)).ravel()
    Lambda = rng.random((A.n, 2 * A.p * c)) * (rng.random((A.n, 2 * A.p * c)) < 0.5)
    subproblem = Subproblem(problem, 0.1, blocks, row_scale(problem), delta, Lambda[:, columns])
    scaled = A.X if A.scale is None else A.X / A.scale
    unit = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)

    def objective(W):
        V = np.zeros((2 * A.p, A.d, c))
        V[blocks] = W
        signs = 2 * A.D.T[blocks % A.p, :, None] - 1
        T = (signs * (unit @ W)).transpose(1, 0, 2).reshape(A.n, -1)
        hinge = np.maximum(Lambda[:, columns] / delta - T, 0)
        Z = problem.forward(V)
        return problem.loss.value(Z + problem.intercept(Z)) + delta / 2 * (hinge**2).sum()

    W, W_new = rng.standard_normal((2, len(blocks), A.d, c))
    P, P_new = subproblem.forward(W), subproblem.forward(W_new)
    C = subproblem.adjoint(subproblem.residual(P))
    step = rng.standard_normal(W.shape)
    slope = (objective(W + 1e-6 * step) - objective(W - 1e-6 * step)) / 2e-6
    assert -np.sum(C * step) == pytest.approx(slope, rel=1e-6)
    expected = objective(W_new) - objective(W) + np.sum(C * (W_new - W))
    assert subproblem.bregman(P_new, P) == pytest.approx(expected, rel=1e-9)
    assert subproblem.curved.sum() == pytest.approx(expected, rel=1e-9)
    new, moved = subproblem.next_multipliers(P)
    shares = subproblem.multipliers_share(P)
    weights = np.zeros((2 * A.p, A.d, c))
    weights[blocks] = W_new
    T_new = A.margins(weights)[:, columns] / np.linalg.norm(scaled, axis=1)[:, None]
    assert np.sum(shares * W_new) == pytest.approx(np.sum(new * T_new), rel=1e-10)
    assert moved == pytest.approx(np.sum((new - Lambda[:, columns]) ** 2), rel=1e-12)
    assert (new >= 0).all()
