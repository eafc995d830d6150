"""What each block of a model takes, gives, stores and computes, measured in one forward pass."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cvxdistill.adapters.batches import run_model, to_batch, where_tensors_go
from cvxdistill.adapters.call_structure import Structure, main_input
from cvxdistill.adapters.layout import Shape
from cvxdistill.adapters.module_tree import check_model, evaluating
from cvxdistill.adapters.teacher_gates import is_transposed_linear


@dataclass(frozen=True)
class BlockInfo:
    """One block of a model.

    Attributes
    ----------
    name : str
        Its dotted name; "" for the model itself.
    type : str
        Its class.
    input_shape, output_shape : tuple of int or None
        Of one example, in the first call; None if there is not one tensor that a student would take
        or give (see ``call_structure.py``).
    parameters : int
        Numbers in its parameters, children included.
    share : float
        ``parameters`` as a part of the model's, from 0 to 1.
    multiply_adds : int
        Of its convolutional, linear and attention layers, for one example, all calls together.
    calls : int
        How often a forward pass calls it.
    """

    name: str
    type: str
    input_shape: Shape | None
    output_shape: Shape | None
    parameters: int
    share: float
    multiply_adds: int
    calls: int


def _input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Shape | None:
    try:
        return _example_shape(main_input(args, kwargs))
    except ValueError:
        return None


def _output_shape(output: Any) -> Shape | None:
    try:
        return _example_shape(Structure.split(output)[0])
    except ValueError:
        return None


def _example_shape(tensor: Tensor) -> Shape | None:
    return tuple(tensor.shape[1:]) if tensor.ndim else None


def _multiply_adds(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> int:
    """Multiply-adds of one call of a layer, for the whole batch; biases are not counted."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        per_pixel = module.out_channels // module.groups * math.prod(module.kernel_size)
        return next(iter((*args, *kwargs.values()))).numel() * per_pixel
    if isinstance(module, nn.modules.conv._ConvNd):
        per_pixel = module.in_channels // module.groups * math.prod(module.kernel_size)
        return output.numel() * per_pixel
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if is_transposed_linear(module):
        return output.numel() * module.get_parameter("weight").shape[0]
    if isinstance(module, nn.Bilinear):
        return output.numel() * module.in1_features * (module.in2_features + 1)
    if isinstance(module, nn.MultiheadAttention):
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        query, key = named["query"], named["key"]
        e = module.embed_dim
        batch = 1 if query.ndim == 2 else query.shape[0 if module.batch_first else 1]
        queries, keys = query.numel() // e, key.numel() // key.shape[-1]
        projections = 2 * queries * e * e + keys * e * (module.kdim + module.vdim)
        return projections + 2 * queries * (keys // batch) * e
    # An embedding is looked up: it multiplies nothing.
    return 0


class _Meter:
    """Hooks on every module: they keep what is running, and charge each layer to all of it."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: Counter[int] = Counter()
        self.multiply_adds: Counter[int] = Counter()
        self.shapes: dict[int, tuple[Shape | None, Shape | None]] = {}
        self._running: list[tuple[int, Shape | None]] = []
        self.handles = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Kept now, because a module may reshape its input in place.
        self._running.append((id(module), _input_shape(args, kwargs)))

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cost = _multiply_adds(module, args, kwargs, output)
        for key in {key for key, _ in self._running}:
            self.multiply_adds[key] += cost
        key, input_shape = self._running.pop()
        self.calls[key] += 1
        self.shapes.setdefault(key, (input_shape, _output_shape(output)))


def measure_blocks(model: nn.Module, example: Any) -> list[BlockInfo]:
    """Return the model itself, then every block that a forward pass calls, in tree order.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was: it runs in eval mode without gradients, and its flags are restored.
    example : tensor, ndarray, tuple, list or dict
        One batch, in any of the forms that ``capture`` takes.

    Raises
    ------
    TypeError
        If ``model`` is not a module or ``example`` not a batch.
    ValueError
        If ``example`` holds no examples.
    """
    check_model(model)
    batch = to_batch(example, *where_tensors_go(model))
    first = (
        next((value for value in batch.values() if isinstance(value, Tensor)), None)
        if isinstance(batch, dict)
        else batch
    )
    if first is None or first.ndim == 0 or first.shape[0] == 0:
        raise ValueError(
            "example must be a batch of at least one example, got "
            f"{'no tensor' if first is None else f'shape {tuple(first.shape)}'}."
        )
    meter = _Meter(model)
    try:
        with evaluating(model):
            run_model(model, batch)
    finally:
        for handle in meter.handles:
            handle.remove()

    total = sum(parameter.numel() for parameter in model.parameters())
    blocks = []
    for name, module in model.named_modules():
        key = id(module)
        if not meter.calls[key]:
            continue
        parameters = sum(parameter.numel() for parameter in module.parameters())
        input_shape, output_shape = meter.shapes[key]
        blocks.append(
            BlockInfo(
                name=name,
                type=type(module).__name__,
                input_shape=input_shape,
                output_shape=output_shape,
                parameters=parameters,
                share=parameters / total if total else 0.0,
                multiply_adds=round(meter.multiply_adds[key] / first.shape[0]),
                calls=meter.calls[key],
            )
        )
    return blocks


def block_table(model: nn.Module, example: Any) -> list[BlockInfo]:
    """Return every named block that a forward pass calls, in tree order, without the model itself.

    See ``measure_blocks`` for the parameters and errors.
    """
    return measure_blocks(model, example)[1:]
