"""Where the next solution of a path will be: on the line through the last two, in log alpha."""

from __future__ import annotations

import math

import numpy as np

# The ratio of two alphas beyond which a line is no better than the last solution.
FARTHEST = 1.5


def share_ahead(alpha: float, last: float, before: float) -> float:
    """log(alpha / last) / log(last / before), at most 1; 0 for long steps and other ways."""
    if not alpha < last < before or last > FARTHEST * alpha:
        return 0.0
    return min(math.log(alpha / last) / math.log(last / before), 1.0)


def ahead(last: np.ndarray, before: np.ndarray, share: float) -> np.ndarray:
    """last + share (last - before), and 0 where last is."""
    beyond = last + np.asarray(share, last.dtype) * (last - before)
    return np.asarray(np.where(last == 0, last, beyond))
