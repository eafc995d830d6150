"""Cones of the activation patterns: violations, projections, interior directions and shifts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, nnls

from cvxdistill.solvers import activation_patterns, sample_gates
from cvxdistill.solvers.cones import (
    cone_projection,
    cone_violations,
    interior_directions,
    project_onto_cones,
    shift_into_cones,
)

KINDS = ("gaussian", "repeated rows", "small integers", "opposite rows", "very different lengths")


def patterns(kind, n, d, p, rng):
    """Rows and patterns, among them cones that are a ray, a line, a subspace or only {0}."""
    X = rng.standard_normal((n, d))
    if kind == "repeated rows":
        X[rng.integers(0, n, size=n // 2)] = X[0]
    if kind == "small integers":
        X = np.round(X)
    if kind == "opposite rows":
        X = np.vstack([X, -X[: n // 2]])
    if kind == "very different lengths":
        X *= 10.0 ** rng.integers(-8, 8, size=(n, 1))
    if kind in ("repeated rows", "very different lengths"):
        return X, X @ rng.standard_normal((d, p)) >= 0
    return X, rng.random((len(X), p)) < 0.5


def signs(D, j):
    return np.where(D[:, j], 1.0, -1.0)


def gated_data(n=60, d=5, p=7, seed=0):
    X = np.random.default_rng(seed).standard_normal((n, d))
    D, G = activation_patterns(X, sample_gates(d, p, random_state=seed))
    return X, D, G


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 40),
    d=st.integers(1, 8),
    halves=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_projection_is_that_of_non_negative_least_squares(kind, n, d, halves, seed):
    rng = np.random.default_rng(seed)
    X, D = patterns(kind, n, d, 2, rng)
    W = rng.standard_normal((2 * halves, d, 2))
    projected, multipliers = cone_projection(X, D, W)
    norms = np.linalg.norm(X, axis=1)
    unit = X / np.where(norms > 0, norms, 1)[:, None]
    for j in range(2 * halves):
        for k in range(2):
            A = signs(D, j % 2)[:, None] * unit
            oracle = W[j, :, k] + A.T @ nnls(A.T, -W[j, :, k], maxiter=1000)[0]
            np.testing.assert_allclose(projected[j, :, k], oracle, atol=1e-9)
            pulled = W[j, :, k] + X.T @ (signs(D, j % 2) * multipliers[:, 2 * j + k])
            np.testing.assert_allclose(projected[j, :, k], pulled, atol=1e-9)
    assert multipliers.min() >= 0
    assert cone_violations(X, D, projected).max() <= 1e-11


def test_projection_solves_the_quadratic_programme():
    cvxpy = pytest.importorskip("cvxpy")
    X, D, _ = gated_data()
    W = np.random.default_rng(1).standard_normal((D.shape[1], X.shape[1], 1))
    projected = project_onto_cones(X, D, W)
    for j in range(D.shape[1]):
        v = cvxpy.Variable(X.shape[1])
        inside = cvxpy.multiply(signs(D, j), X @ v) >= 0
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(v - W[j, :, 0])), [inside]).solve(
            solver=cvxpy.CLARABEL
        )
        np.testing.assert_allclose(projected[j, :, 0], v.value, atol=1e-5)


def test_many_rows_are_projected_onto_by_few():
    X, D, G = gated_data(n=6000, d=12, p=3)
    W = G.T[:, :, None] + 0.05 * np.random.default_rng(1).standard_normal((3, 12, 2))
    projected, multipliers = cone_projection(X, D, W)
    assert cone_violations(X, D, projected).max() <= 1e-11
    assert ((multipliers > 0).sum(axis=0) <= 12).all()
    # First-order conditions: complementary to the distance.
    gap = np.einsum("pdc,pdc->pc", projected, projected - W)
    np.testing.assert_allclose(gap, 0, atol=1e-12)


def test_weights_inside_are_returned_bit_for_bit():
    X, D, G = gated_data()
    W = np.concatenate([G.T, np.zeros_like(G.T)])[:, :, None]
    assert (project_onto_cones(X, D, W) == W).all()


def test_a_cone_of_one_point_projects_to_it():
    X = np.vstack([np.eye(3), -np.eye(3)])
    W = np.random.default_rng(0).standard_normal((1, 3, 4))
    assert not project_onto_cones(X, np.ones((6, 1), dtype=bool), W).any()


def test_a_line_is_projected_onto_where_the_cone_has_no_interior():
    X = np.array([[1.0, 0], [-1.0, 0], [2.0, 0], [0, 0]])
    W = np.array([[[3.0], [-2.0]]])
    out = project_onto_cones(X, np.ones((4, 1), dtype=bool), W)
    np.testing.assert_allclose(out[0, :, 0], [0, -2], atol=1e-15)


def test_float32_stays_float32_in_the_weights_memory_order():
    X, D, _ = gated_data()
    W = np.random.default_rng(1).standard_normal((2 * D.shape[1], 5, 2)).astype(np.float32)
    projected = project_onto_cones(X.astype(np.float32), D, W)
    assert projected.dtype == np.float32 and projected.transpose(0, 2, 1).flags.c_contiguous
    assert cone_violations(X.astype(np.float32), D, projected).max() <= 1e-6


def test_row_sources_need_only_slices(rows_only):
    X, D, G = gated_data(n=1500)
    W = np.random.default_rng(1).standard_normal((D.shape[1], 5, 2))
    source = rows_only(X)
    for ours, whole in zip(cone_projection(source, D, W), cone_projection(X, D, W), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-12)
    np.testing.assert_allclose(cone_violations(source, D, W), cone_violations(X, D, W))
    for ours, whole in zip(
        interior_directions(source, D, G), interior_directions(X, D, G), strict=True
    ):
        np.testing.assert_allclose(ours, whole, atol=1e-12)


def test_violation_is_the_largest_relative_one_and_ignores_zero_rows():
    X = np.array([[2.0, 0], [0, 0], [0, 5.0]])
    D = np.array([[True], [False], [False]])
    W = np.array([[[-3.0, 1, 0], [4.0, -1, 0]], [[3.0, -3, 3], [0, 4.0, 4]]])
    expected = [[0.8, 0, 0], [0, 0.8, 0.8]]
    np.testing.assert_allclose(cone_violations(X, D, W), expected)
    np.testing.assert_allclose(cone_violations(X, D, 1e-200 * W), expected)


def test_gates_of_clear_margin_are_their_own_interior_directions():
    X, D, G = gated_data()
    H, margins = interior_directions(X, D, G)
    np.testing.assert_allclose(H, G / np.linalg.norm(G, axis=0))
    scores = np.abs(X @ H) / np.linalg.norm(X, axis=1)[:, None]
    np.testing.assert_allclose(margins, scores.min(axis=0))


@pytest.mark.parametrize("with_gates", [False, True])
def test_largest_margins_solve_the_hard_margin_programme(with_gates):
    cvxpy = pytest.importorskip("cvxpy")
    X, D, G = gated_data()
    H, margins = interior_directions(X, D, G if with_gates else None, best=True)
    np.testing.assert_allclose(np.linalg.norm(H, axis=0), 1)
    unit = X / np.linalg.norm(X, axis=1)[:, None]
    for j in range(D.shape[1]):
        h = cvxpy.Variable(5)
        inside = cvxpy.multiply(signs(D, j), unit @ h) >= 1
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(h)), [inside]).solve(solver=cvxpy.CLARABEL)
        np.testing.assert_allclose(margins[j], 1 / np.linalg.norm(h.value), rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS[:4]),
    n=st.integers(1, 20),
    d=st.integers(1, 5),
    seed=st.integers(0, 10**6),
)
def test_margins_are_zero_exactly_where_a_linear_programme_finds_no_interior(kind, n, d, seed):
    X, D = patterns(kind, n, d, 2, np.random.default_rng(seed))
    H, margins = interior_directions(X, D)
    for j in range(2):
        A = (signs(D, j)[:, None] * X)[X.any(axis=1)]
        strict = linprog(np.zeros(d), A_ub=-A, b_ub=-np.ones(len(A)), bounds=(None, None))
        assert (margins[j] > 0) == (strict.status == 0)
        assert bool(H[:, j].any()) == (margins[j] > 0)
        assert (A @ H[:, j] >= margins[j] * np.linalg.norm(A, axis=1) * (1 - 1e-9)).all()


def test_a_gate_of_the_wrong_pattern_is_replaced():
    X, D, G = gated_data()
    H, margins = interior_directions(X, D, -G)
    assert (margins > 0).all() and ((H.T @ G).diagonal() > 0).all()


def test_the_always_on_gate_gets_a_direction_if_there_is_one():
    X = np.abs(np.random.default_rng(0).standard_normal((20, 3)))
    H, margins = interior_directions(X, np.ones((20, 1), dtype=bool), np.zeros((3, 1)))
    assert margins[0] > 0 and (X @ H > 0).all()


def test_shift_is_the_smallest_that_brings_both_inside():
    X, D, G = gated_data()
    rng = np.random.default_rng(1)
    V, U = rng.standard_normal((2, D.shape[1], 5, 2))
    H, _ = interior_directions(X, D, G)
    V_in, U_in, t = shift_into_cones(X, D, V, U, H)
    np.testing.assert_allclose(V_in - U_in, V - U, atol=1e-12 * t.max())
    assert max(cone_violations(X, D, V_in).max(), cone_violations(X, D, U_in).max()) <= 1e-14
    less = 0.999 * t[:, None, :] * H.T[:, :, None]
    worst = np.maximum(cone_violations(X, D, V + less), cone_violations(X, D, U + less))
    assert (worst > 0).all()
    again = shift_into_cones(X, D, V_in + 1e-9 * H.T[:, :, None], U_in + 1e-9 * H.T[:, :, None], H)
    assert not again[2].any()


def test_a_shift_without_an_interior_names_the_gate():
    X = np.array([[1.0, 0], [-1.0, 0], [0, 1.0]])
    D = np.array([[True, True], [False, True], [True, True]])
    H, margins = interior_directions(X, D)
    assert margins[0] > 0 and margins[1] == 0
    W = np.array([[[1.0], [1.0]], [[1.0], [1.0]]])
    with pytest.raises(ValueError, match="cone of gate 1"):
        shift_into_cones(X, D, W, W, H)
    W[1] = 0
    assert not shift_into_cones(X, D, W, W, H)[2].any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"D": np.ones((60, 2))}, TypeError, "D must be boolean"),
        ({"D": np.ones((59, 2), dtype=bool)}, ValueError, r"D must have shape \(60, p\)"),
        ({"W": np.ones((3, 5, 1))}, ValueError, "Weights must have shape"),
        ({"W": np.ones((2, 4, 1))}, ValueError, "Weights must have shape"),
        ({"W": np.full((2, 5, 1), np.nan)}, ValueError, "Weights contain NaN"),
        ({"W": np.ones((2, 5, 1), dtype=int)}, TypeError, "Weights must be floating-point"),
        ({"X": np.full((60, 5), np.inf)}, ValueError, "X contains NaN"),
    ],
)
@pytest.mark.parametrize("function", [cone_violations, project_onto_cones, cone_projection])
def test_bad_input_is_named(function, change, error, message):
    X, D, _ = gated_data(p=2)
    with pytest.raises(error, match=message):
        function(**{"X": X, "D": D, "W": np.ones((2, 5, 1)), **change})


def test_bad_gates_and_directions_are_named():
    X, D, G = gated_data(p=2)
    with pytest.raises(ValueError, match="G must have shape"):
        interior_directions(X, D, np.vstack([G, G[:1]]))
    with pytest.raises(ValueError, match="G contains NaN"):
        interior_directions(X, D, G * np.nan)
    V = np.ones((2, 5, 1))
    with pytest.raises(ValueError, match=r"V and U must have shape"):
        shift_into_cones(X, D, V, np.ones((4, 5, 1)), G)
    with pytest.raises(ValueError, match=r"H \(d, p\)"):
        shift_into_cones(X, D, V, V, G.T)
