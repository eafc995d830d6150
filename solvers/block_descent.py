"""Block coordinate descent with exact minimisation of each block, for quadratic programmes.

    minimise over B   1/2 <B, H B> - <q, B> + sum_g (t_g ||B_g||_F + r_g / 2 ||B_g||_F^2)

for features in groups g, with H = A^T diag(h) A / n (columns of A centred with weights h where
there is an intercept). Each group's block of H is diagonal, because its columns of A were rotated
so, which changes no norm. Then the best B_g, all else fixed, is

    B_g = (Lambda_g + r_g + t_g / s)^-1 z_g,   z_g = (q - H B)_g + Lambda_g B_g,

where its length s solves sum_i ||z_gi||^2 / ((lambda_i + r_g) s + t_g)^2 = 1 (zero, if
||z_g|| <= t_g).

There are two forms. The *covariance* form keeps P = q - H B and costs m^2 c a sweep over m
features, whatever n is; the groups of a tile are treated one after the other against the tile's own
piece of H, and the rest of P catches up by one matrix product for each tile. The *naive* form keeps
the residual U, with P = A^T U / n for columns scaled by sqrt(h), and costs 2 n m c. Sweeps find out
which groups are zero, and are slow on the others where features are correlated. Anderson's method
extrapolates them, and Newton's (``cvxdistill.solvers.active_newton``) takes a step on the groups
that are not zero when sweeps have cost as much as a share of it.

References
----------
Friedman, Hastie and Tibshirani 2010 (the two forms); Yang and Hastie 2024 (exact blocks by the
eigenvalues of each); Bertrand and Massias 2021 (Anderson's method for coordinate descent).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import numba
import numpy as np

from cvxdistill.solvers.active_newton import step_length
from cvxdistill.solvers.group_penalties import Penalties

# Sweeps over the groups that are not zero between two over all.
ACTIVE_SWEEPS = 4
# Newton's step comes when sweeps have cost a share of it: at first, at least and at most.
FIRST_SHARE, LEAST_SHARE, MOST_SHARE = 0.3, 0.15, 0.6
# Sweeps over all groups without a smaller gap after which rounding is all that is left.
MOST_IDLE = 50
# By how much an objective may seem to rise.
ROUNDING = 1e-12
# What an operation of a sweep costs in those of a matrix product.
SWEEP_COST = 4.0


class BlockDescent(ABC):
    """The quadratic programme and where its descent stands.

    Parameters
    ----------
    B : ndarray of shape (m, c)
        Rotated coefficients; changed in place.
    eigenvalues : ndarray of shape (m,)
        The diagonal of H.

    Attributes
    ----------
    share : float
        Newton's step comes when sweeps have cost this share of it; adapted by ``minimise``.
    shadow : ndarray
        What is affine in B and kept beside it: P or U.
    """

    shadow: np.ndarray

    def __init__(self, B: np.ndarray, eigenvalues: np.ndarray):
        self.B = B
        self.eigenvalues = eigenvalues
        self.share = FIRST_SHARE

    @abstractmethod
    def gradient(self) -> np.ndarray:
        """P = q - H B, of shape (m, c)."""

    @abstractmethod
    def refresh(self) -> None:
        """Compute ``shadow`` anew: sweeps only add to it, and so do their roundings."""

    @abstractmethod
    def fit(self) -> float:
        """1/2 sum_i h_i ||u_i||^2 / n, the quadratic and what makes it a sum of squares."""

    @abstractmethod
    def sweep(self, penalties: Penalties, *, only_active: bool = False) -> float:
        """Minimise over each group in turn; return the largest lambda_i |change|^2 of a feature.

        If so asked, groups that are zero stay zero.
        """

    @abstractmethod
    def sweep_work(self, active: int) -> float:
        """Operations of a sweep over so many features, in those of a matrix product."""

    @abstractmethod
    def newton_work(self, active: int, groups: int) -> float:
        """Operations of Newton's direction on so many features of so many groups."""

    @abstractmethod
    def newton_direction(
        self, features: np.ndarray, penalties: Penalties, P: np.ndarray
    ) -> np.ndarray | None:
        """Newton's direction on some features, whose rows of P are these, if there is one."""

    @abstractmethod
    def gram(self, features: np.ndarray) -> np.ndarray:
        """The piece of H of some features, not to be changed; in order, of whole groups."""

    @abstractmethod
    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """By how much ``shadow`` falls when the rows of B of these features grow by ``change``."""

    @abstractmethod
    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """<change, H change>."""

    def go_to(self, B: np.ndarray) -> None:
        """Go to other coefficients; they will be changed in place."""
        self.B = B
        self.refresh()

    def gap(self, penalties: Penalties, P: np.ndarray | None = None) -> float:
        """Duality gap at B, from the residual scaled until it is feasible."""
        P = self.gradient() if P is None else P
        s, conjugate = penalties.conjugate_and_scale(penalties.lengths(P))
        pull = float(np.vdot(self.B, P))
        return (1 - s) ** 2 * self.fit() + penalties.value(self.B) + conjugate - s * pull

    def minimise(self, penalties: Penalties, target: float, most_sweeps: int = 100_000) -> int:
        """Descend until the duality gap is at most ``target``, or no longer falls.

        Returns the number of sweeps.

        A sweep over all groups finds out those that are not zero. Some sweeps over these follow,
        which Anderson's method extrapolates, or, when sweeps have cost enough, Newton's step.
        """
        sweeps, work, steps = 0, 0.0, 0
        best, idle = np.inf, 0
        while sweeps < most_sweeps:
            largest = self.sweep(penalties)
            sweeps += 1
            P = self.gradient()
            gap = self.gap(penalties, P)
            idle = 0 if gap < 0.999 * best else idle + 1
            best = min(best, gap)
            if gap <= target or not largest > 0 or idle >= MOST_IDLE:
                # The next programme is like this one: have less patience if it took a step.
                wanted = self.share * (0.7 if steps else 1.4)
                self.share = min(max(wanted, LEAST_SHARE), MOST_SHARE)
                break
            features = int(np.count_nonzero(self.B.any(axis=1)))
            groups = int(np.count_nonzero(penalties.lengths(self.B)))
            each, newton = self.sweep_work(features), self.newton_work(features, groups)
            if work + each >= self.share * newton:
                self.newton_step(penalties, P)
                work, steps = 0.0, steps + 1
                continue
            more = min(ACTIVE_SWEEPS, most_sweeps - sweeps)
            past = [(self.B.copy(), self.shadow.copy())]
            for _ in range(more):
                self.sweep(penalties, only_active=True)
                past.append((self.B.copy(), self.shadow.copy()))
            self._extrapolate(past, penalties)
            sweeps += more
            work += (1 + more) * each
        return sweeps

    def _extrapolate(self, past: list[tuple[np.ndarray, np.ndarray]], penalties: Penalties) -> None:
        """Go to the mixture of past iterates that Anderson's method proposes, if it is better."""
        steps = np.array([(b - a).ravel() for (a, _), (b, _) in pairwise(past)])
        gram = steps @ steps.T
        size = np.trace(gram)
        if not size > 0:
            return
        ones = np.ones(len(gram))
        weights = np.linalg.solve(gram + 1e-12 * size * np.diag(ones), ones)
        if not abs(weights.sum()) > 0:
            return
        weights /= weights.sum()
        here = self.B, self.shadow
        before = self.fit() + penalties.value(self.B)
        self.B = sum(w * B for w, (B, _) in zip(weights, past[1:], strict=True))
        self.shadow = sum(w * S for w, (_, S) in zip(weights, past[1:], strict=True))
        if not self.fit() + penalties.value(self.B) < before:
            self.B, self.shadow = here

    def newton_step(self, penalties: Penalties, P: np.ndarray) -> None:
        """Go along Newton's direction on the groups that are not zero as far as it is best.

        Where the Hessian is singular but for rounding, that may be nowhere.
        """
        lengths = penalties.lengths(self.B)
        active = np.flatnonzero((lengths > 0) | (penalties.norm == 0))
        local, features = penalties.of(active), penalties.features(active)
        if len(active) == 0:
            return
        change = self.newton_direction(features, local, P[features])
        if change is None:
            return
        image = self.image(features, change)
        B, first = self.B[features], local.starts[:-1]
        tau = step_length(
            float(np.vdot(P[features], change)),
            self.curvature(features, change, image),
            local.norm,
            local.ridge,
            lengths[active] ** 2,
            np.add.reduceat(np.einsum("mc,mc->m", B, change), first),
            np.add.reduceat(np.einsum("mc,mc->m", change, change), first),
        )
        shadow, before = self.shadow.copy(), self.fit() + penalties.value(self.B)
        self.B[features] = B + tau * change
        self.shadow -= tau * image
        if not self.fit() + penalties.value(self.B) <= before * (1 + ROUNDING):
            self.B[features], self.shadow[...] = B, shadow


@numba.njit(cache=True, nogil=True)
def length_of_block(squares, eigenvalues, t, r):  # type: ignore[no-untyped-def]
    """The s > 0 with sum_i squares_i / ((eigenvalues_i + r) s + t)^2 = 1, by Newton's method.

    1 / sqrt of the left-hand side is concave and grows with s: from below, Newton's steps end at
    the root without passing it.
    """
    total, largest = 0.0, 0.0
    for i in range(len(squares)):
        total += squares[i]
        largest = max(largest, eigenvalues[i])
    length = np.sqrt(total)
    if len(squares) == 1:
        return (length - t) / (largest + r) if largest + r > 0 else 0.0
    if not largest + r > 0:
        return 0.0
    s = (length - t) / (largest + r)
    for _ in range(50):
        value, slope = 0.0, 0.0
        for i in range(len(squares)):
            rate = eigenvalues[i] + r
            under = rate * s + t
            part = squares[i] / (under * under)
            value += part
            slope += part * rate / under
        root = np.sqrt(value)
        # (1 - 1 / root) / (d/ds 1 / root), with d/ds value = -2 slope.
        step = (root - 1) * value / slope if slope > 0 else 0.0
        s += step
        if abs(step) <= 1e-14 * s:
            break
    return s


@numba.njit(cache=True, nogil=True)
def update_block(P, B, change, eigenvalues, x, y, a, t, r):  # type: ignore[no-untyped-def]
    """Minimise over the features x to y; write what changed to rows from x - a on."""
    c = B.shape[1]
    squares = np.empty(y - x)
    total = 0.0
    for i in range(x, y):
        square = 0.0
        for o in range(c):
            z = P[i, o] + eigenvalues[i] * B[i, o]
            square += z * z
        squares[i - x] = square
        total += square
    s = 0.0
    if t > 0 and total > t * t:
        s = length_of_block(squares, eigenvalues[x:y], t, r)
    biggest = 0.0
    for i in range(x, y):
        rate = eigenvalues[i] + r
        factor = 0.0
        if t > 0:
            if s > 0:
                factor = s / (rate * s + t)
        elif rate > 0:
            factor = 1 / rate
        moved = 0.0
        for o in range(c):
            new = factor * (P[i, o] + eigenvalues[i] * B[i, o])
            difference = new - B[i, o]
            change[i - a, o] = difference
            B[i, o] = new
            moved += difference * difference
        biggest = max(biggest, eigenvalues[i] * moved)
    return biggest
