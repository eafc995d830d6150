"""``Compressor``: what ``compress`` does, for one budget after another."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.allocation import Allocation, Option, largest_budget
from cvxdistill.compression_report import Choice, Compression
from cvxdistill.distillation import timed
from cvxdistill.model_size import ModelSize
from cvxdistill.output_change import CRITERIA
from cvxdistill.site_students import SiteStudents

if TYPE_CHECKING:
    from torch import nn

# How often a build is repeated that misses ``max_error``, or what was expected of it.
MOST_BUILDS = 4
# As many times the squared error expected.
SURPRISE = 4.0


class Compressor:
    """Compresses one network to one budget after another; what they share is done once.

    That is the first two steps of ``compress``: finding the sites, and measuring how large a
    student of each must be. What remains for each budget takes a fraction of the time, and gives
    what ``compress`` gives.

    Parameters
    ----------
    model : nn.Module
        Left as it was; it must stay so as long as budgets are asked for.
    data
        As all other parameters: of ``compress``. Kept.

    Raises
    ------
    ValueError, TypeError
        As ``compress``.

    Examples
    --------
    >>> compressor = Compressor(model, batches)  # doctest: +SKIP
    >>> small = compressor.compress(max_parameters=500_000)  # doctest: +SKIP
    >>> smaller = compressor.compress(max_parameters=200_000)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        blocks: str | Sequence[str] = "auto",
        criterion: str = "output",
        sparse: bool = False,
        sequential: bool = True,
        mask: Any = "auto",
        max_examples: int | None = 50_000,
        validation_fraction: float = 0.1,
        batch_size: int = 256,
        random_state: int | np.random.Generator | None = 0,
        verbose: int = 1,
    ) -> None:
        from cvxdistill.adapters import Examples, evaluating, find_sites

        _check_arguments(locals())
        self.model, self.sequential = model, sequential
        self._seconds: dict[str, float] = {}
        rng = np.random.default_rng(random_state)
        with timed(self._seconds, "data"):
            self._examples = Examples(
                data,
                model,
                batch_size=batch_size,
                max_examples=max_examples,
                mask=mask,
                rng=rng,
            )
            small = self._examples.small_batch
            self._sites = find_sites(model, small, blocks, self._examples.other_batches)
        self._work = SiteStudents(
            model,
            self._examples,
            self._sites.layers,
            self._sites.sites,
            validation_fraction,
            criterion,
            sparse,
            rng,
            verbose,
        )
        with evaluating(model), timed(self._seconds, "curves"):
            self._work.measure_students(sequential)

    def __repr__(self) -> str:
        return (
            f"Compressor({type(self.model).__name__}, {len(self._sites.sites)} sites, "
            f"{len(self._examples):,} examples)"
        )

    def compress(
        self,
        *,
        max_parameters: int | None = None,
        max_bytes: int | None = None,
        max_error: float | None = None,
    ) -> Compression:
        """The network within one of these budgets, as of ``compress``.

        Raises
        ------
        ValueError, TypeError
            If not one of them is given, it is not valid, or it cannot be met: the message says
            the smallest possible.
        """
        from cvxdistill.adapters import evaluating

        check_budgets(max_parameters, max_bytes, max_error)
        model, work, seconds = self.model, self._work, dict(self._seconds)
        measure = ModelSize(max_bytes is not None)
        budget = max_bytes if max_parameters is None else max_parameters
        total = measure.model(model)
        with timed(seconds, "allocation"):
            options = work.options(measure)
            # Layers that no student could replace cost nothing here: units are rounded for each.
            covered = {k for option in options for k in range(option.start, option.stop)}
            layer_costs = [
                measure.layer(model, name) if k in covered else 0
                for k, name in enumerate(self._sites.layers)
            ]
            fixed = total - sum(layer_costs)
            allocation = Allocation(layer_costs, options, largest_budget(layer_costs))
        smallest = fixed + allocation.smallest
        if budget is not None and budget < smallest:
            raise ValueError(
                f"{'max_bytes' if measure.bytes else 'max_parameters'}={budget:,} cannot be met: "
                f"the smallest possible is {smallest:,}. The model has {total:,}."
            )
        costs, errors = allocation.curve()
        with evaluating(model), timed(seconds, "students"):
            if budget is not None:
                compressed, choices, error = _best_within(
                    budget - fixed, work, layer_costs, options, self.sequential
                )
            else:
                assert max_error is not None
                compressed, choices, error = _smallest_within(
                    max_error, work, allocation, costs, errors, self.sequential
                )
        spans = {site.name: site.span for site in self._sites.sites}
        flags = {name: module.training for name, module in model.named_modules()}
        for name, module in compressed.named_modules():
            # A student's parts take its flag.
            flags.setdefault(name, flags[name.rpartition(".")[0]])
            module.training = flags[name]
        return Compression(
            model=compressed,
            original=model,
            choices=tuple(choices),
            error=error,
            unit="bytes" if measure.bytes else "parameters",
            before=total,
            after=measure.model(compressed),
            # Costs were rounded up.
            frontier=np.column_stack([np.minimum(costs + fixed, total), np.sqrt(errors)]),
            curves=_curves(options),
            smallest=smallest,
            spans=tuple(spans[choice.block] for choice in choices),
            sites=tuple(site.name for site in self._sites.sites),
            examples=len(self._examples),
            held_out=work.n_held_out,
            example=self._examples.small_batch,
            criterion=work.change.criterion,
            seconds=seconds,
        )


def _curves(options: Sequence[Option]) -> dict[str, np.ndarray]:
    """Of each site the parameters of its students, and what each is expected to change."""
    points: dict[str, list[tuple[int, float]]] = {}
    for option in options:
        site, size, error = option.student
        points.setdefault(site.name, []).append((size.parameters, math.sqrt(error)))
    return {name: _lowest(found) for name, found in points.items()}


def _lowest(points: list[tuple[int, float]]) -> np.ndarray:
    """By size, those that no smaller one beats."""
    kept: list[tuple[int, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return np.array(kept)


def _best_within(
    budget: int,
    work: SiteStudents,
    layer_costs: Sequence[int],
    options: Sequence[Option],
    sequential: bool,
) -> tuple[nn.Module, list[Choice], float]:
    """The best allocation within a budget; another where students err far more than expected.

    Errors do not add up where the network makes up for each student alone, but not for all of
    them. As much more is then expected of all students of these sites, and the allocation is made
    anew; the best that was measured is kept.
    """
    options = list(options)
    found: list[tuple[float, nn.Module, list[Choice]]] = []
    seen: list[list[object]] = []
    for _ in range(MOST_BUILDS):
        # Anew, with units as fine as the budget allows.
        chosen = Allocation(layer_costs, options, budget).choose(budget)
        students = [option.student for option in chosen]
        if students in seen:
            break
        seen.append(students)
        compressed, choices = work.build(chosen, sequential)
        error = work.change.measure(compressed)
        found.append((error, compressed, choices))
        expected = max(sum(o.error for o in chosen), np.finfo(float).tiny)
        if error <= max(SURPRISE * expected, work.change.smallest_telling):
            break
        sites = {id(site) for site, _, _ in students}
        options = [
            replace(o, error=o.error * error / expected) if id(o.student[0]) in sites else o
            for o in options
        ]
    error, compressed, choices = min(found, key=lambda built: built[0])
    return compressed, choices, math.sqrt(error)


def _smallest_within(
    max_error: float,
    work: SiteStudents,
    allocation: Allocation,
    costs: np.ndarray,
    errors: np.ndarray,
    sequential: bool,
) -> tuple[nn.Module, list[Choice], float]:
    """The smallest predicted to be within the error; again with more room where it was not."""
    aim = max_error**2
    for _ in range(MOST_BUILDS):
        cost = int(costs[np.flatnonzero(errors <= aim)[0]])
        compressed, choices = work.build(allocation.choose(cost), sequential)
        error = math.sqrt(work.change.measure(compressed))
        if error <= max_error:
            return compressed, choices, error
        aim *= 0.8 * (max_error / error) ** 2
    # The original itself errs by nothing.
    return copy.deepcopy(work.model), [], 0.0


def check_budgets(max_parameters: Any, max_bytes: Any, max_error: Any) -> None:
    """Refuse all but one valid budget."""
    budgets = {"max_parameters": max_parameters, "max_bytes": max_bytes, "max_error": max_error}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"give one of {', '.join(budgets)}; got {', '.join(given) if given else 'none'}."
        )
    if max_error is not None:
        _check_number(max_error, "max_error", np.inf)
    else:
        _check_count(budgets[given[0]], given[0])


def _check_count(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_number(value: Any, name: str, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 < float(value) < most:
        raise ValueError(f"{name} must lie in (0, {most:g}), got {value!r}.")


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what can be refused before the model is run."""
    from cvxdistill.adapters import check_model

    check_model(arguments["model"])
    for name in ("max_examples", "batch_size"):
        if arguments[name] is not None or name == "batch_size":
            _check_count(arguments[name], name)
    _check_number(arguments["validation_fraction"], "validation_fraction", 1.0)
    for name in ("sparse", "sequential"):
        if not isinstance(arguments[name], (bool, np.bool_)):
            raise TypeError(f"{name} must be True or False, got {arguments[name]!r}.")
    if arguments["criterion"] not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {arguments['criterion']!r}."
        )
    blocks = arguments["blocks"]
    if isinstance(blocks, str) and blocks != "auto":
        raise ValueError(f"blocks must be 'auto' or a list of names, got {blocks!r}.")
    if not isinstance(blocks, (str, list, tuple)):
        raise TypeError(f"blocks must be 'auto' or a list of names, got {type(blocks).__name__}.")
