"""The driver: limits, callback, trace, progress bar, verdict; and R-FISTA as one of its solvers."""

from __future__ import annotations

import math
import time
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem, RidgeNewton, duality_gap

ANY_LOSS = pytest.mark.parametrize("loss", ["squared", "huber", "logistic", "multinomial"])


@pytest.fixture
def problem(make_problem):
    return make_problem(fit_intercept=True)


@pytest.fixture
def alpha(problem):
    return 0.05 * problem.alpha_max()


def test_it_stops_once_the_gap_is_within_the_tolerance(problem, alpha):
    solution = RFISTA(tol=1e-3).solve(problem, alpha)
    assert solution.converged and solution.status == "converged"
    assert solution.duality_gap <= 1e-3 * solution.objective
    assert solution.relative_gap == pytest.approx(solution.duality_gap / solution.objective)
    assert np.all(solution.trace.gap[:-1] > 1e-3)


def test_the_solution_describes_itself(problem, alpha):
    solution = RFISTA(tol=1e-3).solve(problem, alpha)
    assert solution.objective == pytest.approx(
        problem.objective(solution.V, solution.intercept, alpha), rel=1e-12
    )
    assert solution.alpha == alpha and solution.seconds > 0
    assert solution.kkt_residual < 1e-2 and solution.violation == 0
    assert solution.n_active_gates == np.count_nonzero(np.abs(solution.V).max(axis=(1, 2)))
    assert f"converged after {solution.n_iter} iterations" in solution.message
    assert "relative duality gap" in solution.message


def test_the_kkt_residual_falls_with_the_tolerance(problem, alpha):
    residuals = [RFISTA(tol=tol).solve(problem, alpha).kkt_residual for tol in (1e-2, 1e-5, 1e-9)]
    assert residuals[0] > 10 * residuals[1] > 100 * residuals[2] > 0


def test_a_tighter_tolerance_takes_longer_and_ends_lower(problem, alpha):
    loose, tight = (RFISTA(tol=tol).solve(problem, alpha) for tol in (1e-2, 1e-7))
    assert loose.n_iter < tight.n_iter and tight.objective < loose.objective


def test_iteration_limit(problem, alpha):
    solution = RFISTA(tol=0, max_iter=7, check_every=5).solve(problem, alpha)
    assert solution.status == "iteration limit" and not solution.converged
    assert solution.n_iter == 7
    np.testing.assert_array_equal(solution.trace.iteration, [0, 5, 7])
    assert math.isfinite(solution.duality_gap)


def test_time_limit(problem, alpha):
    solution = RFISTA(tol=0, time_limit=1e-6, max_iter=10**9).solve(problem, alpha)
    assert solution.status == "time limit"
    assert solution.n_iter == 0 and solution.seconds > 1e-6


def test_time_limit_strikes_between_two_checks_of_the_gap(problem, alpha, monkeypatch):
    step = RFISTA.step

    def slow_step(self, *arguments):
        time.sleep(0.02)
        return step(self, *arguments)

    monkeypatch.setattr(RFISTA, "step", slow_step)
    solution = RFISTA(tol=0, time_limit=0.1, check_every=1000).solve(problem, alpha)
    assert solution.status == "time limit"
    assert 1 <= solution.n_iter <= 5
    assert solution.trace.iteration[-1] == solution.n_iter


def test_callback_sees_the_progress_and_stops_the_solve(problem, alpha):
    seen = []

    def callback(progress):
        seen.append(progress)
        return progress.iteration >= 20

    solution = RFISTA(tol=0, check_every=10).solve(problem, alpha, callback=callback)
    assert solution.status == "stopped by callback" and solution.n_iter == 20
    assert [progress.iteration for progress in seen] == [0, 10, 20]
    assert seen[-1].objective == solution.objective
    assert seen[-1].gap == solution.relative_gap
    assert seen[-1].active_gates == solution.n_active_gates
    assert seen[-1].violation == 0


def test_trace_has_a_row_for_each_check(problem, alpha):
    trace = RFISTA(tol=1e-6, check_every=4).solve(problem, alpha).trace
    lengths = {len(getattr(trace, name)) for name in trace.__dataclass_fields__}
    assert lengths == {len(trace)} and len(trace) > 3
    assert np.all(np.diff(trace.iteration) <= 4) and trace.iteration[0] == 0
    assert np.all(np.diff(trace.seconds) >= 0)
    assert trace.active_gates[0] == 0 and trace.active_gates[-1] > 0
    assert trace.objective[-1] < trace.objective[0]
    assert repr(trace) == f"Trace({len(trace)} points)"


@pytest.mark.parametrize("solver", [RFISTA, RidgeNewton])
def test_verbose_shows_a_bar_and_silence_is_silent(make_problem, capsys, solver):
    problem = make_problem(penalty="ridge")
    solver(verbose=0).solve(problem, 0.1)
    assert capsys.readouterr() == ("", "")
    solver(verbose=1).solve(problem, 0.1)
    out, err = capsys.readouterr()
    assert out == "" and solver.__name__ in err


def test_a_warm_start_at_the_solution_stops_at_once(problem, alpha):
    solution = RFISTA(tol=1e-6).solve(problem, alpha)
    for start in (solution, solution.V, np.asfortranarray(solution.V)):
        again = RFISTA(tol=1e-5).solve(problem, alpha, warm_start=start)
        assert again.n_iter <= 10 < solution.n_iter


def test_a_warm_start_is_not_written_to(problem, alpha):
    start = RFISTA(tol=1e-1).solve(problem, alpha).V
    before = start.copy()
    RFISTA(tol=1e-6).solve(problem, alpha, warm_start=start)
    np.testing.assert_array_equal(start, before)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_warm_start_is_in_the_users_units(make_problem, normalize):
    problem = make_problem(normalize=normalize)
    alpha = 0.1 * problem.alpha_max()
    solution = RFISTA(tol=1e-6).solve(problem, alpha)
    again = RFISTA(tol=1e-5).solve(problem, alpha, warm_start=solution)
    assert again.n_iter == 0
    np.testing.assert_allclose(again.V, solution.V, rtol=1e-12)


@ANY_LOSS
@pytest.mark.parametrize("penalty", ["neuron", "nuclear", "feature", "l1"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_solution_has_the_type_of_the_data(make_problem, dtype, loss, penalty):
    problem = make_problem(
        dtype=dtype,
        loss=loss,
        penalty=penalty,
        fit_intercept=True,
        sample_weight=np.random.default_rng(0).uniform(0.5, 2, 40),
    )
    solution = RFISTA(tol=1e-4).solve(problem, 0.1 * problem.alpha_max())
    assert solution.converged
    assert solution.V.dtype == solution.intercept.dtype == dtype
    assert problem.predict(solution.V, solution.intercept).dtype == dtype


@ANY_LOSS
def test_the_same_call_gives_the_same_bits(make_problem, loss):
    problem = make_problem(loss=loss, fit_intercept=True)
    alpha = 0.05 * problem.alpha_max()
    first, second = (RFISTA(tol=1e-5).solve(problem, alpha) for _ in range(2))
    np.testing.assert_array_equal(first.V, second.V)
    np.testing.assert_array_equal(first.trace.gap, second.trace.gap)


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_targets_that_nothing_can_explain_need_no_step(fit_intercept):
    X, D = np.ones((4, 1)), np.ones((4, 1), bool)
    problem = GatedReLUProblem(X, np.zeros(4), D, fit_intercept=fit_intercept)
    solution = RFISTA().solve(problem, 0.1)
    assert solution.converged and solution.n_iter == 0
    assert solution.objective == solution.duality_gap == solution.relative_gap == 0


def test_constant_targets_are_left_to_the_intercept(make_problem):
    plain = make_problem()
    Y = np.tile([3.25, -1.5], (40, 1))
    problem = GatedReLUProblem(plain.operator.X, Y, plain.operator.D, fit_intercept=True)
    solution = RFISTA().solve(problem, 1e-3)
    assert solution.converged and not solution.V.any()
    np.testing.assert_allclose(solution.intercept, [3.25, -1.5])


def test_duality_gap_of_given_weights_bounds_their_error(problem, alpha):
    best = RFISTA(tol=1e-10).solve(problem, alpha)
    rng = np.random.default_rng(0)
    for size in (0.0, 0.01, 1.0):
        V = best.V + size * rng.standard_normal(best.V.shape)
        Z = problem.predict(V)
        error = problem.objective(V, problem.intercept(Z), alpha) - best.objective
        assert duality_gap(problem, V, alpha) >= error - 1e-9 * best.objective
    assert duality_gap(problem, best.V, alpha) < 1e-3 * best.objective


def test_settings_are_frozen_and_compare():
    assert RFISTA(tol=1e-3) == RFISTA(tol=1e-3) != RFISTA(tol=1e-4)
    assert "tol=0.001" in repr(RFISTA(tol=1e-3))
    with pytest.raises(FrozenInstanceError):
        RFISTA().tol = 1.0


@ANY_LOSS
def test_backtracking_recovers_from_any_first_step_size(make_problem, monkeypatch, loss):
    problem = make_problem(c=1 if loss == "logistic" else 2, loss=loss)
    alpha = 0.05 * problem.alpha_max()
    best = RFISTA(tol=1e-8).solve(problem, alpha).objective
    init = RFISTA.init
    for size in (1e-4, 1e4):
        monkeypatch.setattr(RFISTA, "init", lambda *a, s=size: replace(init(*a), step_size=s))
        solution = RFISTA(tol=1e-7).solve(problem, alpha)
        assert solution.converged and solution.objective == pytest.approx(best, rel=1e-6)
