"""The naive form of block descent for the columns of a gated operator, which are never formed.

The columns of gate j, centred and scaled by sqrt(h), are diag(sqrt(h)) (diag(D[:, j]) X - 1 m_j^T),
rotated by Q_j. A sweep needs of them

    A_j^T U = Q_j^T X^T (D[:, j] * sqrt(h) * U)        (sqrt(h)^T U = 0 where columns are centred)

and then U - A_j Delta, for which X is read once each, from cache where it fits. Newton's step forms
some of the columns, or some of the rows, at a time.
"""

from __future__ import annotations

import numba
import numpy as np

from cvxdistill.solvers.active_newton import direction_from_columns, direction_from_gram
from cvxdistill.solvers.block_descent import BlockDescent, update_block
from cvxdistill.solvers.group_penalties import Penalties, smooth_part
from cvxdistill.solvers.naive_descent import naive_newton_work, naive_sweep_work
from cvxdistill.solvers.rows import row_blocks

# Columns that Newton's step forms at a time.
COLUMNS = 1024


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

    def along(self, x: np.ndarray) -> np.ndarray:
        """A_j x_j of each gate, (G, n)."""
        W = self._unrotated(x)
        T = self.X @ W.T
        T *= self.D
        T -= np.einsum("gd,gd->g", self.means, W)
        T *= self.root[:, None]
        return np.ascontiguousarray(T.T)

    def combine(self, x: np.ndarray) -> np.ndarray:
        """A x, (n,)."""
        W = self._unrotated(x)
        T = self.X @ W.T
        T *= self.D
        shift = float(np.vdot(self.means, W))
        out: np.ndarray = self.root * (T.sum(axis=1) - shift)
        return out

    def correlate(self, v: np.ndarray) -> np.ndarray:
        """A^T v, (G d,)."""
        weighted = self.root * v
        C = (self.D * weighted[:, None]).T @ self.X
        C -= self.means * weighted.sum()
        out: np.ndarray = np.matmul(self.Q.transpose(0, 2, 1), C[:, :, None]).ravel()
        return out

    def outer(self, weights: np.ndarray, dtype: type) -> np.ndarray:
        """A diag(weights) A^T, (n, n)."""
        N: np.ndarray = np.zeros((self.n, self.n), dtype=dtype)
        step = max(1, COLUMNS // self.d)
        roots = np.sqrt(weights).reshape(-1, self.d)
        for a in range(0, len(self.Q), step):
            gates = slice(a, a + step)
            part = (self._columns(slice(None), gates) * roots[gates].ravel()).astype(dtype)
            N += part @ part.T
        return N

    def gram(self) -> np.ndarray:
        """A^T A."""
        m = len(self.Q) * self.d
        H = np.zeros((m, m))
        for rows in row_blocks(self.n, m, np.float64):
            part = self._columns(rows, slice(None))
            H += part.T @ part
        return H

    def _unrotated(self, x: np.ndarray) -> np.ndarray:
        return np.matmul(self.Q, x.reshape(-1, self.d, 1))[:, :, 0]

    def _columns(self, rows: slice, gates: slice) -> np.ndarray:
        A = self.X[rows, None, :] * self.D[rows, gates, None] - self.means[gates]
        A *= self.root[rows, None, None]
        A = np.matmul(A.transpose(1, 0, 2), self.Q[gates])
        return A.transpose(1, 0, 2).reshape(len(A[0]), -1)


class GatedDescent(BlockDescent):
    """The naive form over gates, one output.

    Parameters
    ----------
    columns : GatedColumnsOfGroups
        Those of the working gates; empty at first, see ``extended``.
    B, eigenvalues
        As for ``BlockDescent``.
    start : ndarray of shape (n, 1)
        U at B = 0.
    """

    def __init__(
        self,
        columns: GatedColumnsOfGroups,
        B: np.ndarray,
        eigenvalues: np.ndarray,
        start: np.ndarray,
    ):
        super().__init__(B, eigenvalues)
        self.columns, self.start = columns, start
        self.refresh()

    def refresh(self) -> None:
        """Compute U anew."""
        self.shadow = self.start.copy()
        if len(self.B):
            self.shadow[:, 0] -= self.columns.combine(self.B)

    def gradient(self) -> np.ndarray:
        """A^T U / n."""
        return self.columns.correlate(self.shadow[:, 0])[:, None] / len(self.shadow)

    def fit(self) -> float:
        """Half of the mean square of U."""
        return float(np.vdot(self.shadow, self.shadow)) / (2 * len(self.shadow))

    def sweep_work(self, active: int) -> float:
        """As for columns that are stored."""
        return naive_sweep_work(self.shadow, active)

    def newton_work(self, active: int, groups: int) -> float:
        """As for columns that are stored."""
        return naive_newton_work(self.shadow, active, groups)

    def sweep(self, penalties: Penalties, *, only_active: bool = False) -> float:
        """Minimise over each gate in turn."""
        A = self.columns
        return _gated_sweep(
            A.X,
            A.D,
            A.root,
            A.means,
            A.Q,
            self.shadow[:, 0],
            self.B,
            self.eigenvalues,
            penalties.norm,
            penalties.ridge,
            only_active,
        )

    def newton_direction(
        self, features: np.ndarray, penalties: Penalties, P: np.ndarray
    ) -> np.ndarray | None:
        """From the columns, or their piece of H where that is smaller."""
        columns = self._some(features)
        G, U, k = smooth_part(P, self.B[features], penalties)
        r, starts, n = penalties.ridge, penalties.starts, len(self.shadow)
        if len(features) > n:
            nothing = np.zeros((0, n))
            change = direction_from_columns(columns, nothing, G[:, 0], U[:, 0], k, r, starts)
            return None if change is None else change[:, None]
        return direction_from_gram(self.gram(features), G, U, k, r, starts)

    def gram(self, features: np.ndarray) -> np.ndarray:
        """The piece of H of some gates' features."""
        return self._some(features).gram() / len(self.shadow)

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """A change."""
        return self._some(features).combine(change)[:, None]

    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """||A change||^2 / n."""
        return float(np.vdot(image, image)) / len(image)

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
    largest = 0.0
    P, change, change_1 = np.empty((d, 1)), np.empty((d, 1)), np.empty(d)
    for g in range(len(norm) - 1, -1, -1):
        x, y = g * d, (g + 1) * d
        if only_active and not B[x:y].any():
            continue
        sums = np.zeros(d)
        for i in range(n):
            if D[i, g]:
                v = root[i] * U[i]
                for k in range(d):
                    sums[k] += X[i, k] * v
        P[:, 0] = np.dot(Q[g].T, sums)
        P /= n
        biggest = update_block(P, B[x:y], change, eigenvalues[x:y], 0, d, 0, norm[g], ridge[g])
        if biggest > 0:
            largest = max(largest, biggest)
            change_1[:] = change[:, 0]
            w = np.dot(Q[g], change_1)
            shift = 0.0
            for k in range(d):
                shift += means[g, k] * w[k]
            _subtract_gate(X, D, g, root, U, w, shift)
    return largest


@numba.njit(cache=True, nogil=True, fastmath=True)
def _subtract_gate(X, D, g, root, U, w, shift):  # type: ignore[no-untyped-def]
    for i in range(X.shape[0]):
        value = -shift
        if D[i, g]:
            total = 0.0
            for k in range(X.shape[1]):
                total += X[i, k] * w[k]
            value += total
        U[i] -= root[i] * value
