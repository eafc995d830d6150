"""The deployed linear student that sees few directions of the input channels, without waste.

On the rows of a layout it is Z = (X (P x I)) W1 W2 + 1 b^T (``ProjectedRidge``). P (C, r1) and W2
(r2, c) are only known up to an invertible matrix that the next or the last factor undoes, and the
student makes use of it: r1 of the channels, chosen by a pivoted QR, are handed on as they are, and
only the others are mixed into them; r2 of the outputs come straight from W1, and only the others
are mixed from these. That is the same map with r1^2 + r2^2 numbers less, and C + c to say which.

A sparse student is Z = X W1 + 1 b^T with few weights that are not zero (``SparseRidge``): those and
their places are stored.

Where the rest of a network reads a block's c outputs only through s < c combinations of them, Z has
s columns: the student writes s of the outputs, which carry them all, and leaves the others zero.

References
----------
Cheng, Gimbutas, Martinsson and Rokhlin 2005 (interpolative decomposition).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy.linalg import qr, solve
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cvxdistill.adapters.call_structure import main_input
from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.sparse_layer import (
    SparseConv2d,
    SparseLinear,
    keep_places,
    words_for,
)
from cvxdistill.adapters.student import patch_layer, position_layer, set_weights


class LinearStudent(nn.Module):
    """A linear student whose weights are still to be set: by ``build_linear_student``.

    Parameters
    ----------
    layout : DenseLayout or ConvLayout
    input_rank : int or None
        r1; None: no projection.
    rank : int or None
        r2; None: full.
    written : int or None
        s, how many outputs it writes; None: all.
    sparse : bool
        Whether most weights are zero; then both ranks are None.
    dtype : torch.dtype
    """

    channel_order: Tensor
    output_order: Tensor

    def __init__(
        self,
        layout: DenseLayout | ConvLayout,
        input_rank: int | None,
        rank: int | None,
        written: int | None = None,
        *,
        sparse: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if sparse and (input_rank, rank) != (None, None):
            raise ValueError(f"a sparse student has no ranks, got {input_rank} and {rank}.")
        self.layout, self.input_rank, self.rank, self.written = layout, input_rank, rank, written
        self.sparse = sparse
        C, c = input_channels(layout), written or layout.n_outputs
        inner = layout
        self.project: nn.Module | None = None
        self.expand: nn.Module | None = None
        self.mixes_others = input_rank is not None and _saves(input_rank, C)
        # Those that are written are named in any case.
        self.expands_others = rank is not None and (written is not None or _saves(rank, c))
        if input_rank is not None:
            inner = replace(layout, input_shape=(input_rank, *layout.input_shape[1:]))
            given = C - input_rank if self.mixes_others else C
            self.project = skip_init(nn.Conv2d, given, input_rank, 1, bias=False, dtype=dtype)
            if self.mixes_others:
                self.register_buffer("channel_order", torch.arange(C, dtype=torch.int32))
        width = c if rank is None else rank
        bias = rank is None or self.expands_others
        self.core = patch_layer(inner, width, bias=bias, sparse=sparse, dtype=dtype)
        if rank is not None:
            wanted = c - rank if self.expands_others else c
            self.expand = position_layer(layout, rank, bias=True, dtype=dtype, outputs=wanted)
        if self.expands_others or written is not None:
            # Where the outputs come from if all are written, where they go if few are.
            self.register_buffer("output_order", torch.arange(c, dtype=torch.int32))

    @property
    def parameters_stored(self) -> int:
        """All stored numbers: weights, and the orders of channels and outputs."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    @property
    def bytes_stored(self) -> int:
        """What these take in a file, but for a header; sparse students take more in memory."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def trainable(self) -> int:
        """The stored numbers that a gradient could change."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weights; if they are in int8, of the biases."""
        return next(self.parameters()).dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Map the block's input (N, *input_shape) to its output (N, *output_shape)."""
        given = main_input(args, kwargs)
        z = given.to(self.dtype)
        if self.project is not None and self.input_rank is not None:
            if self.mixes_others:
                z = torch.index_select(z, 1, self.channel_order)
                z = z[:, : self.input_rank] + self.project(z[:, self.input_rank :])
            else:
                z = self.project(z)
        dense = isinstance(self.layout, DenseLayout)
        flat = isinstance(self.layout, DenseLayout) and not self.layout.per_position
        out = self.core(z.flatten(1) if flat else z)
        axis = -1 if dense else 1
        if self.expand is not None:
            others = self.expand(out)
            out = torch.cat([out, others], axis) if self.expands_others else others
        if self.written is not None:
            shape = [*out.shape]
            shape[axis] = self.layout.n_outputs
            out = out.new_zeros(shape).index_copy(axis, self.output_order.long(), out)
        elif self.expands_others:
            out = torch.index_select(out, axis, self.output_order)
        if flat:
            out = out.reshape(out.shape[0], *self.layout.output_shape)
        return out.to(given.dtype) if given.is_floating_point() else out

    def extra_repr(self) -> str:
        """Say the shapes and sizes in ``repr(model)``."""
        return (
            f"{self.layout.input_shape} -> {self.layout.output_shape}, "
            f"input_rank={self.input_rank}, rank={self.rank}, written={self.written}, "
            f"sparse={self.sparse}, stored={self.parameters_stored}, bytes={self.bytes_stored}"
        )


def input_channels(layout: DenseLayout | ConvLayout) -> int:
    """Input channels that can be projected: those of images, 1 where the inputs are none."""
    images = isinstance(layout, ConvLayout) or (
        len(layout.input_shape) == 3 and not layout.per_position
    )
    return layout.input_shape[0] if images else 1


def linear_student_size(
    layout: DenseLayout | ConvLayout,
    input_rank: int | None,
    rank: int | None,
    written: int | None = None,
    kept: int | None = None,
) -> int:
    """Numbers that a ``LinearStudent`` of these ranks and written outputs stores.

    A sparse one has no ranks, and ``kept`` weights.
    """
    d, c, C = layout.n_features - 1, written or layout.n_outputs, input_channels(layout)
    size = c + stored_orders(layout, input_rank, rank, written, sparse=kept is not None)
    if kept is not None:
        return size + kept
    if input_rank is not None:
        d = d // C * input_rank
        size += input_rank * (C - input_rank if _saves(input_rank, C) else C)
    if rank is None:
        return size + d * c
    others = c - rank if written is not None or _saves(rank, c) else c
    return size + d * rank + rank * others


def stored_orders(
    layout: DenseLayout | ConvLayout,
    input_rank: int | None,
    rank: int | None,
    written: int | None = None,
    *,
    sparse: bool = False,
) -> int:
    """How many of these numbers are orders and places, which are stored as int32."""
    C, c = input_channels(layout), layout.n_outputs
    of_inputs = C if input_rank is not None and _saves(input_rank, C) else 0
    if sparse:
        of_inputs += words_for((layout.n_features - 1) * (written or c))
    if written is not None:
        return of_inputs + written
    return of_inputs + (c if rank is not None and _saves(rank, c) else 0)


def _saves(rank: int, of: int) -> bool:
    """Whether handing ``rank`` of these on as they are saves more than it takes to say which."""
    return rank * rank > of and rank < of


def build_linear_student(
    layout: DenseLayout | ConvLayout,
    P: np.ndarray | None,
    W1: np.ndarray,
    W2: np.ndarray | None,
    intercept: np.ndarray,
    *,
    written: np.ndarray | None = None,
    places: np.ndarray | None = None,
    dtype: torch.dtype = torch.float32,
) -> LinearStudent:
    """Build the module that predicts Z = (X (P x I)) W1 W2 + 1 b^T.

    Parameters
    ----------
    layout : DenseLayout or ConvLayout
    P : ndarray of shape (C, r1), or None
    W1 : ndarray of shape (r1 T, r2)
        Features ordered (channel, place), without the constant one.
    W2 : ndarray of shape (r2, c), or None
    intercept : ndarray of shape (c,)
    written : ndarray of int of shape (s,), optional
        The outputs that the columns of Z are; the others are zero. c is then s above.
    places : ndarray of bool of the shape of W1, optional
        Of a sparse student without P and W2: where W1 may differ from zero.
    dtype : torch.dtype, default torch.float32

    Raises
    ------
    ValueError
        If shapes do not fit the layout, ``written`` are not different outputs of it, or anything is
        not finite.
    """
    C, c = input_channels(layout), layout.n_outputs
    if written is not None:
        written = np.asarray(written)
        least, most = (int(written.min()), int(written.max())) if written.size else (0, -1)
        if not 0 <= least <= most < c or len(np.unique(written)) < written.size:
            raise ValueError(f"written must be different outputs from 0 to {c - 1}, got {written}.")
        c = len(written)
    positions = (layout.n_features - 1) // C
    r1 = C if P is None else P.shape[1]
    r2 = c if W2 is None else len(W2)
    shapes = {
        "P": (P, (C, r1)),
        "W1": (W1, (r1 * positions, r2)),
        "W2": (W2, (r2, c)),
        "intercept": (intercept, (c,)),
    }
    for name, (array, shape) in shapes.items():
        if array is None:
            continue
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}.")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity.")
    if places is not None and (places.shape != W1.shape or places.dtype != np.bool_):
        raise ValueError(
            f"places must be booleans of shape {W1.shape}, got {places.dtype} of {places.shape}."
        )
    student = LinearStudent(
        layout,
        None if P is None else r1,
        None if W2 is None else r2,
        None if written is None else c,
        sparse=places is not None,
        dtype=dtype,
    )
    order: np.ndarray = np.arange(c)
    W1, b = np.asarray(W1, np.float64), np.asarray(intercept, np.float64)
    if P is not None and student.project is not None:
        P = np.asarray(P, np.float64)
        if student.mixes_others:
            channels = qr(P.T, mode="r", pivoting=True)[1]
            kept = P[channels[:r1]]
            W1 = (kept @ W1.reshape(r1, -1)).reshape(W1.shape)
            P = solve(kept.T, P[channels[r1:]].T).T
            student.channel_order.copy_(torch.from_numpy(channels))
        set_weights(student.project, P)
    if W2 is not None and student.expand is not None:
        W2 = np.asarray(W2, np.float64)
        if student.expands_others:
            order = np.asarray(qr(W2, mode="r", pivoting=True)[1])
            kept = W2[:, order[:r2]]
            W1, W2 = W1 @ kept, solve(kept, W2[:, order[r2:]])
            set_weights(student.core, W1, b[order[:r2]])
            set_weights(student.expand, W2, b[order[r2:]] - b[order[:r2]] @ W2)
        else:
            set_weights(student.core, W1)
            set_weights(student.expand, W2, b)
    else:
        set_weights(student.core, W1, b)
        if places is not None:
            assert isinstance(student.core, (SparseLinear, SparseConv2d))
            keep_places(student.core, places)
    if written is not None:
        student.output_order.copy_(torch.from_numpy(written[order]))
    elif student.expands_others:
        student.output_order.copy_(torch.from_numpy(np.argsort(order)))
    return student.eval()
