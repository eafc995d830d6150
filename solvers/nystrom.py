"""Conjugate gradients on A + mu I with a randomised Nystrom preconditioner.

References
----------
Frangella, Tropp and Udell 2023, "Randomized Nystrom preconditioning", algorithms 2.1 and 5.1;
Feng, Frangella and Pilanci 2024 (CRONOS), for convex networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cholesky, solve_triangular


@dataclass(frozen=True, repr=False)
class NystromApproximation:
    """U diag(eigenvalues) U^T, the Nystrom approximation of a positive semidefinite matrix.

    Attributes
    ----------
    U : ndarray of shape (size, rank)
        Orthonormal columns.
    eigenvalues : ndarray of shape (rank,)
        Decreasing, not negative.
    """

    U: np.ndarray
    eigenvalues: np.ndarray

    def precondition(self, B: np.ndarray, mu: float) -> np.ndarray:
        """P^-1 B, P = U diag((lambda + mu) / (lambda_rank + mu)) U^T + I - U U^T."""
        factors = (self.eigenvalues[-1] + mu) / (self.eigenvalues + mu) - 1
        return B + self.U @ (factors[:, None] * (self.U.T @ B))


def nystrom_approximation(
    product: Callable[[np.ndarray], np.ndarray],
    size: int,
    rank: int,
    random_state: int | np.random.Generator | None = 0,
) -> NystromApproximation:
    """Approximate a positive semidefinite matrix A from its product with a random matrix.

    Parameters
    ----------
    product : callable
        A B for B of shape (size, rank).
    size : int
    rank : int
        At most ``size``.
    random_state : int, Generator or None, default=0

    Returns
    -------
    NystromApproximation
    """
    rng = np.random.default_rng(random_state)
    omega, _ = np.linalg.qr(rng.standard_normal((size, min(rank, size))))
    Y = product(omega)
    shift = np.sqrt(size) * np.finfo(float).eps * max(np.linalg.norm(Y), np.finfo(float).tiny)
    Y = Y + shift * omega
    gram = omega.T @ Y
    factor = cholesky((gram + gram.T) / 2, lower=True)
    U, S, _ = np.linalg.svd(solve_triangular(factor, Y.T, lower=True).T, full_matrices=False)
    return NystromApproximation(U, np.maximum(S**2 - shift, 0))


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    B: np.ndarray,
    precondition: Callable[[np.ndarray], np.ndarray],
    tolerance: float,
    max_iter: int = 500,
) -> np.ndarray:
    """Solve A X = B for every column of B, until ||B - A X|| <= tolerance ||B|| for each.

    Parameters
    ----------
    product : callable
        A X for X of the shape of B; A symmetric positive definite.
    B : ndarray of shape (size, c)
    precondition : callable
        P^-1 R for R of the shape of B.
    tolerance : float
    max_iter : int, default=500

    Returns
    -------
    ndarray of the shape of B
    """
    X = np.zeros_like(B)
    R = B.copy()
    target = tolerance * np.linalg.norm(B, axis=0)
    S = precondition(R)
    P, inner = S.copy(), np.einsum("sc,sc->c", R, S)
    for _ in range(max_iter):
        if (np.linalg.norm(R, axis=0) <= target).all():
            break
        AP = product(P)
        curvature = np.einsum("sc,sc->c", P, AP)
        step = np.divide(inner, curvature, out=np.zeros_like(inner), where=curvature > 0)
        X += step * P
        R -= step * AP
        S = precondition(R)
        new = np.einsum("sc,sc->c", R, S)
        P = S + np.divide(new, inner, out=np.zeros_like(inner), where=inner > 0) * P
        inner = new
    return X
