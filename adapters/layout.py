"""How a block's inputs and outputs become the rows of a convex program, and back.

A layout is inferred from the shapes that a block was seen to take and give. It cuts the inputs
into rows of X (``rows``), puts the outputs into the same order (``targets``), and tells
``student.py`` what the deployed module looks like. The last column of X is a constant one.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np

from cvxdistill.adapters.patches import Pair, PatchRows, VectorRows, check_indices

Shape: TypeAlias = tuple[int, ...]

# What infer_layout tries, in this order, when no kernel size is asked for.
DEFAULT_KERNELS = (3, 2, 4, 1, 5)


def _check_shape(shape: Shape, name: str) -> Shape:
    try:
        checked = tuple(operator.index(size) for size in shape)
    except TypeError:
        raise TypeError(f"{name} must be a tuple of integers, got {shape!r}.") from None
    if any(size < 1 for size in checked):
        raise ValueError(f"{name} must have positive sizes only, got {checked}.")
    return checked


def _check_batch(array: np.ndarray, shape: Shape, name: str) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}.")
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name} must be float32 or float64, got {array.dtype}.")
    if array.ndim == 0 or array.shape[1:] != shape:
        raise ValueError(
            f"{name} must have shape {('n', *shape)} for this layout, got {array.shape}."
        )


def _select(rows: np.ndarray, indices: np.ndarray | None) -> np.ndarray:
    return rows if indices is None else rows[check_indices(indices, len(rows))]


@dataclass(frozen=True)
class DenseLayout:
    """A block of vectors: one row an example, or one a position if the last axis is features.

    Attributes
    ----------
    input_shape, output_shape : tuple of int
        Shapes of one example, without the batch axis.
    per_position : bool
        True if the leading axes, equal in both shapes, are positions (tokens), as in
        (..., d) -> (..., c). Otherwise each example is flattened.
    """

    input_shape: Shape
    output_shape: Shape
    per_position: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_shape", _check_shape(self.input_shape, "input_shape"))
        object.__setattr__(self, "output_shape", _check_shape(self.output_shape, "output_shape"))
        if self.per_position and (
            not self.input_shape or self.input_shape[:-1] != self.output_shape[:-1]
        ):
            raise ValueError(
                "a layout per position needs equal leading axes, got input_shape "
                f"{self.input_shape} and output_shape {self.output_shape}."
            )

    @property
    def n_positions(self) -> int:
        """Rows of X that one example gives."""
        return math.prod(self.input_shape[:-1]) if self.per_position else 1

    @property
    def n_features(self) -> int:
        """Columns of X, d: the features and the constant one."""
        return math.prod(self.input_shape) // self.n_positions + 1

    @property
    def n_outputs(self) -> int:
        """Columns of Y, c."""
        return math.prod(self.output_shape) // self.n_positions

    def rows(self, inputs: np.ndarray) -> VectorRows:
        """Present inputs (N, *input_shape) as the row source X (n, d), read only where sliced.

        Raises
        ------
        TypeError, ValueError
            If ``inputs`` is not a float32 or float64 array of that shape.
        """
        _check_batch(inputs, self.input_shape, "inputs")
        return VectorRows(inputs.reshape(len(inputs) * self.n_positions, self.n_features - 1))

    def targets(self, outputs: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """Put outputs (N, *output_shape) into the matrix Y (n, c), in the order of ``rows``.

        Parameters
        ----------
        outputs : ndarray of shape (N, *output_shape)
        indices : ndarray of int, optional
            Gather these rows only, as ``rows(inputs).take(indices)`` does.

        Raises
        ------
        TypeError, ValueError
            If ``outputs`` is not a float32 or float64 array of that shape.
        """
        _check_batch(outputs, self.output_shape, "outputs")
        matrix = outputs.reshape(len(outputs) * self.n_positions, self.n_outputs)
        return _select(matrix, indices)


@dataclass(frozen=True)
class ConvLayout:
    """A block of images: every position of its output is one row, the k x k patch it looks at.

    Attributes
    ----------
    input_shape, output_shape : tuple of int
        (C, H, W) and (C', H', W').
    kernel_size, stride, padding : (int, int)
        As in ``torch.nn.Conv2d``; padding is zeros on both sides. They must give H' and W' exactly.
    """

    input_shape: Shape
    output_shape: Shape
    kernel_size: Pair
    stride: Pair
    padding: Pair

    def __post_init__(self) -> None:
        for name in ("input_shape", "output_shape"):
            shape = _check_shape(getattr(self, name), name)
            if len(shape) != 3:
                raise ValueError(f"{name} must be (channels, height, width), got {shape}.")
            object.__setattr__(self, name, shape)
        object.__setattr__(self, "kernel_size", _pair(self.kernel_size, "kernel_size", 1))
        object.__setattr__(self, "stride", _pair(self.stride, "stride", 1))
        object.__setattr__(self, "padding", _pair(self.padding, "padding", 0))
        for axis in (0, 1):
            k, s, p = self.kernel_size[axis], self.stride[axis], self.padding[axis]
            size, wanted = self.input_shape[1 + axis], self.output_shape[1 + axis]
            if _output_size(size, k, s, p) != wanted:
                raise _misfit(self.input_shape, self.output_shape, axis, k, s, p)

    @property
    def n_positions(self) -> int:
        """Rows of X that one example gives, H' W'."""
        return self.output_shape[1] * self.output_shape[2]

    @property
    def n_features(self) -> int:
        """Columns of X, d = C kh kw + 1: the patch and the constant one."""
        return self.input_shape[0] * self.kernel_size[0] * self.kernel_size[1] + 1

    @property
    def n_outputs(self) -> int:
        """Columns of Y, c = C'."""
        return self.output_shape[0]

    def rows(self, inputs: np.ndarray) -> PatchRows:
        """Present images (N, C, H, W) as the row source X (N H' W', C kh kw + 1) of their patches.

        Raises
        ------
        TypeError, ValueError
            If ``inputs`` is not a float32 or float64 array of that shape.
        """
        _check_batch(inputs, self.input_shape, "inputs")
        grid = (self.output_shape[1], self.output_shape[2])
        return PatchRows(inputs, grid, self.kernel_size, self.stride, self.padding)

    def targets(self, outputs: np.ndarray, indices: np.ndarray | None = None) -> np.ndarray:
        """Put outputs (N, C', H', W') into the matrix Y (N H' W', C'), in the order of ``rows``.

        Parameters
        ----------
        outputs : ndarray of shape (N, C', H', W')
        indices : ndarray of int, optional
            Gather these rows only, as ``rows(inputs).take(indices)`` does. Nothing else is copied.

        Raises
        ------
        TypeError, ValueError
            If ``outputs`` is not a float32 or float64 array of that shape.
        """
        _check_batch(outputs, self.output_shape, "outputs")
        if indices is None:
            return outputs.transpose(0, 2, 3, 1).reshape(-1, self.n_outputs)
        indices = check_indices(indices, len(outputs) * self.n_positions)
        example, position = np.divmod(indices, self.n_positions)
        a, b = np.divmod(position, self.output_shape[2])
        return outputs[example, :, a, b]


def _pair(value: int | tuple[int, int], name: str, smallest: int) -> Pair:
    """Return an integer or a pair of integers as a pair, refusing anything below ``smallest``."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    whole = all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values)
    if len(values) != 2 or not whole:
        raise TypeError(f"{name} must be an integer or a pair of integers, got {value!r}.")
    if min(values) < smallest:
        raise ValueError(f"{name} must be at least {smallest}, got {value!r}.")
    return int(values[0]), int(values[1])


def _output_size(size: int, k: int, s: int, p: int) -> int:
    """Positions of a convolution along one axis, or 0 where the kernel does not fit."""
    return (size + 2 * p - k) // s + 1 if size + 2 * p >= k else 0


def _fitting_paddings(size: int, wanted: int, k: int, s: int) -> range:
    """All p >= 0 with floor((size + 2 p - k) / s) + 1 == wanted."""
    low = max(0, -((size - k - (wanted - 1) * s) // 2))
    high = (wanted * s - 1 + k - size) // 2
    return range(low, high + 1)


def _geometry(
    size: int, wanted: int, k: int, stride: int | None, padding: int | None, limit: int
) -> tuple[int, int] | None:
    """Return the stride and padding along one axis that suit this kernel, or None.

    Without a stride the largest plausible one is taken: ceil(size / wanted), or less if that asks
    for more padding than ``limit``. Of several paddings the one nearest to (k - 1) / 2 is taken,
    which centres patches where the usual blocks do.
    """
    for s in range(-(-size // wanted), 0, -1) if stride is None else (stride,):
        fits = _fitting_paddings(size, wanted, k, s)
        if padding is not None and padding in fits:
            return s, padding
        plausible = [p for p in fits if padding is None and p <= limit]
        if plausible:
            return s, min(plausible, key=lambda p: (abs(2 * p - (k - 1)), p))
    return None


def _nearest(size: int, wanted: int, k: int, s: int, p: int | None) -> tuple[int, int, int]:
    """Return the (kernel, stride, padding) that gives ``wanted`` with the smallest changes."""

    def distance(candidate: tuple[int, int, int]) -> tuple[int, int]:
        k_new, s_new, p_new = candidate
        moved = 0 if p is None else abs(p_new - p)
        return abs(k_new - k) + abs(s_new - s) + moved, k_new

    def candidates() -> Iterator[tuple[int, int, int]]:
        for k_new, s_new in product(range(1, max(size, k) + 1), range(1, max(size, s) + 1)):
            for p_new in _fitting_paddings(size, wanted, k_new, s_new):
                if p_new < k_new:
                    yield k_new, s_new, p_new

    return min(candidates(), key=distance)


def _misfit(
    input_shape: Shape, output_shape: Shape, axis: int, k: int, s: int, p: int | None
) -> ValueError:
    size, wanted = input_shape[1 + axis], output_shape[1 + axis]
    near = _nearest(size, wanted, k, s, p)
    given = f"kernel_size={k}, stride={s}" + ("" if p is None else f", padding={p}")
    if p is None:
        gives = "no padding within the kernel makes it so"
    else:
        gives = f"it gives {_output_size(size, k, s, p)}"
    return ValueError(
        f"{given} cannot turn the input {input_shape} into the block's output {output_shape}: "
        f"the {('height', 'width')[axis]} must become {wanted} from {size}, and {gives}. "
        f"The nearest that works is kernel_size={near[0]}, stride={near[1]}, padding={near[2]}."
    )


def _infer_axis(
    input_shape: Shape,
    output_shape: Shape,
    axis: int,
    kernels: tuple[int, ...],
    stride: int | None,
    padding: int | None,
) -> tuple[int, int, int]:
    size, wanted = input_shape[1 + axis], output_shape[1 + axis]
    # Half a kernel of padding is usual; a whole one is the most from which a patch sees a pixel.
    for usual in (True, False):
        for k in kernels:
            limit = k // 2 if usual else k - 1
            found = _geometry(size, wanted, k, stride, padding, limit)
            if found is not None:
                return (k, *found)
    s = -(-size // wanted) if stride is None else stride
    raise _misfit(input_shape, output_shape, axis, kernels[0], s, padding)


def infer_layout(
    input_shape: Shape,
    output_shape: Shape,
    *,
    kernel_size: int | tuple[int, int] | None = None,
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] | None = None,
) -> DenseLayout | ConvLayout:
    """Choose the layout of a block from the shapes of one example, without the batch axis.

    * (C, H, W) -> (C', H', W') is convolutional. The kernel is 3, or the whole image without
      padding where the output is 1 x 1 and the image at most 3 x 3; the stride is ceil(H / H') (a
      smaller one where that would need more padding than a kernel has); the padding makes the
      output fit exactly.
    * (..., d) -> (..., c) with equal leading axes is dense, one row a position. Three axes are
      taken for images: a layer over the last of three axes is not recognised.
    * Everything else is dense with each example flattened.

    Parameters
    ----------
    input_shape, output_shape : tuple of int
        What the block was seen to take and give.
    kernel_size, stride, padding : int or (int, int), optional
        Override what is inferred; for convolutional blocks only.

    Raises
    ------
    ValueError
        If the block enlarges its images, if a combination cannot give the output's shape (the
        message names the nearest that can), or if an override is given for a dense block.
    TypeError
        If an override is not an integer or a pair of integers.
    """
    input_shape = _check_shape(input_shape, "input_shape")
    output_shape = _check_shape(output_shape, "output_shape")
    if len(input_shape) != 3 or len(output_shape) != 3:
        for name, value in (("kernel_size", kernel_size), ("stride", stride), ("padding", padding)):
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} is for blocks that map images (C, H, W) to images; this "
                    f"one maps {input_shape} to {output_shape}."
                )
        tokens = len(input_shape) >= 2 and input_shape[:-1] == output_shape[:-1]
        return DenseLayout(input_shape, output_shape, per_position=tokens)

    height, width = input_shape[1:]
    if output_shape[1] > height or output_shape[2] > width:
        raise ValueError(
            f"the block enlarges its images, from {height} x {width} to {output_shape[1]} x "
            f"{output_shape[2]}: upsampling has no convolutional student."
        )
    strides = (None, None) if stride is None else _pair(stride, "stride", 1)
    paddings = (None, None) if padding is None else _pair(padding, "padding", 0)
    kernels: tuple[tuple[int, ...], tuple[int, ...]] = (DEFAULT_KERNELS, DEFAULT_KERNELS)
    if kernel_size is not None:
        kh, kw = _pair(kernel_size, "kernel_size", 1)
        kernels = ((kh,), (kw,))
    elif output_shape[1:] == (1, 1) and max(height, width) <= 3 and set(paddings) <= {None, 0}:
        kernels, paddings = ((height,), (width,)), (0, 0)
    fits = [
        _infer_axis(input_shape, output_shape, axis, kernels[axis], strides[axis], paddings[axis])
        for axis in (0, 1)
    ]
    (kh, sh, ph), (kw, sw, pw) = fits
    return ConvLayout(input_shape, output_shape, (kh, kw), (sh, sw), (ph, pw))
