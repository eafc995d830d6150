"""Where the next solution of a path will be: on the line through the last two, in log alpha."""

from __future__ import annotations

import math

import numpy as np

# The ratio of two alphas beyond which a line is no better than the last solution.
FARTHEST = 1.5


class LastTwo:
    """Where the last two solves of a path ended.

    With what they kept at alphas a_1 > a_2, the line through both is, for the next alpha a,

        x_2 + s (x_2 - x_1),    s = min(1, log(a / a_2) / log(a_2 / a_1)),

    and 0 where x_2 is.
    """

    def __init__(self) -> None:
        self._ends: list[tuple[float, tuple[np.ndarray, ...]]] = []

    def add(self, alpha: float, *arrays: np.ndarray) -> None:
        """Keep where a solve ended; the arrays must not change afterwards."""
        self._ends = [*self._ends[-1:], (alpha, arrays)]

    def last(self) -> tuple[np.ndarray, ...] | None:
        """What was kept last, if anything was."""
        return self._ends[-1][1] if self._ends else None

    def ahead(self, alpha: float) -> tuple[np.ndarray, ...] | None:
        """What is on the line at alpha; None after fewer than two, or for a long step."""
        if len(self._ends) < 2:
            return None
        (before, older), (last, newer) = self._ends
        if not alpha < last < before or last > FARTHEST * alpha:
            return None
        share = min(math.log(alpha / last) / math.log(last / before), 1.0)
        return tuple(_beyond(x, y, share) for x, y in zip(newer, older, strict=True))


def _beyond(last: np.ndarray, before: np.ndarray, share: float) -> np.ndarray:
    line = last + np.asarray(share, last.dtype) * (last - before)
    return np.asarray(np.where(last == 0, last, line))
