"""Rotations of the features of each group to the eigenvectors of its block of a Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np


class Rotations:
    """Orthogonal matrices Q of consecutive groups, kept by runs of groups of one size.

    Parameters
    ----------
    runs : list of ndarray of shape (groups, size, size)
        Their columns are the eigenvectors.
    """

    def __init__(self, runs: list[np.ndarray]):
        self.runs = runs

    @classmethod
    def of(cls, H: np.ndarray, sizes: np.ndarray) -> Rotations:
        """Those that make the diagonal blocks of H of these sizes diagonal."""
        runs, a = [], 0
        for size, count in _runs(sizes):
            blocks = np.ones((count, 1, 1))
            if size > 1:
                places = a + np.arange(count * size).reshape(count, size)
                blocks = np.linalg.eigh(H[places[:, :, None], places[:, None, :]])[1]
            runs.append(blocks)
            a += count * size
        return cls(runs)

    @classmethod
    def of_columns(cls, AT: np.ndarray, starts: np.ndarray) -> Rotations:
        """Those for AT AT^T, from AT."""
        runs, a = [], 0
        for size, count in _runs(np.diff(starts)):
            blocks = np.ones((count, 1, 1))
            if size > 1:
                A = AT[a : a + count * size].reshape(count, size, -1)
                blocks = np.linalg.eigh(A @ A.transpose(0, 2, 1))[1]
            runs.append(blocks)
            a += count * size
        return cls(runs)

    def followed_by(self, other: Rotations) -> Rotations:
        """Those of all groups."""
        return Rotations(self.runs + other.runs)

    def rotate(self, A: np.ndarray) -> None:
        """Q^T A, in place, group by group."""
        for Q, part in self._parts(A):
            for q, rows in zip(Q, part, strict=True):
                rows[...] = q.T @ rows

    def of_rows(self, A: np.ndarray) -> np.ndarray:
        """Q^T A."""
        out = np.array(A, dtype=np.float64, order="C")
        for Q, part in self._parts(out):
            part[...] = Q.transpose(0, 2, 1) @ part
        return out

    def back(self, A: np.ndarray) -> np.ndarray:
        """Q A."""
        out = np.array(A, dtype=np.float64, order="C")
        for Q, part in self._parts(out):
            part[...] = Q @ part
        return out

    def clean(self, H: np.ndarray) -> None:
        """Set what is rounding in rotated diagonal blocks to zero, in place."""
        a = 0
        for Q in self.runs:
            for _ in range(len(Q)):
                e = a + Q.shape[1]
                H[a:e, a:e] = np.diag(np.maximum(np.diagonal(H[a:e, a:e]), 0))
                a = e

    def _parts(self, A: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each run of more than one feature a group, and its rows of A as (groups, size, ...)."""
        a = 0
        for Q in self.runs:
            count, size, _ = Q.shape
            if size > 1:
                yield Q, A[a : a + count * size].reshape(count, size, -1)
            a += count * size


def _runs(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Sizes that follow each other, and how often."""
    cuts = np.flatnonzero(np.diff(sizes)) + 1
    edges = [0, *cuts.tolist(), len(sizes)]
    return [(int(sizes[a]), e - a) for a, e in pairwise(edges) if e > a]
