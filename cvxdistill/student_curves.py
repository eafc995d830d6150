"""How large a student of one block must be: the family of linear students, and what each loses.

All of them come from one set of sums over the block's activations: of the ranks of the input
channels' projection and of the map (``ProjectedRidge``), or with so many weights that are not zero
(``SparseRidge``). Those that nothing smaller beats are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import qr

from cvxdistill.solvers import CentredMoments, LinearFit, ProjectedRidge, SparseFit, SparseRidge

if TYPE_CHECKING:
    from torch import Tensor

    from cvxdistill.adapters import ConvLayout, DenseLayout, LinearStudent

# Strengths of the ridge, relative to the mean variance of a feature.
STRENGTHS = (1e-5, 1e-3, 1e-2, 1e-1)
# Ranks that are tried, as shares of the channels and of the outputs.
INPUT_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625, 0.03125)
# Weights that sparse students keep.
KEPT_SHARES = (0.03, 0.045, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7)
# At most so many students of a block, spread evenly over the logarithm of their size.
MOST_SIZES = 16

# What the weights of outputs are raised by, relative to their mean.
METRIC_FLOOR = 0.1
# Directions of outputs that matter less than this share of the first do not matter.
READ = 1e-6


@dataclass(frozen=True)
class Size:
    """Ranks of a linear student, None where one is full, or how many weights it keeps.

    Attributes
    ----------
    input_rank, rank : int or None
    written : int or None
        How many outputs it writes; None: all.
    parameters : int
        All stored numbers.
    kept : int or None
        Weights of a sparse student.
    """

    input_rank: int | None
    rank: int | None
    written: int | None
    parameters: int
    kept: int | None = None

    def __str__(self) -> str:
        sizes = (
            ("channels", self.input_rank),
            ("rank", self.rank),
            ("outputs", self.written),
            ("weights", self.kept),
        )
        return ", ".join(f"{name} {value:,}" for name, value in sizes if value) or "full"


def described(layout: ConvLayout | DenseLayout, size: Size) -> str:
    """A student in a report: wide kernels are named."""
    return f"5 x 5, {size}" if is_wide(layout) else str(size)


def is_wide(layout: ConvLayout | DenseLayout) -> bool:
    """Whether kernels are 5 x 5: blocks have smaller ones."""
    return getattr(layout, "kernel_size", (3, 3)) == (5, 5)


def best_ridge(fitted: CentredMoments, held_out: CentredMoments, channels: int) -> ProjectedRidge:
    """The strength whose full student errs least on held-out examples.

    From the smallest on; the first that errs more than the one before ends the search.
    """
    best, least = None, math.inf
    for strength in STRENGTHS:
        ridge = ProjectedRidge(fitted, channels, strength)
        error = held_out.error(ridge.W, ridge.intercept)
        if best is not None and error >= least:
            break
        best, least = ridge, error
    assert best is not None
    return best


@dataclass(frozen=True)
class Weighting:
    """The metric in which errors of a block's outputs count, as a change of their basis.

    Attributes
    ----------
    root : ndarray of shape (c, s)
        Targets are multiplied by it.
    inverse : ndarray of shape (s, s)
        Second layers are multiplied by it.
    written : ndarray of int of shape (s,), or None
        The outputs that these then are; None: all c = s of them.
    pooled : bool
        Whether they count as their mean over the positions of an image.
    """

    root: np.ndarray
    inverse: np.ndarray
    written: np.ndarray | None = None
    pooled: bool = False

    @classmethod
    def of(cls, metric: np.ndarray) -> Weighting | None:
        """From J^T J (c, c), raised a little: it is of a few examples, and only to first order."""
        values, vectors = np.linalg.eigh(metric)
        mean = float(values.mean())
        if not mean > 0:
            return None
        values = np.maximum(values / mean, 0) + METRIC_FLOOR
        return cls((vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T)

    @classmethod
    def of_few(cls, metric: np.ndarray) -> Weighting | None:
        """The same where the metric's rank s is at most half of c, for s outputs alone.

        With J^T J = V L V^T, V (c, s), outputs y and y' count for the same if V^T y' = V^T y. Of
        those y' one is zero but for s entries, chosen by a QR of V^T with pivots. That is so to
        first order; whether it holds has to be tried (``change_when_rewritten``).
        """
        values, vectors = np.linalg.eigh(metric)
        seen = values > READ * values[-1]
        s = int(seen.sum())
        if not 0 < s <= len(metric) // 2:
            return None
        root = vectors[:, seen] * np.sqrt(values[seen] / values.mean())
        written = qr(vectors[:, seen].T, mode="r", pivoting=True)[1][:s].astype(np.int64)
        return cls(root, np.linalg.inv(root[written]), written)

    def rewritten(self, outputs: Tensor) -> Tensor:
        """What counts for the same as a block's outputs, (N, c, H, W) or (..., c)."""
        import torch

        axis = 1 if outputs.ndim == 4 else -1
        if self.pooled:
            outputs = outputs.mean(dim=(2, 3), keepdim=True).expand_as(outputs)
        if self.written is None:
            return outputs.clone()
        R = torch.from_numpy(self.root @ self.inverse).to(outputs)
        few = torch.movedim(torch.movedim(outputs, axis, -1) @ R, -1, axis)
        written = torch.from_numpy(self.written).to(outputs.device)
        return torch.zeros_like(outputs).index_copy(axis, written, few)


class StudentFamily:
    """The students of one site.

    Parameters
    ----------
    ridge : ProjectedRidge
        On moments of weighted outputs.
    layout : ConvLayout or DenseLayout
    weighting : Weighting or None
    sparse : bool
        Whether there are sparse ones, too. With wider kernels than the block's there are none.
    """

    def __init__(
        self,
        ridge: ProjectedRidge,
        layout: ConvLayout | DenseLayout,
        weighting: Weighting | None,
        *,
        sparse: bool,
    ) -> None:
        self.ridge, self.layout = ridge, layout
        self.sparse: SparseRidge | None = None
        if sparse and not is_wide(layout):
            root = None if weighting is None else np.linalg.inv(weighting.inverse)
            self.sparse = SparseRidge(ridge.moments, ridge.strength, root)

    def sizes(self, most_parameters: int) -> list[tuple[Size, float]]:
        """Sizes below ``most_parameters`` that no smaller one beats, and their squared errors.

        From the smallest up; errors are relative to the variance of the targets.
        """
        found = [*self._of_ranks(most_parameters), *self._sparse(most_parameters)]
        found.sort(key=lambda pair: (pair[0].parameters, pair[1]))
        front: list[tuple[Size, float]] = []
        for size, error in found:
            # Less than this is not worth a size of its own.
            if not front or error < 0.98 * front[-1][1]:
                front.append((size, error))
        if len(front) > MOST_SIZES:
            wanted = np.geomspace(front[0][0].parameters, front[-1][0].parameters, MOST_SIZES)
            sizes = np.array([size.parameters for size, _ in front])
            kept = sorted({int(np.abs(np.log(sizes / want)).argmin()) for want in wanted})
            front = [front[k] for k in kept]
        return front

    def _of_ranks(self, most_parameters: int) -> Iterator[tuple[Size, float]]:
        from cvxdistill.adapters import linear_student_size

        ridge, layout = self.ridge, self.layout
        c, channels = ridge.outputs, ridge.channels
        written = self._written
        input_ranks: list[int | None] = [None]
        if channels > 1:
            ranks = {max(1, round(share * channels)) for share in INPUT_SHARES} - {channels}
            input_ranks += sorted(ranks)
        for input_rank in input_ranks:
            smallest = linear_student_size(layout, input_rank, 1, written)
            if smallest >= most_parameters:
                continue
            errors = ridge.errors(input_rank)
            features = (layout.n_features - 1) // channels * (input_rank or channels)
            for rank in range(1, min(c, features) + 1):
                full = rank == c
                stored = linear_student_size(layout, input_rank, None if full else rank, written)
                if stored < most_parameters:
                    size = Size(input_rank, None if full else rank, written, stored)
                    yield size, float(errors[rank])

    def _sparse(self, most_parameters: int) -> Iterator[tuple[Size, float]]:
        from cvxdistill.adapters import linear_student_size

        if self.sparse is None:
            return
        # From the most on: what removes weights goes on from there.
        for share in KEPT_SHARES[::-1]:
            kept = max(1, round(share * self.sparse.most))
            stored = linear_student_size(self.layout, None, None, self._written, kept)
            if stored < most_parameters:
                size = Size(None, None, self._written, stored, kept)
                yield size, self.fit(size).error(self.ridge.moments)

    @property
    def _written(self) -> int | None:
        c = self.ridge.outputs
        return c if c < self.layout.n_outputs else None

    def fit(self, size: Size, *, refined: bool = False) -> LinearFit | SparseFit:
        """The student of a size; refined ones of ranks by alternating least squares."""
        if size.kept is not None:
            assert self.sparse is not None
            return self.sparse.fit(size.kept)
        fit = self.ridge.refined if refined else self.ridge.fit
        return fit(size.input_rank, size.rank)

    def relative_gap(self, fit: LinearFit | SparseFit) -> float:
        """Of the ridge regression that a student comes from."""
        return fit.relative_gap if isinstance(fit, SparseFit) else self.ridge.relative_gap


def linear_student(
    fit: LinearFit | SparseFit,
    layout: ConvLayout | DenseLayout,
    weighting: Weighting | None = None,
) -> LinearStudent:
    """The deployed student of a fit to weighted targets."""
    from cvxdistill.adapters import build_linear_student

    if isinstance(fit, SparseFit):
        written = None if weighting is None else weighting.written
        return build_linear_student(
            layout, None, fit.W, None, fit.intercept, written=written, places=fit.places
        )
    W1, W2, b = fit.W1, fit.W2, fit.intercept
    if weighting is None:
        return build_linear_student(layout, fit.P, W1, W2, b)
    b = b @ weighting.inverse
    if W2 is None:
        W1 = W1 @ weighting.inverse
    else:
        W2 = W2 @ weighting.inverse
    return build_linear_student(layout, fit.P, W1, W2, b, written=weighting.written)
