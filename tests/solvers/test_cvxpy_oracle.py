"""R-FISTA and its duality gaps against cvxpy with Clarabel, an interior-point solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem

cp = pytest.importorskip("cvxpy")

SHAPES = {"tall": (30, 4, 8), "wide": (6, 9, 5)}  # n, d, p
CASES = [
    *itertools.product(("neuron", "gate"), (1, 3), SHAPES, (False, True), (1.0, 0.5)),
    *itertools.product(("ridge",), (1, 3), SHAPES, (False, True), (1.0,)),
    *itertools.product(("nuclear", "feature", "l1"), (3,), SHAPES, (False, True), (0.5,)),
]


def objective(A, Y, V, b, penalty, l1_ratio, alpha):
    """P(V, b), written out."""
    p, d, c = V.shape
    Z = A @ V.reshape(p * d, c) + b
    norms = {
        "neuron": np.linalg.norm(V, axis=1).sum(),
        "gate": np.linalg.norm(V, axis=(1, 2)).sum(),
        "nuclear": np.linalg.norm(V, "nuc", axis=(1, 2)).sum(),
        "feature": np.linalg.norm(V, axis=(0, 2)).sum(),
        "l1": np.abs(V).sum(),
        "ridge": 0.5 * (V**2).sum(),
    }
    blend = l1_ratio * norms[penalty] + (1 - l1_ratio) / 2 * (V**2).sum()
    return ((Z - Y) ** 2).sum() / (2 * len(Y)) + alpha * blend


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def solved(request, gated_matrix, make_problem, solve_with_cvxpy):
    penalty, c, shape, fit_intercept, l1_ratio = request.param
    n, d, p = SHAPES[shape]
    options = {"penalty": penalty, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    problem = make_problem(n=n, d=d, p=p, c=c, seed=c, **options)
    alpha = 0.05 if penalty == "ridge" else 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-8, check_every=5).solve(problem, alpha)
    X, D = problem.operator.X, problem.operator.D
    best, _ = solve_with_cvxpy(X, problem.Y, D, alpha, **options)
    return problem, solution, gated_matrix(X, D), best, (penalty, l1_ratio, alpha)


def test_objective_equals_that_of_cvxpy(solved):
    problem, solution, A, best, terms = solved
    value = objective(A, problem.Y, solution.V, solution.intercept, *terms)
    assert solution.converged
    assert value == pytest.approx(best, rel=1e-6)
    assert solution.objective == pytest.approx(value, rel=1e-10)
    if not problem.fit_intercept:
        assert not solution.intercept.any()


def test_duality_gap_bounds_the_error_all_along_the_solve(solved):
    _, solution, _, best, _ = solved
    trace = solution.trace
    errors = trace.objective - best
    assert len(trace) >= 3
    # Clarabel's own error is below 1e-8 of the optimum.
    assert np.all(trace.gap * trace.objective >= errors - 1e-8 * best)
    assert errors[0] > 1e-3 * best  # so that the bound had something to bound
    assert solution.duality_gap >= solution.objective - best - 1e-8 * best


def test_duality_gap_in_float32_bounds_the_error_to_its_precision(make_problem, solve_with_cvxpy):
    problem = make_problem(dtype=np.float32, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-5).solve(problem, alpha)
    X, Y = problem.operator.X.astype(float), problem.Y.astype(float)
    best, _ = solve_with_cvxpy(X, Y, problem.operator.D, alpha, fit_intercept=True)
    errors = solution.trace.objective - best
    assert solution.V.dtype == np.float32 and solution.converged
    assert np.all(solution.trace.gap * solution.trace.objective >= errors - 1e-6 * best)


def test_normalize_solves_the_problem_with_unit_columns_in_the_users_units(
    gated_matrix, make_problem, solve_with_cvxpy
):
    plain = make_problem(c=3)
    X = plain.operator.X * np.array([1.0, 5.0, 0.2, 1.0, 30.0])
    norms = np.linalg.norm(X, axis=0)
    problem = GatedReLUProblem(X, plain.Y, plain.operator.D, normalize=True, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-8).solve(problem, alpha)
    best, V = solve_with_cvxpy(X / norms, problem.Y, problem.operator.D, alpha, fit_intercept=True)
    assert solution.objective == pytest.approx(best, rel=1e-6)
    np.testing.assert_allclose(solution.V, V / norms[:, None], atol=1e-3 * np.abs(V).max())
    prediction = gated_matrix(X, problem.operator.D) @ solution.V.reshape(-1, 3)
    np.testing.assert_allclose(
        problem.predict(solution.V, solution.intercept), prediction + solution.intercept
    )


def test_alpha_is_lambda_over_2n_of_the_sum_form(gated_matrix, make_problem):
    problem = make_problem(c=1)
    n, d = problem.operator.X.shape
    alpha = 0.1 * problem.alpha_max()
    A = gated_matrix(problem.operator.X, problem.operator.D)
    V = cp.Variable(A.shape[1])
    norms = [cp.norm(V[start : start + d], 2) for start in range(0, A.shape[1], d)]
    lam = 2 * n * alpha
    program = cp.Problem(cp.Minimize(cp.sum_squares(A @ V - problem.Y[:, 0]) + lam * cp.sum(norms)))
    program.solve(solver=cp.CLARABEL)
    solution = RFISTA(tol=1e-8).solve(problem, alpha)
    assert 2 * n * solution.objective == pytest.approx(program.value, rel=1e-6)
