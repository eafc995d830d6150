"""Which tokens of a batch to record: those that a mask keeps, padding left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvxdistill.adapters.batches import Batch, count_examples

# What transformers call it; "auto" looks for this key.
ATTENTION_MASK = "attention_mask"


class TokenMask:
    """Says of every batch which tokens (N, T) of a block (N, T, d) -> (N, T, c) count.

    Parameters
    ----------
    mask : "auto", None, False, str, callable, tensor or ndarray
        As for ``capture``.
    data : Any
        What an array is for.

    Raises
    ------
    TypeError, ValueError
        If ``mask`` is something else, or an array that does not fit the data.
    """

    def __init__(self, mask: Any, data: Any) -> None:
        self.automatic = isinstance(mask, str) and mask == "auto"
        self.key: str | None = ATTENTION_MASK if self.automatic else None
        self.array: Any = None
        self.function: Callable[[Batch], Any] | None = None
        if mask is None or mask is False or self.automatic:
            return
        if isinstance(mask, str):
            self.key = mask
            if isinstance(data, Mapping) and mask not in data:
                raise ValueError(f"mask names the key {mask!r}, but data has {list(data)}.")
        elif isinstance(mask, (Tensor, np.ndarray)):
            examples = count_examples(data)
            if examples is None:
                raise ValueError(
                    "mask as one array is for data that is one tensor, array or dict; for batches, "
                    "name a key of theirs or pass a function of the batch."
                )
            if mask.ndim != 2 or len(mask) != examples:
                raise ValueError(
                    f"mask must have shape ({examples}, T), one row an example, got "
                    f"{tuple(mask.shape)}."
                )
            self.array = mask
        elif callable(mask):
            self.function = mask
        else:
            raise TypeError(
                "mask must be 'auto', None, a key of the batches, a function of the batch or an "
                f"array (n_examples, T), got {mask!r}."
            )

    def of(
        self,
        block: str,
        number: int,
        batch: Batch,
        start: int | np.ndarray,
        pair: tuple[Tensor, Tensor],
    ) -> Tensor | None:
        """Return the tokens to keep, bool (N, T), or None for all.

        Raises
        ------
        ValueError
            If the mask does not fit what the block took and gave, or the batch has none.
        """
        value = self._value(number, batch, start, len(pair[0]))
        if value is None:
            return None
        keep = torch.as_tensor(value).detach().cpu()
        shapes = [tuple(tensor.shape) for tensor in pair]
        per_token = len(shapes[0]) == 3 and shapes[0][:-1] == shapes[1][:-1]
        if not per_token or tuple(keep.shape) != shapes[0][:-1]:
            if self.automatic:
                return None
            wanted = f"{shapes[0][:-1]}" if per_token else "none: it does not work token by token"
            raise ValueError(
                f"the mask of batch {number} has shape {tuple(keep.shape)}, but block {block!r} "
                f"maps {shapes[0]} to {shapes[1]}, which takes {wanted}."
            )
        # Masks that are added to attention scores are -inf where these are 0.
        if not torch.isfinite(keep).all() or bool((keep < 0).any()):
            raise ValueError(
                f"the mask of batch {number} must hold 1 for tokens to keep and 0 for others, got "
                f"values from {keep.min().item()} to {keep.max().item()}."
            )
        return keep != 0

    def _value(self, number: int, batch: Batch, start: int | np.ndarray, count: int) -> Any:
        if self.array is not None:
            # The numbers of the batch's examples, or of its first one.
            return self.array[slice(start, start + count) if np.ndim(start) == 0 else start]
        if self.function is not None:
            return self.function(batch)
        if self.key is None:
            return None
        if isinstance(batch, dict) and self.key in batch:
            value = batch[self.key]
            usable = isinstance(value, (Tensor, np.ndarray)) or not self.automatic
            return value if usable else None
        if self.automatic:
            return None
        held = f"the keys {list(batch)}" if isinstance(batch, dict) else "no keys"
        raise ValueError(f"mask names the key {self.key!r}, but batch {number} has {held}.")
