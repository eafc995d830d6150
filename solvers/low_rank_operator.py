"""What a network of few hidden units meets of its data: two forms with the same methods.

A unit h has a first layer U[h] (d,), an output weight W[h] (c,) and a gate j(h); units are sorted
by gate. With A_j = diag(D[:, j]) X and H[:, h] = A_j(h) U[h], both centred where there is an
intercept,

    hidden   T, that which stands for H
    inner    <H_h, H'_k> / n
    normal   A_j(h)^T (sum_k S[h, k] H_k) / n
    blocks   C_j = A_j^T (Y - H W) / n, of all gates

``GramOperator`` keeps T[h, j] = A_j^T H_h / n instead of H and never sees an example: a product
costs r p d^2 multiply-adds. ``RowsOperator`` keeps H itself, for p d too large for a Gram matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from cvxdistill.solvers.gated_statistics import GatedStatistics
from cvxdistill.solvers.rows import RowSource, row_blocks
from cvxdistill.solvers.threads import run_in_threads

GateSlices = list[tuple[int, slice]]
# Above this many numbers in the eigenbases of all gates, a gate is only scaled by its diagonal.
MOST_BASIS_NUMBERS = 2**28
# Multiplications for which it pays to start threads.
LEAST_IN_THREADS = 2**23


def gate_slices(gate: np.ndarray) -> GateSlices:
    """Each gate in use with the slice of its units, for gates in order."""
    used, start = np.unique(gate, return_index=True)
    ends = [*start[1:], len(gate)]
    return [(int(j), slice(int(a), int(b))) for j, a, b in zip(used, start, ends)]


class LowRankOperator(ABC):
    """What both forms share: sizes, the targets' moments, and the gates' own Gram matrices.

    Attributes
    ----------
    n, d, p, c : int
    dtype : dtype
        Of Hessian products; gradients and values are always float64.
    cross : ndarray of float64, shape (p, d, c)
        A_j^T Y / n, centred.
    feature_means, target_means : ndarray of float64, shapes (p, d) and (c,)
        Zero without an intercept.
    target_square : float
        ||Y||_F^2 / n, centred.
    """

    n: int
    d: int
    p: int
    c: int
    dtype: np.dtype
    cross: np.ndarray
    feature_means: np.ndarray
    target_means: np.ndarray
    target_square: float

    def __init__(self) -> None:
        self._bases: dict[int, tuple[np.ndarray | None, np.ndarray]] = {}

    @abstractmethod
    def hidden(self, U: np.ndarray, units: GateSlices, every_gate: bool = True) -> np.ndarray:
        """T of first layers U (r, d); if not every gate, only for products with units of these."""

    @abstractmethod
    def inner(
        self, U: np.ndarray, T: np.ndarray, other: np.ndarray, units: GateSlices
    ) -> np.ndarray:
        """<H_h, H'_k> / n, of shape (r, r'), from U and T of the one and T' of the other."""

    @abstractmethod
    def normal(self, T: np.ndarray, S: np.ndarray, units: GateSlices) -> np.ndarray:
        """A_j(h)^T (sum_k S[h, k] H_k) / n, of shape (r, d)."""

    @abstractmethod
    def blocks(self, T: np.ndarray, W: np.ndarray) -> np.ndarray:
        """C_j = A_j^T (Y - H W) / n, of shape (p, d, c)."""

    @abstractmethod
    def _own_gram(self, j: int) -> np.ndarray:
        """A_j^T A_j / n, centred."""

    @abstractmethod
    def _own_diagonal(self, j: int) -> np.ndarray:
        """Its diagonal."""

    def eigenbasis(self, j: int) -> tuple[np.ndarray | None, np.ndarray]:
        """Q (d, d) and lambda (d,) with Q diag(lambda) Q^T = A_j^T A_j / n.

        Q is None, and lambda the diagonal, where that would take too much memory.
        """
        cache = self._bases
        if j not in cache:
            if self.p * self.d**2 > MOST_BASIS_NUMBERS:
                cache[j] = None, np.maximum(self._own_diagonal(j), 0)
            else:
                values, Q = np.linalg.eigh(self._own_gram(j).astype(self.dtype))
                cache[j] = np.ascontiguousarray(Q), np.maximum(values, 0)
        return cache[j]


class GramOperator(LowRankOperator):
    """The form by sums. T (r, p, d) holds T[h, j] = A_j^T H_h / n.

    Parameters
    ----------
    statistics : GatedStatistics
        Not copied; centring is a correction of rank one.
    fit_intercept : bool
    """

    def __init__(self, statistics: GatedStatistics, fit_intercept: bool):
        super().__init__()
        s = statistics
        self.n, self.d, self.p, self.c, self.dtype = s.n, s.d, s.p, s.c, s.dtype
        centre = float(fit_intercept)
        self.feature_means = centre * s.feature_sums / s.n
        self.target_means = centre * s.target_sums / s.n
        self.target_square = float((s.target_squares / s.n - self.target_means**2).sum())
        self.cross = s.cross / s.n
        self.cross -= self.feature_means[:, :, None] * self.target_means
        self._gram = s.gram
        self._small: np.ndarray | None = None
        if self.dtype == np.float32:
            self._small = np.empty(s.gram.shape, np.float32)
            mean = self.feature_means.ravel()
            for rows in row_blocks(len(mean), len(mean), np.float64):
                self._small[rows] = s.gram[rows] / s.n - np.outer(mean[rows], mean)

    def _own_gram(self, j: int) -> np.ndarray:
        own, mean = slice(j * self.d, (j + 1) * self.d), self.feature_means[j]
        return self._gram[own, own] / self.n - np.outer(mean, mean)

    def _own_diagonal(self, j: int) -> np.ndarray:
        return np.diagonal(self._own_gram(j))

    def hidden(self, U: np.ndarray, units: GateSlices, every_gate: bool = True) -> np.ndarray:
        """T of first layers U (r, d); blocks of gates not in use stay unset if not every gate."""
        exact = self._small is None or U.dtype == np.float64
        gram = self._gram if exact else self._small
        assert gram is not None
        T = np.empty((len(U), self.p, self.d), dtype=U.dtype)

        def fill(gates: list[int]) -> None:
            for k, own in units:
                rows = gram[k * self.d : (k + 1) * self.d]
                for j in gates:
                    here = T[own, j]
                    np.matmul(U[own], rows[:, j * self.d : (j + 1) * self.d], out=here)
                    if exact:
                        here /= self.n
                        here -= np.outer(U[own] @ self.feature_means[k], self.feature_means[j])

        wanted = [*range(self.p)] if every_gate else [j for j, _ in units]
        if len(U) * len(wanted) * self.d**2 < LEAST_IN_THREADS:
            fill(wanted)
        else:
            run_in_threads(fill, wanted)
        return T

    def inner(
        self, U: np.ndarray, T: np.ndarray, other: np.ndarray, units: GateSlices
    ) -> np.ndarray:
        """<H_h, H'_k> / n of shape (r, r'), from U of the one and T' of the other."""
        products = np.empty((len(U), len(other)), dtype=U.dtype)
        for j, own in units:
            np.matmul(U[own], other[:, j].T, out=products[own])
        return products

    def normal(self, T: np.ndarray, S: np.ndarray, units: GateSlices) -> np.ndarray:
        """A_j(h)^T (sum_k S[h, k] H_k) / n, of shape (r, d)."""
        result = np.empty((len(S), self.d), dtype=T.dtype)
        for j, own in units:
            np.matmul(S[own], T[:, j], out=result[own])
        return result

    def blocks(self, T: np.ndarray, W: np.ndarray) -> np.ndarray:
        """C_j = A_j^T (Y - H W) / n, of shape (p, d, c)."""
        C = T.reshape(len(W), self.p * self.d).T @ W
        return np.subtract(self.cross, C.reshape(self.cross.shape), out=C.reshape(self.cross.shape))


class RowsOperator(LowRankOperator):
    """The form by examples. T (n, r) is H itself.

    Parameters
    ----------
    X : row source of shape (n, d)
    Y : ndarray of shape (n, c)
    D : ndarray of bool, shape (n, p)
    fit_intercept : bool
    """

    def __init__(self, X: RowSource, Y: np.ndarray, D: np.ndarray, fit_intercept: bool):
        super().__init__()
        self.X, self.D, self.fit_intercept = X, D, fit_intercept
        (self.n, self.d), self.p, self.c = X.shape, D.shape[1], Y.shape[1]
        self.dtype = np.dtype(np.float32 if X.dtype == np.float32 else np.float64)
        centre = float(fit_intercept)
        self.target_means = centre * Y.mean(axis=0, dtype=np.float64)
        self.Y = Y
        self.feature_means = np.zeros((self.p, self.d))
        self.cross = np.zeros((self.p, self.d, self.c))
        self._diagonals = np.zeros((self.p, self.d))
        self.target_square = 0.0
        for rows, x in self._rows(np.float64):
            if not np.isfinite(x).all():
                raise ValueError("X contains NaN or infinity.")
            R = Y[rows] - self.target_means
            self.target_square += float(np.einsum("nc,nc->", R, R)) / self.n
            self.cross += self._adjoint(x, R, rows) / self.n
            self.feature_means += D[rows].T.astype(np.float64) @ x / self.n
            self._diagonals += D[rows].T.astype(np.float64) @ x**2 / self.n
        self.feature_means *= centre
        self._diagonals -= self.feature_means**2

    def _rows(self, dtype: Any) -> Iterator[tuple[slice, np.ndarray]]:
        for rows in row_blocks(self.n, 4 * self.d, dtype):
            yield rows, np.asarray(self.X[rows], dtype=dtype)

    def _adjoint(self, x: np.ndarray, R: np.ndarray, rows: slice) -> np.ndarray:
        return np.stack([x[on].T @ R[on] for on in self.D[rows].T])

    def _own_gram(self, j: int) -> np.ndarray:
        gram = np.zeros((self.d, self.d))
        for rows, x in self._rows(self.dtype):
            on = x[self.D[rows, j]]
            gram += on.T @ on
        return gram / self.n - np.outer(self.feature_means[j], self.feature_means[j])

    def _own_diagonal(self, j: int) -> np.ndarray:
        return self._diagonals[j]

    def hidden(self, U: np.ndarray, units: GateSlices, every_gate: bool = True) -> np.ndarray:
        """H of first layers U (r, d), centred with an intercept."""
        H = np.empty((self.n, len(U)), dtype=U.dtype)
        gate = _gates_of(units, len(U))
        for rows, x in self._rows(U.dtype):
            np.matmul(x, U.T, out=H[rows])
            H[rows] *= self.D[rows][:, gate]
        if self.fit_intercept:
            H -= H.mean(axis=0, dtype=np.float64).astype(U.dtype)
        return H

    def inner(
        self, U: np.ndarray, T: np.ndarray, other: np.ndarray, units: GateSlices
    ) -> np.ndarray:
        """<H_h, H'_k> / n of shape (r, r'), from T of the one and T' of the other."""
        return T.T @ other / T.dtype.type(self.n)

    def normal(self, T: np.ndarray, S: np.ndarray, units: GateSlices) -> np.ndarray:
        """A_j(h)^T (sum_k S[h, k] H_k) / n, of shape (r, d)."""
        result = np.zeros((len(S), self.d), dtype=T.dtype)
        gate = _gates_of(units, len(S))
        for rows, x in self._rows(T.dtype):
            M = T[rows] @ S.T
            M *= self.D[rows][:, gate]
            result += M.T @ x
        result /= self.n
        return result

    def blocks(self, T: np.ndarray, W: np.ndarray) -> np.ndarray:
        """C_j = A_j^T (Y - H W) / n, of shape (p, d, c)."""
        C = np.zeros((self.p, self.d, self.c))
        for rows, x in self._rows(np.float64):
            R = self.Y[rows] - self.target_means - T[rows] @ W
            C += self._adjoint(x, R, rows)
        C /= self.n
        return C


def _gates_of(units: GateSlices, r: int) -> np.ndarray:
    gate = np.zeros(r, dtype=int)
    for j, own in units:
        gate[own] = j
    return gate
