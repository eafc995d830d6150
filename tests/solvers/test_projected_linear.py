"""Linear students from moments: against scikit-learn, least squares, the theory of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from cvxdistill.solvers import CentredMoments, GatedStatistics, ProjectedRidge


def made(C=5, T=4, c=6, n=400, seed=0, noise=0.1, rank=None):
    """Correlated channels and the moments of a linear map with noise."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((C, C)) * np.geomspace(1, 0.1, C)
    X = np.einsum("nct,ce->net", rng.standard_normal((n, C, T)), mix) + rng.standard_normal((C, 1))
    W = rng.standard_normal((C * T, c))
    if rank:
        W = np.kron(rng.standard_normal((C, rank)), np.eye(T)) @ rng.standard_normal((rank * T, c))
    X = X.reshape(n, -1)
    Y = X @ W + noise * rng.standard_normal((n, c)) + rng.standard_normal(c)
    return X, Y, moments_of(X, Y)


def moments_of(X, Y):
    return CentredMoments.of(GatedStatistics.from_data(X, Y, np.ones((len(X), 1), dtype=bool)))


def test_the_full_student_is_ridge_regression():
    X, Y, moments = made()
    ridge = ProjectedRidge(moments, 5, 0.03)
    fit = ridge.fit(None, None)
    oracle = Ridge(alpha=ridge.alpha * len(X)).fit(X, Y)
    np.testing.assert_allclose(fit.weights, oracle.coef_.T, atol=1e-9)
    np.testing.assert_allclose(fit.intercept, oracle.intercept_, atol=1e-9)
    assert fit.P is None
    assert fit.W2 is None
    assert ridge.relative_gap < 1e-12


@pytest.mark.parametrize("ranks", [(None, None), (None, 2), (3, None), (2, 3), (5, 6)])
def test_the_error_from_sums_is_that_on_the_rows(ranks):
    X, Y, moments = made()
    ridge = ProjectedRidge(moments, 5, 1e-3)
    fit = ridge.fit(*ranks)
    Z = X @ fit.weights + fit.intercept
    expected = ((Z - Y) ** 2).sum() / ((Y - Y.mean(axis=0)) ** 2).sum()
    assert fit.error(moments) == pytest.approx(expected, rel=1e-8)
    rank = Y.shape[1] if ranks[1] is None else ranks[1]
    assert ridge.errors(ranks[0])[rank] == pytest.approx(expected, rel=1e-8)
    new_X, new_Y, new = made(seed=1)
    expected = ((new_X @ fit.weights + fit.intercept - new_Y) ** 2).sum()
    expected /= ((new_Y - new_Y.mean(axis=0)) ** 2).sum()
    assert fit.error(new) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("ranks", [(None, None), (2, 3)])
def test_a_fit_to_shifted_features_is_moved_back(ranks):
    X, Y, _ = made()
    offset = np.linspace(-3, 2, X.shape[1])
    fit = ProjectedRidge(moments_of(X - offset, Y), 5, 1e-3).fit(*ranks)
    back = fit.shifted(offset)
    wanted = (X - offset) @ fit.weights + fit.intercept
    np.testing.assert_allclose(X @ back.weights + back.intercept, wanted, atol=1e-9)
    assert back.error(moments_of(X, Y)) == pytest.approx(
        fit.error(moments_of(X - offset, Y)), rel=1e-7
    )


def test_a_projection_is_followed_by_ridge_regression_on_what_it_leaves():
    X, Y, moments = made()
    ridge = ProjectedRidge(moments, 5, 0.01)
    fit = ridge.fit(2, None)
    np.testing.assert_allclose(fit.P.T @ fit.P, np.eye(2), atol=1e-10)
    projected = X @ np.kron(fit.P, np.eye(4))
    oracle = Ridge(alpha=ridge.alpha * len(X)).fit(projected, Y)
    np.testing.assert_allclose(fit.W1, oracle.coef_.T, atol=1e-9)


def test_a_low_rank_student_is_the_best_approximation_of_the_fitted_outputs():
    X, _, moments = made()
    ridge = ProjectedRidge(moments, 5, 1e-3)
    centred = (X - X.mean(axis=0)) @ ridge.W
    A, S, B = np.linalg.svd(centred, full_matrices=False)
    fit = ridge.fit(None, 3)
    np.testing.assert_allclose(
        (X - X.mean(axis=0)) @ fit.weights, (A[:, :3] * S[:3]) @ B[:3], atol=1e-6
    )


def test_a_map_that_sees_two_channels_is_found_whole_by_a_projection_to_two():
    _, _, moments = made(C=6, rank=2, noise=0.0)
    ridge = ProjectedRidge(moments, 6, 1e-10)
    assert ridge.fit(2, None).error(moments) < 1e-12
    assert ridge.fit(1, None).error(moments) > 1e-3


@settings(max_examples=40, deadline=None)
@given(C=st.integers(1, 5), T=st.integers(1, 4), c=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_errors_fall_with_the_rank(C, T, c, seed):
    _, _, moments = made(C=C, T=T, c=c, n=50, seed=seed)
    ridge = ProjectedRidge(moments, C, 1e-3)
    for input_rank in [None, *range(1, C)]:
        errors = ridge.errors(input_rank)
        assert len(errors) == c + 1
        assert errors[0] == pytest.approx(1)
        assert (np.diff(errors) < 1e-9).all()
        assert errors[-1] >= ridge.errors(None)[-1] - 1e-3


@settings(max_examples=30, deadline=None)
@given(r1=st.integers(1, 4), r2=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_alternating_least_squares_never_does_worse(r1, r2, seed):
    X, Y, moments = made(seed=seed)
    ridge = ProjectedRidge(moments, 5, 1e-3)
    plain, refined = ridge.fit(r1, r2), ridge.refined(r1, r2)
    assert refined.error(moments) <= plain.error(moments) * (1 + 1e-9)
    Z = X @ refined.weights + refined.intercept
    expected = ((Z - Y) ** 2).sum() / ((Y - Y.mean(axis=0)) ** 2).sum()
    assert refined.error(moments) == pytest.approx(expected, rel=1e-8)
    assert np.linalg.matrix_rank(refined.weights) <= r2
    assert refined.P.shape == (5, r1)


def test_alternating_least_squares_ends_where_no_gradient_is_left():
    X, Y, moments = made(noise=1.0)
    ridge = ProjectedRidge(moments, 5, 1e-9)
    fit = ridge.refined(2, 3, sweeps=2000)
    W = fit.W1 @ fit.W2
    residual = (X - X.mean(axis=0)) @ fit.weights - (Y - Y.mean(axis=0))
    slope = ((X - X.mean(axis=0)).T @ residual).reshape(5, 4, -1)
    gradient = np.einsum("ctk,atk->ca", slope, W.reshape(2, 4, -1))
    scale = np.linalg.norm((X - X.mean(axis=0)).T @ (Y - Y.mean(axis=0))) * np.linalg.norm(W)
    assert np.linalg.norm(gradient) < 1e-4 * scale


def test_dead_channels_and_constant_targets_do_no_harm():
    X, Y, _ = made()
    X.reshape(len(X), 5, 4)[:, 2] = 0
    Y[:] = 7.0
    moments = moments_of(X, Y)
    ridge = ProjectedRidge(moments, 5, 1e-3)
    fit = ridge.fit(3, 2)
    np.testing.assert_allclose(X @ fit.weights + fit.intercept, Y, atol=1e-8)
    assert fit.error(moments) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("channels", "alpha", "message"),
    [(3, 1e-3, "divide"), (0, 1e-3, "divide"), (5, 0, "alpha"), (5, np.inf, "alpha")],
)
def test_bad_settings_are_refused(channels, alpha, message):
    _, _, moments = made()
    with pytest.raises(ValueError, match=message):
        ProjectedRidge(moments, channels, alpha)


def test_statistics_must_be_of_one_gate_and_hold_examples():
    with pytest.raises(ValueError, match="one gate"):
        CentredMoments.of(GatedStatistics(2, 4, 1))
    with pytest.raises(ValueError, match="no examples"):
        CentredMoments.of(GatedStatistics(1, 4, 1))


def test_channels_without_variance_that_rounding_made_negative_do_no_harm():
    """One direction of 1,024 channels, in float32: of the rest rounding is all that is left."""
    rng = np.random.default_rng(0)
    X = np.exp(rng.standard_normal((400, 1))) @ rng.uniform(0.5, 1.5, (1, 1024))
    X = X.astype(np.float32)
    Y = X @ rng.standard_normal((1024, 3), dtype=np.float32)
    moments = moments_of(X, Y)
    ridge = ProjectedRidge(moments, 1024, 1e-3)
    assert np.linalg.eigvalsh(ridge.moments.xx)[0] < 0
    fit = ridge.fit(1, None)
    assert fit.P.shape == (1024, 1)
    assert fit.error(moments) < 1e-4
