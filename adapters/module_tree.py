"""Find one block of a model by its dotted name, put another in its place, run it in eval mode.

A block may be a span of blocks, ``"layer3:layer4"``: see ``spans.py``.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cvxdistill.adapters.call_structure import PassThrough, Structure, StructuredBlock
from cvxdistill.adapters.spans import Span, check_tree_order, span_of_tree, split_span


def check_model(model: Any) -> nn.Module:
    """Return ``model`` if it is a torch module; raise TypeError otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    return model


def get_block(model: nn.Module, name: str) -> nn.Module:
    """Return the submodule with this dotted name, e.g. ``"layer4"`` or ``"features.3.conv1"``.

    Of a span, ``"layer3:layer4"``, its blocks in an ``nn.Sequential``, by the order of the model's
    tree. That runs only where the model calls them so, with nothing of its own in between.

    Raises
    ------
    ValueError
        If there is none; the message lists the nearest names.
    TypeError
        If ``model`` is not a module or ``name`` not a string.
    """
    modules = dict(check_model(model).named_modules(remove_duplicate=False))
    if not is_span(model, name):
        return _find(modules, name)
    for end in split_span(name):
        _find(modules, end)
    return nn.Sequential(*(modules[known] for known in span_of_tree(modules, name).names))


def is_span(model: nn.Module, name: Any) -> bool:
    """Whether a name means a span of blocks, not one block, whose own name may hold a colon."""
    if not isinstance(name, str):
        raise TypeError(f"block must be a dotted name such as 'layer4', got {name!r}.")
    known = dict(check_model(model).named_modules(remove_duplicate=False))
    return ":" in name and name not in known


def _find(modules: dict[str, nn.Module], name: str) -> nn.Module:
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
        of ``torch.nn.TransformerEncoder``. If one of a span's blocks is that, or the span is not
        made of two blocks of which neither contains the other.
    TypeError
        If ``model`` is not a module or ``name`` not a string.
    """
    block = get_block(model, name)
    for part in split_span(name) if is_span(model, name) else (name,):
        check_replaceable(model, part)
    return block


def check_replaceable(model: nn.Module, name: str) -> None:
    """Raise ValueError if no other module can stand in the place of this one block."""
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


def span_modules(model: nn.Module, span: Span) -> nn.Sequential:
    """Return the blocks of a span, in the order of their calls."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return nn.Sequential(*(_find(modules, name) for name in span.names))


def swap_block(
    model: nn.Module, name: str | Span, module: nn.Module, *, inplace: bool = False
) -> nn.Module:
    """Return the model with ``module`` in the place of the block ``name``.

    The new block takes the training flag, the device and the floating dtype of the old one (those
    of the model where the old block has no tensors). A block that is registered under several names
    is one block: it is replaced under all of them.

    In the place of a span, ``"layer3:layer4"``, ``module`` stands where the first block was, and
    the others become identities. Which lie between, and whether nothing else of them is used, a
    name alone does not tell: the order of the model's tree is taken. ``find_span`` runs the model
    and tells both.

    Parameters
    ----------
    model : torch.nn.Module
    name : str or Span
        A dotted name or a span, as for ``get_block``, not the root; or what ``find_span`` returned,
        or the ``span`` of a capture or distillation: a block that returns its tensor in a tuple or
        a dataclass needs that, because its name does not tell.
    module : torch.nn.Module
    inplace : bool, default False
        False: neither ``model`` nor ``module`` changes; a copy of the model, holding a copy of the
        module, is returned. True: the model itself is changed and holds ``module`` itself.

    Raises
    ------
    ValueError
        As ``check_swappable``; or if the tree does not tell what lies between.
    TypeError
        If ``model`` or ``module`` is not a module.
    """
    span = _as_span(model, name)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    block = list(span_modules(model, span))
    device, dtype = _placement(model, nn.ModuleList(block))
    if not inplace:
        module = copy.deepcopy(module)
    module.to(device=device, dtype=dtype).train(block[0].training)
    substitutes: dict[str, nn.Module] = {
        known: PassThrough(span.structure(known)).train(old.training)
        for known, old in zip(span.names[1:], block[1:], strict=True)
    }
    structure = span.structure(span.first)
    if structure != Structure():
        module = StructuredBlock(module, structure).train(block[0].training)
    substitutes[span.first] = module
    if not inplace:
        modules = dict(model.named_modules(remove_duplicate=False))
        # The old blocks are not copied: wherever the copy would hold one, it holds the new one.
        memo = {id(modules[known]): new for known, new in substitutes.items()}
        places = _places(model, substitutes)
        model = copy.deepcopy(model, memo)
    else:
        places = _places(model, substitutes)
    _put(model, places)
    return model


def _as_span(model: nn.Module, name: str | Span) -> Span:
    """The span that a name means, checked."""
    if not isinstance(name, Span):
        check_swappable(model, name)
        if not is_span(model, name):
            # A student that replaces a student answers in the same way.
            structure = getattr(get_block(model, name), "structure", None)
            known = {name: structure} if isinstance(structure, Structure) else {}
            return Span(name, name, structures=known)
        modules = dict(model.named_modules(remove_duplicate=False))
        span = span_of_tree(modules, name)
        check_tree_order(modules, span)
    else:
        span = name
    for part in span.names:
        check_replaceable(model, part)
    return span


def _places(model: nn.Module, substitutes: dict[str, nn.Module]) -> list[tuple[str, nn.Module]]:
    """Every name of the blocks that are replaced, with what comes there."""
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {id(modules[name]): substitute for name, substitute in substitutes.items()}
    places = [(known, new[id(old)]) for known, old in modules.items() if id(old) in new]
    # What is also registered inside another replaced block goes with it.
    inside = [f"{known}." for known, _ in places]
    return [(known, module) for known, module in places if not known.startswith(tuple(inside))]


def _put(model: nn.Module, places: list[tuple[str, nn.Module]]) -> None:
    for known, module in places:
        parent, _, child = known.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


@contextmanager
def swapped_for_a_while(model: nn.Module, substitutes: dict[str, nn.Module]) -> Iterator[None]:
    """Hold other modules in the places of these blocks, and put the blocks back afterwards."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places = _places(model, substitutes)
    try:
        _put(model, places)
        yield
    finally:
        _put(model, [(known, modules[known]) for known, _ in places])


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
