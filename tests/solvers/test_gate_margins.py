from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls

from cvxdistill.solvers import attainable_margin, evaluate_gates, nudge_gates, sample_gates

ROUNDING = 1e-12


def angles(X, G):
    """|x . g| / (||x|| ||g||), or the same of (x, 1) and (g, b), without zero rows."""
    if len(G) > X.shape[1]:
        X = np.hstack([X, np.ones((len(X), 1))])
    X, G = X[X.any(axis=1)].astype(float), G.astype(float)
    return np.abs(X @ G) / np.linalg.norm(X, axis=1)[:, None] / np.linalg.norm(G, axis=0)


def through(rows, rng):
    """A gate through the given rows, of any rank."""
    _, s, basis = np.linalg.svd(rows)
    null = basis[(s > 1e-9).sum() :]
    return rng.standard_normal(len(null)) @ null


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.booleans(), st.booleans(), st.integers(0, 10**6))
def test_no_row_is_within_the_margin_afterwards(n, d, bias, grid, seed):
    rng = np.random.default_rng(seed)
    # A grid has zero rows, multiples and equal ones, and gates of integers hit many of them.
    X = rng.integers(-2, 3, (n, d)).astype(float) if grid else rng.standard_normal((n, d))
    G = rng.integers(-2, 3, (d + bias, 8)).astype(float)
    lifted = np.hstack([X, np.ones((n, 1))]) if bias else X
    G = np.column_stack([G, through(lifted[: d + bias - 1], rng), np.zeros(d + bias)])
    nudged = nudge_gates(X, G, random_state=seed)
    zero = ~G.any(axis=0)
    np.testing.assert_array_equal(nudged[:, zero], 0)
    assert angles(X, nudged[:, ~zero]).min(initial=1) >= 1e-5 - ROUNDING
    before = angles(X, G[:, ~zero]).min(axis=0, initial=1)
    unchanged = (nudged == G).all(axis=0)[~zero]
    assert unchanged[before > 1e-5 + ROUNDING].all()
    assert not unchanged[before < 1e-5 - ROUNDING].any()
    np.testing.assert_allclose(np.linalg.norm(nudged, axis=0), np.linalg.norm(G, axis=0))


@pytest.mark.filterwarnings("error")
def test_gates_with_the_margin_and_the_zero_gate_keep_their_numbers():
    X = np.random.default_rng(0).standard_normal((50, 4))
    G = np.hstack([sample_gates(4, 9, always_on=True, random_state=0), X[:1].T * 0])
    G[:, 3] = through(X[:3], np.random.default_rng(1))
    fine = np.arange(11) != 3
    assert angles(X, G[:, 1:10]).min(axis=0)[np.arange(9) != 2].min() > 1e-5
    nudged = nudge_gates(X, G, random_state=0)
    np.testing.assert_array_equal(nudged[:, fine], G[:, fine])
    assert not np.array_equal(nudged[:, 3], G[:, 3])
    np.testing.assert_array_equal(nudge_gates(X, nudged, random_state=1), nudged)


def test_one_tight_row_moves_the_gate_along_it_and_no_further_than_two_margins():
    X = np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    G = np.array([[4e-6], [1.0], [1.0]])
    nudged = nudge_gates(X, G, margin=1e-5)
    u = nudged / np.linalg.norm(nudged)
    np.testing.assert_allclose(nudged[1], nudged[2])
    assert 1.8e-5 <= u[0] <= 2e-5 * (1 + 1e-9)


def test_a_row_on_the_hyperplane_goes_to_either_side_by_two_margins():
    X, G = np.array([[2.0, 0.0, 0.0]]), np.array([[0.0], [1.0], [1.0]])
    moved = [nudge_gates(X, G, random_state=seed) for seed in range(20)]
    sides = [u[0, 0] / np.linalg.norm(u) for u in moved]
    np.testing.assert_allclose(np.abs(sides), 2e-5, rtol=1e-6)
    assert 3 < np.sum(np.array(sides) > 0) < 17
    np.testing.assert_array_equal(moved[7], nudge_gates(X, G, random_state=7))


@pytest.mark.parametrize("seed", range(8))
def test_the_move_is_about_the_least_that_puts_all_tight_rows_on_their_sides(seed):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((200, 12))
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    G = through(X[:7], rng)[:, None]
    g = G / np.linalg.norm(G)
    nudged = nudge_gates(X, G, margin=1e-5, random_state=seed)
    u = nudged / np.linalg.norm(nudged)
    assert angles(X, nudged).min() >= 1e-5
    np.testing.assert_array_equal(np.sign(X[7:] @ g), np.sign(X[7:] @ u))
    # The least change with A change >= target: A^T z, z from the nonnegative least squares of its
    # dual (Lawson and Hanson 1974, chapter 23).
    A = np.sign(unit[:7] @ u) * unit[:7]
    target = 2e-5 * np.ones(7)
    z, _ = nnls(np.vstack([A.T * 1e-5, target]), np.append(np.zeros(12), 1.0))
    residual = np.vstack([A.T * 1e-5, target]) @ z - np.append(np.zeros(12), 1.0)
    least = np.linalg.norm(1e-5 * residual[:12] / residual[12])
    assert np.linalg.norm(u - g) <= 1.05 * least


def test_rows_that_are_equal_or_opposite_to_each_other_can_be_parted_from_the_gate():
    X = np.array(
        [[1.0, 2.0, 0.0]] * 3 + [[-1.0, -2.0, 0.0]] * 2 + [[0.0, 0.0, 1.0], [1.0, 2.0, 1.0]]
    )
    G = np.array([[2.0], [-1.0], [0.0]])
    nudged = nudge_gates(X, G, random_state=0)
    assert angles(X, nudged).min() >= 1e-5
    on = evaluate_gates(X, nudged)[:, 0]
    assert (on[:3] == on[0]).all() and (on[3:5] == ~on[0]).all()


@pytest.mark.parametrize("bias", [False, True])
def test_gates_of_many_rows_are_freed_from_those_that_they_go_through(bias):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30_000, 40))
    # Three in four rows lie in a plane that a gate contains, as rows of one-hot columns do.
    X[:22_500, -1] = 0
    G = np.zeros((40 + bias, 6))
    G[:40, :3] = np.linalg.svd(X[:117].reshape(3, 39, 40))[2][:, -1].T
    G[39, 3:] = 1
    assert (angles(X, G) < 1e-12).sum() > 22_000
    nudged = nudge_gates(X, G, random_state=0)
    assert angles(X, nudged).min() >= 1e-5 - ROUNDING


def test_in_float32_the_patterns_no_longer_depend_on_the_type():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((2000, 20)).astype(np.float32)
    G = np.linalg.svd(X[:190].reshape(10, 19, 20).astype(float))[2][:, -1].T.astype(np.float32)
    double = X.astype(float)
    assert (evaluate_gates(X, G) != (double @ G.astype(float) >= 0)).any()
    nudged = nudge_gates(X, G, random_state=0)
    assert nudged.dtype == np.float32
    assert angles(double, nudged).min() >= 1e-5 - ROUNDING
    np.testing.assert_array_equal(evaluate_gates(X, nudged), double @ nudged.astype(float) >= 0)


def test_scales_of_rows_and_gates_do_not_matter():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 4))
    G = np.column_stack([through(X[k : k + 3], rng) for k in range(5)])
    scaled = X * 10.0 ** rng.uniform(-200, 200, (50, 1))
    lengths = 10.0 ** rng.uniform(-100, 100, 5)
    nudged = nudge_gates(scaled, G * lengths, random_state=0)
    assert angles(X, nudged / lengths).min() >= 1e-5 - ROUNDING
    np.testing.assert_allclose(np.linalg.norm(nudged / lengths, axis=0), np.linalg.norm(G, axis=0))


def test_a_row_source_in_many_blocks_moves_the_gates_of_its_array_alike(rows_only, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 5))
    G = np.column_stack([through(X[k : k + 4], rng) for k in range(6)])
    expected = nudge_gates(X, G, random_state=0)
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    np.testing.assert_allclose(nudge_gates(rows_only(X), G, random_state=0), expected)


def test_a_gate_that_cannot_have_the_margin_is_named():
    turns = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    X = np.column_stack([np.cos(turns), np.sin(turns)])  # 2 pi / 1000 apart: at most pi / 1000 off
    G = np.array([[0.0, 1.0, 1.0], [0.0, 0.3, 0.2]])
    assert angles(X, nudge_gates(X, G[:, 1:], margin=0.001, random_state=0)).min() >= 0.001
    with pytest.raises(ValueError, match=r"gate 1 cannot be moved .* 1000 rows .* margin=0.0035"):
        nudge_gates(X, G, margin=0.0035, random_state=0)


@pytest.mark.parametrize(("n", "d"), [(100_000, 2), (50_000, 10)])
def test_the_attainable_margin_can_be_had(n, d):
    X = np.random.default_rng(0).standard_normal((n, d))
    margin = attainable_margin(n, d)
    assert margin <= 1e-5
    nudged = nudge_gates(X, sample_gates(d, 10, random_state=0), margin=margin, random_state=0)
    assert angles(X, nudged).min() >= margin - ROUNDING


def test_few_rows_leave_room_for_the_margin_asked_for():
    assert attainable_margin(1000, 20) == 1e-5
    assert attainable_margin(10, 20, 1e-3) == 1e-3


X = np.random.default_rng(0).standard_normal((5, 3))
BAD = {
    "margin 0": ({"margin": 0}, r"margin must be a number in \(0, 1\), got 0"),
    "margin 1": ({"margin": 1.0}, "margin .* got 1.0"),
    "margin NaN": ({"margin": np.nan}, "margin .* got nan"),
    "gates of other data": ({"G": np.ones((5, 2))}, r"gates must have shape \(3, p\)"),
    "gates with NaN": ({"G": np.full((3, 2), np.nan)}, "gates contain NaN"),
    "a vector": ({"X": X[0]}, r"X must have shape \(n, d\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changed, message = BAD[case]
    arguments = {"X": X, "G": np.ones((3, 2)), **changed}
    with pytest.raises(ValueError, match=message):
        nudge_gates(**arguments)


def test_rows_of_a_source_that_are_not_finite_are_refused(rows_only):
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        nudge_gates(rows_only(np.where(np.eye(5, 3), np.nan, X)), np.ones((3, 2)))
