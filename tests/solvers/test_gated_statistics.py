"""The sums over examples: batch by batch, merged, saved, in both types."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import GatedStatistics, evaluate_gates
from cvxdistill.solvers.gated_statistics import SUMS


def data(n=300, d=5, p=4, c=3, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((n, d)), rng.standard_normal((n, c)) + 1
    D = rng.random((n, p)) < 0.5
    D[:, 0] = True
    D[:, -1] = p == 1
    return X.astype(dtype), Y.astype(dtype), D


def assert_same(ours, theirs, **tolerance):
    assert ours.n == theirs.n and ours.dtype == theirs.dtype
    for name in SUMS:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), **tolerance)


@pytest.mark.parametrize("p", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_those_of_the_explicit_matrix(gated_matrix, p, dtype):
    X, Y, D = data(n=5000, p=p, dtype=dtype)
    A, Y64 = gated_matrix(X.astype(float), D), Y.astype(float)
    statistics = GatedStatistics.from_data(X, Y, D)
    tolerance = {"rtol": 1e-12 if dtype is np.float64 else 1e-5, "atol": 1e-12 * len(X)}
    if dtype is np.float32:
        tolerance["atol"] = 1e-6 * len(X)
    np.testing.assert_allclose(statistics.gram, A.T @ A, **tolerance)
    np.testing.assert_allclose(statistics.cross.reshape(-1, 3), A.T @ Y64, **tolerance)
    np.testing.assert_allclose(statistics.feature_sums.ravel(), A.sum(axis=0), **tolerance)
    np.testing.assert_allclose(statistics.target_sums, Y64.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.target_squares, (Y64**2).sum(axis=0), rtol=1e-6)
    assert statistics.gram.dtype == np.float64 and statistics.dtype == dtype
    np.testing.assert_array_equal(statistics.gram, statistics.gram.T)


@settings(max_examples=20, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 299), max_size=4),
    d=st.integers(1, 6),
    p=st.integers(1, 4),
    c=st.integers(1, 3),
)
def test_batches_and_merged_parts_are_one_update(cuts, d, p, c):
    X, Y, D = data(d=d, p=p, c=c)
    once = GatedStatistics(p, d, c).update(X, Y, D)
    streamed, merged = GatedStatistics(p, d, c), GatedStatistics(p, d, c)
    ends = [0, *sorted(set(cuts)), len(X)]
    for a, b in pairwise(ends):
        streamed.update(X[a:b], Y[a:b], D[a:b])
        merged = merged + GatedStatistics.from_data(X[a:b], Y[a:b], D[a:b])
    for other in (streamed, merged):
        other.dtype = once.dtype
        assert_same(other, once, atol=1e-11)


def test_gates_make_the_patterns_themselves_with_a_bias_and_an_always_on_gate():
    X, Y, _ = data()
    G = np.random.default_rng(1).standard_normal((6, 4))
    G[:, 2] = 0
    statistics = GatedStatistics(4, 5, 3, gates=G).update(X, Y)
    assert_same(statistics, GatedStatistics.from_data(X, Y, evaluate_gates(X, G)))
    np.testing.assert_allclose(statistics.feature_sums[2], X.sum(axis=0))


def test_features_of_any_making_are_added_whole(gated_matrix):
    X, Y, D = data()
    A = gated_matrix(X, D)
    expected = GatedStatistics.from_data(X, Y, D)
    flat = GatedStatistics(4, 5, 3).update_features(A, Y)
    cubic = GatedStatistics(4, 5, 3).update_features(A.reshape(-1, 4, 5), Y)
    assert_same(flat, expected, atol=1e-11)
    assert_same(cubic, expected, atol=1e-11)


def test_row_sources_are_read_in_slices(rows_only):
    X, Y, D = data(n=5000)
    assert_same(GatedStatistics.from_data(rows_only(X), Y, D), GatedStatistics.from_data(X, Y, D))


def test_arrays_and_back(tmp_path):
    X, Y, _ = data(dtype=np.float32)
    G = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    statistics = GatedStatistics(4, 5, 3, gates=G).update(X, Y)
    np.savez(tmp_path / "sums.npz", **statistics.arrays())
    loaded = GatedStatistics.from_arrays(np.load(tmp_path / "sums.npz"))
    assert_same(loaded, statistics, rtol=0)
    assert_same(loaded.update(X, Y), statistics.update(X, Y), rtol=0)
    assert repr(loaded) == "GatedStatistics(n=600, d=5, p=4, c=3, float32)"


X, Y, D = data(n=8)
HOLED = X.copy()
HOLED[1, 1] = np.nan
BAD = {
    "no gates": (lambda: GatedStatistics(0, 5, 3), "n_gates must be a positive integer, got 0"),
    "fraction": (lambda: GatedStatistics(2, 5, 1.5), "n_outputs must be a positive .* got 1.5"),
    "gates": (lambda: GatedStatistics(2, 5, 3, gates=np.ones((5, 3))), "n_gates = 2 columns"),
    "long gates": (lambda: GatedStatistics(3, 5, 3, gates=np.ones((7, 3))), r"got \(7, 3\)"),
    "columns": (lambda: GatedStatistics(4, 4, 3).update(X, Y, D), "X must have 4 columns, got 5"),
    "rows": (lambda: GatedStatistics(4, 5, 3).update(X, Y[:5], D), r"Y must have shape \(8, 3\)"),
    "patterns": (lambda: GatedStatistics(4, 5, 3).update(X, Y, D[:, :2]), "D must have shape"),
    "no patterns": (lambda: GatedStatistics(4, 5, 3).update(X, Y), "D must be given"),
    "NaN": (lambda: GatedStatistics(4, 5, 3).update(HOLED, Y, D), "X contains NaN"),
    "features": (lambda: GatedStatistics(4, 5, 3).update_features(X, Y), r"got \(8, 5\)"),
    "missing": (lambda: GatedStatistics.from_arrays({"n": np.array(3)}), "lacks gram, cross"),
    "sizes": (lambda: GatedStatistics(4, 5, 3) + GatedStatistics(4, 5, 2), "same sizes"),
    "other gates": (
        lambda: GatedStatistics(4, 5, 3) + GatedStatistics(4, 5, 3, gates=np.ones((5, 4))),
        "same gates",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_patterns_must_be_boolean():
    with pytest.raises(TypeError, match="D must be boolean, got dtype float64"):
        GatedStatistics(4, 5, 3).update(X, Y, D.astype(float))
