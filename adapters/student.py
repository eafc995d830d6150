"""The deployed student: a gated two-layer network made of ordinary torch layers.

The convex program's prediction on the rows X of a layout,

    Z = sum_h (D[:, gate_h] * (X W1[:, h])) W2[h] + b,      D = (X G >= 0),

is, with z the block's input (the paper's equation 8; 1 x 1 convolutions for images, linear layers
for vectors),

    second(first(z) * (gate(z) >= 0)) + linear(z).

``gate`` holds the columns of G that units use, each once, and never learns. ``linear`` holds the
units whose gate is always on: they have no gate to store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cvxdistill.adapters.call_structure import main_input
from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.sparse_layer import SparseConv2d, SparseLayer, SparseLinear


class GatedStudent(nn.Module):
    """A student whose weights are still to be set: by ``build_student``, or from a state_dict.

    Parameters
    ----------
    layout : DenseLayout or ConvLayout
    n_units : int
        Units behind a gate (rows of W2 with a gate that is not always on).
    n_gates : int
        Stored gates. When it differs from ``n_units``, or ``shared_gates`` is true, the buffer
        ``gate_index`` (int64, one a unit) says which gate a unit uses.
    linear_rank : int or None
        None: no linear path. 0: one matrix (d - 1, c). r > 0: two layers of rank r.
    shared_gates : bool
        Whether to hold ``gate_index``.
    dtype : torch.dtype
    """

    gate_index: Tensor
    constant: nn.Parameter

    def __init__(
        self,
        layout: DenseLayout | ConvLayout,
        *,
        n_units: int,
        n_gates: int,
        linear_rank: int | None = None,
        shared_gates: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.n_units, self.n_gates, self.linear_rank = n_units, n_gates, linear_rank
        c = layout.n_outputs
        self.gate: nn.Module | None = None
        self.first: nn.Module | None = None
        self.second: nn.Module | None = None
        self.linear: nn.Module | None = None
        # The intercept sits in whichever layer comes last; a constant student has only that.
        if n_units:
            self.gate = patch_layer(layout, n_gates, bias=True, dtype=dtype).requires_grad_(False)
            self.first = patch_layer(layout, n_units, bias=True, dtype=dtype)
            self.second = position_layer(layout, n_units, bias=True, dtype=dtype)
        if linear_rank:
            self.linear = nn.Sequential(
                patch_layer(layout, linear_rank, bias=False, dtype=dtype),
                position_layer(layout, linear_rank, bias=not n_units, dtype=dtype),
            )
        elif linear_rank == 0:
            self.linear = patch_layer(layout, c, bias=not n_units, dtype=dtype)
        elif not n_units:
            self.constant = nn.Parameter(torch.zeros(c, dtype=dtype))
        if shared_gates:
            self.register_buffer("gate_index", torch.zeros(n_units, dtype=torch.int64))
        self.shared_gates = shared_gates

    @property
    def parameters_stored(self) -> int:
        """All stored numbers: weights, gates, and one for each entry of ``gate_index``."""
        return sum(tensor.numel() for tensor in self.state_dict().values())

    @property
    def bytes_stored(self) -> int:
        """What these take in memory and, but for a header, in a file."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())

    @property
    def trainable(self) -> int:
        """The stored numbers that a gradient could change: no gates, no index, none in int8."""
        return sum(
            parameter.numel()
            for name, parameter in self.named_parameters()
            if not name.startswith("gate.")
        )

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the weights; if they are in int8, of the biases."""
        return next(self.parameters()).dtype

    def forward(self, input: Tensor | None = None, *others: Any, **named: Any) -> Tensor:
        """Map the block's input (N, *input_shape) to its output (N, *output_shape).

        The result has the input's floating dtype, as a block's would; the student computes in its
        own. A block that its model calls with a named tensor, or with masks, positions and flags
        beside its tensor, can be replaced as well: the student ignores them (``main_input`` tells
        which tensor is the input).
        """
        if others or named:
            try:
                input = main_input((input, *others), named)
            except ValueError as error:
                raise TypeError(f"a student takes {error}.") from None
        if input is None:
            raise TypeError("a student takes exactly one tensor, got none.")
        z = input.to(self.dtype)
        dense = isinstance(self.layout, DenseLayout)
        flat = isinstance(self.layout, DenseLayout) and not self.layout.per_position
        if flat:
            z = z.reshape(z.shape[0], self.layout.n_features - 1)
        out: Tensor | None = None
        if self.gate is not None and self.first is not None and self.second is not None:
            on = self.gate(z) >= 0
            if self.shared_gates:
                on = torch.index_select(on, -1 if dense else 1, self.gate_index)
            out = self.second(self.first(z) * on.to(z.dtype))
        if self.linear is not None:
            out = self.linear(z) if out is None else out + self.linear(z)
        if out is None:
            out = self._constant_like(z)
        if flat:
            out = out.reshape(out.shape[0], *self.layout.output_shape)
        return out.to(input.dtype) if input.is_floating_point() else out

    def _constant_like(self, z: Tensor) -> Tensor:
        if isinstance(self.layout, ConvLayout):
            _, height, width = self.layout.output_shape
            return self.constant[:, None, None].expand(z.shape[0], -1, height, width).clone()
        return self.constant.expand(*z.shape[:-1], -1).clone()

    def extra_repr(self) -> str:
        """Say the shapes and sizes in ``repr(model)``."""
        rank = {None: "none", 0: "full"}.get(self.linear_rank, self.linear_rank)
        return (
            f"{self.layout.input_shape} -> {self.layout.output_shape}, units={self.n_units}, "
            f"gates={self.n_gates}, linear_rank={rank}, stored={self.parameters_stored}, "
            f"bytes={self.bytes_stored}"
        )


def patch_layer(
    layout: DenseLayout | ConvLayout,
    width: int,
    *,
    bias: bool,
    sparse: bool = False,
    dtype: torch.dtype,
) -> nn.Module:
    """The layer that multiplies the layout's rows by a (d - 1, width) matrix."""
    layer: nn.Module
    if isinstance(layout, DenseLayout):
        linear = SparseLinear if sparse else nn.Linear
        layer = skip_init(linear, layout.n_features - 1, width, bias=bias, dtype=dtype)
    else:
        layer = skip_init(
            SparseConv2d if sparse else nn.Conv2d,
            layout.input_shape[0],
            width,
            layout.kernel_size,
            stride=layout.stride,
            padding=layout.padding,
            bias=bias,
            dtype=dtype,
        )
    if isinstance(layer, SparseLayer):
        layer.reset_places()
    return layer


def position_layer(
    layout: DenseLayout | ConvLayout,
    width: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    outputs: int | None = None,
) -> nn.Module:
    """The layer that multiplies hidden units at each position by a (width, outputs) matrix.

    ``outputs`` is the layout's c if not given.
    """
    outputs = layout.n_outputs if outputs is None else outputs
    if isinstance(layout, DenseLayout):
        return skip_init(nn.Linear, width, outputs, bias=bias, dtype=dtype)
    return skip_init(nn.Conv2d, width, outputs, 1, bias=bias, dtype=dtype)


def set_weights(layer: nn.Module, weights: np.ndarray, bias: np.ndarray | None = None) -> None:
    """Copy a matrix (in, out), and a bias (out,) where the layer has one, into a layer."""
    parameters = dict(layer.named_parameters())
    with torch.no_grad():
        weight = parameters["weight"]
        matrix = torch.from_numpy(np.ascontiguousarray(weights.T))
        weight.copy_(matrix.reshape(weight.shape))
        if "bias" in parameters:
            parameters["bias"].copy_(torch.from_numpy(np.ascontiguousarray(bias)))


def _checked(value: Any, shape: tuple[int | str, ...], name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}.")
    expected = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"
    fits = array.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape {expected}, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity.")
    return array


def always_on(G: np.ndarray) -> np.ndarray:
    """Return, for each column of G (d, p), whether it is on for every input: zeros, bias >= 0."""
    return ~G[:-1].any(axis=0) & (G[-1] >= 0)


def build_student(
    layout: DenseLayout | ConvLayout,
    W1: np.ndarray,
    W2: np.ndarray,
    gate: np.ndarray,
    G: np.ndarray,
    intercept: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
) -> GatedStudent:
    """Build the module that predicts Z = sum_h (D[:, gate_h] * (X W1[:, h])) W2[h] + b.

    Units whose gate is always on (a column of G that is zero but for a bias >= 0) need no gate:
    together they are a linear map, kept as two layers or as one matrix, whichever is smaller, and
    their biases go into the intercept. Gates that no unit uses are dropped; a gate that several
    units use is stored once.

    Parameters
    ----------
    layout : DenseLayout or ConvLayout
        d = ``layout.n_features`` (the constant one is the last row of W1 and G), c =
        ``layout.n_outputs``.
    W1 : ndarray of shape (d, m)
    W2 : ndarray of shape (m, c)
    gate : ndarray of int of shape (m,)
        The column of G that each unit uses.
    G : ndarray of shape (d, p)
    intercept : ndarray of shape (c,)
    dtype : torch.dtype, default torch.float32

    Raises
    ------
    ValueError
        If shapes do not match the layout, a gate does not exist, or anything is not finite.
    TypeError
        If something does not hold numbers, or ``dtype`` is not a floating dtype.
    """
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}.")
    d, c = layout.n_features, layout.n_outputs
    W1 = _checked(W1, (d, "m"), "W1")
    m = W1.shape[1]
    W2 = _checked(W2, (m, c), "W2")
    G = _checked(G, (d, "p"), "G")
    gate = _checked(gate, (m,), "gate")
    bias = _checked(intercept, (c,), "intercept").astype(np.float64)
    if m and gate.dtype.kind not in "iu":
        raise TypeError(f"gate must hold integers, got dtype {gate.dtype}.")
    gate = gate.astype(np.int64)
    if m and (gate.min() < 0 or gate.max() >= G.shape[1]):
        raise ValueError(
            f"gate must lie in [0, {G.shape[1]}), the columns of G; got {gate.min()} to "
            f"{gate.max()}."
        )

    free = always_on(G)[gate] if m else np.zeros(0, dtype=bool)
    A, B = W1[:, free], W2[free]
    rank: int | None = None
    if free.any():
        rank = A.shape[1] if A.shape[1] * (d - 1 + c) < (d - 1) * c else 0
        bias = bias + A[-1].astype(np.float64) @ B

    units = np.flatnonzero(~free)
    used, first_use, index = np.unique(gate[units], return_index=True, return_inverse=True)
    # Gates in the order of their first use: the index is then the identity unless some are shared.
    order = np.argsort(first_use)
    used, index = used[order], np.argsort(order)[index]
    student = GatedStudent(
        layout,
        n_units=units.size,
        n_gates=used.size,
        linear_rank=rank,
        shared_gates=used.size < units.size,
        dtype=dtype,
    )
    if student.gate is not None and student.first is not None and student.second is not None:
        set_weights(student.gate, G[:-1, used], G[-1, used])
        set_weights(student.first, W1[:-1, units], W1[-1, units])
        set_weights(student.second, W2[units], bias)
    if isinstance(student.linear, nn.Sequential):
        set_weights(student.linear[0], A[:-1])
        set_weights(student.linear[1], B, bias)
    elif student.linear is not None:
        set_weights(student.linear, A[:-1] @ B, bias)
    elif student.second is None:
        with torch.no_grad():
            student.constant.copy_(torch.from_numpy(bias))
    if student.shared_gates:
        student.gate_index.copy_(torch.from_numpy(index))
    return student


def table1_parameters(C_in: int, C_out: int, m: int, k: int = 3) -> int:
    """Count the numbers in the paper's student of Table 1, gates included.

    2 m k^2 C_in + m C_out + 2 (2 m) + 2 C_out: the gates and the first layer (each m filters of
    k x k x C_in, without biases), the 1 x 1 second layer, and batch norms (a scale and a shift
    each) after both stages.

    A student built here has biases instead of batch norms: 2 m + C_out numbers instead of
    4 m + 2 C_out.
    """
    return 2 * m * k**2 * C_in + m * C_out + 2 * (2 * m) + 2 * C_out
