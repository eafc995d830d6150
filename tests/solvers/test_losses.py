from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers.losses import SquaredLoss, find_loss

LOSS = SquaredLoss()
SEEDED = given(st.integers(0, 2**20), st.integers(1, 9), st.integers(1, 4))


def draw(seed, n, c, count=3):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((n, c)) for _ in range(count)]


def test_value_is_half_the_mean_squared_row():
    Z, Y = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    assert LOSS.value(Z, Y) == pytest.approx((1 + 4 + 9) / (2 * 2))


@settings(max_examples=25, deadline=None)
@SEEDED
def test_residual_is_minus_n_times_the_gradient(seed, n, c):
    Z, Y, _ = draw(seed, n, c)
    step = 1e-6
    for i in range(n):
        for k in range(c):
            E = np.zeros((n, c))
            E[i, k] = step
            slope = (LOSS.value(Z + E, Y) - LOSS.value(Z - E, Y)) / (2 * step)
            assert LOSS.residual(Z, Y)[i, k] == pytest.approx(-n * slope, abs=1e-6)


@settings(max_examples=25, deadline=None)
@SEEDED
def test_bregman_is_the_error_of_the_first_order_model(seed, n, c):
    Z, Y, W = draw(seed, n, c)
    gradient = -LOSS.residual(Z, Y) / n
    expected = LOSS.value(W, Y) - LOSS.value(Z, Y) - np.vdot(gradient, W - Z)
    assert LOSS.bregman(W, Z, Y) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=25, deadline=None)
@SEEDED
def test_best_intercept_leaves_no_slope(seed, n, c):
    Z, Y, _ = draw(seed, n, c)
    b = LOSS.best_intercept(Z, Y)
    assert b.shape == (c,)
    np.testing.assert_allclose(LOSS.residual(Z + b, Y).sum(axis=0), 0, atol=1e-12)


@settings(max_examples=25, deadline=None)
@SEEDED
def test_fenchel_gap_is_never_negative_and_zero_at_the_residual(seed, n, c):
    Z, Y, theta = draw(seed, n, c)
    gap = LOSS.fenchel_gap(Z, theta, Y)
    pieces = LOSS.value(Z, Y) - LOSS.dual_value(theta, Y) + np.vdot(Z, theta) / n
    assert gap >= 0
    assert gap == pytest.approx(pieces, abs=1e-12)
    assert LOSS.fenchel_gap(Z, LOSS.residual(Z, Y), Y) == pytest.approx(0, abs=1e-15)


@settings(max_examples=25, deadline=None)
@SEEDED
def test_dual_value_is_minus_the_conjugate(seed, n, c):
    """L*(-theta / n) = sup over Z of -<theta, Z> / n - L(Z), attained at Z = Y - theta."""
    Z, Y, theta = draw(seed, n, c)

    def attempt(W):
        return -np.vdot(theta, W) / n - LOSS.value(W, Y)

    assert -LOSS.dual_value(theta, Y) == pytest.approx(attempt(Y - theta), abs=1e-12)
    assert attempt(Z) <= -LOSS.dual_value(theta, Y) + 1e-12


def test_sums_accumulate_in_float64():
    n = 200_000
    Z, Y = np.full((n, 1), 0.1, np.float32), np.zeros((n, 1), np.float32)
    exact = float(np.float32(0.1)) ** 2 / 2
    assert LOSS.value(Z, Y) == pytest.approx(exact, rel=1e-7)
    assert LOSS.best_intercept(Z, Y)[0] == pytest.approx(-0.1, rel=1e-6)


def test_a_loss_is_found_by_name_or_is_itself():
    assert find_loss("squared") == LOSS and find_loss(LOSS) is LOSS
