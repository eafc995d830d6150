"""Arrays that grow batch by batch: in memory up to a limit, in memory-mapped files beyond it."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np


class ActivationStore:
    """Several float32 arrays that grow together along axis 0.

    Parameters
    ----------
    n_arrays : int
    memory_limit : int
        Bytes to hold in memory, all arrays together. When they are exceeded, everything moves to
        files in a temporary folder of its own, which ``close()``, the garbage collector or the end
        of Python removes.
    """

    def __init__(self, n_arrays: int, memory_limit: int) -> None:
        self.memory_limit = memory_limit
        self._chunks: list[list[np.ndarray]] = [[] for _ in range(n_arrays)]
        self._shapes: list[tuple[int, ...]] = []
        self._length = 0
        self._batches = 0
        self._bytes = 0
        self._folder: Path | None = None
        self._finalizer: weakref.finalize | None = None

    @property
    def on_disk(self) -> bool:
        """Whether the limit was passed and files hold the arrays."""
        return self._folder is not None

    def append(self, *arrays: np.ndarray) -> None:
        """Add one chunk to every array.

        Raises
        ------
        ValueError
            If the shapes, axis 0 aside, differ from those of the first chunk.
        """
        shapes = [array.shape[1:] for array in arrays]
        self._shapes = self._shapes or shapes
        for which, (shape, first) in enumerate(zip(shapes, self._shapes, strict=True)):
            if shape != first:
                raise ValueError(
                    f"the {('input', 'output')[which]} of the block has shape {('n', *shape)} in "
                    f"batch {self._batches} but {('n', *first)} in batch 0: all batches must "
                    "agree beyond axis 0."
                )
        self._length += len(arrays[0])
        self._batches += 1
        self._bytes += sum(array.nbytes for array in arrays)
        for chunks, array in zip(self._chunks, arrays, strict=True):
            chunks.append(array)
        if self._folder is None and self._bytes > self.memory_limit:
            self._folder = Path(tempfile.mkdtemp(prefix="cvxdistill-"))
            self._finalizer = weakref.finalize(self, shutil.rmtree, self._folder, True)
        if self._folder is not None:
            for which in range(len(self._chunks)):
                self._write(which, self._folder)

    def split_rows(self) -> None:
        """Make axis 1 part of axis 0, in all arrays: examples (T, ...) become T rows each."""
        length = {shape[0] for shape in self._shapes}
        assert len(length) == 1
        self._length *= length.pop()
        self._shapes = [shape[1:] for shape in self._shapes]
        # The bytes stay as they lie, also in files.
        self._chunks = [
            [chunk.reshape(-1, *shape) for chunk in chunks]
            for chunks, shape in zip(self._chunks, self._shapes, strict=True)
        ]

    def _write(self, which: int, folder: Path) -> None:
        """Append what is in memory to the file."""
        with open(folder / f"{which}.f32", "ab") as file:
            for chunk in self._chunks[which]:
                file.write(np.ascontiguousarray(chunk).data)
        self._chunks[which] = []

    def finish(self) -> tuple[np.ndarray, ...]:
        """Return the whole arrays; memory maps are copy-on-write, so the files stay as recorded."""
        return tuple(self._whole(which) for which in range(len(self._chunks)))

    def _whole(self, which: int) -> np.ndarray:
        shape = (self._length, *self._shapes[which])
        if self._folder is not None:
            path = self._folder / f"{which}.f32"
            return np.memmap(path, dtype=np.float32, mode="c", shape=shape)
        whole = np.empty(shape, dtype=np.float32)
        position = 0
        # Chunks are let go one by one, so that the peak is not twice the limit.
        chunks, self._chunks[which] = self._chunks[which][::-1], []
        while chunks:
            chunk = chunks.pop()
            whole[position : position + len(chunk)] = chunk
            position += len(chunk)
        return whole

    def close(self) -> None:
        """Forget what is held and remove the temporary folder."""
        self._chunks = [[] for _ in self._chunks]
        if self._finalizer is not None:
            self._finalizer()
