"""A random order of examples that does not undo the one in which the data already are."""

from __future__ import annotations

import numpy as np


def random_order(rng: np.random.Generator, n: int) -> np.ndarray:
    """0, ..., n - 1 in random order, (n,) of int.

    Not ``rng.permutation(n)``: data that were shuffled by it with the same seed, which is mostly 0,
    would be put back in the order that they had before, sorted by class perhaps, and the first of
    them held out.
    """
    return np.argsort(rng.random(n), kind="stable")
