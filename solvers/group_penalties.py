"""What a quadratic programme over groups is penalised with: t_g ||B_g||_F + r_g / 2 ||B_g||_F^2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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


def smooth_part(
    P: np.ndarray, B: np.ndarray, penalties: Penalties
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative gradient, u_g and k_g of groups that are not zero."""
    lengths, sizes = penalties.lengths(B), np.diff(penalties.starts)
    safe = np.where(lengths > 0, lengths, 1.0)
    k = penalties.norm / safe
    G = P - np.repeat(k + penalties.ridge, sizes)[:, None] * B
    return G, B / np.repeat(safe, sizes)[:, None], k
