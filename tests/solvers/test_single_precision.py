"""R-FISTA in single precision first: what it returns is certified in double."""

from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    SemismoothNewton,
    activation_patterns,
    duality_gap,
    fista,
    sample_gates,
)


def programme(n=300, d=8, p=30, c=2, scale=1.0, dtype=np.float64, **options):
    rng = np.random.default_rng(0)
    X = (scale * rng.standard_normal((n, d))).astype(dtype)
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=0))
    Y = np.maximum(X @ rng.standard_normal((d, c)), 0) + 0.3 * scale * rng.standard_normal((n, c))
    if options.get("loss") == "multinomial":
        Y = np.eye(c)[Y.argmax(axis=1)]
    if options.get("loss") == "logistic":
        Y = np.sign(Y[:, :1])
    return GatedReLUProblem(X, Y.astype(dtype), D, **options)


@pytest.fixture
def singles(monkeypatch):
    """Programmes that were solved in single precision, where the smallest pay."""
    monkeypatch.setattr(fista, "DEAR", 0)
    seen = []
    make = GatedReLUProblem.in_single.func
    monkeypatch.setattr(
        GatedReLUProblem, "in_single", property(lambda self: seen.append(make(self)) or seen[-1])
    )
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"penalty": "gate", "fit_intercept": True},
        {"penalty": "nuclear", "normalize": True},
        {"penalty": "l1", "l1_ratio": 0.5},
        {"loss": "huber", "fit_intercept": True},
        {"loss": "logistic", "fit_intercept": True},
        {"loss": "multinomial", "penalty": "gate"},
        {"sample_weight": np.linspace(0.5, 2, 300), "normalize": True, "fit_intercept": True},
    ],
    ids=str,
)
def test_the_optimum_is_that_of_double_precision(singles, options, monkeypatch):
    problem = programme(**options)
    alpha, seen = 0.05 * problem.alpha_max(), []
    solution = RFISTA(tol=1e-5).solve(problem, alpha, callback=seen.append)
    (single,) = singles
    assert single.dtype == single.Y.dtype == np.float32 and problem.dtype == np.float64
    assert solution.converged and solution.V.dtype == np.float64
    own = problem.objective(solution.V, solution.intercept, alpha)
    assert solution.objective == pytest.approx(own, rel=1e-13)
    assert duality_gap(problem, solution.V, alpha) <= 3e-5 * own
    assert [p.iteration for p in seen] == list(solution.trace.iteration)
    for values in (solution.trace.iteration, solution.trace.seconds):
        assert (np.diff(values) >= 0).all()
    assert solution.n_iter == solution.trace.iteration[-1]
    assert solution.seconds >= solution.trace.seconds[-1]
    monkeypatch.setattr(fista, "DEAR", np.inf)
    double = RFISTA(tol=1e-5).solve(problem, alpha)
    assert len(singles) == 1
    assert solution.objective == pytest.approx(double.objective, rel=2e-5)


def test_what_single_precision_cannot_do_is_done_in_double(singles):
    alpha = 0.05 * programme().alpha_max()
    for other in (
        programme(scale=1e-14),
        programme(scale=1e14),
        programme(dtype=np.float32),
        programme(penalty="none"),
    ):
        strength = alpha if other.regularizer.bounds_the_dual else 1.0
        assert not fista.single_precision_pays(other)
        RFISTA(max_iter=40).solve(other, strength)
    assert singles == []


@pytest.mark.parametrize("tol", [1e-6, 1e-10])
def test_a_gap_that_single_precision_does_not_see_is_reached_in_double(singles, tol):
    problem = programme()
    alpha = 0.05 * problem.alpha_max()
    solution = RFISTA(tol=tol).solve(problem, alpha)
    own = problem.objective(solution.V, solution.intercept, alpha)
    assert len(singles) == 1 and solution.converged
    assert duality_gap(problem, solution.V, alpha) <= 3 * tol * own


def test_it_stops_where_it_stalls_and_double_precision_goes_on(singles, monkeypatch):
    problem = programme()
    alpha = 0.05 * problem.alpha_max()
    looks = []
    call = fista._EarlyWatch.__call__
    monkeypatch.setattr(
        fista._EarlyWatch,
        "__call__",
        lambda self, progress: looks.append(self) or call(self, fista.replace(progress, gap=1.0)),
    )
    solution = RFISTA(tol=1e-5, check_every=1).solve(problem, alpha)
    assert len(looks) == fista.MOST_IDLE + 1 and solution.converged
    assert solution.n_iter > fista.MOST_IDLE


@pytest.mark.parametrize("after", [1, 3])
def test_a_callback_stops_it(singles, after):
    problem, seen = programme(), []
    alpha = 0.01 * problem.alpha_max()
    solver = RFISTA(tol=1e-5, check_every=1)
    solution = solver.solve(problem, alpha, callback=lambda p: seen.append(p) or len(seen) == after)
    assert solution.status == "stopped by callback" and len(seen) == after
    assert solution.n_iter == after - 1 and solution.V.dtype == np.float64
    assert np.isfinite(solution.relative_gap)


def test_limits_are_those_of_both(singles):
    problem = programme()
    alpha = 0.01 * problem.alpha_max()
    short = RFISTA(tol=1e-5, max_iter=7).solve(problem, alpha)
    assert short.status == "iteration limit" and short.n_iter == 7
    late = RFISTA(tol=1e-5, time_limit=1e-9).solve(problem, alpha)
    assert late.status == "time limit" and late.n_iter == 0
    assert RFISTA(tol=1e-5, max_iter=1).solve(problem, alpha).n_iter == 1


def test_a_warm_start_goes_on_and_is_left_alone(singles):
    problem = programme()
    alpha = 0.01 * problem.alpha_max()
    best = RFISTA(tol=1e-8).solve(problem, alpha)
    before = best.V.copy()
    again = RFISTA(tol=1e-5).solve(problem, alpha, warm_start=best)
    assert again.n_iter == 0 and again.converged
    np.testing.assert_array_equal(best.V, before)


def test_newtons_method_has_it_in_front(singles, monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.LEAST_WORK", 0.0)
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.iteration_work", lambda _: 1.0)
    problem = programme(c=1)
    solution = SemismoothNewton(tol=1e-4).solve(problem, 0.1 * problem.alpha_max())
    assert len(singles) == 1 and solution.converged
    assert (np.diff(solution.trace.iteration) >= 0).all()
