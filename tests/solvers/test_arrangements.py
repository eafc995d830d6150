from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from cvxdistill.solvers import (
    ADMM,
    RFISTA,
    GatedReLUProblem,
    ReLUProblem,
    activation_patterns,
    enumerate_gates,
    pattern_count,
    sample_gates,
)


def signs(X, G):
    """The sign vectors of the gates as a set of tuples."""
    return {tuple(column) for column in (X @ G > 0).T}


def regions_by_linear_programming(X):
    """All sign vectors s in {0, 1}^n for which (2 s_i - 1) x_i . u >= 1 has a solution."""
    found = set()
    for pattern in itertools.product([False, True], repeat=len(X)):
        S = np.where(pattern, 1.0, -1.0)[:, None]
        answer = linprog(np.zeros(X.shape[1]), -S * X, -np.ones(len(X)), bounds=(None, None))
        assert answer.status in (0, 2)
        if answer.status == 0:
            found.add(pattern)
    return found


def reflections(name):
    """Normals of the mirrors of a finite reflection group."""
    size = int(name[1]) + (name[0] == "A")
    axes = np.eye(size)
    rows = [axes[i] - axes[j] for i in range(size) for j in range(i)]
    if name[0] != "A":
        rows += [axes[i] + axes[j] for i in range(size) for j in range(i)]
    if name[0] in "BF":
        rows += list(axes)
    if name[0] == "F":
        rows += [np.array([1.0, *rest]) for rest in itertools.product([1.0, -1.0], repeat=3)]
    return np.array(rows)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 25), st.integers(1, 3), st.integers(0, 10**6))
def test_general_position_has_as_many_regions_as_covers_formula(n, d, seed):
    X = np.random.default_rng(seed).standard_normal((n, d))
    G = enumerate_gates(X)
    assert G.shape == (d, pattern_count(n, d))
    assert len(signs(X, G)) == G.shape[1]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 2), st.integers(0, 10**6))
def test_any_position_has_the_regions_that_linear_programming_finds(n, d, largest, seed):
    X = np.random.default_rng(seed).integers(-largest, largest + 1, (n, d)).astype(float)
    rows = X[X.any(axis=1)]
    if len(rows) == 0:
        return
    G = enumerate_gates(X)
    assert signs(rows, G) == regions_by_linear_programming(rows)
    assert G.shape[1] == len(signs(rows, G))


@pytest.mark.parametrize(
    ("name", "order"), [("A3", 24), ("B3", 48), ("A4", 120), ("D4", 192), ("B4", 384), ("F4", 1152)]
)
def test_mirrors_of_a_reflection_group_have_a_region_for_each_element(name, order):
    X = reflections(name)
    G = enumerate_gates(X)
    assert G.shape[1] == len(signs(X, G)) == order


def test_in_the_plane_every_region_is_found_however_many_lines_there_are():
    X = np.random.default_rng(0).standard_normal((500, 2))
    assert len(signs(X, enumerate_gates(X))) == 1000


def test_sampling_finds_no_other_pattern():
    rng = np.random.default_rng(1)
    X = rng.standard_normal((12, 3))
    sampled = signs(X, rng.standard_normal((3, 100_000)))
    exact = signs(X, enumerate_gates(X))
    assert sampled <= exact
    assert len(sampled) > 0.9 * len(exact)  # or the claim would say little


def test_regions_do_not_depend_on_scales_multiples_copies_or_zero_rows():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((9, 3))
    expected = signs(X, enumerate_gates(X))
    scaled = X * [1e6, 1.0, 1e-5] * rng.uniform(1e-8, 1e8, (9, 1))
    assert signs(scaled, enumerate_gates(scaled)) == expected
    padded = np.vstack([X, -X[:4], 3 * X[2:5] / 7, np.zeros((2, 3))])
    G = enumerate_gates(padded)
    assert G.shape[1] == len(expected) and signs(X, G) == expected


def test_only_the_rank_of_the_data_counts():
    rng = np.random.default_rng(3)
    X = rng.standard_normal((10, 2)) @ rng.standard_normal((2, 7))
    G = enumerate_gates(X)
    assert G.shape == (7, pattern_count(10, 2))
    assert len(signs(X, G)) == G.shape[1]


def test_gates_are_unit_vectors_of_largest_margin_in_opposite_pairs():
    cp = pytest.importorskip("cvxpy")
    rng = np.random.default_rng(4)
    X = rng.standard_normal((8, 3)) * [1.0, 3.0, 0.2]
    G = enumerate_gates(X)
    half = G.shape[1] // 2
    np.testing.assert_array_equal(G[:, half:], -G[:, :half])
    np.testing.assert_allclose(np.linalg.norm(G, axis=0), 1, rtol=1e-12)
    unit = X / np.linalg.norm(X, axis=1, keepdims=True)
    for g in G[:, :half:4].T:
        w = cp.Variable(3)
        nearest = cp.Problem(
            cp.Minimize(cp.sum_squares(w)), [cp.multiply(np.sign(unit @ g), unit @ w) >= 1]
        )
        margin = 1 / np.sqrt(nearest.solve(solver="CLARABEL"))
        assert np.abs(unit @ g).min() == pytest.approx(margin, rel=1e-5)


def test_margins_are_not_lost_in_thin_regions():
    X = np.array([[1.0, 0.0, 0.0], [1.0, 1e-6, 0.0], [1.0, 0.0, 1e-6], [0.3, 0.2, 1.0]])
    G = enumerate_gates(X)
    assert signs(X, G) == regions_by_linear_programming(X * [1.0, 1e6, 1e6] / [1.0, 1.0, 1e6])
    assert G.shape[1] == pattern_count(4, 3)


def test_activation_patterns_keep_every_region_but_the_empty_one():
    X = np.column_stack([np.random.default_rng(5).standard_normal((10, 2)), np.ones(10)])
    D, G = activation_patterns(X, enumerate_gates(X))
    assert D.shape[1] == G.shape[1] == pattern_count(10, 3) - 1
    around_the_origin = np.vstack([X, -X.sum(axis=0)])
    D, G = activation_patterns(around_the_origin, enumerate_gates(around_the_origin))
    assert D.shape[1] == G.shape[1] == pattern_count(11, 3)


def test_a_row_source_gives_the_gates_of_its_array(rows_only):
    X = np.random.default_rng(6).standard_normal((7, 3))
    np.testing.assert_array_equal(enumerate_gates(rows_only(X)), enumerate_gates(X))


@pytest.mark.parametrize("seed", range(4))
def test_no_sample_of_gates_beats_all_patterns(seed):
    rng = np.random.default_rng(seed)
    X = np.column_stack([rng.standard_normal((10, 2)), np.ones(10)])
    Y = np.sign(rng.standard_normal(10))
    every, _ = activation_patterns(X, enumerate_gates(X))
    best = GatedReLUProblem(X, Y, every)
    alpha = 0.02 * best.alpha_max()
    optimum = RFISTA(tol=1e-6).solve(best, alpha)
    assert optimum.converged
    for p in (5, 50):
        D, _ = activation_patterns(X, sample_gates(3, p, random_state=seed))
        sampled = RFISTA(tol=1e-6).solve(GatedReLUProblem(X, Y, D), alpha)
        assert optimum.objective - optimum.duality_gap <= sampled.objective
    assert optimum.objective < sampled.objective  # 50 gates are not enough here


@pytest.fixture(scope="module")
def relu_optimum():
    """Data, alpha, and the solution of C-ReLU over all patterns."""
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.standard_normal((8, 2)), np.ones(8)])
    Y = np.sign(rng.standard_normal(8))
    D, G = activation_patterns(X, enumerate_gates(X))
    alpha = 0.03 * GatedReLUProblem(X, Y, D).alpha_max()
    solution = ADMM(tol=1e-4).solve(ReLUProblem(X, Y, D, G=G), alpha)
    assert solution.converged
    return X, Y, alpha, solution


@pytest.mark.parametrize("seed", range(3))
def test_no_sample_of_gates_beats_all_patterns_of_relu_networks(relu_optimum, seed):
    X, Y, alpha, optimum = relu_optimum
    D, G = activation_patterns(X, sample_gates(3, 8, random_state=seed))
    sampled = ADMM(tol=1e-4).solve(ReLUProblem(X, Y, D, G=G), alpha)
    assert optimum.objective - optimum.duality_gap <= sampled.objective
    assert optimum.objective < sampled.objective - sampled.duality_gap  # 8 are not enough here


def test_local_descent_comes_near_the_optimum_over_all_patterns_and_never_below_it(relu_optimum):
    X, Y, alpha, optimum = relu_optimum
    m = 30

    def network(w):
        W1, W2 = w[: 3 * m].reshape(3, m), w[3 * m :]
        H = np.maximum(X @ W1, 0)
        error = (H @ W2 - Y) / len(Y)
        value = len(Y) / 2 * (error @ error) + alpha / 2 * (w @ w)
        G1 = X.T @ (np.outer(error, W2) * (H > 0)) + alpha * W1
        return value, np.concatenate([G1.ravel(), H.T @ error + alpha * W2])

    rng = np.random.default_rng(1)
    starts = rng.standard_normal((10, 4 * m)) / 2
    ends = [minimize(network, w, jac=True, method="L-BFGS-B").fun for w in starts]
    assert optimum.objective - optimum.duality_gap <= min(ends) <= 1.02 * optimum.objective


@pytest.mark.parametrize(
    ("n", "rank", "expected"), [(1, 1, 2), (7, 1, 2), (5, 2, 10), (4, 3, 14), (3, 8, 8), (3, 3, 8)]
)
def test_covers_formula_in_cases_counted_by_hand(n, rank, expected):
    assert pattern_count(n, rank) == expected


def test_covers_formula_obeys_deletion_and_restriction():
    for n, rank in itertools.product(range(2, 30), range(2, 6)):
        assert pattern_count(n, rank) == pattern_count(n - 1, rank) + pattern_count(n - 1, rank - 1)


@pytest.mark.parametrize("arguments", [(0, 1), (3, 0), (2.0, 1), (True, 1), (3, "2")])
def test_counts_need_positive_integers(arguments):
    with pytest.raises(ValueError, match="must be a positive integer"):
        pattern_count(*arguments)


def test_too_many_patterns_are_refused_with_their_bound():
    X = np.random.default_rng(0).standard_normal((40, 10))
    with pytest.raises(ValueError, match=f"up to {pattern_count(40, 10)} patterns"):
        enumerate_gates(X)
    assert enumerate_gates(X[:4, :2], max_patterns=8).shape == (2, 8)
    with pytest.raises(ValueError, match="max_patterns=7"):
        enumerate_gates(X[:4, :2], max_patterns=7)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (np.zeros((3, 2)), "row that is not zero"),
        (np.ones(3), "must have shape"),
        (np.array([[1.0, np.nan]]), "NaN or infinity"),
    ],
)
def test_data_without_an_arrangement_are_refused(X, message):
    with pytest.raises(ValueError, match=message):
        enumerate_gates(X)


@pytest.mark.parametrize("max_patterns", [0, 2.5, True, None])
def test_the_bound_must_be_a_positive_integer(max_patterns):
    with pytest.raises(ValueError, match="max_patterns must be"):
        enumerate_gates(np.eye(2), max_patterns=max_patterns)
