"""Read batches from whatever people have: loaders, iterables, tensors and arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

# What a model is called with: model(batch), or model(**batch) for a dict.
Batch: TypeAlias = Tensor | dict[str, Any]


def check_data(data: Any) -> None:
    """Refuse what cannot be a source of batches.

    Raises
    ------
    TypeError
        If ``data`` is not iterable, is a string, or is a dataset of examples.
    ValueError
        If it is one dict whose tensors do not agree in the number of examples.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        return
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TypeError(
            f"data is a dataset ({type(data).__name__}), which yields examples, not batches; pass "
            "torch.utils.data.DataLoader(data, batch_size=...)."
        )
    if isinstance(data, Mapping):
        count_examples(data)
        return
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(
            "data must be a DataLoader, an iterable of batches, a tensor or an array, got "
            f"{type(data).__name__}."
        )


def count_examples(data: Any) -> int | None:
    """How many examples one tensor, array or dict of them holds; None for other data.

    Raises
    ------
    ValueError
        If the tensors of a dict, "labels" aside, do not agree.
    """
    if isinstance(data, (Tensor, np.ndarray)):
        return data.shape[0] if data.ndim else None
    if not isinstance(data, Mapping):
        return None
    counts = {key: len(value) for key, value in data.items() if _is_split(key, value)}
    if not counts:
        raise ValueError(f"data is one dict, but none of {list(data)} is a tensor of examples.")
    if len(set(counts.values())) > 1:
        held = ", ".join(f"{key!r} {count}" for key, count in counts.items())
        raise ValueError(
            "data is one dict, to be split into batches, but its tensors hold different numbers of "
            f"examples: {held}. Pass a list of batches, [batch]."
        )
    return next(iter(counts.values()))


def _is_split(key: Any, value: Any) -> bool:
    return key != "labels" and isinstance(value, (Tensor, np.ndarray)) and value.ndim > 0


def _split(data: Any, batch_size: int) -> Iterator[Any]:
    """Cut one tensor, one array or one dict of them into batches."""
    for start in range(0, count_examples(data) or 0, batch_size):
        rows = slice(start, start + batch_size)
        if isinstance(data, Mapping):
            yield {k: v[rows] if _is_split(k, v) else v for k, v in data.items()}
        else:
            yield data[rows]


def count_batches(data: Any, batch_size: int) -> int | None:
    """How many batches there will be, or None where nobody knows."""
    examples = count_examples(data)
    if examples is not None:
        return -(-examples // batch_size)
    try:
        return len(data)
    except TypeError:
        return None


def iterate_batches(data: Any, model: nn.Module, batch_size: int) -> Iterator[Batch]:
    """Yield each batch on the model's device, floating tensors in the model's dtype.

    Labels are dropped: everything but the first item of a tuple or list, and "labels" in a dict.

    Raises
    ------
    ValueError
        If a single tensor or array has no axis of examples.
    TypeError
        If a batch is something else than a tensor, an array, a tuple, a list or a dict.
    """
    whole = isinstance(data, (Tensor, np.ndarray, Mapping))
    if whole and not isinstance(data, Mapping) and data.ndim == 0:
        raise ValueError("data must have an axis of examples, got a single number.")
    batches: Iterable[Any] = _split(data, batch_size) if whole else data
    device, dtype = where_tensors_go(model)
    for number, batch in enumerate(batches):
        yield to_batch(batch, device, dtype, number)


def where_tensors_go(model: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """The device and the floating dtype of the model's tensors; None where it has none."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else None
    return device, next((t.dtype for t in tensors if t.is_floating_point()), None)


def run_model(model: nn.Module, batch: Batch) -> Any:
    """Call the model with a batch: ``model(**batch)`` for a dict."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


def batch_length(batch: Batch) -> int:
    """How many examples a batch holds."""
    if isinstance(batch, dict):
        return next(len(v) for v in batch.values() if holds_examples(v))
    return len(batch)


def holds_examples(value: Any) -> bool:
    """Whether a value of a batch is a tensor with an axis of examples."""
    return isinstance(value, Tensor) and value.ndim > 0


def take_examples(batch: Batch, chosen: np.ndarray, size: int) -> Batch:
    """Some examples of a batch of ``size``."""
    index = torch.from_numpy(chosen)

    def part(value: Any) -> Any:
        split = holds_examples(value) and len(value) == size
        return value[index.to(value.device)] if split else value

    return {k: part(v) for k, v in batch.items()} if isinstance(batch, dict) else part(batch)


def repeat_examples(batch: Batch, count: int) -> Batch:
    """``count`` examples: those that there are, over and over."""
    length = batch_length(batch)
    return take_examples(batch, np.arange(count) % length, length)


def start_of(batch: Batch) -> Batch:
    """Its first two examples, or its only one, as a copy."""
    return take_examples(batch, np.arange(min(2, batch_length(batch))), batch_length(batch))


def to_batch(
    batch: Any, device: torch.device | None, dtype: torch.dtype | None, number: int = 0
) -> Batch:
    """Turn one batch, in any of the accepted forms, into what the model is called with."""
    if isinstance(batch, Mapping):
        return {
            key: _place(value, device, dtype) if isinstance(value, (Tensor, np.ndarray)) else value
            for key, value in batch.items()
            if key != "labels"
        }
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError(f"batch {number} is an empty {type(batch).__name__}.")
        batch = batch[0]
    if not isinstance(batch, (Tensor, np.ndarray)):
        raise TypeError(
            f"batch {number} must be a tensor, an array, a tuple or list that starts with one, or "
            f"a dict, got {type(batch).__name__}."
        )
    return _place(batch, device, dtype)


def _place(value: Any, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    if isinstance(value, np.ndarray):
        # Copying also serves arrays that are read-only or have negative strides.
        value = torch.from_numpy(np.array(value, order="C"))
    if value.is_floating_point():
        return value.to(device=device, dtype=dtype)
    return value.to(device=device)
