"""How often a model calls one of its blocks, told without computing anything."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cvxdistill.adapters.batches import Batch, run_model
from cvxdistill.adapters.module_tree import get_block


def count_calls(model: nn.Module, name: str, batch: Batch) -> int | None:
    """How often one forward pass calls the block; None where that cannot be told.

    Leaving the model at the block hides a second call. So the whole model runs once, without
    computing anything, as a copy on the meta device that has shapes but no numbers. A model whose
    path depends on numbers cannot run like that.
    """
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def without_numbers(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="meta")

    try:
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            ghost = without_numbers(tensor.detach())
            memo[id(tensor)] = (
                nn.Parameter(ghost, requires_grad=False)
                if isinstance(tensor, nn.Parameter)
                else ghost
            )
        shadow = copy.deepcopy(model, memo)
        # The user's own hooks must not see a run that has no numbers.
        for module in shadow.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        get_block(shadow, name).register_forward_pre_hook(count)
        ghosts: Batch = (
            {
                key: without_numbers(value) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            if isinstance(batch, dict)
            else without_numbers(batch)
        )
        run_model(shadow, ghosts)
    except Exception:
        return None
    return calls
