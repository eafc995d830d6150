"""Semismooth Newton's method: its optima by their gaps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    SemismoothNewton,
    activation_patterns,
    duality_gap,
    sample_gates,
    solve_path,
)


def programme(n=40, d=3, p=6, c=2, seed=0, weighted=False, dtype=np.float64, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(dtype)
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=seed))
    Y = (np.maximum(X @ rng.standard_normal((d, c)), 0) + 0.3 * rng.standard_normal((n, c))).astype(
        dtype
    )
    if weighted:
        options["sample_weight"] = rng.uniform(0.3, 3, n)
    return GatedReLUProblem(X, Y, D, **options)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(5, 80),
    d=st.integers(1, 6),
    p=st.integers(1, 12),
    c=st.integers(1, 3),
    penalty=st.sampled_from(["neuron", "gate"]),
    l1_ratio=st.sampled_from([1.0, 0.7, 0.1]),
    intercept=st.booleans(),
    weighted=st.booleans(),
    ratio=st.floats(1e-4, 0.9),
    seed=st.integers(0, 2**16),
)
def test_gaps_are_those_of_the_weights(
    n, d, p, c, penalty, l1_ratio, intercept, weighted, ratio, seed
):
    """The certificate is computed again by another part of the package, from the weights alone."""
    options = {"penalty": penalty, "l1_ratio": l1_ratio, "fit_intercept": intercept}
    problem = programme(n, d, p, c, seed, weighted, **options)
    alpha = ratio * problem.alpha_max()
    solution = SemismoothNewton(tol=1e-9).solve(problem, alpha)
    assert solution.converged, solution.message
    assert solution.objective == pytest.approx(
        problem.objective(solution.V, solution.intercept, alpha), rel=1e-12
    )
    assert duality_gap(problem, solution.V, alpha) <= 1e-4 * solution.objective


@pytest.mark.parametrize("penalty", ["neuron", "gate"])
def test_it_agrees_with_accelerated_gradients(penalty):
    problem = programme(penalty=penalty, fit_intercept=True, weighted=True)
    alpha = 0.05 * problem.alpha_max()
    ours = SemismoothNewton(tol=1e-10).solve(problem, alpha)
    other = RFISTA(tol=1e-8, max_iter=100_000).solve(problem, alpha)
    assert other.converged
    assert ours.objective == pytest.approx(other.objective, rel=1e-7)
    np.testing.assert_allclose(ours.intercept, other.intercept, atol=1e-3)
    assert ours.objective <= other.objective * (1 + 1e-12)


def test_a_path_starts_where_the_last_alpha_ended():
    problem = programme(n=120, p=20, c=1)
    alphas = problem.alpha_max() * np.array([0.3, 0.1, 0.03])
    solver = SemismoothNewton(tol=1e-8)
    path = solve_path(solver, problem, alphas)
    alone = [solver.solve(problem, alpha) for alpha in path.alphas]
    for warm, cold in zip(path, alone, strict=True):
        assert warm.converged
        assert warm.objective == pytest.approx(cold.objective, rel=1e-7)
    assert sum(one.n_iter for one in path) <= sum(one.n_iter for one in alone)


def test_a_solution_is_its_own_warm_start():
    problem = programme()
    alpha = 0.1 * problem.alpha_max()
    solver = SemismoothNewton(tol=1e-7)
    solution = solver.solve(problem, alpha)
    assert solver.solve(problem, alpha, warm_start=solution).n_iter < solution.n_iter


def test_single_precision_is_returned_as_such():
    problem = programme(dtype=np.float32)
    solution = SemismoothNewton(tol=1e-5).solve(problem, 0.1 * problem.alpha_max())
    assert solution.converged
    assert solution.V.dtype == np.float32


def test_alpha_max_leaves_nothing_and_little_less_leaves_something():
    problem = programme(c=1)
    largest = problem.alpha_max()
    assert not SemismoothNewton().solve(problem, largest).V.any()
    assert SemismoothNewton(tol=1e-8).solve(problem, 0.98 * largest).n_active_gates == 1


def test_a_callback_stops_it_and_the_trace_is_of_its_steps(capsys):
    problem = programme()
    alpha, seen = 0.01 * problem.alpha_max(), []

    def stop(progress):
        seen.append(progress)
        return progress.iteration >= 3

    solution = SemismoothNewton(tol=1e-12).solve(problem, alpha, callback=stop)
    assert solution.status == "stopped by callback"
    assert [progress.iteration for progress in seen] == list(solution.trace.iteration)
    assert (np.diff(solution.trace.seconds) >= 0).all()
    assert capsys.readouterr() == ("", "")


def test_limits_end_it():
    problem = programme()
    alpha = 0.01 * problem.alpha_max()
    assert SemismoothNewton(tol=0, max_iter=2).solve(problem, alpha).status == "iteration limit"
    late = SemismoothNewton(tol=0, time_limit=1e-9).solve(problem, alpha)
    assert late.status == "time limit"
    # The most that rounding leaves.
    assert SemismoothNewton(tol=0).solve(problem, alpha).relative_gap < 1e-12


def test_verbose_shows_a_bar(capsys):
    problem = programme()
    SemismoothNewton(verbose=1).solve(problem, 0.1 * problem.alpha_max())
    assert "SemismoothNewton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"penalty": "nuclear"}, {"penalty": "ridge"}, {"loss": "huber"}], ids=str
)
def test_other_programmes_are_refused(options):
    with pytest.raises(ValueError, match=r"^SemismoothNewton solves gated ReLU programmes with"):
        SemismoothNewton().solve(programme(**options), 0.1)


def test_gradients_go_first_where_a_step_is_dear_and_keep_the_limit(monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.LEAST_WORK", 0.0)
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.iteration_work", lambda _: 1.0)
    problem = programme(n=120, p=20, c=1)
    alpha, seen = 0.1 * problem.alpha_max(), []
    easy = SemismoothNewton(tol=1e-3).solve(problem, alpha, callback=seen.append)
    assert easy.converged and easy.n_iter > 1
    assert [p.iteration for p in seen] == list(easy.trace.iteration)
    short = SemismoothNewton(tol=1e-12, max_iter=3).solve(problem, alpha)
    assert short.status == "iteration limit" and short.n_iter == 6
    assert (np.diff(short.trace.iteration) >= 0).all()
    assert (np.diff(short.trace.seconds) >= 0).all()


def test_gradients_go_first_on_paths_too(monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.LEAST_WORK", 0.0)
    monkeypatch.setattr("cvxdistill.solvers.first_order_start.iteration_work", lambda _: 1.0)
    problem = programme(n=120, p=20, c=2, fit_intercept=True)
    alphas = problem.alpha_max() * np.array([0.5, 0.3, 0.01])
    solver, seen = SemismoothNewton(tol=1e-7), []
    path = solve_path(solver, problem, alphas, callback=seen.append)
    assert [p.iteration for p in seen] == [i for one in path for i in one.trace.iteration]
    for one in path:
        assert one.converged
        alone = RFISTA(tol=1e-8, max_iter=100_000).solve(problem, one.alpha)
        assert one.objective == pytest.approx(alone.objective, rel=2e-7)
    # An alpha again: its solution was kept, whoever found it.
    solve = solver.successive(problem)
    first, again = solve(alphas[0], None), solve(alphas[0], None)
    assert again.n_iter == 0 < first.n_iter
    assert again.relative_gap <= 1e-7
