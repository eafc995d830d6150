"""The rows of a block's inputs, cut as they are asked for: vectors, tokens or image patches.

Both row sources present recorded inputs as the matrix X (n, d) of the convex program, with a last
column of ones (the constant that carries the first layer's and the gates' biases). They read the
inputs, an array or a memory map, only where a slice or a selection touches them, so X never lies
in memory all at once. ``layout.py`` says which of the two a block needs.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

# Rows are cut in pieces of about this size: what is being copied should stay in cache.
PIECE_BYTES = 2**20

Pair: TypeAlias = tuple[int, int]


def check_indices(indices: np.ndarray, n: int) -> np.ndarray:
    """Return row numbers as int64, refusing what does not lie in range(n)."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise TypeError(
            f"indices must be a one-dimensional array of integers, got shape {indices.shape} "
            f"and dtype {indices.dtype}."
        )
    indices = indices.astype(np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= n):
        raise IndexError(f"indices must lie in [0, {n}), got {indices.min()} to {indices.max()}.")
    return indices


class _Rows:
    """Shape, dtype and slicing that the two row sources share."""

    shape: tuple[int, int]
    dtype: np.dtype
    ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype})"

    def __getitem__(self, rows: slice) -> np.ndarray:
        if not isinstance(rows, slice):
            raise TypeError(
                f"rows are read by slices, or by number with take(indices); got {rows!r}."
            )
        start, stop, step = rows.indices(self.shape[0])
        if step != 1:
            return self.take(np.arange(start, stop, step))
        out = np.empty((max(stop - start, 0), self.shape[1]), dtype=self.dtype)
        out[:, -1] = 1
        if len(out):
            self._fill(out, start, stop)
        return out

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows with these numbers, in this order; repeats are allowed.

        Raises
        ------
        IndexError
            If a number does not lie in range(n).
        TypeError
            If ``indices`` is not one-dimensional or not of integers.
        """
        indices = check_indices(indices, self.shape[0])
        out = np.empty((indices.size, self.shape[1]), dtype=self.dtype)
        out[:, -1] = 1
        if indices.size:
            self._gather(out, indices)
        return out

    def _fill(self, out: np.ndarray, start: int, stop: int) -> None:
        raise NotImplementedError

    def _gather(self, out: np.ndarray, indices: np.ndarray) -> None:
        raise NotImplementedError


class VectorRows(_Rows):
    """Feature vectors (n, d - 1) as rows of X, with the column of ones behind them."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self.shape = (vectors.shape[0], vectors.shape[1] + 1)
        self.dtype = vectors.dtype

    def _fill(self, out: np.ndarray, start: int, stop: int) -> None:
        out[:, :-1] = self._vectors[start:stop]

    def _gather(self, out: np.ndarray, indices: np.ndarray) -> None:
        out[:, :-1] = self._vectors[indices]


class PatchRows(_Rows):
    """The patches of images (N, C, H, W) as rows of X, ordered (image, row, column of the output).

    The columns run over (C, kh, kw), as the weights of a convolution flatten, then the ones. Row
    (i, a, b) holds ``padded[i, :, a s : a s + kh, b s : b s + kw]``, so that
    ``X[:, :-1] @ weight.reshape(m, -1).T`` is the convolution.
    """

    def __init__(
        self, images: np.ndarray, grid: Pair, kernel_size: Pair, stride: Pair, padding: Pair
    ) -> None:
        self._images = images
        self._grid = grid
        self._kernel, self._stride, self._padding = kernel_size, stride, padding
        n_features = images.shape[1] * kernel_size[0] * kernel_size[1] + 1
        self.shape = (images.shape[0] * grid[0] * grid[1], n_features)
        self.dtype = images.dtype

    def _padded(self, images: np.ndarray) -> np.ndarray:
        """Images (m, C, H, W) with the layout's zero padding, channels last: (m, H+, W+, C)."""
        (top, left), (m, channels, height, width) = self._padding, images.shape
        padded = np.zeros((m, height + 2 * top, width + 2 * left, channels), dtype=self.dtype)
        padded[:, top : top + height, left : left + width] = images.transpose(0, 2, 3, 1)
        return padded

    def _cut(self, out: np.ndarray, first: int, last: int, top: int, bottom: int) -> None:
        """Write the patches of images [first, last) at output rows [top, bottom)."""
        (_, width), (kh, kw), (sh, sw) = self._grid, self._kernel, self._stride
        channels, height = self._images.shape[1], bottom - top
        per_image = height * width
        piece = max(1, PIECE_BYTES // (per_image * out.strides[0]))
        for begin in range(first, last, piece):
            end = min(begin + piece, last)
            padded = self._padded(self._images[begin:end])
            rows = out[(begin - first) * per_image : (end - first) * per_image, :-1]
            patches = rows.reshape(end - begin, height, width, channels, kh, kw)
            # One tap at a time keeps the channels contiguous on the side that is read: two to
            # four times as fast as one copy out of a window view.
            for i in range(kh):
                vertical = slice(top * sh + i, (bottom - 1) * sh + i + 1, sh)
                for j in range(kw):
                    horizontal = slice(j, (width - 1) * sw + j + 1, sw)
                    patches[..., i, j] = padded[:, vertical, horizontal]

    def _cut_within(self, out: np.ndarray, image: int, start: int, stop: int) -> None:
        """Write positions [start, stop) of one image."""
        width = self._grid[1]
        top, bottom = start // width, -(-stop // width)
        strip = np.empty(((bottom - top) * width, out.shape[1]), dtype=self.dtype)
        self._cut(strip, image, image + 1, top, bottom)
        out[:, :-1] = strip[start - top * width : stop - top * width, :-1]

    def _fill(self, out: np.ndarray, start: int, stop: int) -> None:
        per_image = self._grid[0] * self._grid[1]
        first, offset = divmod(start, per_image)
        if offset:
            head = min(stop - start, per_image - offset)
            self._cut_within(out[:head], first, offset, offset + head)
            out, first = out[head:], first + 1
        n_whole, tail = divmod(len(out), per_image)
        if n_whole:
            self._cut(out[: n_whole * per_image], first, first + n_whole, 0, self._grid[0])
        if tail:
            self._cut_within(out[n_whole * per_image :], first + n_whole, 0, tail)

    def _gather(self, out: np.ndarray, indices: np.ndarray) -> None:
        height, width = self._grid
        (kh, kw), (sh, sw) = self._kernel, self._stride
        # In order of rows every image is read once, and a memory map from front to back.
        order = np.argsort(indices, kind="stable")
        image, position = np.divmod(indices[order], height * width)
        images, image_of = np.unique(image, return_inverse=True)
        tops, lefts = (position // width) * sh, (position % width) * sw
        piece = max(1, PIECE_BYTES // max(1, self._images[:1].nbytes))
        for begin in range(0, images.size, piece):
            low, high = np.searchsorted(image_of, (begin, begin + piece))
            padded = self._padded(self._images[images[begin : begin + piece]])
            which, top, left = image_of[low:high] - begin, tops[low:high], lefts[low:high]
            patches = np.empty((high - low, padded.shape[-1], kh, kw), dtype=self.dtype)
            for i in range(kh):
                for j in range(kw):
                    patches[:, :, i, j] = padded[which, top + i, left + j]
            out[order[low:high], :-1] = patches.reshape(high - low, -1)
