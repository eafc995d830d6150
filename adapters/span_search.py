"""Run a model to find what lies between the ends of a span, and whether a student may stand in.

A span ``"first:last"`` is one block if nothing of it but the last block's output is used: no
skip connection leaves it, and the model computes nothing of its own between its modules. That is
tried out rather than guessed: the model must give the same whether the last block returns some
random values, or a stand-in for the first one does and the others are identities.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cvxdistill.adapters.batches import Batch, run_model, to_batch, where_tensors_go
from cvxdistill.adapters.call_structure import PassThrough, Structure, main_input, tensors_in
from cvxdistill.adapters.module_tree import (
    check_model,
    check_replaceable,
    check_swappable,
    evaluating,
    is_span,
    swapped_for_a_while,
)
from cvxdistill.adapters.spans import Span, split_span


@dataclass
class _Call:
    """One call of a module: when it began and ended, and what it took and gave."""

    module: nn.Module
    start: int
    input: Tensor | None
    version: int
    end: int = -1
    output: Any = None
    output_version: int = 0


class _Watch:
    """Hooks on every module: they keep the calls, and the tensors of those inside the span."""

    def __init__(self, model: nn.Module, first: nn.Module, last: nn.Module) -> None:
        self.first, self.last = first, last
        self.calls: list[_Call] = []
        self._clock = 0
        self._running: list[_Call] = []
        self._inside = False
        self.handles = []
        for module in model.modules():
            self.handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clock += 1
        self._inside = self._inside or module is self.first
        taken: Tensor | None = None
        if self._inside:
            try:
                taken = main_input(args, kwargs)
            except ValueError:
                taken = None
        call = _Call(module, self._clock, taken, 0 if taken is None else taken._version)
        self.calls.append(call)
        self._running.append(call)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._clock += 1
        call = self._running.pop()
        call.end = self._clock
        if self._inside:
            call.output = output
            tensors = tensors_in(output)
            call.output_version = tensors[0]._version if tensors else 0
        if module is self.last:
            # A copy: what comes next may change it in place.
            call.output = _copied(output)
            self._inside = False


def find_span(model: nn.Module, name: str, example: Any) -> Span:
    """Find what ``swap_block`` must know of ``"first:last"``, and check that it is a block.

    That is which modules run between its ends, and how each returns its tensor.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it was. It runs on the example three times, in eval mode; once for one block.
    name : str
        A span, or one block.
    example : tensor, ndarray, tuple, list or dict
        One batch, in any of the forms that ``capture`` takes.

    Returns
    -------
    Span
        For ``swap_block``.

    Raises
    ------
    ValueError
        If the two blocks do not exist, are not called once each, in this order; if a module between
        them is called elsewhere as well; if one of them does not map one tensor to one; or if the
        span is no block: something inside is used outside of it, or the model itself computes
        between its modules.
    TypeError
        If ``model`` is not a module or ``example`` not a batch.
    """
    check_swappable(check_model(model), name)
    return search_span(model, name, to_batch(example, *where_tensors_go(model)))


def search_span(model: nn.Module, name: str, batch: Batch) -> Span:
    """As ``find_span``, with a batch on the model's device and arguments that are checked."""
    if not is_span(model, name):
        name = f"{name}:{name}"
    modules = dict(model.named_modules(remove_duplicate=False))
    first, last = split_span(name)
    with evaluating(model):
        watch = _Watch(model, modules[first], modules[last])
        try:
            run_model(model, _copied(batch))
        finally:
            for handle in watch.handles:
                handle.remove()
        chain = _chain(model, name, watch)
        span, output = _described(model, name, chain)
        for part in span.between:
            check_replaceable(model, part)
        if len(chain) > 1:
            _try_out(model, span, batch, output, chain)
    return span


def _chain(model: nn.Module, name: str, watch: _Watch) -> list[_Call]:
    """The calls of the span's modules, outermost only, in order."""
    first, last = split_span(name)
    where = f" of the span {name!r}" if first != last else ""
    ends = []
    for end, module in ((first, watch.first), (last, watch.last)):
        calls = [call for call in watch.calls if call.module is module]
        if len(calls) != 1:
            often = f"{len(calls)} times" if calls else "not at all"
            raise ValueError(
                f"block {end!r}{where} is called {often} in one forward pass; it must be called "
                "once."
            )
        ends.append(calls[0])
    start, stop = ends
    if start is stop:
        return [start]
    if stop.end < start.start:
        raise ValueError(
            f"in the span {name!r}, {last!r} runs before {first!r}: write '{last}:{first}'."
        )
    if stop.start < start.end:
        raise ValueError(f"in the span {name!r}, one block is called by the other.")
    inside = [call for call in watch.calls if start.end < call.start and call.end < stop.start]
    counts = Counter(id(call.module) for call in watch.calls)
    inside_counts = Counter(id(call.module) for call in inside)
    chain = [start]
    for call in inside:
        if call.start < chain[-1].end:
            continue
        if counts[id(call.module)] != inside_counts[id(call.module)]:
            raise ValueError(
                f"{_name_of(model, call.module)!r} runs inside the span {name!r} and elsewhere "
                "too, so it cannot become an identity."
            )
        chain.append(call)
    return [*chain, stop]


def _described(model: nn.Module, name: str, chain: list[_Call]) -> tuple[Span, Tensor]:
    """Name the modules and say how each returns its tensor."""
    structures: dict[str, Structure] = {}
    first, last = split_span(name)
    names = [first, *(_name_of(model, call.module) for call in chain[1:-1]), last][: len(chain)]
    where = f", in the span {name!r}," if first != last else ""
    tensor: Tensor | None = None
    for known, call in zip(names, chain, strict=True):
        try:
            tensor, structure = Structure.split(call.output)
        except ValueError as error:
            raise ValueError(f"the output of block {known!r}{where} must be {error}.") from None
        if structures.setdefault(known, structure) != structure:
            raise ValueError(
                f"{known!r}{where} returns its tensor now in one way, now in "
                "another, so it cannot become an identity."
            )
    assert tensor is not None
    if not tensor.is_floating_point():
        raise ValueError(f"the span {name!r} must give floating numbers, got {tensor.dtype}.")
    between = tuple(dict.fromkeys(names[1:-1]))
    kept = {known: form for known, form in structures.items() if form.key is not None}
    return Span(first, last, between, kept), tensor


def _try_out(
    model: nn.Module, span: Span, batch: Batch, output: Tensor, chain: list[_Call]
) -> None:
    """Compare the model with random values behind the span to the model with a stand-in."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    finite = output[torch.isfinite(output)]
    scale = finite.abs().mean() if finite.numel() else 1.0
    probe = noise * scale + output.nan_to_num() / 2

    def give(known: str) -> Any:
        return lambda *_: span.structure(known).wrap(probe.clone())

    # Random values, because an activation of the model's own may leave the real ones as they are.
    handle = dict(model.named_modules(remove_duplicate=False))[span.last].register_forward_hook(
        give(span.last)
    )
    try:
        expected = tensors_in(run_model(model, _copied(batch)))
    finally:
        handle.remove()
    substitutes: dict[str, nn.Module] = {
        known: PassThrough(span.structure(known)) for known in span.names
    }
    handle = substitutes[span.first].register_forward_hook(give(span.first))
    with swapped_for_a_while(model, substitutes):
        try:
            got = tensors_in(run_model(model, _copied(batch)))
        # Whatever the user's model raises where it finds other shapes than it counts on.
        except Exception as error:
            raise ValueError(
                f"the span {str(span)!r} is no block of consecutive modules: with the output of "
                f"{span.last!r} in the place of {span.first!r} and identities for the others, the "
                f"model fails with {type(error).__name__}: {error}. {_diagnosis(span, chain)}"
            ) from error
    if len(got) != len(expected) or not all(map(_same, got, expected)):
        raise ValueError(
            f"the span {str(span)!r} is no block of consecutive modules: the model gives something "
            f"else with the output of {span.last!r} in the place of {span.first!r} and identities "
            f"for the others. {_diagnosis(span, chain)}"
        )


def _diagnosis(span: Span, chain: list[_Call]) -> str:
    """Say where the values change between two modules, or that they are used elsewhere."""
    # A module that runs twice has one name: then only the ends can be named.
    names = span.names if len(span.names) == len(chain) else [""] * len(chain)
    for before, after, left, right in zip(chain, chain[1:], names, names[1:], strict=False):
        given = tensors_in(before.output)
        taken = after.input
        if taken is None or not given:
            continue
        same = taken is given[0] or (
            taken.data_ptr() == given[0].data_ptr() and taken.numel() == given[0].numel()
        )
        if not (same and after.version == before.output_version):
            taker, giver = right or "a module inside", left or "the one before"
            return (
                f"What {taker!r} takes is not what {giver!r} gives: the model computes something "
                "itself in between, such as an activation, an addition or a pooling."
            )
    return (
        f"Something that {' or '.join(map(repr, span.names[:-1]))} gives is used elsewhere too, as "
        "by a skip connection. Choose a span that holds both ends of it."
    )


def _same(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    if not got.is_floating_point():
        return torch.equal(got, expected)
    finite = expected[torch.isfinite(expected)]
    size = float(finite.abs().max()) if finite.numel() else 0.0
    precision = 100 * torch.finfo(got.dtype).eps
    return torch.allclose(got, expected, rtol=0, atol=precision * size, equal_nan=True)


def _copied(value: Any) -> Any:
    """The same with its tensors copied: the model may change them in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict) and type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    try:
        tensor, structure = Structure.split(value)
    except ValueError:
        return value
    return structure.wrap(tensor.clone())


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, known in model.named_modules() if known is module)
