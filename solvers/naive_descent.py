"""The naive form of block descent, for columns that are stored: the residual is kept up to date."""

from __future__ import annotations

from abc import abstractmethod

import numba
import numpy as np

from cvxdistill.solvers.active_newton import (
    ColumnsOfGroups,
    DenseColumnsOfGroups,
    direction_from_columns,
    direction_from_gram,
)
from cvxdistill.solvers.block_descent import SWEEP_COST, BlockDescent, update_block
from cvxdistill.solvers.group_penalties import Penalties, smooth_part


class ResidualDescent(BlockDescent):
    """What the forms share that keep U, sqrt(h) times the residual; ``shadow`` is U.

    Parameters
    ----------
    B, eigenvalues
        As for ``BlockDescent``.
    U : ndarray of shape (n, c)
        At B; changed in place.
    start : ndarray of shape (n, c), optional
        U at B = 0, where it is known.
    """

    def __init__(
        self,
        B: np.ndarray,
        eigenvalues: np.ndarray,
        U: np.ndarray,
        start: np.ndarray | None = None,
    ):
        super().__init__(B, eigenvalues)
        self.shadow = U
        self.start = U + self.image(np.arange(len(B)), B) if start is None else start

    def refresh(self) -> None:
        """Compute U anew."""
        np.subtract(self.start, self.image(np.arange(len(self.B)), self.B), out=self.shadow)

    def fit(self) -> float:
        """Half of the mean square of U."""
        return float(np.vdot(self.shadow, self.shadow)) / (2 * len(self.shadow))

    def sweep_work(self, active: int) -> float:
        """Two passes over the columns."""
        return SWEEP_COST * 2 * active * self.shadow.size

    def newton_work(self, active: int, groups: int) -> float:
        """The cheaper of the two ways."""
        return min(self._features_work(active), self._examples_work(active, groups))

    def by_examples(self, active: int, groups: int) -> bool:
        """Whether Newton's direction is cheaper by a matrix of the examples."""
        return self._examples_work(active, groups) < self._features_work(active)

    def outer_work(self, active: int, groups: int) -> float:
        """Operations of A A^T."""
        return len(self.shadow) ** 2 * active / 2

    def _features_work(self, active: int) -> float:
        """A^T A and its factorisation, for more outputs also an inverse and solutions."""
        n, c = self.shadow.shape
        factor = active**3 / 3 if c == 1 else active**3 + 2 * active**2 * c
        return n * active**2 / 2 + factor

    def _examples_work(self, active: int, groups: int) -> float:
        """A A^T, its factorisation, and a solution for each group."""
        n, c = self.shadow.shape
        if c > 1:
            return np.inf
        return self.outer_work(active, groups) + n**3 / 3 + 2 * n * groups * (n + groups)

    @abstractmethod
    def columns_of_groups(
        self, features: np.ndarray, sizes: np.ndarray, penalised: np.ndarray
    ) -> tuple[ColumnsOfGroups, np.ndarray]:
        """Columns of the penalised ones of groups of these sizes, and of the others as rows."""

    def newton_direction(
        self, features: np.ndarray, penalties: Penalties, P: np.ndarray
    ) -> np.ndarray | None:
        """From the piece of H of these features, or by a matrix of the examples."""
        G, U, k = smooth_part(P, self.B[features], penalties)
        r, starts = penalties.ridge, penalties.starts
        if not self.by_examples(len(features), len(k)):
            return direction_from_gram(self.gram(features), G, U, k, r, starts)
        columns, free = self.columns_of_groups(features, np.diff(starts), k + r > 0)
        change = direction_from_columns(columns, free, G[:, 0], U[:, 0], k, r, starts)
        return None if change is None else change[:, None]

    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """||A change||^2 / n."""
        return float(np.vdot(image, image)) / len(image)


class NaiveDescent(ResidualDescent):
    """The naive form, for columns that are centred, scaled by sqrt(h) and rotated.

    Parameters
    ----------
    AT : ndarray of shape (m, n)
        The columns, as rows.
    B, eigenvalues, U, start
        As for ``ResidualDescent``.
    """

    def __init__(
        self,
        AT: np.ndarray,
        B: np.ndarray,
        eigenvalues: np.ndarray,
        U: np.ndarray,
        start: np.ndarray | None = None,
    ):
        self.AT = AT
        super().__init__(B, eigenvalues, U, start)

    def gradient(self) -> np.ndarray:
        """A^T U / n."""
        return self.AT @ self.shadow / len(self.shadow)

    def sweep(self, penalties: Penalties, *, only_active: bool = False) -> float:
        """Minimise over each group in turn."""
        return _naive_sweep(
            self.AT,
            self.shadow,
            self.B,
            self.eigenvalues,
            penalties.starts,
            penalties.norm,
            penalties.ridge,
            only_active,
        )

    def columns_of_groups(
        self, features: np.ndarray, sizes: np.ndarray, penalised: np.ndarray
    ) -> tuple[ColumnsOfGroups, np.ndarray]:
        """Those of the penalised, and the others."""
        AT, mine = self._columns(features), np.repeat(penalised, sizes)
        with_penalty, free = (AT, AT[:0]) if mine.all() else (AT[mine], AT[~mine])
        return DenseColumnsOfGroups(with_penalty, sizes[penalised]), free

    def gram(self, features: np.ndarray) -> np.ndarray:
        """A^T A / n."""
        AT = self._columns(features)
        return AT @ AT.T / AT.shape[1]

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """A change."""
        return self._columns(features).T @ change

    def _columns(self, features: np.ndarray) -> np.ndarray:
        return self.AT if len(features) == len(self.AT) else self.AT[features]


@numba.njit(cache=True, nogil=True)
def _naive_sweep(AT, U, B, eigenvalues, starts, norm, ridge, only_active):  # type: ignore[no-untyped-def]
    n, c = U.shape
    u = U.reshape(n * c)
    largest = 0.0
    for g in range(len(norm) - 1, -1, -1):
        x, y = starts[g], starts[g + 1]
        if only_active and not B[x:y].any():
            continue
        P = np.empty((y - x, c))
        if c == 1:
            for i in range(x, y):
                P[i - x, 0] = _dot(AT[i], u)
        else:
            P[:] = np.dot(AT[x:y], U)
        P /= n
        change = np.empty((y - x, c))
        biggest = update_block(P, B[x:y], change, eigenvalues[x:y], 0, y - x, 0, norm[g], ridge[g])
        if biggest > 0:
            largest = max(largest, biggest)
            if c == 1:
                for i in range(x, y):
                    _subtract(u, AT[i], change[i - x, 0])
            else:
                U -= np.dot(AT[x:y].T, change)
    return largest


@numba.njit(cache=True, nogil=True, fastmath=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@numba.njit(cache=True, nogil=True)
def _subtract(u, a, factor):  # type: ignore[no-untyped-def]
    for i in range(len(u)):
        u[i] -= factor * a[i]
