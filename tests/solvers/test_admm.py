"""ADMM for ReLU networks: its linear systems, its settings, and its solutions beside cvxpy's."""

from __future__ import annotations

import time

import numpy as np
import pytest

from cvxdistill.solvers import difference_system
from cvxdistill.solvers.admm import ADMM
from cvxdistill.solvers.difference_system import DifferenceSystem
from cvxdistill.solvers.relu_problem import ReLUProblem

SIDES = ["examples", "features", "neither"]


@pytest.fixture(scope="module")
def build(make_problem):
    """A small ReLU problem."""

    def problem_of(**options):
        return make_problem(**{"n": 40, "d": 4, "p": 6, "programme": ReLUProblem, **options})

    return problem_of


def dense_hessian(problem, gated_matrix):
    """A^T diag(omega) A / n for A = [A_0, -A_0], centred where there is an intercept."""
    A = problem.operator
    X = A.X if A.scale is None else A.X / A.scale
    n = A.n
    omega = np.ones(n) if problem.loss.weights is None else problem.loss.weights
    matrix = gated_matrix(X, A.D)
    if problem.fit_intercept:
        matrix = matrix - omega @ matrix / n
    both = np.hstack([matrix, -matrix])
    return both.T @ (omega[:, None] * both) / n


def as_columns(B):
    blocks, d, c = B.shape
    return B.reshape(blocks * d, c)


OPTIONS = {
    "plain": {},
    "weighted": {"sample_weight": np.random.default_rng(0).uniform(0.2, 3, 40)},
    "intercept": {"fit_intercept": True},
    "both": {
        "fit_intercept": True,
        "sample_weight": np.random.default_rng(1).uniform(0.2, 3, 40),
    },
    "normalized": {"normalize": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("side", SIDES)
def test_system_is_solved_on_every_side_of_the_matrix(build, gated_matrix, side, options):
    problem = build(**options)
    H = dense_hessian(problem, gated_matrix)
    system = DifferenceSystem(problem, side)
    rng = np.random.default_rng(0)
    for mu in (1e-2, 3.0, 1e-2):
        B = rng.standard_normal(problem.zeros().shape)
        X = system.solve(B, mu)
        assert X.shape == B.shape
        exact = np.linalg.solve(H + mu * np.eye(len(H)), as_columns(B))
        np.testing.assert_allclose(as_columns(X), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [20, 60])
def test_the_smaller_side_is_the_one_that_is_factored(build, n):
    problem = build(n=n)
    size = problem.operator.p * problem.operator.d
    assert DifferenceSystem(problem).side == ("examples" if n < size else "features")


@pytest.mark.parametrize("side", SIDES)
def test_mean_eigenvalue_is_that_of_the_differences(build, gated_matrix, side):
    problem = build()
    size = problem.operator.p * problem.operator.d
    H = dense_hessian(problem, gated_matrix)
    # The eigenvalues of H are those of the differences, and as many zeros.
    found = DifferenceSystem(problem, side).mean_eigenvalue
    assert found == pytest.approx(np.trace(H) / size)


CASES = [
    ("neuron", "squared", 1, False),
    ("neuron", "huber", 2, True),
    ("gate", "squared", 2, True),
    ("gate", "logistic", 1, False),
    ("l1", "squared", 2, False),
]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(map(str, case)) for case in CASES])
def solved(request, build, solve_with_cvxpy):
    penalty, loss, c, fit_intercept = request.param
    options = {"penalty": penalty, "loss": loss, "fit_intercept": fit_intercept}
    problem = build(c=c, **options)
    alpha = 0.1 * problem.alpha_max()
    best, _ = solve_with_cvxpy(
        problem.operator.X, problem.Y, problem.operator.D, alpha, relu=True, **options
    )
    return problem, alpha, best, ADMM(tol=1e-7, check_every=5).solve(problem, alpha)


def test_objective_is_that_of_cvxpy_and_the_weights_are_in_their_cones(solved):
    problem, alpha, best, solution = solved
    assert solution.converged
    assert solution.objective == pytest.approx(best, rel=1e-6)
    value = problem.objective(solution.V, solution.intercept, alpha)
    assert value == pytest.approx(best, rel=1e-6)
    X, signs = problem.operator.X, 2 * problem.operator.D - 1
    margins = signs[:, :, None] * np.einsum("nd,spdc->snpc", X, solution.V)
    assert margins.min() >= -1e-10 * np.abs(margins).max()
    assert solution.violation < 1e-10


def test_duality_gap_bounds_the_error_all_along_the_solve(solved):
    _, _, best, solution = solved
    trace = solution.trace
    errors = trace.objective - best
    assert len(trace) >= 3 and errors[0] > 1e-3 * best
    assert np.all(trace.gap * trace.objective >= errors - 1e-7 * best)


@pytest.mark.parametrize("penalty", ["neuron", "feature"])
@pytest.mark.parametrize("loss", ["squared", "multinomial"])
def test_conjugate_gradients_lead_to_the_same_optimum(build, monkeypatch, penalty, loss):
    problem = build(c=3, penalty=penalty, loss=loss, fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    factored = ADMM(tol=1e-6).solve(problem, alpha)
    monkeypatch.setattr(difference_system, "MOST_FACTORED", 0)
    monkeypatch.setattr(difference_system, "NYSTROM_RANK", 4)
    assert DifferenceSystem(problem).side == "neither"
    iterated = ADMM(tol=1e-6).solve(problem, alpha)
    assert factored.converged and iterated.converged
    assert iterated.objective == pytest.approx(factored.objective, rel=2e-6)
    assert iterated.n_iter <= 2 * factored.n_iter + 40


@pytest.mark.parametrize("rho", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("relaxation", [1.0, 1.9])
def test_any_first_rho_and_relaxation_leads_to_the_optimum(build, rho, relaxation):
    problem = build()
    alpha = 0.1 * problem.alpha_max()
    best = ADMM(tol=1e-8).solve(problem, alpha)
    solution = ADMM(tol=1e-6, rho=rho, relaxation=relaxation).solve(problem, alpha)
    assert solution.converged
    assert 0 <= solution.objective - best.objective + 1e-8 <= 2e-6 * best.objective + 2e-8


def test_scaling_of_targets_and_alpha_scales_the_weights(build):
    plain = build(c=1)
    scaled = ReLUProblem(plain.operator.X, 1e4 * plain.Y, plain.operator.D)
    alpha = 0.1 * plain.alpha_max()
    one = ADMM(tol=1e-7).solve(plain, alpha)
    other = ADMM(tol=1e-7).solve(scaled, 1e4 * alpha)
    assert other.converged
    assert other.objective == pytest.approx(1e8 * one.objective, rel=1e-6)
    np.testing.assert_allclose(other.V / 1e4, one.V, atol=1e-2 * np.abs(one.V).max())


def test_warm_start_at_the_optimum_needs_fewer_iterations(build):
    problem = build()
    alpha = 0.1 * problem.alpha_max()
    solver = ADMM(tol=1e-5, check_every=1)
    cold = solver.solve(problem, alpha)
    exact = ADMM(tol=1e-9).solve(problem, alpha)
    assert solver.solve(problem, alpha, warm_start=exact).n_iter == 0
    near = solver.solve(problem, 0.95 * alpha, warm_start=cold)
    assert near.converged and near.n_iter < cold.n_iter


@pytest.mark.parametrize("side", SIDES)
def test_float32_stays_float32_and_certifies_what_it_can(build, monkeypatch, side):
    problem = build(dtype=np.float32)
    alpha = 0.1 * problem.alpha_max()
    original = DifferenceSystem.__init__
    monkeypatch.setattr(
        DifferenceSystem, "__init__", lambda self, problem: original(self, problem, side)
    )
    solution = ADMM(tol=1e-4).solve(problem, alpha)
    assert solution.converged and solution.V.dtype == np.float32
    assert solution.violation < 1e-6


def test_without_a_penalty_it_converges_though_solutions_are_unbounded(build, solve_with_cvxpy):
    """What V and U share costs nothing, and the multipliers go to 0: only the floor holds rho."""
    options = {"penalty": "none", "fit_intercept": True}
    problem = build(n=80, p=12, c=2, **options)
    solution = ADMM(tol=1e-4).solve(problem, 0.01)
    assert solution.converged and solution.kkt_residual <= 1e-4
    A = problem.operator
    best, _ = solve_with_cvxpy(A.X, problem.Y, A.D, 0.01, relu=True, **options)
    assert solution.objective == pytest.approx(best, rel=1e-5)


def test_at_alpha_max_the_solution_is_zero(build):
    problem = build(fit_intercept=True)
    solution = ADMM().solve(problem, 1.001 * problem.alpha_max())
    assert solution.converged and not solution.V.any()


def test_constant_targets_with_an_intercept_need_no_weights(build):
    plain = build(c=1)
    problem = ReLUProblem(plain.operator.X, np.full(40, 3.0), plain.operator.D, fit_intercept=True)
    solution = ADMM().solve(problem, 0.1)
    assert solution.converged and not solution.V.any()
    assert solution.intercept == pytest.approx(3.0)


def test_time_limit_stops_a_solve_that_would_take_longer(build):
    problem = build(n=200, d=8, p=20)
    alpha = 1e-4 * problem.alpha_max()
    start = time.perf_counter()
    solution = ADMM(tol=1e-13, max_iter=10**9, time_limit=0.05).solve(problem, alpha)
    assert solution.status == "time limit"
    assert time.perf_counter() - start < 30
    assert solution.violation < 1e-10 and np.isfinite(solution.objective)


def test_a_solve_prints_and_warns_nothing(build, capfd, recwarn):
    problem = build()
    ADMM().solve(problem, 0.1 * problem.alpha_max())
    assert capfd.readouterr() == ("", "")
    assert len(recwarn) == 0


def test_two_solves_are_the_same_and_leave_the_problem_alone(build):
    problem = build()
    alpha = 0.1 * problem.alpha_max()
    X, Y, D = problem.operator.X.copy(), problem.Y.copy(), problem.operator.D.copy()
    first, second = (ADMM().solve(problem, alpha) for _ in range(2))
    np.testing.assert_allclose(first.V, second.V, rtol=1e-6, atol=1e-9)
    for before, after in ((X, problem.operator.X), (Y, problem.Y), (D, problem.operator.D)):
        np.testing.assert_array_equal(before, after)


def test_gated_programmes_are_refused(make_problem):
    with pytest.raises(ValueError, match="ADMM solves ReLU programmes, got GatedReLUProblem"):
        ADMM().solve(make_problem(), 0.1)


@pytest.mark.parametrize(
    "setting",
    [{"relaxation": 2}, {"relaxation": 0.5}, {"rho": 0.0}, {"rho": np.inf}, {"adapt_every": 0}],
)
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ADMM(**setting)
