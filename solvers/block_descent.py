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
the residual U, with P = A^T U / n for columns scaled by sqrt(h), and costs 2 n m c. Every few
sweeps Anderson's method extrapolates either; P and U are affine in B, so that a mixture of iterates
has the mixture of theirs.

References
----------
Friedman, Hastie and Tibshirani 2010 (the two forms); Yang and Hastie 2024 (exact blocks by the
eigenvalues of each); Bertrand and Massias 2021 (Anderson's method for coordinate descent).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np

# Features of a tile of the covariance form: its piece of H, of P and of B stay in cache.
TILE = 48
# Sweeps between two extrapolations, and how many iterates each mixes.
EXTRAPOLATE_EVERY, MIXED = 5, 6
# Sweeps over the blocks that are not zero between two over all.
MOST_ACTIVE_SWEEPS = 50


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

    def conjugate_and_scale(self, P: np.ndarray) -> tuple[float, float]:
        """The largest s <= 1 for which the conjugate at s P is finite, and its value there.

        Groups with neither norm nor ridge are left out: P is 0 there in a dual point.
        """
        lengths = self.lengths(P)
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

    shadow: np.ndarray
    """What is affine in B and kept beside it: P or U."""

    @abstractmethod
    def gradient(self) -> np.ndarray:
        """P = q - H B, of shape (m, c)."""

    @abstractmethod
    def fit(self) -> float:
        """1/2 sum_i h_i ||u_i||^2 / n, the quadratic and what makes it a sum of squares."""

    @abstractmethod
    def sweep(self, penalties: Penalties) -> float:
        """Minimise over each group in turn; return the largest lambda_i |change|^2 of a feature."""

    @abstractmethod
    def restricted(self, features: np.ndarray) -> BlockDescent:
        """The programme over some features only, the others held where they are."""

    @abstractmethod
    def accept(self, part: BlockDescent, features: np.ndarray) -> None:
        """Take over what ``restricted`` has reached."""

    def gap(self, penalties: Penalties) -> float:
        """Duality gap at B, from the residual scaled until it is feasible."""
        P = self.gradient()
        s, conjugate = penalties.conjugate_and_scale(P)
        pull = float(np.vdot(self.B, P))
        return (1 - s) ** 2 * self.fit() + penalties.value(self.B) + conjugate - s * pull

    def minimise(self, penalties: Penalties, target: float, most_sweeps: int = 100_000) -> int:
        """Descend until the duality gap is at most ``target``; return the number of sweeps.

        All groups are swept once, and then those that are not zero until they are solved.
        """
        sweeps = 0
        while sweeps < most_sweeps:
            self.sweep(penalties)
            sweeps += 1
            if self.gap(penalties) <= target:
                break
            active = np.flatnonzero(penalties.lengths(self.B) > 0)
            if len(active) == 0:
                if not self.sweep(penalties) > 0:
                    break
                continue
            features = penalties.features(active)
            if len(features) > 0.8 * len(self.B):
                sweeps += self._descend(penalties, target, EXTRAPOLATE_EVERY)
            else:
                part = self.restricted(features)
                sweeps += part._descend(penalties.of(active), target / 2, MOST_ACTIVE_SWEEPS)
                self.accept(part, features)
        return sweeps

    def _descend(self, penalties: Penalties, target: float, most: int) -> int:
        """Sweep with extrapolation until the gap is at most ``target``."""
        past = [(self.B.copy(), self.shadow.copy())]
        for k in range(1, most + 1):
            self.sweep(penalties)
            past.append((self.B.copy(), self.shadow.copy()))
            if k % EXTRAPOLATE_EVERY == 0:
                self._extrapolate(past[-MIXED:], penalties)
                past = [(self.B.copy(), self.shadow.copy())]
                if self.gap(penalties) <= target:
                    return k
        return most

    def _extrapolate(self, past: list[tuple[np.ndarray, np.ndarray]], penalties: Penalties) -> None:
        """Go to the mixture of past iterates that Anderson's method proposes, if it is better."""
        steps = np.array([(b - a).ravel() for (a, _), (b, _) in pairwise(past)])
        gram = steps @ steps.T
        size = np.trace(gram)
        if not size > 0:
            return
        weights = np.linalg.solve(gram + 1e-12 * size * np.eye(len(gram)), np.ones(len(gram)))
        total = weights.sum()
        if not abs(total) > 0:
            return
        weights /= total
        here = self.B.copy(), self.shadow.copy()
        before = self.fit() + penalties.value(self.B)
        self.B[...] = sum(w * B for w, (B, _) in zip(weights, past[1:], strict=True))
        self.shadow = sum(w * S for w, (_, S) in zip(weights, past[1:], strict=True))
        if not self.fit() + penalties.value(self.B) < before:
            self.B[...], self.shadow = here


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

    def gradient(self) -> np.ndarray:
        """P."""
        return self.shadow

    def fit(self) -> float:
        """Half of the mean square of what is left."""
        left = self.squares - float(np.vdot(self.B, self.q)) - float(np.vdot(self.B, self.shadow))
        return max(left, 0.0) / 2

    def sweep(self, penalties: Penalties) -> float:
        """Minimise over each group in turn, a tile at a time."""
        return _covariance_sweep(
            self.H,
            self.shadow,
            self.B,
            self.eigenvalues,
            penalties.starts,
            penalties.norm,
            penalties.ridge,
        )

    def restricted(self, features: np.ndarray) -> CovarianceDescent:
        """The programme over some features: their piece of H."""
        H = self.H[np.ix_(features, features)]
        B, P = self.B[features], self.shadow[features]
        q = P + H @ B
        # What the others leave: fit() must not change.
        squares = 2 * self.fit() + float(np.vdot(B, q)) + float(np.vdot(B, P))
        return CovarianceDescent(H, q, B, squares, P)

    def accept(self, part: BlockDescent, features: np.ndarray) -> None:
        """Take over B, and bring P up to date."""
        change = part.B - self.B[features]
        self.shadow -= self.H[features].T @ change
        self.B[features] = part.B


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
    """

    def __init__(self, AT: np.ndarray, U: np.ndarray, B: np.ndarray, eigenvalues: np.ndarray):
        super().__init__(B, eigenvalues)
        self.AT, self.shadow = AT, U

    def gradient(self) -> np.ndarray:
        """A^T U / n."""
        return self.AT @ self.shadow / len(self.shadow)

    def fit(self) -> float:
        """Half of the mean square of U."""
        return float(np.vdot(self.shadow, self.shadow)) / (2 * len(self.shadow))

    def sweep(self, penalties: Penalties) -> float:
        """Minimise over each group in turn."""
        starts, norm, ridge = penalties.starts, penalties.norm, penalties.ridge
        return _naive_sweep(self.AT, self.shadow, self.B, self.eigenvalues, starts, norm, ridge)

    def restricted(self, features: np.ndarray) -> NaiveDescent:
        """The programme over some features, with copies of their columns."""
        return NaiveDescent(
            self.AT[features], self.shadow.copy(), self.B[features], self.eigenvalues[features]
        )

    def accept(self, part: BlockDescent, features: np.ndarray) -> None:
        """Take over B and U."""
        self.B[features] = part.B
        self.shadow[...] = part.shadow


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
def _covariance_sweep(H, P, B, eigenvalues, starts, norm, ridge):  # type: ignore[no-untyped-def]
    m, c = B.shape
    largest = 0.0
    first = 0
    groups = len(norm)
    while first < groups:
        last = first + 1
        a = starts[first]
        while last < groups and starts[last + 1] - a <= TILE:
            last += 1
        e = starts[last]
        change = np.zeros((e - a, c))
        moved = False
        for g in range(first, last):
            x, y = starts[g], starts[g + 1]
            biggest = _update_block(P, B, change, eigenvalues, x, y, a, norm[g], ridge[g])
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
                if a > 0:
                    P[:a] -= np.dot(np.ascontiguousarray(H[a:e, :a].T), change)
                if e < m:
                    P[e:] -= np.dot(np.ascontiguousarray(H[a:e, e:].T), change)
        first = last
    return largest


@numba.njit(cache=True, nogil=True)
def _update_block(P, B, change, eigenvalues, x, y, a, t, r):  # type: ignore[no-untyped-def]
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
def _naive_sweep(AT, U, B, eigenvalues, starts, norm, ridge):  # type: ignore[no-untyped-def]
    n, c = U.shape
    largest = 0.0
    for g in range(len(norm)):
        x, y = starts[g], starts[g + 1]
        P = np.dot(AT[x:y], U)
        P /= n
        change = np.empty((y - x, c))
        biggest = _update_block(P, B[x:y], change, eigenvalues[x:y], 0, y - x, 0, norm[g], ridge[g])
        if biggest > 0:
            largest = max(largest, biggest)
            U -= np.dot(AT[x:y].T, change)
    return largest
