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
which groups are zero, and are slow on the others where features are correlated; so a step of
Newton's method on these (``cvxdistill.solvers.active_newton``) follows when sweeps have cost as
much as a share of one.

References
----------
Friedman, Hastie and Tibshirani 2010 (the two forms); Yang and Hastie 2024 (exact blocks by the
eigenvalues of each).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np

from cvxdistill.solvers.active_newton import (
    DenseColumnsOfGroups,
    direction_from_columns,
    direction_from_gram,
    step_length,
)

# Features of a tile of the covariance form: its piece of H, of P and of B stay in cache.
TILE = 48
# Sweeps over the groups that are not zero between two over all.
ACTIVE_SWEEPS = 4
# Newton's step comes when sweeps have cost a share of it: at first, at least and at most.
FIRST_SHARE, LEAST_SHARE, MOST_SHARE = 0.3, 0.15, 0.6
# What an operation of a sweep costs in those of a matrix product.
SWEEP_COST = 4.0


@dataclass
class Penalties:
    """What a quadratic programme is penalised with.

    Attributes
    ----------
    starts : ndarray of int, shape (groups + 1,)
        Group g has the features starts[g] to starts[g + 1].
    norm, ridge : ndarray of shape (groups,)
        t and r.
    """

    starts: np.ndarray
    norm: np.ndarray
    ridge: np.ndarray

    def lengths(self, B: np.ndarray) -> np.ndarray:
        """||B_g||_F of all groups."""
        if len(self.norm) == 0:
            return np.zeros(0)
        squares = np.einsum("mc,mc->m", B, B)
        return np.sqrt(np.add.reduceat(squares, self.starts[:-1]))

    def value(self, B: np.ndarray) -> float:
        """Sum over groups of t_g ||B_g|| + r_g / 2 ||B_g||^2."""
        lengths = self.lengths(B)
        return float(self.norm @ lengths + self.ridge @ lengths**2 / 2)

    def of(self, groups: np.ndarray) -> Penalties:
        """Those of some groups."""
        sizes = np.diff(self.starts)[groups]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        return Penalties(starts, self.norm[groups], self.ridge[groups])

    def features(self, groups: np.ndarray) -> np.ndarray:
        """Indices of the features of some groups."""
        runs = [np.arange(self.starts[g], self.starts[g + 1]) for g in groups]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)

    def conjugate_and_scale(self, lengths: np.ndarray) -> tuple[float, float]:
        """The largest s <= 1 for which the conjugate at s P is finite, and its value there.

        Takes the lengths ||P_g||. Groups with neither norm nor ridge are left out: P is 0 there in
        a dual point.
        """
        bound = (self.ridge == 0) & (self.norm > 0)
        over = lengths[bound] / self.norm[bound]
        s = 1 / max(1.0, float(over.max(initial=0.0)))
        blended = self.ridge > 0
        excess = np.maximum(s * lengths[blended] - self.norm[blended], 0)
        return s, float(np.sum(excess**2 / (2 * self.ridge[blended])))


class BlockDescent(ABC):
    """The quadratic programme and where its descent stands.

    Parameters
    ----------
    B : ndarray of shape (m, c)
        Rotated coefficients; changed in place.
    eigenvalues : ndarray of shape (m,)
        The diagonal of H.
    """

    def __init__(self, B: np.ndarray, eigenvalues: np.ndarray):
        self.B = B
        self.eigenvalues = eigenvalues
        self.share = FIRST_SHARE

    shadow: np.ndarray
    """What is affine in B and kept beside it: P or U."""

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
    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """By how much ``shadow`` falls when the rows of B of these features grow by ``change``."""

    @abstractmethod
    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """<change, H change>."""

    def gap(self, penalties: Penalties, P: np.ndarray | None = None) -> float:
        """Duality gap at B, from the residual scaled until it is feasible."""
        P = self.gradient() if P is None else P
        s, conjugate = penalties.conjugate_and_scale(penalties.lengths(P))
        pull = float(np.vdot(self.B, P))
        return (1 - s) ** 2 * self.fit() + penalties.value(self.B) + conjugate - s * pull

    def minimise(self, penalties: Penalties, target: float, most_sweeps: int = 100_000) -> int:
        """Descend until the duality gap is at most ``target``; return the number of sweeps.

        Each sweep over all groups, which finds out those that are not zero, is followed by a step
        of Newton's method on these.
        """
        sweeps, work, steps = 0, 0.0, 0
        while sweeps < most_sweeps:
            largest = self.sweep(penalties)
            sweeps += 1
            P = self.gradient()
            if self.gap(penalties, P) <= target or not largest > 0:
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
        """Go along Newton's direction on the groups that are not zero as far as it is best."""
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
        self.B[features] = B + tau * change
        self.shadow -= tau * image


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
        return SWEEP_COST * active * self.B.size

    def newton_work(self, active: int, groups: int) -> float:
        """A factorisation, for more outputs also an inverse and solutions."""
        c = self.B.shape[1]
        return active**3 / 3 if c == 1 else active**3 + 2 * active**2 * c

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
        """From the piece of H."""
        H = self.H if len(features) == len(self.H) else self.H[np.ix_(features, features)]
        G, U, k = smooth_part(P, self.B[features], penalties)
        return direction_from_gram(H, G, U, k, penalties.ridge, penalties.starts)

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """H change."""
        return self.H[features].T @ change

    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """<change, H change>."""
        return float(np.vdot(change, image[features]))


class NaiveDescent(BlockDescent):
    """The naive form, for columns that are centred, scaled by sqrt(h) and rotated.

    Parameters
    ----------
    AT : ndarray of shape (m, n)
        The columns, as rows.
    U : ndarray of shape (n, c)
        sqrt(h) times the residual at B; changed in place.
    B, eigenvalues
        As for ``BlockDescent``.
    start : ndarray of shape (n, c), optional
        U at B = 0, where it is known.
    """

    def __init__(
        self,
        AT: np.ndarray,
        U: np.ndarray,
        B: np.ndarray,
        eigenvalues: np.ndarray,
        start: np.ndarray | None = None,
    ):
        super().__init__(B, eigenvalues)
        self.AT, self.shadow = AT, U
        self.start = U + AT.T @ B if start is None else start

    def refresh(self) -> None:
        """Compute U anew."""
        np.subtract(self.start, self.AT.T @ self.B, out=self.shadow)

    def gradient(self) -> np.ndarray:
        """A^T U / n."""
        return self.AT @ self.shadow / len(self.shadow)

    def fit(self) -> float:
        """Half of the mean square of U."""
        return float(np.vdot(self.shadow, self.shadow)) / (2 * len(self.shadow))

    def sweep_work(self, active: int) -> float:
        """Two passes over their columns."""
        return naive_sweep_work(self.shadow, active)

    def newton_work(self, active: int, groups: int) -> float:
        """The smaller Gram matrix and its factorisation."""
        return naive_newton_work(self.shadow, active, groups)

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

    def newton_direction(
        self, features: np.ndarray, penalties: Penalties, P: np.ndarray
    ) -> np.ndarray | None:
        """From the columns, or their piece of H where that is smaller."""
        AT = self.AT if len(features) == len(self.AT) else self.AT[features]
        G, U, k = smooth_part(P, self.B[features], penalties)
        r, starts = penalties.ridge, penalties.starts
        if len(features) > self.AT.shape[1] and U.shape[1] == 1:
            normed = np.repeat(k > 0, np.diff(starts))
            columns, free = (AT, AT[:0]) if normed.all() else (AT[normed], AT[~normed])
            change = direction_from_columns(
                DenseColumnsOfGroups(columns, np.diff(starts)[k > 0]),
                free,
                G[:, 0],
                U[:, 0],
                k,
                r,
                starts,
            )
            return None if change is None else change[:, None]
        return direction_from_gram(AT @ AT.T / AT.shape[1], G, U, k, r, starts)

    def image(self, features: np.ndarray, change: np.ndarray) -> np.ndarray:
        """A change."""
        return self.AT[features].T @ change

    def curvature(self, features: np.ndarray, change: np.ndarray, image: np.ndarray) -> float:
        """||A change||^2 / n."""
        return float(np.vdot(image, image)) / len(image)


def naive_sweep_work(U: np.ndarray, active: int) -> float:
    """Of the naive form with residual U (n, c): two passes over the columns."""
    return SWEEP_COST * 2 * active * U.size


def naive_newton_work(U: np.ndarray, active: int, groups: int) -> float:
    """Of the naive form with residual U (n, c): the smaller Gram matrix and its factorisation."""
    n, c = U.shape
    if c > 1:
        return n * active**2 / 2 + active**3 + 2 * active**2 * c
    small, large = sorted((n, active))
    work = small**2 * large / 2 + small**3 / 3
    return work if active <= n else work + 2 * n**2 * groups + 2 * n * groups**2


def smooth_part(
    P: np.ndarray, B: np.ndarray, penalties: Penalties
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative gradient, u_g and k_g of groups that are not zero."""
    lengths, sizes = penalties.lengths(B), np.diff(penalties.starts)
    safe = np.where(lengths > 0, lengths, 1.0)
    k = penalties.norm / safe
    G = P - np.repeat(k + penalties.ridge, sizes)[:, None] * B
    return G, B / np.repeat(safe, sizes)[:, None], k


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
