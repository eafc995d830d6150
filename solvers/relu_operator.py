"""The linear maps of the convex ReLU programme: predictions, and margins in the cones.

    forward   Z = sum_j diag(D[:, j]) X (V[j] - U[j])     (2p, d, c) -> (n, c)
    margins   T_j = S_j X W[j]                            (2p, d, c) -> (n, 2p c)

with S_j = 2 diag(D[:, j]) - I. Weights W of shape (2p, d, c) hold the blocks of V, then those of
U; column (j c + k) of the margins belongs to output k of block j.
"""

from __future__ import annotations

import numba
import numpy as np

from cvxdistill.solvers.gated_operator import GatedOperator, empty_weights, flat_weights
from cvxdistill.solvers.rows import RowSource, row_blocks


class ReLUOperator:
    """Predictions and margins of weights W = (V, U), and their adjoints.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    scale : ndarray of shape (d,), optional
        Divide column i of X by scale[i] (without copying X).

    Raises
    ------
    ValueError, TypeError
        If the shapes or the types do not fit.
    """

    def __init__(self, X: RowSource, D: np.ndarray, *, scale: np.ndarray | None = None):
        self.gated = GatedOperator(X, D, scale=scale)
        self.X, self.D, self.scale = self.gated.X, self.gated.D, self.gated.scale
        self.n, self.d, self.p = self.gated.n, self.gated.d, self.gated.p
        self.dtype = self.gated.dtype

    def __repr__(self) -> str:
        return f"ReLUOperator(n={self.n}, d={self.d}, p={self.p}, dtype={self.dtype})"

    @property
    def n_blocks(self) -> int:
        """2 p: the blocks of V and those of U."""
        return 2 * self.p

    def forward(self, W: np.ndarray) -> np.ndarray:
        """Z = sum_j diag(D[:, j]) X (V[j] - U[j]), of shape (n, c)."""
        return self.gated.forward(W[: self.p] - W[self.p :])

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """C[j] = X^T diag(D[:, j]) R for the blocks of V and minus that for U, (2p, d, c)."""
        C = self.gated.adjoint(R)
        out = empty_weights(2 * self.p, self.d, R.shape[1], self.dtype)
        out[: self.p] = C
        np.negative(C, out=out[self.p :])
        return out

    def contributions(self, W: np.ndarray, blocks: np.ndarray, rows: slice) -> np.ndarray:
        """What single blocks add to Z on some rows: +-diag(D[:, j]) X W_j, of shape (rows, m, c).

        Parameters
        ----------
        W : ndarray of shape (m, d, c)
            Weights of these blocks alone.
        blocks : ndarray of int, shape (m,)
        rows : slice
        """
        T = self.gated.contributions(W, blocks % self.p, rows)
        T[:, blocks >= self.p] *= -1
        return T

    def margins(self, W: np.ndarray) -> np.ndarray:
        """S_j X W[j] for every block and output, of shape (n, 2p c): at least 0 in the cones."""
        flat = flat_weights(W)
        if self.scale is not None:
            flat = flat / self.scale
        T = np.empty((self.n, len(flat)), dtype=self.dtype)

        def work(blocks: list[slice]) -> None:
            for rows in blocks:
                np.dot(self.X[rows], flat.T, out=T[rows])
                _multiply_by_signs(T[rows], self.D[rows])

        self.gated.for_row_blocks(work, len(flat))
        return T

    def margins_adjoint(self, multipliers: np.ndarray) -> np.ndarray:
        """X^T S_j times column (j c + k) of the multipliers (n, 2p c), of shape (2p, d, c)."""
        width = multipliers.shape[1]

        def work(blocks: list[slice]) -> np.ndarray:
            total = np.zeros((width, self.d), dtype=self.dtype)
            for rows in blocks:
                signed = multipliers[rows].astype(self.dtype)
                _multiply_by_signs(signed, self.D[rows])
                total += signed.T @ self.X[rows]
            return total

        total, *others = self.gated.for_row_blocks(work, width)
        for other in others:
            total += other
        if self.scale is not None:
            total /= self.scale
        return total.reshape(2 * self.p, -1, self.d).transpose(0, 2, 1)


def relu_predictions(X: RowSource, V: np.ndarray) -> np.ndarray:
    """sum_j relu(X V[0, j]) - relu(X V[1, j]), of shape (n, c), with no gates at all.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Any inputs, not only those of the fit.
    V : ndarray of shape (2, p, d, c)
    """
    n = X.shape[0]
    c = V.shape[3]
    Z = np.zeros((n, c), dtype=np.result_type(X.dtype, V.dtype))
    for sign, side in zip((1, -1), V, strict=True):
        active = side[side.any(axis=(1, 2))]
        flat = flat_weights(active)
        for rows in row_blocks(n, len(flat), X.dtype):
            hidden = np.maximum(X[rows] @ flat.T, 0)
            Z[rows] += sign * hidden.reshape(len(hidden), len(active), c).sum(axis=1)
    return Z


@numba.njit(cache=True, nogil=True)
def _multiply_by_signs(T, D):  # type: ignore[no-untyped-def]
    """T[i, column of gate j] *= -1 where D[i, j] is off, for the blocks of V and of U."""
    n, p = D.shape
    c = T.shape[1] // (2 * p)
    for i in range(n):
        for block in range(2 * p):
            if not D[i, block % p]:
                for k in range(block * c, (block + 1) * c):
                    T[i, k] = -T[i, k]
