from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, alpha_grid, solve_path
from cvxdistill.solvers.relu_problem import ReLUProblem


@pytest.fixture
def problem(make_problem):
    return make_problem(fit_intercept=True)


def test_alphas_fall_from_alpha_max_by_equal_factors(problem):
    path = solve_path(RFISTA(), problem, n_alphas=5, eps=0.01)
    np.testing.assert_allclose(path.alphas, problem.alpha_max() * 0.01 ** (np.arange(5) / 4))
    np.testing.assert_array_equal(path.alphas, alpha_grid(problem.alpha_max(), 5, 0.01))


def test_given_alphas_are_sorted(problem):
    path = solve_path(RFISTA(), problem, [0.05, 0.4, 0.1])
    np.testing.assert_array_equal(path.alphas, [0.4, 0.1, 0.05])


def test_each_point_has_its_time_sparsity_and_certified_gap(problem):
    path = solve_path(RFISTA(tol=1e-5), problem, n_alphas=6)
    assert len(path) == 6 and np.all(path.relative_gaps <= 1e-5) and np.all(path.seconds > 0)
    np.testing.assert_array_equal(path.active_gates, [s.n_active_gates for s in path])
    assert path.active_gates[0] == 0 < path.active_gates[-1]
    assert "6 alphas" in repr(path) and "largest relative gap" in repr(path)


def test_every_point_equals_a_cold_solve(problem):
    for solution in solve_path(RFISTA(tol=1e-8), problem, n_alphas=4):
        cold = RFISTA(tol=1e-8).solve(problem, solution.alpha)
        assert solution.objective == pytest.approx(cold.objective, rel=1e-7)


def test_each_point_starts_at_the_one_before(problem):
    first, second = solve_path(RFISTA(tol=1e-5), problem, [0.1, 0.09])
    # The objective of the second at its start is that of the first's weights.
    start = problem.objective(first.V, problem.intercept(problem.predict(first.V)), 0.09)
    assert second.trace.objective[0] == pytest.approx(start, rel=1e-12)


def test_a_callback_ends_the_path(problem):
    path = solve_path(RFISTA(), problem, n_alphas=9, callback=lambda progress: progress.gap > 0)
    assert 1 <= len(path) < 9 and path[-1].status == "stopped by callback"


@pytest.mark.parametrize(
    "options", [{"loss": "multinomial"}, {"loss": "huber", "penalty": "nuclear"}], ids=str
)
def test_every_loss_and_penalty_has_a_path(make_problem, options):
    problem = make_problem(c=3, fit_intercept=True, **options)
    path = solve_path(RFISTA(tol=1e-4), problem, n_alphas=4, eps=0.1)
    assert np.all(path.relative_gaps <= 1e-4) and path.active_gates[0] == 0 < path.active_gates[-1]


def test_relu_networks_have_a_path(make_problem):
    problem = make_problem(n=30, programme=ReLUProblem)
    path = solve_path(RFISTA(tol=1e-4), problem, n_alphas=4)
    assert np.all(path.relative_gaps <= 1e-4) and path[-1].V.shape == problem.weights_shape
    assert path.active_gates[0] == 0 < path.active_gates[-1] <= problem.operator.p


def test_the_objective_falls_along_the_path(problem):
    path = solve_path(RFISTA(tol=1e-6), problem, n_alphas=8)
    assert np.all(np.diff([solution.objective for solution in path]) < 0)
