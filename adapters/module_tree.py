"""Find one block of a model by its dotted name, put another in its place, run it in eval mode."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def check_model(model: Any) -> nn.Module:
    """Return ``model`` if it is a torch module; raise TypeError otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    return model


def get_block(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule with this dotted name, e.g. ``"layer4"`` or ``"features.3.conv1"``.

    Raises
    ------
    ValueError
        If there is none; the message lists the nearest names.
    TypeError
        If ``model`` is not a module or ``name`` not a string.
    """
    modules = dict(check_model(model).named_modules(remove_duplicate=False))
    if not isinstance(name, str):
        raise TypeError(f"block must be a dotted name such as 'layer4', got {name!r}.")
    if name not in modules:
        names = [known for known in modules if known]
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
        # A name that exists further down or up the tree is nearer than its spelling says.
        tail = name.rsplit(".", 1)[-1]
        near += [known for known in names if known.rsplit(".", 1)[-1] == tail and known not in near]
        hint = f" Did you mean {', '.join(map(repr, near[:5]))}?" if near else ""
        raise ValueError(
            f"the model has no block named {name!r}.{hint} "
            "[name for name, _ in model.named_modules()] lists all names."
        )
    return modules[name]


def check_swappable(model: nn.Module, name: str) -> nn.Module:
    """Return the block with this name if another module can stand in its place.

    Raises
    ------
    ValueError
        If the block does not exist, is the model itself, or has an owner in torch that reaches into
        it instead of calling it: a part of ``torch.nn.TransformerEncoderLayer``, or the first layer
        of ``torch.nn.TransformerEncoder``.
    TypeError
        If ``model`` is not a module or ``name`` not a string.
    """
    block = get_block(model, name)
    if block is model:
        raise ValueError("the model itself cannot be swapped; name one of its blocks.")
    for known, owner in model.named_modules():
        is_part = isinstance(owner, nn.TransformerEncoderLayer) and any(
            block is child for child in owner.children()
        )
        is_first = isinstance(owner, nn.TransformerEncoder) and block is owner.layers[0]
        if is_part or is_first:
            raise ValueError(
                f"block {name!r} cannot be swapped: {known or 'the model'!r} is a torch.nn."
                f"{type(owner).__name__}, which reads the weights of this block itself instead of "
                "calling it. Choose another layer or a block around it."
            )
    return block


def swap_block(
    model: nn.Module, name: str, module: nn.Module, *, inplace: bool = False
) -> nn.Module:
    """Return the model with ``module`` in the place of the block ``name``.

    The new block takes the training flag, the device and the floating dtype of the old one (those
    of the model where the old block has no tensors). A block that is registered under several names
    is one block: it is replaced under all of them.

    Parameters
    ----------
    model : torch.nn.Module
    name : str
        A dotted name, as for ``get_block``; not the root.
    module : torch.nn.Module
    inplace : bool, default False
        False: neither ``model`` nor ``module`` changes; a copy of the model, holding a copy of the
        module, is returned. True: the model itself is changed and holds ``module`` itself.

    Raises
    ------
    ValueError
        As ``check_swappable``.
    TypeError
        If ``model`` or ``module`` is not a module.
    """
    block = check_swappable(model, name)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    names = [
        known
        for known, candidate in model.named_modules(remove_duplicate=False)
        if candidate is block
    ]
    parents = [known.rpartition(".")[::2] for known in names]
    device, dtype = _placement(model, block)
    if not inplace:
        module = copy.deepcopy(module)
        # The old block is not copied: wherever the copy would hold it, it holds the new one.
        model = copy.deepcopy(model, {id(block): module})
    module.to(device=device, dtype=dtype).train(block.training)
    for parent, child in parents:
        setattr(model.get_submodule(parent), child, module)
    return model


def _placement(model: nn.Module, block: nn.Module) -> tuple[torch.device | None, Any]:
    """Device and floating dtype of the block's tensors, or of the model's where it has none."""
    device: torch.device | None = None
    for module in (block, model):
        for tensor in (*module.parameters(), *module.buffers()):
            device = tensor.device if device is None else device
            if tensor.is_floating_point():
                return device, tensor.dtype
    return device, None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients, and every submodule's flag back afterwards."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
