from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from cvxdistill.solvers import (
    attainable_margin,
    evaluate_gates,
    nudge_gates,
    sample_gates,
    sample_pair_gates,
    sample_quantile_gates,
    sample_wedge_gates,
)

LEAST_P_VALUE = 1e-3  # of tests with fixed seeds


def data(n=30, d=4, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def with_ones(X, bias):
    return np.hstack([X, np.ones((len(X), 1))]) if bias else X


def sines(X, G):
    """|x . g| / (||x|| ||g||)."""
    return np.abs(X @ G) / np.linalg.norm(X, axis=1)[:, None] / np.linalg.norm(G, axis=0)


def cross_product(rows):
    """The generalised cross product of d - 1 rows by its cofactors."""
    d = rows.shape[1]
    return np.array([(-1) ** k * np.linalg.det(np.delete(rows, k, axis=1)) for k in range(d)])


def parted_pairs(X, G, bias):
    """For each gate the pairs of rows with respect to which it is the bisector."""
    found = []
    lifted = with_ones(X, bias)
    ends = X if bias else X / np.linalg.norm(X, axis=1, keepdims=True)
    scores = lifted @ G if bias else ends @ G
    for j in range(G.shape[1]):
        direction = G[: X.shape[1], j] / np.linalg.norm(G[: X.shape[1], j])
        pairs = set()
        for a, b in combinations(range(len(X)), 2):
            between = (ends[a] - ends[b]) / np.linalg.norm(ends[a] - ends[b])
            if abs(between @ direction) > 1 - 1e-9 and abs(scores[a, j] + scores[b, j]) < 1e-9:
                pairs.add((a, b))
        found.append(pairs)
    return found


# Biases at quantiles


def test_the_bias_is_minus_the_midpoint_at_a_quantile_of_the_projections():
    X = data(60)
    G = sample_quantile_gates(X, 40, random_state=3)
    np.testing.assert_array_equal(G[:4], sample_gates(4, 40, random_state=3))
    levels = (np.arange(59) + 0.5) / 59
    for g, b in zip(G[:4].T, G[4], strict=True):
        midpoints = np.quantile(X @ g, levels, method="midpoint")
        assert np.abs(midpoints + b).min() < 1e-12


def test_any_share_of_the_examples_is_as_likely_to_be_on():
    X = data(400, 3)
    share = evaluate_gates(X, sample_quantile_gates(X, 2000, random_state=0)).mean(axis=0)
    assert 0 < share.min() < 0.02 and 0.98 < share.max() < 1
    assert kstest(share, "uniform").pvalue > LEAST_P_VALUE


def test_the_hyperplane_passes_between_examples_also_where_many_are_equal():
    X = np.repeat(data(6, 2), [1, 9, 1, 30, 1, 18], axis=0)
    G = sample_quantile_gates(X, 300, random_state=0)
    D = evaluate_gates(X, G)
    assert D.any(axis=0).all() and not D.all(axis=0).any()
    scores = X @ G[:2] + G[2]
    nearest_above = np.where(D, scores, np.inf).min(axis=0)
    nearest_below = np.where(D, -np.inf, scores).max(axis=0)
    np.testing.assert_allclose(nearest_above, -nearest_below)


def test_quantiles_of_many_examples_are_those_of_a_part_of_them(monkeypatch):
    X = data(3000, 3)
    monkeypatch.setattr("cvxdistill.solvers.data_gates.MOST_NUMBERS", 1)
    G = sample_quantile_gates(X, 500, random_state=0)
    share = evaluate_gates(X, G).mean(axis=0)
    assert kstest(share, "uniform").pvalue > LEAST_P_VALUE


# Pairs


@pytest.mark.parametrize("bias", [False, True])
def test_each_gate_bisects_a_pair_of_examples_with_different_labels(bias):
    X, labels = data(), np.arange(30) % 3
    G = sample_pair_gates(X, labels, 25, bias=bias, margin=None, random_state=0)
    assert G.shape == (4 + bias, 25)
    for pairs, on in zip(parted_pairs(X, G, bias), evaluate_gates(X, G).T, strict=True):
        ((a, b),) = pairs
        assert labels[a] != labels[b] and on[a] != on[b]


@pytest.mark.parametrize(
    "Y",
    [
        np.repeat([0, 1, 7], [1, 2, 3]),
        np.repeat([7.5, 7.5, -2.0], [1, 2, 3]),
        np.repeat([0.1, 0.4, 0.7], [3, 2, 1]),
        np.repeat(["a", "b", "c"], [1, 2, 3]),
        np.repeat(np.array(["a", "b", "c"], dtype=object), [1, 2, 3])[:, None],
        np.repeat([False, False, True], [1, 2, 3]),
    ],
    ids=["integers", "two numbers", "three numbers", "text", "objects", "booleans"],
)
def test_all_pairs_of_different_labels_are_equally_likely(Y):
    X = data(6, 3)
    G = sample_pair_gates(X, Y, 3000, margin=None, random_state=0)
    drawn = [min(pairs) for pairs in parted_pairs(X, G, bias=False)]
    different = [(a, b) for a, b in combinations(range(6), 2) if np.all(Y[a] != Y[b])]
    counts = [drawn.count(pair) for pair in different]
    assert sum(counts) == 3000
    assert chisquare(counts).pvalue > LEAST_P_VALUE
    # and either of the two may be the one that is on
    first_on = evaluate_gates(X, G)[[pair[0] for pair in drawn], np.arange(3000)]
    assert chisquare([first_on.sum(), 3000 - first_on.sum()]).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("dtype", [int, np.float32])
def test_one_hot_targets_part_each_class_from_the_others(dtype):
    X, classes = data(12, 3), np.arange(12) % 4
    G = sample_pair_gates(X, np.eye(4, dtype=dtype)[classes], 60, margin=None, random_state=0)
    drawn = [min(pairs) for pairs in parted_pairs(X, G, bias=False)]
    assert all(classes[a] != classes[b] for a, b in drawn)
    assert {frozenset(classes[list(pair)]) for pair in drawn} == {
        frozenset(pair) for pair in combinations(range(4), 2)
    }


def test_pairs_of_numbers_differ_by_about_their_median_difference_or_more():
    X, y = data(40, 3), np.random.default_rng(1).standard_cauchy(40)
    G = sample_pair_gates(X, y, 200, bias=True, margin=None, random_state=0)
    drawn = [abs(y[a] - y[b]) for (a, b) in map(min, parted_pairs(X, G, bias=True))]
    differences = [abs(y[a] - y[b]) for a, b in combinations(range(40), 2)]
    assert np.quantile(differences, 0.35) < min(drawn) < np.quantile(differences, 0.65)
    assert max(drawn) > np.quantile(differences, 0.95)


def test_a_rare_target_is_always_one_of_the_pair():
    X, y = data(500, 3), np.zeros(500)
    y[77] = 1e-3
    G = sample_pair_gates(X, y, 20, margin=None, random_state=0)
    scores = X @ G / np.linalg.norm(X, axis=1)[:, None]
    others = np.delete(np.abs(scores + scores[77]), 77, axis=0)
    assert others.min(axis=0).max() < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_pairs_that_no_hyperplane_parts_are_replaced(bias):
    X = np.repeat(data(2, 3), [30, 1], axis=0)
    X[29] *= -1
    X[:29] *= 1 if bias else np.linspace(1, 2, 29)[:, None]
    X[28] = 0
    y = np.arange(31)
    G = sample_pair_gates(X, y, 40, bias=bias, random_state=0)
    assert G.shape == (3 + bias, 40) and np.isfinite(G).all()
    D = evaluate_gates(X, G)
    # Without a bias the row of zeros, which is always on, is in no pair.
    kept = np.arange(31) if bias else np.delete(np.arange(31), 28)
    assert D[kept].any(axis=0).all() and not D[kept].all(axis=0).any()
    if not bias:
        G = sample_pair_gates(X, y, 40, margin=None, random_state=0)
        assert all(parted_pairs(X[[0, 29, 30]], G, bias))


@pytest.mark.parametrize(
    ("X", "bias", "reason"),
    [
        (np.ones((4, 2)), True, "equal"),
        (np.outer([1.0, 2, 3, 0], [1.0, 2]), False, "parallel or zero"),
    ],
)
def test_too_few_pairs_are_an_error(X, bias, reason):
    with pytest.raises(ValueError, match=f"Found only 0 of 5 gates .* rows that are {reason}"):
        sample_pair_gates(X, np.arange(4), 5, bias=bias)


# Wedges


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 5), st.booleans(), st.integers(0, 10**6))
def test_a_wedge_gate_is_the_cross_product_of_the_rows_that_it_goes_through(d, bias, seed):
    X = data(25, d, seed)
    G = sample_wedge_gates(X, 5, bias=bias, margin=None, random_state=seed)
    lifted = with_ones(X, bias)
    for g in G.T:
        rows = lifted[np.argsort(np.abs(lifted @ g))[: len(g) - 1]]
        normal = cross_product(rows)
        cosine = g @ normal / np.linalg.norm(g) / np.linalg.norm(normal)
        np.testing.assert_allclose(abs(cosine), 1, rtol=1e-9)
        assert (sines(lifted, g[:, None]) < 1e-12).sum() == len(g) - 1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sketch", ["gaussian", "features"])
def test_a_sketched_gate_goes_through_as_many_rows_as_its_sketch_has_dimensions(sketch, bias):
    X = data(100, 20)
    G = sample_wedge_gates(
        X, 8, bias=bias, sketch=sketch, sketch_size=6, margin=None, random_state=0
    )
    on_hyperplane = sines(with_ones(X, bias), G) < 1e-12
    np.testing.assert_array_equal(on_hyperplane.sum(axis=0), 5 + bias)
    np.testing.assert_array_equal((G[:20] != 0).sum(axis=0), 6 if sketch == "features" else 20)
    assert len({tuple(np.flatnonzero(column)) for column in on_hyperplane.T}) == 8
    assert np.linalg.matrix_rank(G[:20]) == 8


def test_a_sketch_as_large_as_the_data_is_none():
    X = data(50, 7)
    expected = sample_wedge_gates(X, 5, sketch=None, random_state=0)
    for options in ({}, {"sketch_size": 7}, {"sketch": "features", "sketch_size": 9}):
        np.testing.assert_array_equal(sample_wedge_gates(X, 5, random_state=0, **options), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sketch_size", [4, 7, 8])
def test_in_data_of_low_rank_a_gate_does_not_contain_everything(sketch_size, dtype):
    rng = np.random.default_rng(0)
    X = (rng.standard_normal((60, 5)) @ rng.standard_normal((5, 8))).astype(dtype)
    G = sample_wedge_gates(X, 10, sketch_size=sketch_size, margin=None, random_state=0)
    on_hyperplane = sines(X.astype(float), G.astype(float)) < 1e-5
    np.testing.assert_array_equal(on_hyperplane.sum(axis=0), min(sketch_size, 5) - 1)


def test_sizes_of_rows_and_columns_do_not_matter_to_a_wedge():
    X = data(40, 4)
    sizes = np.array([1e-12, 1.0, 1e6, 1e12])
    row_sizes = 10.0 ** np.random.default_rng(1).uniform(-9, 9, (40, 1))
    G = sample_wedge_gates(X, 6, margin=None, random_state=0)
    scaled = sample_wedge_gates(row_sizes * X * sizes, 6, margin=None, random_state=0)
    unit = scaled * sizes[:, None] / np.linalg.norm(scaled * sizes[:, None], axis=0)
    np.testing.assert_allclose(np.abs(np.sum(unit * G / np.linalg.norm(G, axis=0), axis=0)), 1)


def test_either_side_of_a_wedge_is_as_likely_to_be_on():
    X = np.abs(data(100, 3))
    G = sample_wedge_gates(np.column_stack([X, np.ones(100)]), 2000, random_state=0)
    positive = int((G[3] > 0).sum())
    assert chisquare([positive, 2000 - positive]).pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_there_is_a_wedge_gate_of_however_few_rows(n, bias):
    X = data(n, 3)
    G = sample_wedge_gates(X, 4, bias=bias, random_state=0)
    assert sines(with_ones(X, bias), G).min() >= 1e-5 * (1 - 1e-9)


# Both


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["pairs", "wedge", "exact wedge"])
def test_gates_from_the_data_keep_a_margin_to_it(kind, dtype, bias):
    # One-hot columns, equal rows and rows of zeros among others.
    rng = np.random.default_rng(0)
    X = np.hstack([data(400, 3), np.eye(40)[rng.integers(0, 40, 400)]]).astype(dtype)
    X[10:20] = X[0]
    X[20] = 0
    options = {"bias": bias, "random_state": 0}
    if kind == "pairs":
        G = sample_pair_gates(X, rng.integers(0, 2, 400), 30, **options)
    else:
        sketch = "gaussian" if kind == "wedge" else None
        G = sample_wedge_gates(X, 30, sketch=sketch, sketch_size=8, **options)
    lifted = with_ones(X.astype(float), bias)
    assert sines(lifted[lifted.any(axis=1)], G.astype(float)).min() >= 1e-5 * (1 - 1e-9)
    np.testing.assert_array_equal(nudge_gates(X, G), G)


def test_a_margin_can_be_asked_for():
    X = data(50, 10)
    assert sines(X, sample_wedge_gates(X, 5, margin=1e-3, random_state=0)).min() >= 1e-3
    assert sines(X, sample_pair_gates(X, X[:, 0], 5, margin=1e-3, random_state=0)).min() >= 1e-3


def test_a_margin_that_so_many_rows_leave_no_room_for_is_lowered():
    X = data(500, 3)
    least = attainable_margin(500, 3, margin=0.1)
    assert least < 1e-3
    assert sines(X, sample_wedge_gates(X, 5, margin=0.1, random_state=0)).min() >= least
    with pytest.raises(ValueError, match="gate 0 cannot be moved"):
        nudge_gates(X, sample_wedge_gates(X, 5, random_state=0), margin=0.1)


X = data(4, 2)
BAD = {
    "no gates": (lambda: sample_wedge_gates(X, 0), "n_gates must be a positive integer, got 0"),
    "unknown sketch": (
        lambda: sample_wedge_gates(X, 3, sketch="srht"),
        r"sketch must be one of \['gaussian', 'features'\] or None, got 'srht'",
    ),
    "no sketch": (
        lambda: sample_wedge_gates(X, 3, sketch_size=0),
        "sketch_size must be a positive integer, got 0",
    ),
    "only zeros": (lambda: sample_wedge_gates(0 * X, 3), "X must have a row that is not zero"),
    "NaN": (lambda: sample_quantile_gates(X * np.nan, 3), "X contains NaN or infinity"),
    "fewer targets": (
        lambda: sample_pair_gates(X, [0, 1], 3),
        r"Y must have shape \(4,\) .* \(2,\)",
    ),
    "equal labels": (
        lambda: sample_pair_gates(X, ["a"] * 4, 3),
        "Y must hold different targets, got 4 equal ones",
    ),
    "equal targets": (
        lambda: sample_pair_gates(X, np.ones(4), 3),
        "Y must hold different targets, got 4 equal ones",
    ),
    "infinite targets": (
        lambda: sample_pair_gates(X, [0, 1, 2, np.inf], 3),
        "Y contains NaN or infinity",
    ),
    "columns of text": (
        lambda: sample_pair_gates(X, np.full((4, 2), "a"), 3),
        "Y must hold numbers, or labels in one column, got dtype <U1",
    ),
    "negative margin": (
        lambda: sample_pair_gates(X, np.arange(4), 3, margin=-1e-5),
        r"margin must be a number in \(0, 1\), got -1e-05",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_rows_of_a_source_that_are_not_finite_are_refused(rows_only):
    with pytest.raises(ValueError, match="X contains NaN or infinity"):
        sample_wedge_gates(rows_only(X * np.nan), 3)
