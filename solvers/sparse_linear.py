"""Sparse linear students: ridge regressions of few weights each, from moments alone.

With the targets' moments as for ``ProjectedRidge``, and weights allowed at the places S alone,

    minimise over W, b   1/(2n) ||X W + 1 b^T - Y||_F^2 + alpha/2 ||W||_F^2,   W_ij = 0 outside S,

each output is a ridge regression on its own features, solved exactly. Which k places to keep is
combinatorial; they are chosen by what the objective would lose without them, H = xx + alpha I,

    w_i^2 / (2 (H^-1)_ii),

in two stages. One pass over the features (SparseGPT) keeps 2 k or more: of each stretch of features
the weights that lose most, the later features making up for those that go. Then the weight that
loses least goes, one by one and output by output, the others of its output being refitted each time
(optimal brain surgeon), until k are left of all outputs together. The same order serves for all
smaller k.

References
----------
Hassibi and Stork 1993 (optimal brain surgeon); Frantar and Alistarh 2022, 2023 (its exact form for
one layer; SparseGPT).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numba
import numpy as np
from scipy.linalg import cho_factor, cho_solve, cholesky

from cvxdistill.solvers.centred_moments import CentredMoments

# Features of a stretch of the first stage, which all keep the same share of their weights.
STRETCH = 64
# Places of the first stage for each one that is kept in the end.
MARGIN = 2
# Multiplications of the second stage, which is left out where there would be more.
MOST_WORK = 1e9


@dataclass(frozen=True)
class SparseFit:
    """Z = (X W + 1 b^T) R, W mostly zero.

    Attributes
    ----------
    W : ndarray of shape (d, s)
    places : ndarray of bool of shape (d, s)
        Where W may differ from zero.
    intercept : ndarray of shape (s,)
    root : ndarray of shape (s, s)
        R.
    alpha : float
        Of the ridge.
    relative_gap : float
        Duality gap of the ridge regressions on these places, relative to what they lower the
        objective by.
    """

    W: np.ndarray
    places: np.ndarray
    intercept: np.ndarray
    root: np.ndarray
    alpha: float
    relative_gap: float

    def shifted(self, offset: np.ndarray) -> SparseFit:
        """The same map of features to which ``offset``, (d,), is added."""
        return replace(self, intercept=self.intercept - offset @ self.W)

    def error(self, moments: CentredMoments) -> float:
        """||Y' - Y||_F^2 / ||Y - mean Y||_F^2 on the examples of some moments."""
        return moments.error(self.W @ self.root, self.intercept @ self.root)


class SparseRidge:
    """Sparse students of one block with any number of weights, from one set of moments.

    Parameters
    ----------
    moments : CentredMoments
        Of features x (d,) and targets y = R^T t; W maps x to t.
    alpha : float
        Strength of the ridge, relative to the mean variance of a feature.
    root : ndarray of shape (s, s), optional
        R, invertible. An error of t_j alone counts as much as row j of R is long.

    Raises
    ------
    ValueError
        If alpha is not positive and finite.
    """

    def __init__(self, moments: CentredMoments, alpha: float, root: np.ndarray | None = None):
        if not (alpha > 0 and np.isfinite(alpha)):
            raise ValueError(f"alpha must be positive and finite, got {alpha!r}.")
        self.moments = moments
        d, s = moments.xy.shape
        self.root = np.eye(s) if root is None else root
        inverse = np.linalg.inv(self.root)
        self.xy, self.target_mean = moments.xy @ inverse, moments.y_mean @ inverse
        self.importance = np.sum(self.root**2, axis=1)
        self.alpha = max(alpha * float(np.trace(moments.xx)) / d, moments.noise) or 1.0
        self.system = moments.xx.copy()
        self.system[np.diag_indices(d)] += self.alpha
        # Features that vary most come first: the later ones make up for them.
        self.order = np.argsort(-np.diag(self.system), kind="stable")
        # Of the second stage, and how many places it was begun with.
        self._begun, self._ranks = 0, np.zeros((d, s), dtype=np.int64)

    @property
    def most(self) -> int:
        """All weights, d s."""
        return self.xy.size

    @cached_property
    def _whole(self) -> tuple[np.ndarray, np.ndarray]:
        """All weights, and U with H^-1 = U^T U, U upper triangular; features in ``order``."""
        H = self.system[np.ix_(self.order, self.order)]
        factor = cho_factor(H, lower=True)
        W = cho_solve(factor, self.xy[self.order])
        inverse = cho_solve(factor, np.eye(len(H)))
        return W, cholesky((inverse + inverse.T) / 2, lower=False)

    def fit(self, count: int) -> SparseFit:
        """The student of ``count`` weights.

        The second stage goes on where a fit of more weights left it.

        Raises
        ------
        ValueError
            If there are not so many, or none.
        """
        if not 1 <= count <= self.most:
            raise ValueError(f"count must lie between 1 and {self.most:,}, got {count}.")
        ranks = self._ranks_for(count)
        return self._refitted(self._one_pass(count) if ranks is None else ranks < count)

    def _ranks_for(self, count: int) -> np.ndarray | None:
        """Places in the order of the second stage, begun with enough; None where that is much."""
        wanted = min(MARGIN * count, self.most)
        if self._begun < wanted:
            outputs = self.xy.shape[1]
            if outputs * (wanted / outputs) ** 3 / 3 > MOST_WORK:
                return None
            self._begun, self._ranks = wanted, self._backward(self._one_pass(wanted))
        return self._ranks

    def _one_pass(self, count: int) -> np.ndarray:
        """Places (d, s) of so many weights, by the first stage."""
        W, U = self._whole
        d, s = W.shape
        places = np.zeros((d, s), dtype=bool)
        if count == d * s:
            return ~places
        W, scale = W.copy(), np.sqrt(self.importance)
        for start in range(0, d, STRETCH):
            stop = min(start + STRETCH, d)
            own = slice(start, stop)
            # Rounded so that all stretches together keep ``count``.
            wanted = count * stop // d - count * start // d
            losses = np.abs(W[own]) * scale / np.diag(U)[own, None]
            places[own] = _largest(losses, wanted)
            errors = np.zeros((stop - start, s))
            for i in range(start, stop):
                gone = np.where(places[i], 0, W[i]) / U[i, i]
                errors[i - start] = gone
                W[i:stop] -= U[i, i:stop, None] * gone
            W[stop:] -= U[own, stop:].T @ errors
        found = np.empty_like(places)
        found[self.order] = places
        return found

    def _backward(self, places: np.ndarray) -> np.ndarray:
        """Ranks (d, s) by the second stage, begun with these: the k best places are below k."""
        losses, steps = np.full(places.shape, -1.0), np.zeros(places.shape, dtype=np.int64)
        for j in range(places.shape[1]):
            own = np.flatnonzero(places[:, j])
            if len(own) == 0:
                continue
            inverse = cho_solve(cho_factor(self.system[np.ix_(own, own)]), np.eye(len(own)))
            lost, gone = _remove_all(inverse, inverse @ self.xy[own, j])
            # One that goes later counts for no less: those before it have to go, too.
            losses[own[gone], j] = np.maximum.accumulate(lost) * self.importance[j]
            steps[own[gone], j] = np.arange(len(own))
        ranks = np.empty(places.size, dtype=np.int64)
        ranks[np.lexsort((steps.ravel(), losses.ravel()))[::-1]] = np.arange(places.size)
        return ranks.reshape(places.shape)

    def _refitted(self, places: np.ndarray) -> SparseFit:
        W = np.zeros_like(self.xy)
        for j in range(places.shape[1]):
            own = np.flatnonzero(places[:, j])
            if len(own):
                system = self.system[np.ix_(own, own)]
                W[own, j] = cho_solve(cho_factor(system, overwrite_a=True), self.xy[own, j])
        gradient = np.where(places, self.system @ W - self.xy, 0)
        # Twice the gap, and twice what W lowers the objective by from W = 0 on.
        gap = float(np.sum(gradient**2)) / self.alpha
        lowered = float(np.vdot(W, self.xy))
        return SparseFit(
            W,
            places,
            self.target_mean - self.moments.x_mean @ W,
            self.root,
            self.alpha,
            gap / lowered if lowered > 0 else gap,
        )


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the ``count`` largest are, as booleans."""
    found = np.zeros(values.size, dtype=bool)
    if count:
        found[np.argpartition(-values.ravel(), count - 1)[:count]] = True
    return found.reshape(values.shape)


@numba.njit(cache=True)
def _remove_all(inverse: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each removal loses, w_i^2 / (H^-1)_ii, and of which feature, from the first to the last.

    Of one output with weights ``w`` and H^-1 ``inverse``, both overwritten.
    """
    left = len(w)
    features = np.arange(left)
    lost, gone = np.empty(left), np.empty(left, np.int64)
    for step in range(left):
        least, best = 0, np.inf
        for a in range(left):
            loss = w[a] * w[a] / inverse[a, a]
            if loss < best:
                least, best = a, loss
        lost[step], gone[step] = best, features[least]
        column, pivot = inverse[least, :left].copy(), inverse[least, least]
        for a in range(left):
            share = column[a] / pivot
            w[a] -= share * w[least] if a != least else 0.0
            if share != 0.0 and a != least:
                for b in range(left):
                    inverse[a, b] -= share * column[b]
        # The last takes its place.
        left -= 1
        w[least], features[least] = w[left], features[left]
        for b in range(left):
            inverse[least, b] = inverse[left, b]
        inverse[least, least] = inverse[left, left]
        for a in range(left):
            inverse[a, least] = inverse[least, a]
    return lost, gone
