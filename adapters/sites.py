"""Find the blocks and spans of a model that a student could replace, and what each would cover.

A model runs its layers (modules with parameters of their own) in some order, and a site covers a
run of them. Sites nest and overlap; an allocation takes some that do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cvxdistill.adapters.batches import Batch, run_model
from cvxdistill.adapters.call_structure import Structure, main_input
from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout
from cvxdistill.adapters.module_tree import check_swappable, evaluating, is_span
from cvxdistill.adapters.span_search import search_span
from cvxdistill.adapters.spans import Span
from cvxdistill.adapters.streaming import BlockTaps

# Blocks with less than this share of the model's parameters are left alone.
SMALLEST_SHARE = 2e-3
# Of the model's last block: below, no span ends before it.
SMALLEST_END = 2e-2
# Features of a student that sees the whole image.
MOST_FEATURES = 4096
# Features of a student with wider kernels than its block's.
MOST_WIDE = 3500
# Features of a student that is tried unasked: the square of their number goes into its sums.
MOST_TRIED = 3000


@dataclass(frozen=True)
class Site:
    """A block or span that a student could replace.

    Attributes
    ----------
    name : str
    span : Span
        For ``swap_block``.
    start, stop : int
        It covers the model's layers ``range(start, stop)``.
    layout : DenseLayout or ConvLayout
    rows : int
        Of one example: its positions or tokens.
    modules : tuple of nn.Module
    """

    name: str
    span: Span = field(repr=False)
    start: int
    stop: int
    layout: DenseLayout | ConvLayout
    rows: int
    modules: tuple[nn.Module, ...] = field(repr=False)

    @property
    def key(self) -> tuple[str, DenseLayout | ConvLayout]:
        """What no other site of a model has: there may be two of a name, of other layouts."""
        return self.name, self.layout

    def wider(self) -> Site | None:
        """The same for students of 5 x 5 instead of 3 x 3, if convolutions in a row see so far."""
        layout = self.layout
        if not isinstance(layout, ConvLayout) or min(layout.input_shape[1:]) < 4:
            return None
        if (layout.kernel_size, layout.padding) != ((3, 3), (1, 1)):
            return None
        every = {id(m): m for module in self.modules for m in module.modules()}.values()
        seeing = [m for m in every if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        if len(seeing) < 2 or 25 * layout.input_shape[0] > MOST_WIDE:
            return None
        return replace(self, layout=replace(layout, kernel_size=(5, 5), padding=(2, 2)))


@dataclass(frozen=True)
class Sites:
    """The layers of a model in the order of their calls, and the sites that cover them.

    Attributes
    ----------
    layers : tuple of str
    sites : tuple of Site
        In the order of their first layers.
    """

    layers: tuple[str, ...]
    sites: tuple[Site, ...]


@dataclass
class _Call:
    """One call of a module, its place in the run, and what it mapped to what."""

    name: str
    module: nn.Module
    start: int
    input: Tensor | None
    end: int = -1
    output: Tensor | None = None
    children: list[_Call] = field(default_factory=list)


def find_sites(
    model: nn.Module,
    batch: Batch,
    blocks: str | Sequence[str] = "auto",
    others: Sequence[Batch] = (),
) -> Sites:
    """Run a model on one small batch and list its sites.

    "auto" takes every convolution and linear layer (with the batch norm behind it, where one
    follows), two linear layers with an activation between, every larger block, and the spans from
    a larger block to the end of the model; each if it has its share of the parameters, is called
    once, maps one floating tensor to one, and a student of at most 3,000 features has its shapes.

    Parameters
    ----------
    model : nn.Module
    batch : Tensor or dict
        On the model's device.
    blocks : "auto" or sequence of str
        Names of blocks and spans.
    others : sequence of Tensor or dict
        Batches of other shapes, which students must take too: single tokens come in any number.

    Raises
    ------
    ValueError
        If one of the blocks named does not exist or cannot be replaced, or "auto" finds none.
    """
    with evaluating(model):
        root = _watch(model, batch)
    calls = list(_walk(root))
    counts: dict[int, int] = {}
    for call in calls:
        counts[id(call.module)] = counts.get(id(call.module), 0) + 1
    layers = [call for call in calls if list(call.module.parameters(recurse=False))]
    finder = _Finder(model, batch, layers, counts)
    if isinstance(blocks, str):
        if blocks != "auto":
            raise ValueError(f"blocks must be 'auto' or a list of names, got {blocks!r}.")
        sites = finder.automatic(root, calls)
        for other in others:
            changing = _changing(model, sites, other)
            sites = [site for site in sites if site.name not in changing]
        if not sites:
            raise ValueError(
                "the model has no block to replace: none with a share of its parameters is called "
                "once and maps one tensor to one in shapes that a student can have."
            )
    else:
        if not blocks:
            raise ValueError("blocks is empty.")
        for name in blocks:
            check_swappable(model, name)
        sites = [finder.site(name) for name in dict.fromkeys(blocks)]
        for other in others:
            for name, shape in _changing(model, sites, other).items():
                raise ValueError(
                    f"block {name!r} takes inputs of several shapes, such as {shape}; its student "
                    "would take one. Choose a block that works token by token, or pad."
                )
    sites.sort(key=lambda site: (site.start, site.stop))
    return Sites(tuple(call.name for call in layers), tuple(sites))


def _changing(model: nn.Module, sites: Sequence[Site], batch: Batch) -> dict[str, tuple[int, ...]]:
    """Sites whose inputs or outputs have other shapes here than a student's, and those."""
    found: dict[str, tuple[int, ...]] = {}
    if not sites:
        return found
    pairs = BlockTaps(model, [site.span for site in sites]).run(batch)
    for site, tensors in zip(sites, pairs, strict=True):
        wanted = (site.layout.input_shape, site.layout.output_shape)
        shapes = [tuple(tensor.shape[1:]) for tensor in tensors]
        if isinstance(site.layout, DenseLayout) and site.layout.per_position:
            shapes = [shape[-1:] for shape in shapes]
        if tuple(shapes) != wanted:
            found[site.name] = tuple(tensors[0].shape[1:])
    return found


class _Finder:
    """Tries names out and makes sites of them."""

    def __init__(
        self, model: nn.Module, batch: Batch, layers: list[_Call], counts: dict[int, int]
    ) -> None:
        self.model, self.batch, self.layers, self.counts = model, batch, layers, counts
        self.total = sum(parameter.numel() for parameter in model.parameters())
        self.modules = dict(model.named_modules(remove_duplicate=False))

    def automatic(self, root: _Call, calls: list[_Call]) -> list[Site]:
        """All sites that are worth trying."""
        names: list[str] = []
        alone = {call.name for call in self.layers if _is_linear(call.module)}
        pairs = zip(self.layers, self.layers[1:], strict=False)
        for before, after in pairs:
            follows = isinstance(after.module, (nn.BatchNorm1d, nn.BatchNorm2d))
            linear = _is_linear(after.module)
            if before.name in alone and (follows or linear) and before.end < after.start:
                name = f"{before.name}:{after.name}"
                if self.tried(name) is not None:
                    names.append(name)
                    if follows:
                        alone.discard(before.name)
        names += [call.name for call in self.layers if call.name in alone]
        larger = [call.name for call in calls if call is not root and list(call.module.children())]
        names += larger
        chain = [call for call in _chain(root) if _size(call.module)]
        ends = chain[-1:]
        if chain and _size(chain[-1].module) > SMALLEST_END * self.total:
            ends = chain[-2:]
        for k, call in enumerate(chain):
            if list(call.module.children()):
                names += [f"{call.name}:{end.name}" for end in ends if end in chain[k + 1 :]]
        found = (self.tried(name) for name in dict.fromkeys(names))
        # Several names may mean the same, as of a block and of all that it holds.
        different = {(s.start, s.stop, s.layout): s for s in found if s is not None}
        return [*different.values()]

    def tried(self, name: str) -> Site | None:
        """The site with this name, if there is one that is worth it."""
        names = name.split(":") if is_span(self.model, name) else [name]
        ends = [self.modules[part] for part in names]
        if sum(map(_size, ends)) < SMALLEST_SHARE * self.total and len(ends) == 1:
            return None
        if any(self.counts.get(id(module)) != 1 for module in ends):
            return None
        try:
            check_swappable(self.model, name)
            site = self.site(name, floating=True)
        except ValueError:
            return None
        enough = sum(map(_size, site.modules)) >= SMALLEST_SHARE * self.total
        return site if enough else None

    def site(self, name: str, floating: bool = False) -> Site:
        """The site with this name; ValueError if it cannot be one, or takes no ``floating``."""
        span = search_span(self.model, name, self.batch)
        modules = tuple(self.modules[part] for part in span.names)
        inside = {id(module) for part in modules for module in part.modules()}
        mine = {id(p) for part in modules for p in part.parameters()}
        for known, module in self.model.named_modules():
            own = module.parameters(recurse=False)
            if id(module) not in inside and any(id(p) in mine for p in own):
                raise ValueError(f"block {name!r} shares parameters with {known!r}, which stays.")
        covered = [k for k, call in enumerate(self.layers) if id(call.module) in inside]
        if not covered:
            raise ValueError(f"block {name!r} has no parameters.")
        start, stop = covered[0], covered[-1] + 1
        if len(covered) != stop - start:
            raise ValueError(f"other layers run between those of block {name!r}.")
        shapes, is_floating = _shapes(self.model, span, self.batch)
        if floating and not is_floating:
            raise ValueError(f"block {name!r} takes no floating numbers.")
        layout = _layout(modules[0] if len(modules) < 3 else None, *shapes)
        name = name if is_span(self.model, name) else span.first
        tokens = isinstance(layout, DenseLayout) and layout.per_position
        rows = math.prod(shapes[0][:-1]) if tokens else layout.n_positions
        return Site(name, span, start, stop, layout, rows, modules)


def _layout(
    first: nn.Module | None, input_shape: tuple[int, ...], output_shape: tuple[int, ...]
) -> DenseLayout | ConvLayout:
    """A convolution's own patches, or what the shapes say, of whole images and single tokens."""
    if len(input_shape) == len(output_shape) == 3 and output_shape[1:] == (1, 1):
        # A kernel that holds the whole image, and no padding.
        if math.prod(input_shape) <= MOST_FEATURES:
            return infer_layout(
                input_shape, output_shape, kernel_size=_two(input_shape[1:]), padding=0
            )
    elif (
        isinstance(first, nn.Conv2d)
        and first.padding_mode == "zeros"
        and first.groups == 1
        and tuple(first.dilation) == (1, 1)
        and not isinstance(first.padding, str)
    ):
        return infer_layout(
            input_shape,
            output_shape,
            kernel_size=_two(first.kernel_size),
            stride=_two(first.stride),
            padding=_two(first.padding),
        )
    layout = infer_layout(input_shape, output_shape)
    if isinstance(layout, DenseLayout) and layout.per_position:
        return DenseLayout(input_shape[-1:], output_shape[-1:], per_position=True)
    return layout


def _two(value: tuple[int, ...]) -> tuple[int, int]:
    return value[0], value[1]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv2d, nn.Linear)) or type(module).__name__ == "Conv1D"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shapes(
    model: nn.Module, span: Span, batch: Batch
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], bool]:
    """Shapes of one example at the two ends of a span, and whether it takes floating numbers."""
    found: dict[str, Tensor] = {}
    modules = dict(model.named_modules(remove_duplicate=False))

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found["input"] = main_input(args, kwargs)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found["output"] = Structure.split(output)[0]

    handles = [
        modules[span.first].register_forward_pre_hook(before, with_kwargs=True),
        modules[span.last].register_forward_hook(after),
    ]
    try:
        with evaluating(model):
            run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    taken, given = found["input"], found["output"]
    return (tuple(taken.shape[1:]), tuple(given.shape[1:])), taken.is_floating_point()


def _watch(model: nn.Module, batch: Batch) -> _Call:
    """The call of the model, with the calls that it made, as a tree."""
    names = {id(module): name for name, module in model.named_modules()}
    running: list[_Call] = []
    roots: list[_Call] = []
    clock = iter(range(10**9))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            taken: Tensor | None = main_input(args, kwargs)
        except ValueError:
            taken = None
        call = _Call(names[id(module)], module, next(clock), taken)
        (running[-1].children if running else roots).append(call)
        running.append(call)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = running.pop()
        call.end = next(clock)
        try:
            call.output = Structure.split(output)[0]
        except ValueError:
            call.output = None

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        run_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return roots[0]


def _walk(call: _Call) -> Iterator[_Call]:
    yield call
    for child in call.children:
        yield from _walk(child)


def _chain(call: _Call) -> Iterator[_Call]:
    """The calls that a model is a chain of: its own, those of chains among them taken apart."""
    for child in call.children:
        if _is_chain(child):
            yield from _chain(child)
        else:
            yield child


def _is_chain(call: _Call) -> bool:
    """Whether a block does nothing but run its children one after the other."""
    parts = call.children
    if not parts or call.input is None:
        return False
    links = [call.input, *(part.output for part in parts)]
    ends = [*(part.input for part in parts), call.output]
    return all(link is not None and link is end for link, end in zip(links, ends, strict=True))
