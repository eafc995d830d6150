"""Block coordinate descent on gated ReLU programmes, beside R-FISTA and by its own certificate."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    BlockCoordinateDescent,
    GroupElasticNetProblem,
    ReLUProblem,
    activation_patterns,
    duality_gap,
    sample_gates,
    solve_path,
)

GROUPED = ["neuron", "gate", "feature", "l1"]


@settings(max_examples=25, deadline=None)
@given(
    penalty=st.sampled_from(GROUPED),
    loss=st.sampled_from(["squared", "huber"]),
    c=st.integers(1, 3),
    l1_ratio=st.sampled_from([1.0, 0.7, 0.0]),
    normalize=st.booleans(),
    fit_intercept=st.booleans(),
    weighted=st.booleans(),
    ratio=st.sampled_from([0.3, 0.03]),
    seed=st.integers(0, 1000),
)
def test_it_certifies_the_optimum_that_rfista_finds(
    make_problem, penalty, loss, c, l1_ratio, weighted, ratio, seed, **options
):
    if weighted:
        options["sample_weight"] = np.random.default_rng(seed).uniform(0.3, 3, 30)
    options |= {"penalty": penalty, "loss": loss, "l1_ratio": l1_ratio}
    problem = make_problem(n=30, d=4, p=6, c=c, seed=seed, **options)
    alpha = ratio * (problem.alpha_max() if l1_ratio > 0 else 1.0)
    ours = BlockCoordinateDescent(tol=1e-9).solve(problem, alpha)
    theirs = RFISTA(tol=1e-7, max_iter=100_000).solve(problem, alpha)
    assert ours.converged, ours.message
    assert ours.relative_gap <= 1e-9
    assert ours.objective <= theirs.objective * (1 + 1e-9)
    assert ours.objective >= theirs.objective - theirs.duality_gap - 1e-9 * theirs.objective
    assert ours.objective == pytest.approx(
        problem.objective(ours.V, ours.intercept, alpha), rel=1e-12
    )
    assert ours.kkt_residual < 1e-3


@pytest.mark.parametrize("seed", [36, 58, 130])
@pytest.mark.parametrize("form", ["covariance", "naive"])
def test_collinear_features_do_not_hold_it_up(make_problem, seed, form):
    """A lasso of gated features, whose Hessian is singular: Newton's directions are endless."""
    weights = np.random.default_rng(seed).uniform(0.3, 3, 30)
    problem = make_problem(n=30, d=4, p=6, c=1, seed=seed, penalty="l1", sample_weight=weights)
    solver = BlockCoordinateDescent(tol=1e-9, form=form, max_iter=5000)
    solution = solver.solve(problem, 0.03 * problem.alpha_max())
    assert solution.converged, solution.message


def test_what_it_says_of_itself_is_what_the_certificate_says(make_problem):
    problem = make_problem(c=3, fit_intercept=True)
    alpha = 0.05 * problem.alpha_max()
    solution = BlockCoordinateDescent(tol=1e-6).solve(problem, alpha)
    # The public certificate also moves the residual, and may be a better one.
    assert duality_gap(problem, solution.V, alpha) <= solution.duality_gap * (1 + 1e-9)
    assert solution.duality_gap <= 1e-6 * solution.objective
    assert solution.violation == 0.0 and solution.V.shape == (problem.operator.p, 5, 3)
    trace = solution.trace
    assert (np.diff(trace.seconds) >= 0).all() and (np.diff(trace.iteration) >= 0).all()
    assert trace.gap[-1] <= 1e-6 and trace.active_gates[-1] == solution.n_active_gates
    assert trace.iteration[-1] == solution.n_iter > 0
    # Outputs are solved one after the other, and the trace is of all of them.
    assert trace.objective[-1] == pytest.approx(solution.objective, rel=1e-9)


def test_weights_have_the_type_of_the_data(make_problem):
    problem = make_problem(dtype=np.float32, c=2)
    alpha = 0.1 * problem.alpha_max()
    solution = BlockCoordinateDescent(tol=1e-4).solve(problem, alpha)
    assert solution.V.dtype == solution.intercept.dtype == np.float32
    assert solution.converged
    # What float32 cannot certify is not claimed.
    assert BlockCoordinateDescent(tol=1e-13).solve(problem, alpha).status == "no progress"


def test_it_starts_where_it_is_told_to(make_problem):
    problem = make_problem(n=200, p=20, c=2)
    alpha = 0.01 * problem.alpha_max()
    solver = BlockCoordinateDescent(tol=1e-8)
    cold = solver.solve(problem, alpha)
    warm = solver.solve(problem, alpha, warm_start=cold)
    assert warm.converged and warm.n_iter == 0
    np.testing.assert_array_equal(warm.V, cold.V)
    np.testing.assert_array_equal(solver.solve(problem, alpha, warm_start=cold.V).V, cold.V)


def test_a_path_of_solutions(make_problem):
    problem = make_problem(fit_intercept=True)
    path = solve_path(BlockCoordinateDescent(tol=1e-7), problem, n_alphas=5)
    assert (path.relative_gaps <= 1e-7).all() and path.active_gates[0] == 0
    alone = [BlockCoordinateDescent(tol=1e-7).solve(problem, point.alpha) for point in path]
    np.testing.assert_allclose([one.objective for one in path], [a.objective for a in alone])
    # What was computed for one alpha serves the next.
    assert sum(one.n_iter for one in path[1:]) <= sum(one.n_iter for one in alone[1:])


def test_a_callback_stops_it(make_problem):
    problem = make_problem(n=200, p=20, c=2)
    seen = []
    solution = BlockCoordinateDescent(tol=0).solve(
        problem, 0.01 * problem.alpha_max(), callback=lambda now: seen.append(now) or len(seen) == 3
    )
    assert len(seen) == 3 == len(solution.trace)
    assert solution.status == "stopped by callback"


def test_it_keeps_its_limits(make_problem):
    problem = make_problem(n=200, d=10, p=40, c=2)
    alpha = 1e-3 * problem.alpha_max()
    few = BlockCoordinateDescent(tol=0, max_iter=3).solve(problem, alpha)
    assert few.status == "iteration limit" and few.n_iter <= 3 * 2
    start = time.perf_counter()
    late = BlockCoordinateDescent(tol=0, time_limit=1e-6).solve(problem, alpha)
    assert late.status == "time limit" and time.perf_counter() - start < 30


def test_a_bar_is_shown_if_asked_for(make_problem, capsys):
    problem = make_problem()
    alpha = 0.1 * problem.alpha_max()
    BlockCoordinateDescent(verbose=0).solve(problem, alpha)
    assert capsys.readouterr().err == ""
    BlockCoordinateDescent(verbose=1).solve(problem, alpha)
    assert "BlockCoordinateDescent" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": "nuclear"},
        {"penalty": "none"},
        {"penalty": "neuron", "loss": "multinomial", "c": 3},
        {"penalty": "l1", "loss": "multinomial", "c": 3},
    ],
    ids=str,
)
def test_what_has_no_groups_is_refused(make_problem, options):
    with pytest.raises(ValueError, match="penalties of groups"):
        BlockCoordinateDescent().solve(make_problem(**options), 0.1)


def test_relu_networks_are_refused():
    X = np.random.default_rng(0).standard_normal((20, 4))
    D, G = activation_patterns(X, sample_gates(4, 6, random_state=0))
    with pytest.raises(ValueError, match="penalties of groups"):
        BlockCoordinateDescent().solve(ReLUProblem(X, X[:, :1], D, G=G), 0.1)


def test_it_gives_what_the_group_elastic_net_gives(make_problem):
    problem = make_problem(c=2, penalty="gate", fit_intercept=True)
    alpha = 0.1 * problem.alpha_max()
    solver = BlockCoordinateDescent(tol=1e-10)
    same = GroupElasticNetProblem(problem.operator, problem.Y)
    coef = solver.solve(same, alpha).coef
    V = solver.solve(problem, alpha).V
    np.testing.assert_allclose(V.reshape(-1, 2), coef, atol=1e-6)
