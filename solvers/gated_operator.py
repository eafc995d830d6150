"""The linear map of the gated ReLU programme, applied without ever forming its matrix.

    forward   Z = sum_j diag(D[:, j]) X V[j]              (p, d, c) -> (n, c)
    adjoint   C[j] = X^T diag(D[:, j]) R                  (n, c) -> (p, d, c)

Each is one matrix product for a block of rows, with the masking and the sum over gates fused in
compiled loops over the block while it is in cache; with several outputs rows that agree on some
gates share their products (``cvxdistill.solvers.pattern_products``). Weights are arrays of shape
(p, d, c) whose memory is ordered (p, c, d), so that both products run without copying them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from cvxdistill.solvers.pattern_products import (
    add_adjoint,
    add_forward,
    adjoint_pays,
    block_rows,
    forward_pays,
)
from cvxdistill.solvers.rows import RowSource, check_rows, even_blocks, row_blocks
from cvxdistill.solvers.threads import n_threads, one_blas_thread, run_in_threads

# Multiply-adds below which a second thread costs more than it brings.
SMALLEST_PARALLEL_WORK = 2_000_000
# What the interpreter does between a product with A and one with A^T, in operations of a matrix
# product, and what masks are worth, in columns of X.
OVERHEAD, MASKING = 3e6, 8


def empty_weights(p: int, d: int, c: int, dtype: Any) -> np.ndarray:
    """Uninitialised weights of shape (p, d, c) in the memory order (p, c, d)."""
    return np.empty((p, c, d), dtype=dtype).transpose(0, 2, 1)


def as_weights(V: Any, dtype: Any) -> np.ndarray:
    """Copy ``V`` of shape (p, d, c) into the memory order (p, c, d)."""
    V = np.asarray(V)
    p, d, c = V.shape
    weights = empty_weights(p, d, c, dtype)
    weights[...] = V
    return weights


def flat_weights(V: np.ndarray) -> np.ndarray:
    """Weights (p, d, c) as the matrix (p c, d)."""
    p, d, c = V.shape
    return np.ascontiguousarray(V.transpose(0, 2, 1)).reshape(p * c, d)


def products_work(n: int, d: int, gates: int, c: int) -> float:
    """Operations of a product with A and one with A^T, masks and the interpreter among them."""
    return 4 * n * (d + MASKING) * gates * c + OVERHEAD


class GatedOperator:
    """The operator A: V -> sum_j diag(D[:, j]) X V[j] and its adjoint.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        float32 or float64, in any memory order.
    D : ndarray of bool, shape (n, p)
        Activation patterns.
    scale : ndarray of shape (d,), optional
        Divide column i of X by scale[i] (without copying X).

    Raises
    ------
    ValueError, TypeError
        If the shapes or the types do not fit.
    """

    def __init__(self, X: RowSource, D: np.ndarray, *, scale: np.ndarray | None = None):
        self.X = check_rows(X)
        D = np.asarray(D)
        if D.dtype != np.bool_:
            raise TypeError(f"D must be boolean, got dtype {D.dtype}.")
        if D.ndim != 2 or D.shape[0] != self.X.shape[0] or D.shape[1] == 0:
            raise ValueError(
                f"D must have shape ({self.X.shape[0]}, p) with p >= 1, one row for each row of "
                f"X, got {D.shape}."
            )
        self.D = np.ascontiguousarray(D)
        self.n, self.d = self.X.shape
        self.p = D.shape[1]
        self.dtype = np.dtype(self.X.dtype)
        self.scale = None if scale is None else np.asarray(scale, dtype=self.dtype)

    def __repr__(self) -> str:
        return f"GatedOperator(n={self.n}, d={self.d}, p={self.p}, dtype={self.dtype})"

    def forward(self, V: np.ndarray) -> np.ndarray:
        """Z = sum_j diag(D[:, j]) X V[j], of shape (n, c); gates with V[j] = 0 cost nothing."""
        c = V.shape[2]
        Z = np.zeros((self.n, c), dtype=self.dtype)
        active = np.flatnonzero(V.any(axis=(1, 2)))
        if len(active) == 0:
            return Z
        W = flat_weights(V if len(active) == self.p else V[active])
        if self.scale is not None:
            W = W / self.scale

        def work(blocks: list[slice]) -> None:
            longest = max(rows.stop - rows.start for rows in blocks)
            products = np.empty((longest, len(W)), dtype=self.dtype)
            for rows in blocks:
                part = products[: rows.stop - rows.start]
                np.dot(self.X[rows], W.T, out=part)
                _add_masked(part, self.D[rows], active, Z[rows])

        def work_by_patterns(blocks: list[slice]) -> None:
            for rows in blocks:
                add_forward(self.X[rows], self.D[rows], W.reshape(-1, c, self.d), active, Z[rows])

        if forward_pays(self.n, len(active), c):
            self.for_row_blocks(work_by_patterns, len(W), block_rows(self.d, self.dtype))
        else:
            self.for_row_blocks(work, len(W))
        return Z

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """C[j] = X^T diag(D[:, j]) R, of shape (p, d, c)."""
        c = R.shape[1]
        R = np.ascontiguousarray(R, dtype=self.dtype)

        def work(blocks: list[slice]) -> np.ndarray:
            C = np.zeros((self.p * c, self.d), dtype=self.dtype)
            product = np.empty_like(C)
            for rows in blocks:
                spread = np.empty((rows.stop - rows.start, self.p * c), dtype=self.dtype)
                _spread_masked(R[rows], self.D[rows], spread)
                C += np.dot(spread.T, self.X[rows], out=product)
            return C

        def work_by_patterns(blocks: list[slice]) -> np.ndarray:
            C = np.zeros((self.p, c, self.d), dtype=self.dtype)
            for rows in blocks:
                add_adjoint(self.X[rows], self.D[rows], R[rows], C)
            return C.reshape(self.p * c, self.d)

        if adjoint_pays(self.n, self.d, self.dtype, self.p, c):
            rows = block_rows(self.d, self.dtype)
            C, *others = self.for_row_blocks(work_by_patterns, self.p * c, rows)
        else:
            C, *others = self.for_row_blocks(work, self.p * c)
        for other in others:
            C += other
        if self.scale is not None:
            C /= self.scale
        return C.reshape(self.p, c, self.d).transpose(0, 2, 1)

    def contributions(self, W: np.ndarray, gates: np.ndarray, rows: slice) -> np.ndarray:
        """T_g = diag(D[:, g]) X W_g on a block of rows, of shape (rows, m, c).

        Parameters
        ----------
        W : ndarray of shape (m, d, c)
            Weights of the gates alone.
        gates : ndarray of int, shape (m,)
        rows : slice
        """
        flat = flat_weights(W)
        if self.scale is not None:
            flat = flat / self.scale
        T = np.dot(self.X[rows], flat.T).reshape(-1, *W.shape[::2])
        T *= self.D[rows][:, gates, None]
        return T

    @property
    def n_blocks(self) -> int:
        """Number p of gates."""
        return self.p

    def gate_gradient_norms(self, R: np.ndarray) -> np.ndarray:
        """Frobenius norm of X^T diag(D[:, j]) R for each gate, of shape (p,)."""
        C = self.adjoint(R)
        return np.sqrt(np.einsum("pdc,pdc->p", C, C))

    def for_row_blocks(
        self, work: Callable[[list[slice]], Any], width: int, rows: int | None = None
    ) -> list[Any]:
        """Call ``work`` on runs of row blocks, one run a thread, BLAS held to one thread each.

        Blocks are of as many ``rows``, or as ``width`` columns of them stay in cache.
        """
        blocks = list(row_blocks(self.n, width, self.dtype, rows))
        if self.n * self.d * width < SMALLEST_PARALLEL_WORK:
            return [work(blocks)]
        with one_blas_thread():
            return run_in_threads(work, even_blocks(self.n, len(blocks), n_threads()))


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_masked(products, D, active, Z):  # type: ignore[no-untyped-def]
    """Z[i, k] += sum_a D[i, active[a]] * products[i, a c + k]."""
    n, c = Z.shape
    m = len(active)
    if c == 1:
        for i in range(n):
            total = Z[i, 0]
            if m == D.shape[1]:
                for a in range(m):
                    total += products[i, a] * D[i, a]
            else:
                for a in range(m):
                    total += products[i, a] * D[i, active[a]]
            Z[i, 0] = total
    else:
        for i in range(n):
            for a in range(m):
                if D[i, active[a]]:
                    for k in range(c):
                        Z[i, k] += products[i, a * c + k]


@numba.njit(cache=True, nogil=True)
def _spread_masked(R, D, out):  # type: ignore[no-untyped-def]
    """out[i, j c + k] = D[i, j] * R[i, k]."""
    n, c = R.shape
    p = D.shape[1]
    if c == 1:
        for i in range(n):
            r = R[i, 0]
            for j in range(p):
                out[i, j] = r * D[i, j]
    else:
        for i in range(n):
            for j in range(p):
                if D[i, j]:
                    for k in range(c):
                        out[i, j * c + k] = R[i, k]
                else:
                    for k in range(c):
                        out[i, j * c + k] = 0
