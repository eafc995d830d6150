"""The naive form of block descent for the columns of a gated operator, which are never formed.

The columns of gate j, centred and scaled by sqrt(h), are diag(sqrt(h)) (diag(D[:, j]) X - 1 m_j^T),
rotated by Q_j. A sweep needs of them

    A_j^T U = Q_j^T X^T (D[:, j] * sqrt(h) * U)        (sqrt(h)^T U = 0 where columns are centred)

and then U - A_j Delta, for which X is read once each, from cache where it fits. Newton's step takes
inner products of columns, or of examples, of which neither needs the columns.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numba
import numpy as np

from cvxdistill.solvers.active_newton import ColumnsOfGroups
from cvxdistill.solvers.block_descent import update_block
from cvxdistill.solvers.gated_gram import gated_gram
from cvxdistill.solvers.gated_operator import GatedOperator, as_weights
from cvxdistill.solvers.group_penalties import Penalties
from cvxdistill.solvers.naive_descent import ResidualDescent
from cvxdistill.solvers.rotations import Rotations
from cvxdistill.solvers.rows import row_blocks


class GatedColumnsOfGroups:
    """Products with the columns A (n, G d) of some gates.

    Parameters
    ----------
    X : ndarray of shape (n, d)
    D : ndarray of bool, shape (n, G)
    root : ndarray of shape (n,)
        sqrt(h).
    means : ndarray of shape (G, d)
        Zero without centring.
    Q : ndarray of shape (G, d, d)
    """

    def __init__(
        self, X: np.ndarray, D: np.ndarray, root: np.ndarray, means: np.ndarray, Q: np.ndarray
    ):
        self.X, self.D, self.root, self.means, self.Q = X, D, root, means, Q
        self.n, self.d = X.shape

    @cached_property
    def operator(self) -> GatedOperator:
        """The columns as they were: neither centred nor scaled nor rotated."""
        return GatedOperator(self.X, self.D)

    def along(self, x: np.ndarray) -> np.ndarray:
        """A_j x_j of each gate, (G, n), for x of shape (G d,)."""
        W = self._unrotated(x[:, None])[:, :, 0]
        T = self.X @ W.T
        T *= self.D
        T -= np.einsum("gd,gd->g", self.means, W)
        T *= self.root[:, None]
        return np.ascontiguousarray(T.T)

    def combine(self, x: np.ndarray) -> np.ndarray:
        """A x, (n,) or (n, c), for x of shape (G d,) or (G d, c)."""
        if len(x) == 0:
            return np.zeros((self.n, *x.shape[1:]))
        W = self._unrotated(x if x.ndim == 2 else x[:, None])
        out = self.operator.forward(as_weights(W, np.float64))
        out -= np.einsum("gd,gdc->c", self.means, W)
        out *= self.root[:, None]
        return out.reshape(self.n, *x.shape[1:])

    def correlate(self, v: np.ndarray) -> np.ndarray:
        """A^T v, (G d,) or (G d, c), for v of shape (n,) or (n, c)."""
        V = self.root[:, None] * (v if v.ndim == 2 else v[:, None])
        C = self.operator.adjoint(V) - self.means[:, :, None] * V.sum(axis=0)
        C = np.matmul(self.Q.transpose(0, 2, 1), C)
        return C.reshape(len(self.Q) * self.d, *v.shape[1:])

    def outer(self, weights: np.ndarray, dtype: Any) -> np.ndarray:
        """sum_g weights_g A_g A_g^T, (n, n), of which the lower triangle counts.

        Rotations do not matter, and a sum over gates of the examples' inner products is such a
        product times that of their patterns:

            sum_g w_g diag(D_g) X X^T diag(D_g) = (X X^T) * (D diag(w) D^T).
        """
        X, D, root = self.X.astype(dtype), self.D.astype(dtype), self.root.astype(dtype)
        weighted, w = D * weights.astype(dtype), weights
        # Of centred columns: (diag(D_g) X - 1 m_g^T) (diag(D_g) X - 1 m_g^T)^T.
        shift = ((self.D * (self.X @ self.means.T)) @ w).astype(dtype)
        constant = float(w @ np.einsum("gd,gd->g", self.means, self.means))
        N = np.empty((self.n, self.n), dtype=dtype)
        for rows in row_blocks(self.n, self.n, dtype):
            past = slice(rows.stop)
            part = X[rows] @ X[past].T
            part *= weighted[rows] @ D[past].T
            part -= shift[rows, None]
            part += constant - shift[past]
            part *= root[rows, None]
            part *= root[past]
            N[rows, past] = part
        return N

    def formed(self) -> np.ndarray:
        """A^T itself, (G d, n)."""
        gates = zip(self.D.T, self.means, self.Q, strict=True)
        parts = [Q.T @ ((self.X * D[:, None] - m) * self.root[:, None]).T for D, m, Q in gates]
        return np.concatenate([np.zeros((0, self.n)), *parts])

    def gram(self) -> np.ndarray:
        """A^T A."""
        h, means = self.root**2, self.means.ravel()
        H = gated_gram(self.X.__getitem__, self.D, h)
        if means.any():
            H -= np.outer(h.sum() * means, means)
        rotations = Rotations([self.Q])
        return rotations.of_rows(rotations.of_rows(H).T)

    def _unrotated(self, x: np.ndarray) -> np.ndarray:
        return np.matmul(self.Q, x.reshape(len(self.Q), self.d, x.shape[1]))


class GatedDescent(ResidualDescent):
    """The naive form over gates.

    Parameters
    ----------
    columns : GatedColumnsOfGroups
        Those of the working gates.
    B, eigenvalues, U, start
        As for ``ResidualDescent``.
    """

    def __init__(
        self,
        columns: GatedColumnsOfGroups,
        B: np.ndarray,
        eigenvalues: np.ndarray,
        U: np.ndarray,
        start: np.ndarray | None = None,
    ):
        self.columns = columns
        super().__init__(B, eigenvalues, U, start)

    def outer_work(self, active: int, groups: int) -> float:
        """Two products of patterns and of examples."""
        return len(self.shadow) ** 2 * (self.columns.d + groups) / 2

    def gradient(self) -> np.ndarray:
        """A^T U / n."""
        return self.columns.correlate(self.shadow) / len(self.shadow)

    def sweep(self, penalties: Penalties, *, only_active: bool = False) -> float:
        """Minimise over each gate in turn."""
        A = self.columns
        return _gated_sweep(
            A.X,
            A.D,
            A.root,
            A.means,
            A.Q,
            self.shadow,
            self.B,
            self.eigenvalues,
            penalties.norm,
            penalties.ridge,
            only_active,
        )

    def columns_of_groups(
        self, features: np.ndarray, sizes: np.ndarray, penalised: np.ndarray
    ) -> tuple[ColumnsOfGroups, np.ndarray]:
        """Those of the penalised, which are not formed, and the others, which are."""
        mine = np.repeat(penalised, sizes)
        return self._some(features[mine]), self._some(features[~mine]).formed()

    def gram(self, features: np.ndarray) -> np.ndarray:
        """A^T A / n."""
        return self._some(features).gram() / len(self.shadow)

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """A change."""
        return self._some(features).combine(change)

    def _some(self, features: np.ndarray) -> GatedColumnsOfGroups:
        A = self.columns
        gates = features[:: A.d] // A.d
        if len(gates) == len(A.Q):
            return A
        return GatedColumnsOfGroups(
            A.X, np.ascontiguousarray(A.D[:, gates]), A.root, A.means[gates], A.Q[gates]
        )


@numba.njit(cache=True, nogil=True)
def _gated_sweep(  # type: ignore[no-untyped-def]
    X, D, root, means, Q, U, B, eigenvalues, norm, ridge, only_active
):
    n, d = X.shape
    c = U.shape[1]
    u = U.reshape(n * c)
    largest = 0.0
    P, change = np.empty((d, c)), np.empty((d, c))
    V, sums = np.empty((n if c > 1 else 0, c)), np.empty(d)
    for g in range(len(norm) - 1, -1, -1):
        x, y = g * d, (g + 1) * d
        if only_active and not B[x:y].any():
            continue
        if c == 1:
            sums[:] = 0
            _correlate_gate(X, D, g, root, u, sums)
            P[:] = np.dot(Q[g].T, sums.reshape(d, 1))
        else:
            for i in range(n):
                for o in range(c):
                    V[i, o] = root[i] * U[i, o] if D[i, g] else 0.0
            P[:] = np.dot(Q[g].T, np.dot(X.T, V))
        P /= n
        biggest = update_block(P, B[x:y], change, eigenvalues[x:y], 0, d, 0, norm[g], ridge[g])
        if biggest > 0:
            largest = max(largest, biggest)
            W = np.dot(Q[g], change)
            shift = np.dot(means[g : g + 1], W)[0]
            if c == 1:
                _subtract_gate(X, D, g, root, u, W.reshape(d), shift[0])
            else:
                T = np.dot(X, W)
                for i in range(n):
                    for o in range(c):
                        U[i, o] -= root[i] * ((T[i, o] if D[i, g] else 0.0) - shift[o])
    return largest


@numba.njit(cache=True, nogil=True)
def _correlate_gate(X, D, g, root, u, sums):  # type: ignore[no-untyped-def]
    """Add X^T (D[:, g] root u) to sums."""
    for i in range(X.shape[0]):
        if D[i, g]:
            v = root[i] * u[i]
            for k in range(X.shape[1]):
                sums[k] += X[i, k] * v


@numba.njit(cache=True, nogil=True, fastmath=True)
def _subtract_gate(X, D, g, root, u, w, shift):  # type: ignore[no-untyped-def]
    """Subtract root (D[:, g] (X w) - shift) from u."""
    for i in range(X.shape[0]):
        value = -shift
        if D[i, g]:
            total = 0.0
            for k in range(X.shape[1]):
                total += X[i, k] * w[k]
            value += total
        u[i] -= root[i] * value
