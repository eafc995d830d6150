"""The covariance form of block descent: P = q - H B is kept up to date, whatever n is.

The groups of a tile are treated one after the other against the tile's own piece of H, and the rest
of P catches up by one matrix product for each tile.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np

from cvxdistill.solvers.active_newton import (
    HessianFactor,
    direction_from_gram,
    hessian_product,
)
from cvxdistill.solvers.block_descent import SWEEP_COST, BlockDescent, update_block
from cvxdistill.solvers.conjugate_gradients import conjugate_gradients
from cvxdistill.solvers.group_penalties import Penalties, smooth_part

# Features of a tile of the covariance form: its piece of H, of P and of B stay in cache.
TILE = 48
# What an operation of a sweep costs where H comes from memory, and H of which size does.
MEMORY_COST, CACHE_BYTES = 20.0, 2**24
# Of conjugate gradients with the factor of an earlier Hessian: relative residual, most steps, and
# about how many it takes.
STALE_TOLERANCE, STALE_STEPS, USUAL_STEPS = 0.2, 30, 10


class CovarianceDescent(BlockDescent):
    """The covariance form.

    Parameters
    ----------
    H : ndarray of shape (m, m)
        Symmetric, rotated.
    q : ndarray of shape (m, c)
    B
        As for ``BlockDescent``.
    squares : float
        Sum over examples of h_i ||u_i||^2 / n at B = 0, for ``fit``.
    P : ndarray of shape (m, c), optional
        q - H B, where it is known.
    """

    def __init__(
        self,
        H: np.ndarray,
        q: np.ndarray,
        B: np.ndarray,
        squares: float,
        P: np.ndarray | None = None,
    ):
        super().__init__(B, np.diagonal(H).copy())
        self.H = H
        self.q = q
        self.squares = squares
        self.shadow = q - H @ B if P is None else P
        self.factor: HessianFactor | None = None

    @classmethod
    def at(cls, H: np.ndarray, B: np.ndarray, P: np.ndarray, left: float) -> CovarianceDescent:
        """From what is known at B: P, and ``left``, the sum of h_i ||u_i||^2 / n there."""
        q = P + H @ B
        squares = left + float(np.vdot(B, q)) + float(np.vdot(B, P))
        return cls(H, q, B, squares, P)

    def refresh(self) -> None:
        """Compute P anew."""
        self.shadow = self.q - self.H @ self.B

    def gradient(self) -> np.ndarray:
        """P."""
        return self.shadow

    def fit(self) -> float:
        """Half of the mean square of what is left."""
        left = self.squares - float(np.vdot(self.B, self.q)) - float(np.vdot(self.B, self.shadow))
        return max(left, 0.0) / 2

    def sweep_work(self, active: int) -> float:
        """One pass over their columns of H."""
        entries, c = active * len(self.B), self.B.shape[1]
        cost = SWEEP_COST if 8 * entries < CACHE_BYTES else max(SWEEP_COST, MEMORY_COST / c)
        return cost * entries * c

    def newton_work(self, active: int, groups: int) -> float:
        """A factorisation, for more outputs also an inverse and solutions."""
        c = self.B.shape[1]
        if c > 1:
            return active**3 + 2 * active**2 * c
        new = self._factor_work(active)
        return min(new, self._stale_work(active)) if self.factor else new

    def _factor_work(self, active: int) -> float:
        """Operations of a new factor, in single precision, which is twice as fast."""
        return active**3 / 6

    def _stale_work(self, active: int) -> float:
        """Operations of Newton's direction with the factor of an earlier Hessian."""
        return 2 * USUAL_STEPS * self.sweep_work(active)

    def sweep(self, penalties: Penalties, *, only_active: bool = False) -> float:
        """Minimise over each group in turn, a tile at a time."""
        return _covariance_sweep(
            self.H,
            self.shadow,
            self.B,
            self.eigenvalues,
            penalties.starts,
            penalties.norm,
            penalties.ridge,
            only_active,
        )

    def newton_direction(
        self, features: np.ndarray, penalties: Penalties, P: np.ndarray
    ) -> np.ndarray | None:
        """From the piece of H, or the factor of one that was like it."""
        G, U, k = smooth_part(P, self.B[features], penalties)
        r, starts = penalties.ridge, penalties.starts
        if G.shape[1] > 1:
            return direction_from_gram(self.gram(features), G, U, k, r, starts)
        g, u, diagonal = G[:, 0], U[:, 0], np.repeat(k + r, np.diff(starts))
        m = len(features)
        if self.factor is not None and self._stale_work(m) < self._factor_work(m):
            product = partial(hessian_product, partial(self._product, features))
            solve = self.factor.restricted(features, self.eigenvalues[features] + diagonal)
            x, reached = conjugate_gradients(
                partial(product, u, k, diagonal, starts), solve, g, STALE_TOLERANCE, STALE_STEPS
            )
            if reached:
                return x[:, None]
        H = self.gram(features)
        self.factor = HessianFactor.of(features, H, u, k, diagonal, starts)
        if self.factor is None:
            return None
        product = partial(hessian_product, H.__matmul__, u, k, diagonal, starts)
        return self.factor.refined(product, G)

    def _product(self, features: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The piece of H of some features, times x."""
        return self.image(features, x)[features]

    def gram(self, features: np.ndarray) -> np.ndarray:
        """A piece of H."""
        return self.H if len(features) == len(self.H) else self.H[np.ix_(features, features)]

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """H change."""
        # Copying rows costs more than some zeros.
        if 2 * len(features) < len(self.H):
            return self.H[features].T @ change
        everything = np.zeros((len(self.H), *change.shape[1:]))
        everything[features] = change
        return self.H @ everything

    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """<change, H change>."""
        return float(np.vdot(change, image[features]))


@numba.njit(cache=True, nogil=True)
def _covariance_sweep(  # type: ignore[no-untyped-def]
    H, P, B, eigenvalues, starts, norm, ridge, only_active
):
    m, c = B.shape
    largest = 0.0
    last = len(norm)
    while last > 0:
        first = last - 1
        e = starts[last]
        while first > 0 and e - starts[first - 1] <= TILE:
            first -= 1
        a = starts[first]
        change = np.zeros((e - a, c))
        moved = False
        for g in range(last - 1, first - 1, -1):
            x, y = starts[g], starts[g + 1]
            if only_active and not B[x:y].any():
                continue
            biggest = update_block(P, B, change, eigenvalues, x, y, a, norm[g], ridge[g])
            if biggest > 0:
                moved = True
                largest = max(largest, biggest)
                # The tile's other groups see it at once.
                for i in range(x, y):
                    for k in range(a, e):
                        if k < x or k >= y:
                            v = H[i, k]
                            for o in range(c):
                                P[k, o] -= v * change[i - a, o]
                for i in range(x, y):
                    for o in range(c):
                        P[i, o] -= eigenvalues[i] * change[i - a, o]
        if moved and e - a < m:
            # All others at once.
            if c == 1:
                for i in range(a, e):
                    v = change[i - a, 0]
                    if v != 0:
                        for k in range(a):
                            P[k, 0] -= H[i, k] * v
                        for k in range(e, m):
                            P[k, 0] -= H[i, k] * v
            else:
                mine = P[a:e].copy()
                P -= np.dot(H[a:e].T, change)
                P[a:e] = mine
        last = first
    return largest
