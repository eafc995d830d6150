"""What a matrix of examples must be: shape, dtype and slices of rows, nothing more.

Arrays and memory maps are such row sources, and so are the patches of an image batch, which are
cut as they are asked for and never lie in memory all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

# A block of rows and what is computed from it should stay in cache.
BLOCK_BYTES = 2 * 2**20
SMALLEST_BLOCK = 512


class RowSource(Protocol):
    """Anything with a shape (n, d), a floating dtype and ``source[start:stop] -> (m, d)``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""
        ...

    @property
    def dtype(self) -> Any:
        """float32 or float64."""
        ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


def row_blocks(n: int, width: int, dtype: Any, rows: int | None = None) -> Iterator[slice]:
    """Slices that cover range(n): of ``rows``, or such that ``width`` columns stay in cache."""
    in_cache = BLOCK_BYTES // (max(width, 1) * np.dtype(dtype).itemsize)
    size = max(SMALLEST_BLOCK, in_cache) if rows is None else rows
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def even_blocks(n: int, count: int, threads: int) -> list[slice]:
    """Slices of equal size that cover range(n): at least ``count``, as many for each thread."""
    count = min(-(-count // threads) * threads, n)
    ends = [n * k // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(ends)]


def check_rows(X: Any, name: str = "X") -> RowSource:
    """Return ``X`` if it is a row source; turn a list or an integer array into a float array.

    Raises
    ------
    ValueError
        If it is not two-dimensional, has no rows or no columns, or holds NaN or infinity.
    TypeError
        If it does not hold real numbers.
    """
    if not isinstance(X, np.ndarray) and not (
        hasattr(X, "shape") and hasattr(X, "dtype") and hasattr(X, "__getitem__")
    ):
        X = np.asarray(X)
    if len(X.shape) != 2:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(X.shape)}.")
    if 0 in X.shape:
        raise ValueError(f"{name} must have at least one row and one column, got {X.shape}.")
    if not isinstance(X[0:1], np.ndarray):
        # Sparse matrices and tensors look like row sources, but their products are not arrays.
        raise TypeError(
            f"{name} must be a NumPy array or give arrays when sliced, got {type(X).__name__}."
        )
    if np.dtype(X.dtype).kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {X.dtype}.")
    if not isinstance(X, np.ndarray):
        return X
    if X.dtype not in (np.float32, np.float64):
        X = X.astype(np.float32 if X.dtype == np.float16 else np.float64)
    if not np.isfinite(X).all():
        raise ValueError(f"{name} contains NaN or infinity.")
    return X


class RowSubset:
    """Some rows of another row source, gathered as they are asked for.

    Parameters
    ----------
    rows : row source with ``take(indices) -> ndarray``, of shape (n, d)
    indices : ndarray of int, shape (m,)
    """

    def __init__(self, rows: Any, indices: np.ndarray):
        self._rows = rows
        self.indices = np.asarray(indices)
        self.shape = (len(self.indices), rows.shape[1])
        self.dtype = rows.dtype

    def __getitem__(self, rows: Any) -> np.ndarray:
        return self._rows.take(self.indices[rows])
