"""The factored programme against cvxpy, R-FISTA, finite differences, and itself in another form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cvxdistill.solvers.threads
from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    GatedStatistics,
    LowRankNewton,
    LowRankProblem,
    Neurons,
    low_rank_operator,
    weights_from_neurons,
)
from cvxdistill.solvers.low_rank_newton import Hessian, gradient, step_length
from cvxdistill.solvers.low_rank_problem import Factors, SingularPairs, balanced, leading_pairs


def data(n=60, d=5, p=4, c=4, dtype=np.float64, seed=0):
    """A gated network of few units with noise; gate 0 is always on, the last one never."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    D = X @ rng.standard_normal((d, p)) >= 0
    D[:, 0] = True
    D[:, -1] = p == 1
    H = np.maximum(X @ rng.standard_normal((d, 6)), 0)
    Y = H @ rng.standard_normal((6, c)) + 0.3 * rng.standard_normal((n, c)) + 1
    return X.astype(dtype), Y.astype(dtype), D


def problem(X, Y, D, form="sums", **options):
    if form == "rows":
        return LowRankProblem.from_rows(X, Y, D, **options)
    return LowRankProblem(GatedStatistics.from_data(X, Y, D), **options)


def written_out(X, Y, D, neurons, intercept, alpha):
    """The factored objective from its definition."""
    H = D[:, neurons.gate] * (X.astype(float) @ neurons.W1)
    residual = H @ neurons.W2 + intercept - Y
    return (residual**2).sum() / (2 * len(X)) + alpha * neurons.weight_decay()


@pytest.mark.parametrize("share", [0.3, 0.01, 0.001])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("c", [1, 4])
def test_objective_equals_that_of_cvxpy(solve_with_cvxpy, share, fit_intercept, c):
    X, Y, D = data(c=c)
    for form in ("sums", "rows"):
        ours = problem(X, Y, D, form, fit_intercept=fit_intercept)
        alpha = share * ours.alpha_max()
        solution = LowRankNewton(tol=1e-7).solve(ours, alpha)
        best, _ = solve_with_cvxpy(X, Y, D, alpha, penalty="nuclear", fit_intercept=fit_intercept)
        value = written_out(X, Y, D, solution.neurons, solution.intercept, alpha)
        assert solution.globally_optimal and solution.converged
        assert solution.objective == pytest.approx(best, rel=1e-6)
        assert solution.objective == pytest.approx(value, rel=1e-10)
        assert solution.duality_gap >= solution.objective - best - 1e-8 * best
        assert solution.neurons.gate.max() < D.shape[1] - 1  # the last is never on


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gap_bounds_the_error_where_the_rank_is_capped(solve_with_cvxpy, fit_intercept):
    X, Y, D = data()
    ours = problem(X, Y, D, fit_intercept=fit_intercept)
    alpha = 0.01 * ours.alpha_max()
    best, _ = solve_with_cvxpy(X, Y, D, alpha, penalty="nuclear", fit_intercept=fit_intercept)
    for most in (1, 3, 6):
        solution = LowRankNewton(tol=1e-6, max_neurons=most).solve(ours, alpha)
        error = solution.objective - best
        assert solution.rank <= most and not solution.globally_optimal
        assert solution.status == "stationary with max_neurons"
        assert error > 1e-3 * best  # so that the bound had something to bound
        assert solution.duality_gap >= error - 1e-8 * best
        gap = ours.duality_gap(solution.neurons, alpha)
        assert gap == pytest.approx(solution.duality_gap, rel=1e-8)
        point = ours.evaluate(ours.factors(solution.neurons), alpha)
        for part in gradient(point):
            assert np.abs(part).max() < 0.05 * alpha


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 30),
    d=st.integers(1, 5),
    p=st.integers(1, 4),
    c=st.integers(1, 4),
    share=st.sampled_from([1.5, 0.5, 0.05, 0.005]),
    fit_intercept=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    form=st.sampled_from(["sums", "rows"]),
    duplicates=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_certifies_whatever_the_shapes(
    n, d, p, c, share, fit_intercept, dtype, form, duplicates, seed
):
    X, Y, D = data(n, d, p, c, dtype, seed)
    if duplicates:
        X[:, -1], D[:, -1] = X[:, 0], D[:, 0]
    ours = problem(X, Y, D, form, fit_intercept=fit_intercept)
    alpha = share * ours.alpha_max() + 1e-6
    solution = LowRankNewton(tol=1e-4).solve(ours, alpha)
    assert solution.globally_optimal, solution
    assert solution.relative_gap <= 1e-4
    assert solution.neurons.W1.dtype == dtype and solution.intercept.dtype == dtype
    if share > 1:
        assert solution.rank == 0
    value = written_out(X, Y, D, solution.neurons, solution.intercept, alpha)
    assert solution.objective == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_r_fista_reaches_the_same_objective():
    X, Y, D = data(n=400, d=12, p=6, c=8)
    convex = GatedReLUProblem(X, Y, D, penalty="nuclear", fit_intercept=True)
    ours = problem(X, Y, D)
    assert ours.alpha_max() == pytest.approx(convex.alpha_max(), rel=1e-10)
    alpha = 0.02 * ours.alpha_max()
    theirs = RFISTA(tol=1e-5).solve(convex, alpha)
    solution = LowRankNewton(tol=1e-6).solve(ours, alpha)
    assert theirs.converged and solution.globally_optimal
    assert solution.objective == pytest.approx(theirs.objective, rel=2e-5)
    V = weights_from_neurons(solution.neurons, D.shape[1])
    nuclear = np.linalg.norm(V, "nuc", axis=(1, 2)).sum()
    assert solution.neurons.weight_decay() == pytest.approx(nuclear, rel=1e-10)
    assert convex.objective(V, solution.intercept, alpha) == pytest.approx(solution.objective)
    np.testing.assert_allclose(solution.intercept, theirs.intercept, atol=1e-2)


def test_constant_targets_need_no_units():
    X, Y, D = data()
    solution = LowRankNewton().solve(problem(X, 0 * Y, D), 0.1)
    assert solution.rank == 0 and solution.objective == 0 and solution.globally_optimal
    solution = LowRankNewton().solve(problem(X, 0 * Y + 3, D), 0.1)
    assert solution.rank == 0 and solution.objective == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(solution.intercept, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ill_conditioned_inputs_are_certified_at_small_alpha(dtype):
    rng = np.random.default_rng(0)
    n, d, c = 2000, 40, 16
    Q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    X = (rng.standard_normal((n, d)) * np.logspace(0, -4, d)) @ Q + 2 * Q[0]
    D = X @ rng.standard_normal((d, 4)) >= 0
    D[:, 0] = True
    Y = np.maximum(X @ rng.standard_normal((d, 30)), 0) @ rng.standard_normal((30, c))
    Y += 0.01 * rng.standard_normal(Y.shape)
    ours = problem(X.astype(dtype), Y.astype(dtype), D)
    own = np.linalg.eigvalsh(X.T @ X)
    assert own[-1] / own[0] > 1e8
    solution = LowRankNewton(tol=1e-4).solve(ours, 1e-3 * ours.alpha_max())
    assert solution.globally_optimal
    # The gap from the sums is the gap from the rows in float64.
    exact = problem(X, Y, D, "rows")
    assert exact.duality_gap(solution.neurons, solution.alpha) <= 2e-4 * solution.objective


@pytest.mark.parametrize("form", ["sums", "rows"])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_gradient_and_hessian_products_are_those_of_finite_differences(form, fit_intercept):
    X, Y, D = data()
    ours = problem(X, Y, D, form, fit_intercept=fit_intercept)
    rng = np.random.default_rng(1)
    gate = np.array([0, 0, 1, 2, 2])
    factors = balanced(rng.standard_normal((5, 5)), rng.standard_normal((5, 4)), gate)
    dU, dW = rng.standard_normal((5, 5)), rng.standard_normal((5, 4))
    alpha, h = 0.1, 1e-5

    def at(t):
        return ours.evaluate(Factors(factors.U + t * dU, factors.W + t * dW, gate), alpha)

    point = at(0)
    gU, gW = gradient(point)
    slope = (at(h).objective - at(-h).objective) / (2 * h)
    assert np.sum(gU * dU) + np.sum(gW * dW) == pytest.approx(slope, rel=1e-6)
    none = SingularPairs(np.zeros(0), np.zeros((0, 5)), np.zeros((0, 4)), np.zeros(0, int), alpha)
    HU, HW = Hessian(ours.operator, point, none)((dU, dW))
    for ours_, plus, minus in zip((HU, HW), gradient(at(h)), gradient(at(-h))):
        np.testing.assert_allclose(ours_, (plus - minus) / (2 * h), rtol=1e-5, atol=1e-6)
    clipped = Hessian(ours.operator, point, leading_pairs(point.C, alpha))
    for _ in range(20):
        v = rng.standard_normal((5, 5)), rng.standard_normal((5, 4))
        Hv = clipped(v)
        assert np.sum(v[0] * Hv[0]) + np.sum(v[1] * Hv[1]) > 0
    t = step_length(ours.operator, point, (-gU, -gW))
    values = [
        ours.evaluate(Factors(factors.U - s * gU, factors.W - s * gW, gate), alpha).objective
        for s in (t, 0.999 * t, 1.001 * t, 0.0)
    ]
    assert values[0] == min(values) < values[3]


def test_rows_and_sums_make_the_same_products(rows_only):
    X, Y, D = data(n=3000, d=7)
    sums, rows = problem(X, Y, D).operator, problem(rows_only(X), Y, D, "rows").operator
    assert sums.target_square == pytest.approx(rows.target_square)
    np.testing.assert_allclose(sums.cross, rows.cross, atol=1e-12)
    for j in range(4):
        np.testing.assert_allclose(sums._own_gram(j), rows._own_gram(j), atol=1e-12)
        np.testing.assert_allclose(sums._own_diagonal(j), rows._own_diagonal(j), atol=1e-12)


def test_patterns_that_are_not_used_cost_no_wrong_block():
    X, Y, D = data(n=200, p=6)
    A = problem(X, Y, D).operator
    units = Factors(np.ones((3, 5)), np.ones((3, 4)), np.array([1, 1, 4])).units
    U = np.random.default_rng(0).standard_normal((3, 5))
    whole, part = A.hidden(U, units), A.hidden(U, units, every_gate=False)
    np.testing.assert_allclose(part[:, [1, 4]], whole[:, [1, 4]])


@pytest.mark.parametrize("threads", [1, 2, 9])
@pytest.mark.parametrize("every_gate", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hidden_units_are_the_same_in_threads(monkeypatch, threads, every_gate, dtype):
    X, Y, D = data(n=200, p=6)
    A = problem(X.astype(np.float32), Y.astype(np.float32), D).operator
    units = Factors(np.ones((4, 5)), np.ones((4, 4)), np.array([0, 3, 3, 4])).units
    U = np.random.default_rng(0).standard_normal((4, 5)).astype(dtype)
    H = np.stack([X @ u * D[:, j] for u, j in zip(U, (0, 3, 3, 4), strict=True)])
    masked = [X * D[:, [j]] for j in range(6)]
    wanted = np.stack([(H - H.mean(1, keepdims=True)) @ a / len(X) for a in masked], axis=1)
    monkeypatch.setattr(low_rank_operator, "LEAST_IN_THREADS", 0)
    monkeypatch.setattr(cvxdistill.solvers.threads, "n_threads", lambda: threads)
    gates = slice(None) if every_gate else [0, 3, 4]
    T = A.hidden(U, units, every_gate)
    np.testing.assert_allclose(T[:, gates], wanted[:, gates], rtol=1e-4, atol=1e-4)


def test_a_path_is_warm_started_and_certified():
    X, Y, D = data(n=300, d=8, c=6)
    ours = problem(X, Y, D)
    alphas = ours.alpha_max() * np.array([0.01, 1.0, 0.3, 0.1])
    path = LowRankNewton().path(ours, alphas)
    np.testing.assert_array_equal(path.alphas, np.sort(alphas)[::-1])
    assert path.ranks[0] == 0 and (np.diff(path.ranks) > 0).all()
    assert (path.relative_gaps <= 1e-4).all()
    again = LowRankNewton().solve(ours, path[-1].alpha, warm_start=path[-1])
    assert again.n_iter == 0 and again.rank == path[-1].rank
    few = LowRankNewton(max_neurons=2).solve(ours, path[-1].alpha, warm_start=path[-1].neurons)
    assert few.rank == 2


def test_limits_say_why_it_stopped():
    X, Y, D = data()
    ours = problem(X, Y, D)
    alpha = 0.001 * ours.alpha_max()
    assert LowRankNewton(max_iter=1, tol=1e-8).solve(ours, alpha).status == "iteration limit"
    assert LowRankNewton(time_limit=1e-9, tol=1e-8).solve(ours, alpha).status == "time limit"
    assert LowRankNewton(tol=0).solve(ours, alpha).status in ("no progress", "converged")


X, Y, D = data()
SUMS = GatedStatistics.from_data(X, Y, D)
OURS = LowRankProblem(SUMS)
BAD = {
    "rows": (lambda: LowRankProblem(X), TypeError, "statistics must be GatedStatistics"),
    "empty": (lambda: LowRankProblem(GatedStatistics(1, 1, 1)), ValueError, "no examples"),
    "short Y": (lambda: problem(X, Y[:5], D, "rows"), ValueError, "as many rows as X, got 5"),
    "float D": (lambda: problem(X, Y, 1.0 * D, "rows"), TypeError, "D must be boolean"),
    "short D": (lambda: problem(X, Y, D[:5], "rows"), ValueError, "D must have shape"),
    "alpha": (lambda: LowRankNewton().solve(OURS, -1), ValueError, "alpha must be positive"),
    "text": (lambda: LowRankNewton().solve(OURS, "1"), TypeError, "alpha must be a number"),
    "problem": (lambda: LowRankNewton().solve(SUMS, 1), TypeError, "must be a LowRankProblem"),
    "start": (
        lambda: LowRankNewton().solve(OURS, 1, warm_start=X),
        TypeError,
        "warm_start must be Neurons or a LowRankSolution, got ndarray",
    ),
    "tol": (lambda: LowRankNewton(tol=-1), ValueError, "tol must be a finite number"),
    "units": (lambda: LowRankNewton(max_neurons=0), ValueError, "max_neurons must be a positive"),
    "steps": (lambda: LowRankNewton(max_iter=None), ValueError, "max_iter must be a positive"),
    "gate": (
        lambda: OURS.objective(Neurons(np.ones((5, 1)), np.ones((1, 4)), np.array([9])), 1.0),
        ValueError,
        r"range\(4\)",
    ),
    "network": (
        lambda: OURS.objective(Neurons(np.ones((4, 1)), np.ones((1, 4)), np.array([0])), 1.0),
        ValueError,
        r"W1 of shape \(5, r\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_reprs_are_short():
    assert repr(OURS) == ("LowRankProblem(n=60, d=5, p=4, c=4, form='sums', fit_intercept=True)")
    solution = LowRankNewton().solve(OURS, 0.1 * OURS.alpha_max())
    assert len(repr(solution)) < 400
