"""Students that ship in lower precision: in half, or with weights in int8.

In int8 a layer Z = X W + b keeps q_W = round(W / s_W) with one s_W = max |W| / 127 for each output
channel. Its input is rounded alike when it comes, with one s_X for each row (vectors and tokens) or
image, so that no example's answer depends on the others of its batch:

    Z = s_X (q_X q_W) s_W + b,      |W - s_W q_W| <= s_W / 2,      |X - s_X q_X| <= s_X / 2.

The sums q_X q_W are exact. Integers of 8 bits and their sums below 2^24 are exact in float32, in
which every device and ONNX can convolve; longer sums are split, and the parts added as int32.
"""

from __future__ import annotations

import copy
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cvxdistill.adapters.linear_student import LinearStudent
from cvxdistill.adapters.sparse_layer import SparseConv2d, SparseLayer, SparseLinear
from cvxdistill.adapters.student import GatedStudent

DTYPES = ("float16", "int8")
LARGEST = 127
# So many products of two such integers sum to at most 2^24.
EXACT_TERMS = 2**24 // LARGEST**2

Student = TypeVar("Student", GatedStudent, LinearStudent)


class Int8Layer(nn.Module):
    """A linear layer or a convolution with its weights in int8.

    It computes in float32 and answers in the dtype of its input. Not for training: rounding has no
    gradient.

    Parameters
    ----------
    layer : nn.Linear or nn.Conv2d
        With one group and no dilation; left as it is.

    Attributes
    ----------
    weight : Tensor of int8, of the layer's shape
    scale : Tensor of float32, of shape (out,)
    bias : nn.Parameter of float32, of shape (out,), or None
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight, scale = quantize_weight(layer.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        bias = None if layer.bias is None else layer.bias.detach().float().clone()
        self.bias = None if bias is None else nn.Parameter(bias)
        self.stride = layer.stride if isinstance(layer, nn.Conv2d) else None
        self.padding = layer.padding if isinstance(layer, nn.Conv2d) else 0
        # Input channels, or features, whose products are summed at once.
        self.width = max(1, EXACT_TERMS // weight[0, 0].numel())

    def forward(self, input: Tensor) -> Tensor:
        """Multiply rows (..., in), or convolve images (N, in, H, W)."""
        convolves = self.stride is not None
        axis = 1 if convolves else -1
        q, step = quantize_examples(input.float(), (1, 2, 3) if convolves else (-1,))
        if self.weight.shape[1] <= self.width:
            sums = self._product(q, self.weight)
        else:
            parts = zip(q.split(self.width, axis), self.weight.split(self.width, 1), strict=True)
            exact = (self._product(part, weight).to(torch.int32) for part, weight in parts)
            sums = reduce(torch.add, exact).float()
        places = (-1, 1, 1) if convolves else (-1,)
        out = sums * step * self.scale.float().reshape(places)
        if self.bias is not None:
            out = out + self.bias.float().reshape(places)
        return out.to(input.dtype)

    def _product(self, q: Tensor, weight: Tensor) -> Tensor:
        if self.stride is None:
            return functional.linear(q, weight.float())
        return functional.conv2d(q, weight.float(), None, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Say the sizes in ``repr(model)``."""
        outputs, inputs, *kernel = self.weight.shape
        moves = f", stride={self.stride}, padding={self.padding}" if kernel else ""
        kernel_size = f", kernel_size={tuple(kernel)}" if kernel else ""
        return f"{inputs}, {outputs}{kernel_size}{moves}, bias={self.bias is not None}"


class SparseInt8Layer(SparseLayer, Int8Layer):
    """An ``Int8Layer`` that stores few weights.

    Parameters
    ----------
    layer : SparseLinear or SparseConv2d
    """

    def __init__(self, layer: SparseLinear | SparseConv2d) -> None:
        super().__init__(layer)
        self.reset_places()
        self.places = layer.places.clone()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weights (out, ...) to q in int8, with one float32 scale for each output channel.

    scale = max |W| / 127, q = round(W / scale): |W - scale q| <= scale / 2 but for rounding.
    """
    weight = weight.float()
    scale = _step(weight, tuple(range(1, weight.ndim)))
    return torch.round(weight / scale).to(torch.int8), scale.flatten()


def quantize_examples(X: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Round float32 inputs to integers, with one step for all that lies along ``axes``."""
    step = _step(X, axes)
    return torch.round(X / step), step


def _step(X: Tensor, axes: tuple[int, ...]) -> Tensor:
    # What is all zeros has any step.
    largest = X.abs().amax(axes, keepdim=True)
    return (largest / LARGEST).clamp(min=torch.finfo(torch.float32).tiny)


def quantize_student(student: Student, dtype: str) -> Student:
    """Return a copy of a student in lower precision.

    Parameters
    ----------
    student : GatedStudent or LinearStudent
        Left as it is.
    dtype : {"float16", "int8"}
        "float16": all weights in half, in which it computes; its input and output are cast. That is
        for GPUs: on CPUs torch's convolutions in half take tens of times as long as in float32.
        "int8": all layers but the gates become ``Int8Layer``. A gate that is rounded flips where
        its sum is near 0, and all of its units with it.

    Raises
    ------
    TypeError
        If ``student`` is neither.
    ValueError
        If ``dtype`` is unknown, weights are too large for half, or the student is in int8 already.
    """
    if not isinstance(student, (GatedStudent, LinearStudent)):
        raise TypeError(
            f"student must be a GatedStudent or a LinearStudent, got {type(student).__name__}."
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}.")
    if stored_dtype(student) == "int8":
        raise ValueError("student is in int8 already; quantise the one that it came from.")
    if dtype == "float16":
        largest = max(float(p.detach().abs().max()) for p in student.parameters() if p.numel())
        if largest > torch.finfo(torch.float16).max:
            raise ValueError(
                f"student: its weights, up to {largest:.1e}, are too large for float16, which ends "
                f"at {torch.finfo(torch.float16).max:.1e}."
            )
    return as_stored(copy.deepcopy(student), dtype)


def stored_dtype(student: GatedStudent | LinearStudent) -> str:
    """Return "int8" if a student has layers in int8, else the name of its floating dtype."""
    if any(isinstance(module, Int8Layer) for module in student.modules()):
        return "int8"
    return str(student.dtype).removeprefix("torch.")


def refuse_int8(student: GatedStudent | LinearStudent) -> None:
    """Raise a TypeError if a student has layers in int8, whose weights no fit can change."""
    if stored_dtype(student) == "int8":
        raise TypeError("student is in int8; give the one that it was quantised from.")


def as_stored(student: Student, dtype: str) -> Student:
    """Turn a floating student itself into one of this ``stored_dtype``, and return it."""
    if dtype != "int8":
        return student.to(dtype_of(dtype))
    student.float()
    for name, child in student.named_children():
        if name != "gate":
            setattr(student, name, _in_int8(child))
    return student


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name, as "float32"."""
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown.")
    return dtype


def _in_int8(module: nn.Module) -> nn.Module:
    if isinstance(module, (SparseLinear, SparseConv2d)):
        return SparseInt8Layer(module).train(module.training)
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return Int8Layer(module).train(module.training)
    for name, child in module.named_children():
        setattr(module, name, _in_int8(child))
    return module
