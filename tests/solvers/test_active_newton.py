"""Newton's directions against dense solutions with the Hessian as it is written down."""

from itertools import pairwise

import numpy as np
import pytest

from cvxdistill.solvers import covariance_descent
from cvxdistill.solvers.active_newton import (
    DenseColumnsOfGroups,
    HessianFactor,
    direction_from_columns,
    direction_from_gram,
)
from cvxdistill.solvers.covariance_descent import CovarianceDescent
from cvxdistill.solvers.gated_descent import GatedColumnsOfGroups
from cvxdistill.solvers.group_penalties import Penalties


def hessian(H, U, k, r, starts):
    """On the vectorised coefficients (m c,)."""
    m, c = U.shape
    out = np.kron(H, np.eye(c))
    for g, (a, e) in enumerate(pairwise(starts)):
        u = np.zeros((m, c))
        u[a:e] = U[a:e]
        diagonal = np.zeros((m, c))
        diagonal[a:e] = k[g] + r[g]
        out += np.diag(diagonal.ravel()) - k[g] * np.outer(u, u)
    return out


def programme(seed, n, c, sizes=(1, 3, 4, 2)):
    """Columns as rows, and what else a direction takes.

    The last group is not penalised, the second only by its ridge.
    """
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    m = starts[-1]
    AT = rng.standard_normal((m, n))
    U = rng.standard_normal((m, c))
    for a, e in pairwise(starts):
        U[a:e] /= np.linalg.norm(U[a:e])
    k, r = rng.uniform(0.1, 2, len(sizes)), rng.uniform(0.01, 0.1, len(sizes))
    k[[1, -1]] = r[-1] = 0
    return AT, U, k, r, starts, rng.standard_normal((m, c))


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_from_a_gram_matrix(seed, c):
    AT, U, k, r, starts, G = programme(seed, 30, c)
    H = AT @ AT.T / 30
    expected = np.linalg.solve(hessian(H, U, k, r, starts), G.ravel()).reshape(G.shape)
    change = direction_from_gram(H, G, U, k, r, starts)
    assert np.linalg.norm(change - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize("n", [6, 30])
@pytest.mark.parametrize("seed", range(3))
def test_from_columns(seed, n):
    AT, U, k, r, starts, G = programme(seed, n, 1)
    expected = np.linalg.solve(hessian(AT @ AT.T / n, U, k, r, starts), G[:, 0])
    columns = DenseColumnsOfGroups(AT[: starts[-2]], np.diff(starts)[:-1])
    free = AT[starts[-2] :]
    change = direction_from_columns(columns, free, G[:, 0], U[:, 0], k, r, starts)
    assert np.linalg.norm(change - expected) <= 1e-4 * np.linalg.norm(expected)


def test_what_fails_in_single_precision_is_factorised_in_double():
    rng = np.random.default_rng(0)
    # Singular but for less than single precision sees.
    V = rng.standard_normal((400, 3)) * [1e3, 1, 1]
    diagonal, starts = np.full(400, 1e-4), np.arange(401)
    H = V @ V.T
    factor = HessianFactor.of(np.arange(400), H, np.ones(400), np.zeros(400), diagonal, starts)
    assert factor.solve.__self__.factor.dtype == np.float64
    x = rng.standard_normal(400)
    solved = factor.refined(lambda v: H @ v + diagonal * v, x[:, None])[:, 0]
    left = x - H @ solved - diagonal * solved
    assert np.linalg.norm(left) <= 0.03 * np.linalg.norm(x)


def test_an_indefinite_matrix_has_no_factor():
    H, zeros = np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2)
    assert HessianFactor.of(np.arange(2), H, zeros, zeros, zeros, np.arange(3)) is None


@pytest.mark.parametrize("centred", [False, True])
def test_products_with_gated_columns_are_those_of_the_columns(centred):
    rng = np.random.default_rng(0)
    n, d, gates = 50, 4, 3
    X, D = rng.standard_normal((n, d)) + 1, rng.random((n, gates)) < 0.5
    h = rng.uniform(0.5, 2, n)
    root = np.sqrt(h)
    means = (D * h[:, None]).T @ X / h.sum() if centred else np.zeros((gates, d))
    Q = np.linalg.qr(rng.standard_normal((gates, d, d)))[0]
    A = np.concatenate(
        [root[:, None] * (X * D[:, [g]] - means[g]) @ Q[g] for g in range(gates)], axis=1
    )
    columns = GatedColumnsOfGroups(X, D, root, means, Q)
    x, v, w = rng.standard_normal(gates * d), rng.standard_normal(n), rng.uniform(1, 2, gates)
    np.testing.assert_allclose(columns.combine(x), A @ x, atol=1e-12)
    np.testing.assert_allclose(columns.correlate(v), A.T @ v, atol=1e-12)
    np.testing.assert_allclose(columns.gram(), A.T @ A, atol=1e-11)
    for dtype, tol in ((np.float64, 1e-11), (np.float32, 1e-4)):
        outer = columns.outer(w, dtype)
        assert outer.dtype == dtype
        expected = (A * np.repeat(w, d)) @ A.T
        np.testing.assert_allclose(np.tril(outer), np.tril(expected), atol=tol)


@pytest.mark.parametrize("more", [0, 2])
def test_the_factor_of_an_earlier_hessian_serves_a_later_one(more, monkeypatch):
    rng = np.random.default_rng(0)
    m = 40
    A = rng.standard_normal((100, m))
    H = A.T @ A / 100
    B = rng.standard_normal((m, 1))
    B[-4 * more or m :] = 0
    starts = np.arange(0, m + 1, 4)

    def penalties(t):
        return Penalties(starts, np.full(len(starts) - 1, t), np.zeros(len(starts) - 1))

    def direction(descent, alpha):
        active = np.flatnonzero(penalties(alpha).lengths(descent.B) > 0)
        local = penalties(alpha).of(active)
        features = penalties(alpha).features(active)
        P = descent.gradient()[features]
        return features, local, P, descent.newton_direction(features, local, P)

    descent = CovarianceDescent(H, rng.standard_normal((m, 1)), B, 1.0)
    direction(descent, 0.1)
    factor = descent.factor
    # Groups that were zero are not any more.
    descent.B = descent.B + 0.1 * rng.standard_normal((m, 1))
    descent.refresh()
    monkeypatch.setattr(CovarianceDescent, "_stale_work", lambda self, active: 0.0)
    monkeypatch.setattr(covariance_descent, "STALE_TOLERANCE", 1e-6)
    monkeypatch.setattr(covariance_descent, "STALE_STEPS", 100)
    features, local, P, change = direction(descent, 0.09)
    assert descent.factor is factor
    fresh = CovarianceDescent(H, descent.q, descent.B, 1.0)
    exact = fresh.newton_direction(features, local, P)
    assert np.linalg.norm(change - exact) <= 1e-3 * np.linalg.norm(exact)


def test_a_feature_without_curvature_that_is_new_to_a_factor_stays_finite():
    H, zeros = np.eye(2), np.zeros(2)
    factor = HessianFactor.of(np.arange(2), H, zeros, zeros, zeros, np.arange(3))
    solve = factor.restricted(np.arange(3), np.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(solve(np.array([1.0, 2.0, 0.0])), [1, 2, 0], rtol=1e-5)
