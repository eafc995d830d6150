"""Sparse linear students: against scikit-learn, brute force, and what pruning alone keeps."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from cvxdistill.solvers import CentredMoments, GatedStatistics, SparseRidge, sparse_linear


def made(d=12, s=3, n=200, seed=0, noise=0.3, root=None):
    """Correlated features, targets t of them, and the moments of x and y = R^T t."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)) @ (np.eye(d) + 0.4 * rng.standard_normal((d, d))) + 1
    T = X @ rng.standard_normal((d, s)) + noise * rng.standard_normal((n, s)) - 2
    Y = T if root is None else T @ root
    return X, T, moments_of(X, Y)


def moments_of(X, Y):
    return CentredMoments.of(GatedStatistics.from_data(X, Y, np.ones((len(X), 1), dtype=bool)))


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 15),
    s=st.integers(1, 4),
    share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    one_pass=st.booleans(),
)
def test_each_output_is_ridge_regression_on_its_places(d, s, share, seed, one_pass):
    X, T, moments = made(d, s, seed=seed)
    count = max(1, round(share * d * s))
    ridge = SparseRidge(moments, 0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_linear, "MOST_WORK", 0 if one_pass else 1e9)
        fit = ridge.fit(count)
    assert fit.places.sum() == count
    assert not fit.W[~fit.places].any()
    for j in range(s):
        own = fit.places[:, j]
        expected = np.zeros(d)
        intercept = T[:, j].mean()
        if own.any():
            oracle = Ridge(alpha=ridge.alpha * len(X)).fit(X[:, own], T[:, j])
            expected[own], intercept = oracle.coef_, oracle.intercept_
        np.testing.assert_allclose(fit.W[:, j], expected, atol=1e-8)
        assert fit.intercept[j] == pytest.approx(intercept, abs=1e-7)
    assert fit.relative_gap < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_second_stage_is_optimal_brain_surgeon(seed):
    """One by one, by brute force: each time the weight goes without which the rest errs least."""
    _, _, moments = made(7, 1, seed=seed)
    ridge = SparseRidge(moments, 0.01)

    def value(own):
        own = list(own)
        W = np.zeros(7)
        W[own] = np.linalg.solve(ridge.system[np.ix_(own, own)], ridge.xy[own, 0])
        return W @ ridge.system @ W - 2 * W @ ridge.xy[:, 0]

    own = set(range(7))
    for count in range(6, 0, -1):
        own = min((own - {i} for i in own), key=value)
        places = ridge._backward(np.ones((7, 1), dtype=bool)) < count
        assert set(np.flatnonzero(places[:, 0])) == own
        if count == 3:
            best = min(map(value, combinations(range(7), 3)))
            assert value(own) <= best + 0.2 * abs(best)


def test_both_stages_are_better_than_the_first_alone_and_than_magnitudes():
    _, _, moments = made(150, 20, n=1000, noise=1.0)
    ridge = SparseRidge(moments, 1e-3)
    for count in (1, 37, 500, 1501, 2999, 3000):
        assert ridge._one_pass(count).sum() == count
    W = np.linalg.solve(ridge.system, ridge.xy)
    magnitudes = ridge._refitted(sparse_linear._largest(np.abs(W), 900))
    one_pass = ridge._refitted(ridge._one_pass(900))
    both = ridge.fit(900)
    assert both.error(moments) < min(one_pass.error(moments), magnitudes.error(moments))


@pytest.mark.parametrize("count", [5, 20])
def test_errors_count_in_the_metric_of_the_targets(count):
    root = np.random.default_rng(1).standard_normal((3, 3)) * [1, 1, 20]
    X, T, moments = made(root=root)
    fit = SparseRidge(moments, 1e-3, root).fit(count)
    Z, Y = (X @ fit.W + fit.intercept) @ root, T @ root
    expected = ((Z - Y) ** 2).sum() / ((Y - Y.mean(axis=0)) ** 2).sum()
    assert fit.error(moments) == pytest.approx(expected, rel=1e-8)


def test_places_go_where_errors_matter():
    """Two targets alike, of which errors of one count a hundred times."""
    X, T, _ = made(s=1)
    root = np.diag([1.0, 10.0])
    moments = moments_of(X, np.hstack([T, T]) @ root)
    places = SparseRidge(moments, 1e-3, root).fit(8).places.sum(axis=0)
    assert places[1] > places[0]


def test_a_fit_to_shifted_features_is_moved_back():
    X, T, _ = made()
    offset = np.linspace(-3, 2, X.shape[1])
    fit = SparseRidge(moments_of(X - offset, T), 1e-3).fit(9)
    back = fit.shifted(offset)
    np.testing.assert_allclose(
        X @ back.W + back.intercept, (X - offset) @ fit.W + fit.intercept, atol=1e-9
    )


def test_a_sparse_map_is_found():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((500, 40))
    W = np.where(rng.random((40, 6)) < 0.2, rng.standard_normal((40, 6)), 0)
    fit = SparseRidge(moments_of(X, X @ W), 1e-9).fit(int(np.count_nonzero(W)))
    np.testing.assert_array_equal(fit.places, W != 0)
    np.testing.assert_allclose(fit.W, W, atol=1e-6)


def test_dead_features_are_not_kept():
    X, T, _ = made(d=10)
    X[:, 4] = 0
    fit = SparseRidge(moments_of(X, T), 1e-3).fit(20)
    assert not fit.places[4].any()


@pytest.mark.parametrize("count", [0, 37])
def test_counts_that_cannot_be_are_refused(count):
    _, _, moments = made()
    with pytest.raises(ValueError, match="count must lie between 1 and 36"):
        SparseRidge(moments, 1e-3).fit(count)


@pytest.mark.parametrize("alpha", [0, -1, np.inf, np.nan])
def test_alphas_that_cannot_be_are_refused(alpha):
    _, _, moments = made()
    with pytest.raises(ValueError, match="alpha must be positive"):
        SparseRidge(moments, alpha)


def test_one_order_serves_for_all_smaller_counts():
    _, _, moments = made(40, 6)
    ridge = SparseRidge(moments, 1e-3)
    fits = [ridge.fit(count) for count in (100, 60, 10)]
    assert ridge._begun == 200
    for larger, smaller in pairwise(fits):
        assert (larger.places | ~smaller.places).all()
    errors = [fit.error(moments) for fit in fits]
    assert errors == sorted(errors)
