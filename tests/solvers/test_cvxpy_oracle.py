"""R-FISTA and its duality gaps against cvxpy with Clarabel, an interior-point solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem

cp = pytest.importorskip("cvxpy")
# Clarabel may stop just short of its tolerances; the comparisons say whether it was near enough.
pytestmark = pytest.mark.filterwarnings("ignore:Solution may be inaccurate:UserWarning")

SHAPES = {"tall": (30, 4, 8), "wide": (6, 9, 5)}  # n, d, p
CASES = [
    *itertools.product(("neuron", "gate"), (1, 3), SHAPES, (False, True), (1.0, 0.5)),
    *itertools.product(("ridge",), (1, 3), SHAPES, (False, True), (1.0,)),
]


def optimum(A, Y, d, penalty, l1_ratio, alpha, fit_intercept):
    """Optimal value of the programme on the explicit matrix A (n, p d), and the weights."""
    n, c = Y.shape
    V = cp.Variable((A.shape[1], c))
    b = cp.Variable((1, c)) if fit_intercept else np.zeros((1, c))
    gates = [V[start : start + d] for start in range(0, A.shape[1], d)]
    norms = {
        "neuron": lambda v: cp.sum(cp.norm(v, 2, axis=0)),
        "gate": lambda v: cp.norm(v, "fro"),
        "ridge": lambda v: cp.sum_squares(v) / 2,
    }
    regularizer = l1_ratio * cp.sum([norms[penalty](v) for v in gates])
    regularizer += (1 - l1_ratio) / 2 * cp.sum_squares(V)
    loss = cp.sum_squares(A @ V + np.ones((n, 1)) @ b - Y) / (2 * n)
    program = cp.Problem(cp.Minimize(loss + alpha * regularizer))
    tolerances = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
    program.solve(solver=cp.CLARABEL, **tolerances)
    assert program.status in ("optimal", "optimal_inaccurate")
    return program.value, V.value.reshape(-1, d, c)


def objective(A, Y, V, b, penalty, l1_ratio, alpha):
    """P(V, b), written out."""
    p, d, c = V.shape
    Z = A @ V.reshape(p * d, c) + b
    norms = {
        "neuron": np.linalg.norm(V, axis=1).sum(),
        "gate": np.linalg.norm(V, axis=(1, 2)).sum(),
        "ridge": 0.5 * (V**2).sum(),
    }
    blend = l1_ratio * norms[penalty] + (1 - l1_ratio) / 2 * (V**2).sum()
    return ((Z - Y) ** 2).sum() / (2 * len(Y)) + alpha * blend


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def solved(request, gated_matrix, make_problem):
    penalty, c, shape, fit_intercept, l1_ratio = request.param
    n, d, p = SHAPES[shape]
    problem = make_problem(
        n=n, d=d, p=p, c=c, seed=c, penalty=penalty, l1_ratio=l1_ratio, fit_intercept=fit_intercept
    )
    alpha = 0.05 if penalty == "ridge" else 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-8, check_every=5).solve(problem, alpha)
    A = gated_matrix(problem.operator.X, problem.operator.D)
    best, _ = optimum(A, problem.Y, d, penalty, l1_ratio, alpha, fit_intercept)
    return problem, solution, A, best, (penalty, l1_ratio, alpha)


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


def test_duality_gap_in_float32_bounds_the_error_to_its_precision(gated_matrix, make_problem):
    problem = make_problem(dtype=np.float32, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-5).solve(problem, alpha)
    A = gated_matrix(problem.operator.X, problem.operator.D).astype(float)
    best, _ = optimum(A, problem.Y.astype(float), 5, "neuron", 1.0, alpha, True)
    errors = solution.trace.objective - best
    assert solution.V.dtype == np.float32 and solution.converged
    assert np.all(solution.trace.gap * solution.trace.objective >= errors - 1e-6 * best)


def test_normalize_solves_the_problem_with_unit_columns_in_the_users_units(
    gated_matrix, make_problem
):
    plain = make_problem(c=3)
    X = plain.operator.X * np.array([1.0, 5.0, 0.2, 1.0, 30.0])
    norms = np.linalg.norm(X, axis=0)
    problem = GatedReLUProblem(X, plain.Y, plain.operator.D, normalize=True, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-8).solve(problem, alpha)
    A = gated_matrix(X / norms, problem.operator.D)
    best, V = optimum(A, problem.Y, 5, "neuron", 1.0, alpha, True)
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
