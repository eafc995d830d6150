from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from cvxdistill.solvers import (
    GatedOperator,
    HiddenStatistics,
    Neurons,
    hidden_features,
    refit_second_layer,
)


def rows(n=60, m=5, c=3, seed=0):
    rng = np.random.default_rng(seed)
    H = rng.standard_normal((n, m)) * (rng.random((n, m)) < 0.6) + 0.3
    return H, H @ rng.standard_normal((m, c)) + 0.5 * rng.standard_normal((n, c)) + 2


def prior(m=5, c=3):
    rng = np.random.default_rng(7)
    return rng.standard_normal((m, c)), rng.standard_normal(c)


def statistics_of(H, Y, ends=()):
    parts = zip(np.split(H, ends), np.split(Y, ends), strict=True)
    blocks = [HiddenStatistics.of_rows(h, y) for h, y in parts if len(h)]
    return sum(blocks, HiddenStatistics.empty(H.shape[1], Y.shape[1]))


def ridge_regression(H, Y, ridge):
    model = Ridge(alpha=ridge * H.var(axis=0).mean() * len(H), solver="svd").fit(H, Y)
    return model.coef_.T, model.intercept_


def stacked_least_squares(H, Y, ridge, prior, prior_rows, weights=None):
    """Every term of the objective as rows of one least-squares problem."""
    w = np.ones(len(H)) if weights is None else weights
    n, m = w.sum(), H.shape[1]
    mean = w @ H / n
    s = (w @ (H - mean) ** 2 / n).mean()
    W2, b = prior
    eye, ones = np.hstack([np.eye(m), np.zeros((m, 1))]), np.ones((len(H), 1))
    terms = [
        (np.sqrt(w / n)[:, None] * np.hstack([H, ones]), np.sqrt(w / n)[:, None] * Y),
        (np.sqrt((ridge + prior_rows / n) * s) * eye, np.sqrt((ridge + prior_rows / n) * s) * W2),
        (
            np.sqrt(prior_rows / n) * np.append(mean, 1)[None],
            np.sqrt(prior_rows / n) * (mean @ W2 + b)[None],
        ),
    ]
    A, B = (np.vstack(side) for side in zip(*terms, strict=True))
    theta = np.linalg.lstsq(A, B, rcond=None)[0]
    return theta[:-1], theta[-1]


def assert_same_layer(layer, expected, rtol=1e-9):
    for got, want in zip(layer, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("ridge", [1e-6, 1e-4, 0.3])
def test_the_second_layer_is_ridge_regression(ridge):
    H, Y = rows()
    layer = statistics_of(H, Y, [10, 11, 40]).second_layer(ridge)
    assert_same_layer(layer, ridge_regression(H, Y, ridge))


def test_without_a_ridge_it_is_least_squares():
    H, Y = rows()
    theta = np.linalg.lstsq(np.hstack([H, np.ones((len(H), 1))]), Y, rcond=None)[0]
    assert_same_layer(statistics_of(H, Y, [25]).second_layer(0.0), (theta[:-1], theta[-1]))


@pytest.mark.parametrize("prior_rows", [0.0, 4.0, 500.0])
@pytest.mark.parametrize("ridge", [0.0, 1e-2])
def test_a_prior_is_one_more_term_of_the_least_squares(ridge, prior_rows):
    H, Y = rows()
    layer = statistics_of(H, Y, [31]).second_layer(ridge, prior(), prior_rows)
    assert_same_layer(layer, stacked_least_squares(H, Y, ridge, prior(), prior_rows))


def test_one_row_moves_the_intercept_alone_and_by_no_more_than_its_share():
    H, Y = rows(n=1)
    W2, b = prior()
    layer = statistics_of(H, Y).second_layer(1e-4, prior(), 9.0)
    assert_same_layer(layer, (W2, b + (Y - H @ W2 - b)[0] / 10))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), max_size=12), st.permutations(range(60)))
def test_neither_the_number_nor_the_order_of_batches_matters(ends, order):
    H, Y = rows()
    whole = HiddenStatistics.of_rows(H, Y)
    parts = statistics_of(H[order], Y[order], sorted(ends))
    assert parts.n == 60
    for name, array in whole.arrays().items():
        np.testing.assert_allclose(parts.arrays()[name], array, atol=1e-10, err_msg=name)
    assert_same_layer(parts.second_layer(), whole.second_layer())


def test_large_means_cost_no_digits():
    H, Y = rows(n=2000)
    far_H, far_Y = H + 1e6, Y - 1e6
    expected = ridge_regression(far_H - 1e6, far_Y + 1e6, 1e-4)
    layer = statistics_of(far_H, far_Y, range(100, 2000, 100)).second_layer(1e-4)
    np.testing.assert_allclose(layer[0], expected[0], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(
        (far_H - 1e6) @ layer[0] + (1e6 * layer[0].sum(axis=0) + layer[1] + 1e6),
        H @ expected[0] + expected[1],
        atol=1e-7,
    )
    raw = far_H.T @ far_H / 2000 - np.outer(far_H.mean(axis=0), far_H.mean(axis=0))
    assert np.abs(raw - np.cov(H.T, bias=True)).max() > 1e-5, "raw sums would do as well"


@pytest.mark.parametrize("ridge", [0.0, 1e-12, 1e-4])
def test_dead_constant_and_dependent_units_are_no_trouble(ridge):
    H, Y = rows()
    H = np.hstack([H, np.zeros((60, 2)), np.full((60, 1), 3.0), H[:, :2], 7 * H[:, 2:3]])
    W2_0, b_0 = prior(m=11)
    W2, b = statistics_of(H, Y, [20, 40]).second_layer(ridge, (W2_0, b_0))
    np.testing.assert_allclose(W2[5:8], W2_0[5:8], atol=1e-9)
    step = W2 - W2_0
    np.testing.assert_allclose(step[:2], step[8:10], atol=1e-2, err_msg="not the shortest step")
    V, v = ridge_regression(H[:, :5], Y, 1e-12)
    best = np.linalg.norm(H[:, :5] @ V + v - Y)
    assert np.linalg.norm(H @ W2 + b - Y) <= (1 + 1e-4) * best


def test_all_units_dead_leave_the_mean():
    _, Y = rows()
    W2, b = statistics_of(np.zeros((60, 4)), Y, [30]).second_layer()
    np.testing.assert_array_equal(W2, np.zeros((4, 3)))
    np.testing.assert_allclose(b, Y.mean(axis=0))


def test_no_units_leave_the_mean():
    _, Y = rows()
    statistics = statistics_of(np.zeros((60, 0)), Y, [30])
    W2, b = statistics.second_layer()
    assert W2.shape == (0, 3)
    np.testing.assert_allclose(b, Y.mean(axis=0))
    assert statistics.error(W2, b) == pytest.approx(
        np.linalg.norm(Y - b) / np.linalg.norm(Y), rel=1e-12
    )


def test_the_error_is_that_on_the_rows():
    H, Y = rows()
    W2, b = prior()
    wrong = np.linalg.norm(H @ W2 + b - Y) / np.linalg.norm(Y)
    assert statistics_of(H, Y, [13, 50]).error(W2, b) == pytest.approx(wrong, rel=1e-12)


def test_the_error_of_targets_that_are_met_or_zero():
    H, _ = rows()
    W2, b = prior()
    assert statistics_of(H, H @ W2 + b).error(W2, b) < 1e-7
    zero = statistics_of(H, np.zeros((60, 3)))
    assert zero.error(*zero.second_layer(0.0)) == 0


def test_scaled_statistics_are_those_of_weighted_rows():
    H, Y = rows()
    old, new = statistics_of(H[:40], Y[:40], [5]), statistics_of(H[40:], Y[40:])
    both = old.scaled(0.25) + new
    assert both.n == 30
    weights = np.repeat([0.25, 1.0], [40, 20])
    expected = stacked_least_squares(H, Y, 1e-2, prior(), 3.0, weights)
    assert_same_layer(both.second_layer(1e-2, prior(), 3.0), expected)
    W2, b = prior()
    wrong, total = (np.sqrt(weights @ (A**2).sum(axis=1)) for A in (H @ W2 + b - Y, Y))
    assert both.error(W2, b) == pytest.approx(wrong / total, rel=1e-12)


@pytest.mark.parametrize("factor", [0, -1, 1.5, float("nan")])
def test_other_factors_are_refused(factor):
    with pytest.raises(ValueError, match=r"factor must lie in \(0, 1\], got"):
        statistics_of(*rows()).scaled(factor)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_in_float64_whatever_the_rows(dtype):
    H, Y = (A.astype(dtype) for A in rows())
    statistics = statistics_of(H, Y, [30])
    assert {array.dtype for array in statistics.arrays().values()} == {np.dtype(float)}
    expected = ridge_regression(H.astype(float), Y.astype(float), 1e-4)
    assert_same_layer(statistics.second_layer(), expected)


def test_what_is_given_and_what_is_added_stay_as_they_were():
    H, Y = rows()
    copies = H.copy(), Y.copy()
    first, second = statistics_of(H[:30], Y[:30]), statistics_of(H[30:], Y[30:])
    before = {name: array.copy() for name, array in first.arrays().items()}
    (first + second).scaled(0.5).second_layer()
    first.second_layer(1e-3, prior())
    np.testing.assert_array_equal(H, copies[0])
    np.testing.assert_array_equal(Y, copies[1])
    for name, array in first.arrays().items():
        np.testing.assert_array_equal(array, before[name])


def test_arrays_come_back():
    statistics = statistics_of(*rows(), [9])
    again = HiddenStatistics.from_arrays(statistics.arrays())
    assert repr(again) == repr(statistics) == "HiddenStatistics(n=60, m=5, c=3)"
    for name, array in statistics.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    assert again.n == 60 and isinstance(again.n, float) and again.is_finite()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gram", None, "statistics lack gram"),
        ("gram", np.zeros((4, 4)), r"gram must be float64 of shape \(5, 5\), got .* \(4, 4\)"),
        ("cross", np.zeros((5, 3), np.float32), "cross must be float64.*got float32"),
        ("target_squares", np.array([0, np.nan, 1.0]), "target_squares contains NaN"),
        ("gram", -np.eye(5), "must not be negative"),
        ("n", np.array(-1.0), "must not be negative"),
    ],
)
def test_other_arrays_are_refused(name, value, message):
    arrays = statistics_of(*rows()).arrays()
    if value is None:
        del arrays[name]
    else:
        arrays[name] = value
    with pytest.raises(ValueError, match=message):
        HiddenStatistics.from_arrays(arrays)


def test_rows_that_do_not_fit_are_refused():
    H, Y = rows()
    for bad in ((H[:0], Y[:0]), (H, Y[1:]), (H[0], Y), (H, Y[:, 0])):
        with pytest.raises(ValueError, match="H and Y must have shapes"):
            HiddenStatistics.of_rows(*bad)
    with pytest.raises(ValueError, match=r"\(5, 3\) and \(4, 3\)"):
        statistics_of(H, Y) + statistics_of(H[:, :4], Y)
    with pytest.raises(TypeError):
        statistics_of(H, Y) + 1
    with pytest.raises(ValueError, match="at least one row"):
        HiddenStatistics.empty(5, 3).second_layer()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_refitted_second_layer_of_a_network_is_ridge_regression(dtype):
    rng = np.random.default_rng(2)
    X, D = rng.standard_normal((2000, 6)).astype(dtype), rng.random((2000, 4)) < 0.5
    D[:, 3] = False
    Y = (np.abs(X[:, :2]) + 3).astype(dtype)
    W1 = rng.standard_normal((6, 5)).astype(dtype)
    units = Neurons(W1, np.zeros((5, 2), dtype), np.array([0, 1, 1, 2, 3]))
    operator = GatedOperator(X, D)
    refitted, b = refit_second_layer(operator, units, Y, ridge=1e-3)
    assert refitted.W2.dtype == b.dtype == dtype
    H = hidden_features(operator, units).astype(float)
    expected = ridge_regression(H, Y.astype(float), 1e-3)
    assert_same_layer((refitted.W2, b), expected, 1e-5 if dtype == np.float32 else 1e-9)
