"""Gates read off the teacher: the filters of the block's own first layer.

The first layer's pre-activation, its bias and batch norm folded in, is an affine function of a
patch of the block's input. Its sign is therefore a gate of the convex program, and where the block
switches its own units is often a better place to switch than a random hyperplane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout
from cvxdistill.adapters.module_tree import evaluating
from cvxdistill.adapters.patches import Pair

# One example shows which layer comes first; two tell batch norm's axis from a batch of one.
PROBE_EXAMPLES = 2


@dataclass
class _Layer:
    """A layer that took the block's input, what it gave, and the batch norm right behind it."""

    module: nn.Module
    output: Tensor
    version: int
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None = None


def teacher_gates(
    block: nn.Module, inputs: np.ndarray, layout: DenseLayout | ConvLayout
) -> np.ndarray:
    """Return the gates G (d, p) of the block's first layer, for the rows of ``layout``.

    The layer is the first Conv2d (of those with the largest kernel, so that no shortcut is taken
    for it) or Linear (or ``Conv1D`` of transformers, a linear layer with its weights transposed)
    that is called with the block's input itself. With weights w, bias b and an
    eval-mode batch norm (mean, variance, scale, shift) called directly on its output,

        G[:-1] = w scale / sqrt(variance + eps),
        G[-1]  = (b - mean) scale / sqrt(variance + eps) + shift,

    so that ``layout.rows(inputs) @ G`` is the normalised pre-activation. A kernel that is placed
    otherwise than the layout's is moved into its patches. Where the layer's stride is a divisor of
    the layout's, as in a span of several strided stages, several of its positions fall on one of
    the layout's; the most central one's gates are taken.

    Parameters
    ----------
    block : torch.nn.Module
        Of a span its blocks in an ``nn.Sequential``, which need run only as far as that layer.
    inputs : ndarray of shape (N, *layout.input_shape)
        What the block saw; the first few examples are run. Where they are tokens, (n, d), they are
        run as one sequence.
    layout : DenseLayout or ConvLayout

    Raises
    ------
    ValueError
        If no such layer exists, the block cannot be run alone, or the layer's kernel reaches beyond
        the layout's patches (the message says which ``kernel_size`` would hold it).
    """
    layers = _first_layers(block, inputs, layout)
    if isinstance(layout, ConvLayout):
        kept = [layer for layer in layers if _same_geometry(layer.module, layout)]
        if kept:
            layer = max(kept, key=lambda kept_layer: np.prod(_kernel(kept_layer.module)))
            weights, bias = _folded(layer)
            return _join(_embed(layer.module, weights, layout), bias, inputs.dtype)
    else:
        for layer in layers:
            if _weights(layer.module).shape[1:] == (layout.n_features - 1,):
                weights, bias = _folded(layer)
                return _join(weights, bias, inputs.dtype)
    raise ValueError(
        f"the block ({type(block).__name__}) has no first layer to take gates from: no "
        f"{'Conv2d' if isinstance(layout, ConvLayout) else 'Linear'} that is called with the "
        "block's input itself and fits the student's patches (a stride that divides theirs, no "
        'dilation or groups, zero padding). Use gates="gaussian".'
    )


def _first_layers(
    block: nn.Module, inputs: np.ndarray, layout: DenseLayout | ConvLayout
) -> list[_Layer]:
    """Run the block and return, in order of call, the layers that took its unchanged input."""
    if inputs.ndim == 0 or inputs.shape[1:] != layout.input_shape or not len(inputs):
        raise ValueError(
            f"inputs must have shape {('n', *layout.input_shape)} with n >= 1, got {inputs.shape}."
        )
    tensors = [*block.parameters(), *block.buffers()]
    device = tensors[0].device if tensors else None
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)
    # A copy: the block may work in place.
    x = torch.from_numpy(np.array(inputs[:PROBE_EXAMPLES])).to(device=device, dtype=dtype)
    if isinstance(layout, DenseLayout) and layout.per_position and len(layout.input_shape) == 1:
        x = x[None]
    version = x._version
    layers: list[_Layer] = []

    def is_input(tensor: Any) -> bool:
        # A view (flattened, say) counts; what was changed in place since does not.
        return tensor is x or (
            isinstance(tensor, Tensor)
            and tensor.data_ptr() == x.data_ptr()
            and tensor.numel() == x.numel()
            and tensor.is_contiguous()
        )

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        is_layer = isinstance(module, (nn.Conv2d, nn.Linear)) or is_transposed_linear(module)
        takes_input = is_layer and args and is_input(args[0])
        if takes_input and x._version == version:
            layers.append(_Layer(module, output, output._version))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            return
        for layer in layers:
            unchanged = args[0] is layer.output and layer.output._version == layer.version
            if unchanged and layer.norm is None:
                layer.norm = module

    handles = []
    try:
        for module in block.modules():
            handles.append(module.register_forward_hook(after))
            handles.append(module.register_forward_pre_hook(before))
        with evaluating(block):
            block(x)
    # Whatever the block misses when it is called with its input alone, or between a span's parts.
    except Exception as error:
        if not layers:
            raise ValueError(
                f"the block ({type(block).__name__}) has no first layer to take gates from: called "
                f"with its input alone it fails with {type(error).__name__}: {error}. Use "
                'gates="gaussian".'
            ) from error
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _folded(layer: _Layer) -> tuple[np.ndarray, np.ndarray]:
    """Weights (m, ...) and bias (m,) in float64, the batch norm behind the layer folded in."""
    module, norm = layer.module, layer.norm
    weights = _weights(module)
    bias = _array(module.bias) if module.bias is not None else np.zeros(len(weights))
    # BatchNorm1d takes axis 1 for the channels: those of a linear layer only in two dimensions.
    if norm is None or (not isinstance(module, nn.Conv2d) and layer.output.ndim != 2):
        return weights, bias
    scale, shift = folded_norm(norm)
    return weights * scale.reshape(-1, *[1] * (weights.ndim - 1)), bias * scale + shift


def folded_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift (c,) of an eval-mode batch norm, in float64.

    Raises
    ------
    ValueError
        If it keeps no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(
            "the batch norm behind the block's first layer keeps no running statistics, so its "
            'gates depend on the batch. Use gates="gaussian".'
        )
    mean, variance = _array(norm.running_mean), _array(norm.running_var)
    scale = 1 / np.sqrt(variance + norm.eps)
    shift = np.zeros_like(mean)
    if norm.affine:
        scale, shift = scale * _array(norm.weight), _array(norm.bias)
    return scale, shift - mean * scale


def _weights(module: nn.Module) -> np.ndarray:
    """Weights (m, ...) of a layer, one row an output."""
    weights = _array(module.weight)
    return weights.T if is_transposed_linear(module) else weights


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether this is the ``Conv1D`` of transformers: x W + b with W (in, out)."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.ndim == 2


def _array(tensor: Any) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()


def _join(weights: np.ndarray, bias: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Stack weights (m, ...) and bias (m,) as columns of G (d, m)."""
    return np.vstack([weights.reshape(len(weights), -1).T, bias]).astype(dtype)


def _kernel(module: nn.Module) -> Pair:
    assert isinstance(module, nn.Conv2d)
    return module.kernel_size[0], module.kernel_size[1]


def _same_geometry(module: nn.Module, layout: ConvLayout) -> bool:
    """Whether the layer looks at a dense, zero-padded patch at every position of the layout."""
    if not isinstance(module, nn.Conv2d) or module.padding_mode != "zeros":
        return False
    # Along an axis with a single position there is no step to take.
    steps = zip(module.stride, layout.stride, layout.output_shape[1:], strict=True)
    return (
        module.groups == 1
        and tuple(module.dilation) == (1, 1)
        and all(theirs % own == 0 or positions == 1 for own, theirs, positions in steps)
    )


def _padding(module: nn.Module) -> Pair:
    """The zeros before the first pixel along each axis."""
    assert isinstance(module, nn.Conv2d)
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        return (module.kernel_size[0] - 1) // 2, (module.kernel_size[1] - 1) // 2
    return int(module.padding[0]), int(module.padding[1])


def _central_position(module: nn.Module, layout: ConvLayout, axis: int) -> int:
    """Pixels from the layer's first position in the layout's first patch to the most central."""
    assert isinstance(module, nn.Conv2d)
    stride, step = module.stride[axis], layout.stride[axis]
    if layout.output_shape[1 + axis] == 1:
        return 0
    # Twice how far the middle of the kernel lies left of the middle of the patch.
    left = layout.kernel_size[axis] - _kernel(module)[axis]
    left -= 2 * (layout.padding[axis] - _padding(module)[axis])
    return min(range(0, step, stride), key=lambda pixels: abs(2 * pixels - left))


def _taps(module: nn.Module, layout: ConvLayout, axis: int) -> tuple[range, int]:
    """The layer's taps along one axis that ever see a pixel, and how far to move them.

    At output position o tap u sees pixel o s + u - padding; the layout's tap u + shift sees the
    same one. Taps that see padding at every position add nothing.
    """
    size, positions = layout.input_shape[1 + axis], layout.output_shape[1 + axis]
    step = layout.stride[axis]
    own = _padding(module)[axis] - _central_position(module, layout, axis)
    useful = [
        u
        for u in range(_kernel(module)[axis])
        if any(0 <= o * step + u - own < size for o in range(positions))
    ]
    taps = range(useful[0], useful[-1] + 1) if useful else range(0)
    return taps, layout.padding[axis] - own


def _holds(module: nn.Module, layout: ConvLayout) -> bool:
    """Whether the layout's patches hold every tap of the layer that ever sees a pixel."""
    for axis in (0, 1):
        taps, shift = _taps(module, layout, axis)
        if taps and not (taps[0] + shift >= 0 and taps[-1] + shift < layout.kernel_size[axis]):
            return False
    return True


def _embed(module: nn.Module, weights: np.ndarray, layout: ConvLayout) -> np.ndarray:
    """Move weights (m, C, th, tw) into the layout's patches (m, C, kh, kw)."""
    if not _holds(module, layout):
        raise ValueError(
            f"the block's first layer has a kernel of {_kernel(module)} with padding "
            f"{_padding(module)}, which reaches beyond the student's patches of "
            f"{layout.kernel_size} with padding {layout.padding}. {_advice(module, layout)}"
        )
    embedded = np.zeros((*weights.shape[:2], *layout.kernel_size))
    (rows, down), (columns, right) = (_taps(module, layout, axis) for axis in (0, 1))
    if rows and columns:
        embedded[
            :,
            :,
            rows[0] + down : rows[-1] + down + 1,
            columns[0] + right : columns[-1] + right + 1,
        ] = weights[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return embedded


def _advice(module: nn.Module, layout: ConvLayout) -> str:
    """Name the smallest square kernel size whose layout holds the layer."""
    largest = max(_kernel(module)) + max(layout.input_shape[1:])
    for size in range(1, largest + 1):
        try:
            candidate = infer_layout(layout.input_shape, layout.output_shape, kernel_size=size)
        except ValueError:
            continue
        assert isinstance(candidate, ConvLayout)
        if _same_geometry(module, candidate) and _holds(module, candidate):
            return f'kernel_size={size} would hold it, or use gates="gaussian".'
    return 'No square kernel would hold it; use gates="gaussian".'
