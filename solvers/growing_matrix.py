"""A symmetric matrix that grows by rows and columns, in one piece of memory."""

from __future__ import annotations

import numba
import numpy as np


class GrowingMatrix:
    """A symmetric matrix of shape (m, m), 0 at first.

    Attributes
    ----------
    values : ndarray of shape (m, m)
        In C order. A view of memory that the next call of ``grow`` writes over.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0)
        self.values = np.empty((0, 0))

    def grow(self, cross: np.ndarray, own: np.ndarray) -> None:
        """Add k rows and columns: ``cross`` (m, k) beside what there is, ``own`` (k, k) below."""
        m, size = len(self.values), len(self.values) + len(own)
        past, memory = self.values, self.memory
        if size**2 > len(memory):
            memory = np.empty(max(size**2, 3 * len(memory) // 2))
        self.values = memory[: size**2].reshape(size, size)
        if memory is self.memory:
            _spread_rows(memory, m, size)
        else:
            self.values[:m, :m] = past
            self.memory = memory
        self.values[:m, m:] = cross
        self.values[m:, :m] = cross.T
        self.values[m:, m:] = own


@numba.njit(cache=True, nogil=True)
def _spread_rows(memory, m, size):  # type: ignore[no-untyped-def]
    """Move m rows of m numbers to where rows of ``size`` numbers start, the last ones first."""
    for i in range(m - 1, 0, -1):
        for k in range(m - 1, -1, -1):
            memory[i * size + k] = memory[i * m + k]
