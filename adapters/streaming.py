"""What blocks take and give, batch by batch, without keeping it: for sums over many examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvxdistill.adapters.batches import (
    Batch,
    batch_length,
    check_data,
    holds_examples,
    iterate_batches,
    run_model,
    start_of,
    take_examples,
)
from cvxdistill.adapters.call_structure import Structure, main_input, tensors_in
from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.module_tree import evaluating
from cvxdistill.adapters.spans import Span
from cvxdistill.adapters.token_mask import TokenMask
from cvxdistill.solvers.random_order import random_order


class Examples:
    """Batches that can be gone through many times, each example with its own random number.

    Parameters
    ----------
    data : DataLoader, iterable of batches, tensor, ndarray or dict
        As for ``capture``. Batches of an iterable are kept, as they are.
    model : nn.Module
        Batches go to its device, floating ones to its dtype, when they are asked for.
    batch_size : int
        For splitting one tensor, array or dict.
    max_examples : int or None
        Keep no more than the first so many.
    mask : "auto", None, str, callable or array
        As for ``capture``.
    rng : Generator

    Raises
    ------
    ValueError, TypeError
        If there are fewer than two examples, or ``data`` is no source of batches.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        *,
        batch_size: int,
        max_examples: int | None,
        mask: Any,
        rng: np.random.Generator,
    ) -> None:
        check_data(data)
        self.masks = TokenMask(mask, data)
        self.batches: list[Batch] = []
        self._count = 0
        for batch in iterate_batches(data, model, batch_size):
            size = batch_length(batch)
            left = size if max_examples is None else min(size, max_examples - self._count)
            if left < size:
                batch = take_examples(batch, np.arange(left), size)
            self.batches.append(batch)
            self._count += left
            if self._count == max_examples:
                break
        if self._count < 2:
            raise ValueError(
                f"data must hold at least 2 examples, to hold one out; got {self._count}."
            )
        self._where = (random_order(rng, self._count) + 0.5) / self._count

    def __len__(self) -> int:
        return self._count

    @property
    def small_batch(self) -> Batch:
        """Two examples or so, to find out about a model."""
        return start_of(self.batches[0])

    @property
    def other_batches(self) -> list[Batch]:
        """One small batch of each other length of sequences or size of images that there is."""
        found = {_shapes_of(batch): batch for batch in reversed(self.batches)}
        found.pop(_shapes_of(self.batches[0]))
        return [start_of(batch) for batch in found.values()]

    @property
    def largest_batch(self) -> int:
        """Examples in the largest batch."""
        return max(map(batch_length, self.batches))

    def between(self, low: float, high: float) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches of the examples whose number in (0, 1) lies in [low, high), and which these are.

        Yields
        ------
        batch : Tensor or dict
        numbers : ndarray of int
            In the order of the data.
        """
        # Few of each batch may be chosen: they are put together again to batches of its size.
        most = self.largest_batch
        held: list[tuple[Batch, np.ndarray]] = []
        for piece in self._pieces(low, high):
            count = sum(len(numbers) for _, numbers in held)
            if held and not (_alike(held[0][0], piece[0]) and count + len(piece[1]) <= most):
                yield _joined(held)
                held = []
            held.append(piece)
        if held:
            yield _joined(held)

    def _pieces(self, low: float, high: float) -> Iterator[tuple[Batch, np.ndarray]]:
        start = 0
        for batch in self.batches:
            size = batch_length(batch)
            where = self._where[start : start + size]
            chosen = np.flatnonzero((where >= low) & (where < high))
            if len(chosen):
                yield take_examples(batch, chosen, size), start + chosen
            start += size


class BlockTaps:
    """Records what some spans of a model take and give in one run of it.

    Parameters
    ----------
    model : nn.Module
    spans : sequence of Span
    inputs_only : bool, default=False
        Leave their outputs alone: they may not be there any more.
    """

    def __init__(
        self, model: nn.Module, spans: Sequence[Span], *, inputs_only: bool = False
    ) -> None:
        self.model, self.spans, self.inputs_only = model, spans, inputs_only
        self._found: list[dict[int, Tensor]] = [{}, {}]

    def run(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Inputs and outputs of the spans for one batch; the model is left after the last.

        Eval mode, without gradients; no hook stays behind. Without outputs the inputs stand in
        for them.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self._found = [{}, {}]
        handles = []
        try:
            for k, span in enumerate(self.spans):
                handles.append(
                    modules[span.first].register_forward_pre_hook(self._before(k), with_kwargs=True)
                )
                if not self.inputs_only:
                    handles.append(modules[span.last].register_forward_hook(self._after(k)))
            with evaluating(self.model), suppress(_AllSeenError):
                run_model(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        inputs, outputs = self._found
        if self.inputs_only:
            outputs = inputs
        return [(inputs[k], outputs[k]) for k in range(len(self.spans))]

    def _before(self, k: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._keep(0, k, main_input(args, kwargs))

        return hook

    def _after(self, k: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep(1, k, Structure.split(output)[0])

        return hook

    def _keep(self, side: int, k: int, tensor: Tensor) -> None:
        found = self._found[side]
        # A copy: what comes next may change it in place.
        found[k] = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if len(found) == len(self.spans) and (side == 1 or self.inputs_only):
            raise _AllSeenError


class _AllSeenError(BaseException):
    """Leaves the model: no ``except Exception`` may stop it."""


def token_rows(
    layout: DenseLayout | ConvLayout,
    input: Tensor,
    output: Tensor,
    keep: Tensor | None,
    most: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows X (m, d - 1) and targets Y (m, c) of one batch, at most so many, drawn at random.

    Parameters
    ----------
    layout : DenseLayout or ConvLayout
        Of tokens, (d,) to (c,), where inputs have more axes than it says.
    input, output : Tensor of shape (N, ...)
    keep : Tensor of bool of shape (N, T), optional
        Which tokens to take.
    most : int
    rng : Generator
    """
    inputs, outputs = input.numpy(), output.numpy()
    if inputs.ndim - 1 > len(layout.input_shape):
        if keep is not None:
            inputs, outputs = inputs[keep.numpy()], outputs[keep.numpy()]
        inputs = inputs.reshape(-1, inputs.shape[-1])
        outputs = outputs.reshape(-1, outputs.shape[-1])
    n = len(inputs) * layout.n_positions
    rows = layout.rows(inputs)
    if most < n:
        chosen = np.sort(rng.choice(n, most, replace=False))
        return rows.take(chosen)[:, :-1], layout.targets(outputs, chosen)
    return rows[:][:, :-1], layout.targets(outputs)


def _alike(one: Batch, other: Batch) -> bool:
    """Whether two batches can be one: of the same shapes but for the number of examples."""
    if isinstance(one, dict) != isinstance(other, dict):
        return False
    if not isinstance(one, dict) or not isinstance(other, dict):
        return _shapes_of(one) == _shapes_of(other)
    rest = [
        {key: value for key, value in batch.items() if not holds_examples(value)}
        for batch in (one, other)
    ]
    plain = not any(isinstance(value, Tensor) for value in rest[0].values())
    same = one.keys() == other.keys() and _shapes_of(one) == _shapes_of(other)
    return same and plain and bool(rest[0] == rest[1])


def _joined(pieces: list[tuple[Batch, np.ndarray]]) -> tuple[Batch, np.ndarray]:
    numbers = np.concatenate([numbers for _, numbers in pieces])
    tensors = [batch for batch, _ in pieces if isinstance(batch, Tensor)]
    if tensors:
        return torch.cat(tensors), numbers
    dicts = [batch for batch, _ in pieces if isinstance(batch, dict)]
    joined = {
        key: torch.cat([batch[key] for batch in dicts]) if holds_examples(value) else value
        for key, value in dicts[0].items()
    }
    return joined, numbers


def _shapes_of(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Shapes without the axis of examples."""
    tensors = list(batch.values()) if isinstance(batch, dict) else [batch]
    return tuple(tuple(t.shape[1:]) for t in tensors if isinstance(t, Tensor) and t.ndim)


def model_output(model: nn.Module, batch: Batch) -> Tensor:
    """The first floating tensor that a model returns, float32 on the CPU.

    Raises
    ------
    ValueError
        If there is none.
    """
    floating = [t for t in tensors_in(run_model(model, batch)) if t.is_floating_point()]
    if not floating:
        raise ValueError("the model returns no floating tensor to compare.")
    return floating[0].detach().to(device="cpu", dtype=torch.float32)
