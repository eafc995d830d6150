"""Spans: blocks that run one after the other, named ``"first:last"``, as one block.

The student takes the first one's place, and the others become identities. ``span_search.py`` finds
by running the model which modules lie between; here they are taken from the model's tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cvxdistill.adapters.call_structure import Structure

# Lists of modules are never called themselves.
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Span:
    """One block, or several that run one after the other.

    Attributes
    ----------
    first, last : str
        Dotted names; the same for a single block.
    between : tuple of str
        The modules that run between the two, outermost only.
    structures : mapping of str to Structure
        How modules return their tensor; those that return it alone may be left out.
    """

    first: str
    last: str
    between: tuple[str, ...] = ()
    structures: Mapping[str, Structure] = field(default_factory=dict, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks that are replaced."""
        if self.first == self.last:
            return (self.first,)
        return (self.first, *self.between, self.last)

    def __str__(self) -> str:
        return self.first if self.first == self.last else f"{self.first}:{self.last}"

    def structure(self, name: str) -> Structure:
        """How the module with this name returns its tensor."""
        return self.structures.get(name, Structure())


def split_span(name: str) -> tuple[str, str]:
    """Return the names of the first and the last block of ``"first:last"``.

    Raises
    ------
    ValueError
        If there are not exactly two, or one lies within the other.
    """
    first, colon, last = name.partition(":")
    if not first or (colon and not last) or ":" in last:
        raise ValueError(
            f"a span is written 'first:last', with the names of two blocks, got {name!r}."
        )
    last = last or first
    for outer, inner in ((first, last), (last, first)):
        if inner.startswith(f"{outer}."):
            raise ValueError(
                f"a span runs from one block to another, but in {name!r} the block {outer!r} "
                f"contains {inner!r}."
            )
    return first, last


def span_of_tree(modules: Mapping[str, Any], name: str) -> Span:
    """Take for the blocks between those that are registered between, outermost only.

    Parameters
    ----------
    modules : mapping from str
        The model's, by name, in tree order.
    name : str
        Of a span whose two ends exist.
    """
    first, last = split_span(name)
    names = list(modules)
    start, stop = names.index(first), names.index(last)
    between: list[str] = []
    for known in names[start + 1 : stop]:
        part_of_an_end = known.startswith(f"{first}.") or last.startswith(f"{known}.")
        covered = any(known.startswith(f"{outer}.") for outer in between)
        if not (part_of_an_end or covered or isinstance(modules[known], CONTAINERS)):
            between.append(known)
    return Span(first, last, tuple(between))


def check_tree_order(modules: Mapping[str, nn.Module], span: Span) -> None:
    """Refuse a span where the order of the tree may not be the order of the calls.

    Registration tells it apart only where every owner runs its children in order, or where nothing
    without parameters (an activation, dropout) is registered elsewhere that could run between.

    Raises
    ------
    ValueError
        If the last block is registered before the first, or such a module exists.
    """
    names = list(modules)
    advice = f"find_span(model, {str(span)!r}, batch) finds what runs between; pass what it returns"
    if names.index(span.last) < names.index(span.first):
        raise ValueError(
            f"block {span.last!r} is registered before {span.first!r}, so the model must be run to "
            f"tell what lies between. {advice}, or turn the span around."
        )
    shared = _common_owner(span)
    owner = modules[shared]
    ends_are_layers = any(not list(modules[name].children()) for name in (span.first, span.last))
    if isinstance(owner, (nn.Sequential, *CONTAINERS)) or not ends_are_layers:
        return
    for child_name, child in owner.named_children():
        full = f"{shared}.{child_name}" if shared else child_name
        idle = not list(child.parameters()) and not isinstance(child, CONTAINERS)
        if idle and full not in span.names:
            raise ValueError(
                f"{full!r} may run between {span.first!r} and {span.last!r}, which the order of "
                f"the model's tree does not tell. {advice}."
            )


def _common_owner(span: Span) -> str:
    """The name of the innermost module that holds both ends."""
    parents = (span.first.split(".")[:-1], span.last.split(".")[:-1])
    shared = []
    for left, right in zip(*parents, strict=False):
        if left != right:
            break
        shared.append(left)
    return ".".join(shared)
