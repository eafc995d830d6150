"""Cone decompositions: gated ReLU weights as differences of weights in the cones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    activation_patterns,
    cone_decomposition,
    sample_gates,
)
from cvxdistill.solvers.cone_decomposition import decompose
from cvxdistill.solvers.cones import cone_violations, interior_directions

METHODS = ("exact", "approximate", "closed-form")


def gated_data(n=60, d=5, p=7, c=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    G = sample_gates(d, p, random_state=seed)
    D, G = activation_patterns(X, np.where((X @ G >= 0).any(axis=0), G, -G))
    return X, D, G, rng.standard_normal((D.shape[1], d, c))


def lengths(V):
    return np.linalg.norm(V, axis=1)


def relu_network(X, V, U):
    return sum(np.maximum(X @ v, 0) - np.maximum(X @ u, 0) for v, u in zip(V, U, strict=True))


def gated_network(X, D, V):
    return sum(D[:, [j]] * (X @ V[j]) for j in range(len(V)))


def shortest_sums(X, D, V):
    """Optima of cvxpy and Clarabel for every gate and output."""
    cvxpy = pytest.importorskip("cvxpy")
    unit = X / np.linalg.norm(X, axis=1)[:, None]
    sums = np.empty((len(V), V.shape[2]))
    for j in range(len(V)):
        B = np.where(D[:, [j]], 1, -1) * unit
        for k in range(V.shape[2]):
            w = V[j, :, k]
            v = cvxpy.Variable(len(w))
            programme = cvxpy.Problem(
                cvxpy.Minimize(cvxpy.norm(v) + cvxpy.norm(v - w)), [B @ v >= np.maximum(B @ w, 0)]
            )
            sums[j, k] = programme.solve(solver=cvxpy.CLARABEL)
    return sums


@pytest.mark.parametrize("n", [4, 60])
def test_exact_decompositions_are_the_shortest_ones(n):
    X, D, G, V = gated_data(n=n)
    result = decompose(X, D, V, G=G)
    np.testing.assert_allclose(
        lengths(result.V) + lengths(result.U), shortest_sums(X, D, V), rtol=1e-6
    )
    assert result.relative_gap is None or result.relative_gap <= 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_a_decomposed_solution_predicts_the_same_as_a_relu_network(method):
    X, D, G, _ = gated_data(n=30, d=40, p=12) if method == "closed-form" else gated_data(n=200)
    Y = np.random.default_rng(1).standard_normal((len(X), 2))
    problem = GatedReLUProblem(X, Y, D)
    alpha = 0.05 * problem.alpha_max()
    solution = RFISTA(tol=1e-6).solve(problem, alpha)
    result = decompose(X, D, solution.V, method=method, G=G)
    Z = gated_network(X, D, solution.V)
    np.testing.assert_allclose(relu_network(X, result.V, result.U), Z, atol=1e-11)
    np.testing.assert_allclose(gated_network(X, D, result.V - result.U), Z, atol=1e-11)
    assert result.norm_growth > 1
    assert np.shares_memory(result.weights, result.V) is False
    np.testing.assert_array_equal(result.weights, np.stack([result.V, result.U]))


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 8),
    c=st.integers(1, 2),
    scale=st.integers(-6, 6),
    nearly_inside=st.sampled_from([None, 1e-12, 1e-9, 1e-6, 1e-3]),
    seed=st.integers(0, 10**6),
)
def test_pairs_are_inside_differ_by_the_weight_and_the_exact_ones_are_shortest(
    n, d, c, scale, nearly_inside, seed
):
    X, D, G, V = gated_data(n, d, 4, c, seed)
    assume((interior_directions(X, D, G)[1] > 1e-7).all())
    if nearly_inside is not None:
        V = G.T[:, :, None] + nearly_inside * V
    V *= 10.0**scale
    V[0] = 0
    total = {}
    for method in METHODS[: 3 if n <= d else 2]:
        result = decompose(X, D, V, method=method, G=G, max_iter=200)
        np.testing.assert_allclose(
            result.V - result.U, V, rtol=0, atol=1e-12 * max(lengths(result.V).max(), 1e-300)
        )
        outside = max(cone_violations(X, D, side).max() for side in (result.V, result.U))
        assert result.violation == outside <= 1e-9
        assert not result.V[0].any() and not result.U[0].any()
        total[method] = lengths(result.V).sum() + lengths(result.U).sum()
        assert total[method] == pytest.approx(result.norm_after)
        assert result.norm_growth >= 1 - 1e-12
        if method == "exact" and result.relative_gap is not None:
            assert result.relative_gap <= 1e-7
    assert total["exact"] <= min(total.values()) * (1 + 1e-7)


def test_weights_inside_a_cone_or_its_negative_stay_whole():
    X, D, G, _ = gated_data()
    V = np.stack([G.T, -2 * G.T], axis=2)
    result = decompose(X, D, V)
    np.testing.assert_array_equal(result.V, np.stack([G.T, 0 * G.T], axis=2))
    np.testing.assert_array_equal(result.U, np.stack([0 * G.T, 2 * G.T], axis=2))
    assert result.norm_growth == 1 and result.relative_gap is None


def test_the_penalty_of_the_approximation_bounds_its_violation_before_the_repair():
    X, D, G, V = gated_data(n=300, d=10)
    before, after = [], []
    for rho in (1e-2, 1e-4):
        result = decompose(X, D, V, method="approximate", G=G, rho=rho, tol=1e-4, max_iter=20_000)
        before.append(result.violation_before_repair)
        after.append(result.norm_after)
        assert result.relative_gap <= 1e-4
        assert result.violation <= 1e-12 < result.violation_before_repair
    assert before[1] < before[0] / 20
    shortest = decompose(X, D, V).norm_after
    assert shortest < after[1] < after[0] and after[1] < 1.02 * shortest


def test_the_approximation_solves_the_penalised_least_squares(monkeypatch):
    X, D, _, V = gated_data(n=40, c=1)
    w, rho = V[0, :, 0] / np.linalg.norm(V[0]), 0.05
    B = np.where(D[:, [0]], 1, -1) * X / np.linalg.norm(X, axis=1)[:, None]

    def objective(v):
        short = np.maximum(np.maximum(B @ w, 0) - B @ v, 0)
        length = np.linalg.norm(v)
        return short @ short / 2 + rho * length, rho * v / length - B.T @ short

    oracle = minimize(objective, w, jac=True, method="BFGS", options={"gtol": 1e-9})
    unrepaired = {}

    def keep(X, D, v, u, H):
        unrepaired["v"] = v[0, :, 0]
        return v, u, None

    monkeypatch.setattr(cone_decomposition, "shift_into_cones", keep)
    decompose(X, D[:, :1], V[:1], method="approximate", rho=rho, tol=1e-10, max_iter=20_000)
    np.testing.assert_allclose(unrepaired["v"], oracle.x, atol=1e-5)


def test_the_closed_form_meets_its_equations():
    X, D, _, V = gated_data(n=8, d=12)
    X[3] = 0
    result = decompose(X, D, V, method="closed-form")
    for j in range(len(V)):
        S = np.where(D[:, [j]], 1, -1)
        np.testing.assert_allclose(S * (X @ result.V[j]), np.maximum(S * (X @ V[j]), 0), atol=1e-12)
        np.testing.assert_allclose(
            S * (X @ result.U[j]), np.maximum(-S * (X @ V[j]), 0), atol=1e-12
        )


def test_the_closed_form_shares_what_no_row_sees():
    # The rows see the first entry of w only, and there v takes all of it.
    X, D = np.eye(2, 3), np.array([[True], [False]])
    w = np.array([[[3.0], [3.0], [4.0]]])
    result = decompose(X, D, w, method="closed-form")
    np.testing.assert_allclose(result.V[0, :, 0], [3, 0, 2])
    np.testing.assert_allclose(result.U[0, :, 0], [0, -3, -2])
    assert result.norm_after == pytest.approx(np.hypot(6, 4))


def test_the_closed_form_asks_for_full_row_rank():
    X, D, _, V = gated_data()
    with pytest.raises(ValueError, match="60 rows that are not zero have rank 5"):
        decompose(X, D, V, method="closed-form")


@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_a_cone_without_interior_is_refused_by_its_gate(method):
    X = np.array([[1.0, 0], [-1.0, 0], [0, 1.0]])
    D = np.array([[True, True], [False, True], [True, True]])
    V = np.array([[[-1.0], [1.0]], [[1.0], [-1.0]]])
    with pytest.raises(ValueError, match=r"Gate 1 \(1 of 2\) has a cone without interior"):
        decompose(X, D, V, method=method)
    V[1] = 0
    assert decompose(X, D, V, method=method).violation == 0


@pytest.mark.parametrize("method", METHODS[:2])
def test_row_sources_decompose_alike(method, rows_only):
    X, D, G, V = gated_data(n=700)
    ours, whole = (decompose(data, D, V, method=method, G=G) for data in (rows_only(X), X))
    np.testing.assert_allclose(ours.V, whole.V, atol=1e-6 * lengths(whole.V).max())


def test_float32_stays_float32():
    X, D, G, V = (a.astype(np.float32) if a.dtype == float else a for a in gated_data())
    result = decompose(X, D, V, G=G)
    assert result.V.dtype == result.U.dtype == np.float32
    assert result.violation <= 1e-6
    np.testing.assert_allclose(result.V - result.U, V, atol=1e-5)


def test_it_says_what_it_did():
    X, D, G, V = gated_data()
    result = decompose(X, D, V, G=G)
    assert str(result).startswith("exact cone decomposition of 7 gates: norm ")
    assert "array" not in repr(result) and "norm_after" in repr(result)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "best"}, ValueError, "method must be one of"),
        ({"rho": 0.0}, ValueError, "rho must be positive"),
        ({"rho": "1"}, TypeError, "rho must be a number"),
        ({"tol": -1.0}, ValueError, "tol must be positive"),
        ({"tol": np.nan}, ValueError, "tol must be positive"),
        ({"max_iter": 0}, ValueError, "max_iter must be a positive integer"),
        ({"V": np.ones((14, 5, 2))}, ValueError, "V must have a block for each of the 7 gates"),
        ({"V": np.ones((7, 4, 2))}, ValueError, "Weights must have shape"),
        ({"V": np.full((7, 5, 2), np.inf)}, ValueError, "Weights contain NaN"),
        ({"D": np.ones((60, 7))}, TypeError, "D must be boolean"),
        ({"X": np.full((60, 5), np.nan)}, ValueError, "X contains NaN"),
        ({"G": np.ones((6, 7))}, ValueError, r"G must have shape \(5, 7\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    X, D, G, V = gated_data()
    with pytest.raises(error, match=message):
        decompose(**{"X": X, "D": D, "V": V, "G": G, **change})
