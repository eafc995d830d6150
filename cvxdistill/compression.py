"""``compress``: make a whole network fit a budget, by students of its blocks, without labels."""

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


def compress(
    model: nn.Module,
    data: Any,
    *,
    max_parameters: int | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
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
) -> Compression:
    """Replace blocks of a network by convex students so that the whole fits a budget.

    1. Sites: layers, blocks and spans that a student could stand in for (``find_sites``).
    2. Curves: for each site the family of linear students of all ranks, from one set of sums over
       its activations (of convolutions in a row also with 5 x 5 kernels), and what some of them
       change in the model's output on held-out examples,

           E = ||F' - F||_F^2 / ||F - mean F||_F^2,

       each alone in the model, or the squared share of examples that it classifies otherwise
       (``criterion``). Between these E is in proportion to the activation error. Outputs of a block
       are weighted by how the rest of the network uses them (``output_metrics``). Where it reads no
       more than s combinations of c outputs, s <= c/2, students write s of them, which carry them
       all, and leave the others zero; where it reads only their mean over an image, that mean is
       fitted. Both are tried on the network first: its output must stay the same.
    3. Allocation: the sites and sizes of the least sum of E within the budget, exactly, by dynamic
       programming over the layers in the order of their calls.
    4. Students: each site's in turn is fitted to the activations of the compressed network so far,
       with the original's outputs as targets, by ridge regression with a certified gap.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    data : DataLoader, iterable of batches, tensor, array or dict
        Inputs of the model; labels beside them are ignored. They are gone through many times;
        batches of an iterable are kept in memory.
    max_parameters : int, optional
        Of the compressed model, all stored numbers of its students included.
    max_bytes : int, optional
        Of its parameters and buffers.
    max_error : float, optional
        sqrt(E) of the compressed model on held-out examples: the smallest model that does not
        exceed it is sought. Give one of the three.
    blocks : "auto" or sequence of str, default="auto"
        Names of blocks and spans (``"layer3:layer4"``) that may be replaced.
    criterion : {"output", "agreement"}, default="output"
        What E compares: all that the model returns, or, of a classifier, only which of its outputs
        is the largest. A student of the last blocks may get the classes right and the scale of the
        outputs wrong: that is an error of the output, and none of agreement. A classifier that
        agrees with the original on all but 2 % of the examples is at most 2 points less accurate
        on them.
    sparse : bool, default=False
        Let students also be sparse: ridge regressions of few weights (``SparseRidge``), of which a
        file holds those and a bit for each place. They keep more of a network that has little to
        spare; in memory they are whole, and they are not faster.
    sequential : bool, default=True
        Fit each student to what the compressed network before it gives; False: to what the original
        gives, and then all students write all outputs.
    mask : "auto", None, str, callable or array, default="auto"
        Which tokens count, as for ``capture``.
    max_examples : int or None, default=50_000
        Use at most this many.
    validation_fraction : float, default=0.1
        Share of the examples, at most 2,000, that is held out: they choose.
    batch_size : int, default=256
        For data that are one tensor, array or dict.
    random_state : int, Generator or None, default=0
        Of held-out examples and sampled rows.
    verbose : int, default=1
        0 is silent.

    Returns
    -------
    Compression
        With the new model, the choices, the frontier and a printable report.

    Raises
    ------
    ValueError, TypeError
        If an argument is not valid; if a budget cannot be met: the message says the smallest
        possible.

    References
    ----------
    Varshney and Pilanci 2024, section 4.1; Izenman 1975 (reduced-rank regression); Frantar and
    Alistarh 2022 (layers of few weights).
    """
    from cvxdistill.adapters import Examples, evaluating, find_sites

    _check_arguments(locals())
    seconds: dict[str, float] = {}
    rng = np.random.default_rng(random_state)
    measure = ModelSize(max_bytes is not None)
    with timed(seconds, "data"):
        examples = Examples(
            data,
            model,
            batch_size=batch_size,
            max_examples=max_examples,
            mask=mask,
            rng=rng,
        )
        found = find_sites(model, examples.small_batch, blocks, examples.other_batches)
    work = SiteStudents(
        model,
        examples,
        found.layers,
        found.sites,
        validation_fraction,
        criterion,
        sparse,
        rng,
        verbose,
    )
    budget = max_bytes if max_parameters is None else max_parameters
    total = measure.model(model)
    with evaluating(model):
        with timed(seconds, "curves"):
            options = work.options(measure, sequential)
        with timed(seconds, "allocation"):
            # Layers that no student could replace cost nothing here: units are rounded for each.
            covered = {k for option in options for k in range(option.start, option.stop)}
            layer_costs = [
                measure.layer(model, name) if k in covered else 0
                for k, name in enumerate(found.layers)
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
        with timed(seconds, "students"):
            if budget is not None:
                compressed, choices, error = _best_within(
                    budget - fixed, work, layer_costs, options, sequential
                )
            else:
                assert max_error is not None
                compressed, choices, error = _smallest_within(
                    max_error, work, allocation, costs, errors, sequential
                )
    spans = {site.name: site.span for site in found.sites}
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
        sites=tuple(site.name for site in found.sites),
        examples=len(examples),
        held_out=work.n_held_out,
        example=examples.small_batch,
        criterion=criterion,
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


def _check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse what can be refused before the model is run."""
    from cvxdistill.adapters import check_model

    check_model(arguments["model"])
    budgets = {k: arguments[k] for k in ("max_parameters", "max_bytes", "max_error")}
    given = [name for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            f"give one of {', '.join(budgets)}; got {', '.join(given) if given else 'none'}."
        )
    for name in ("max_parameters", "max_bytes", "max_examples", "batch_size"):
        value = arguments[name]
        if value is None and name != "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    for name, most in (("validation_fraction", 1.0), ("max_error", np.inf)):
        value = arguments[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        if not 0 < float(value) < most:
            raise ValueError(f"{name} must lie in (0, {most:g}), got {value!r}.")
    if arguments["criterion"] not in CRITERIA:
        raise ValueError(
            f"criterion must be one of {', '.join(CRITERIA)}, got {arguments['criterion']!r}."
        )
    blocks = arguments["blocks"]
    if isinstance(blocks, str) and blocks != "auto":
        raise ValueError(f"blocks must be 'auto' or a list of names, got {blocks!r}.")
    if not isinstance(blocks, (str, list, tuple)):
        raise TypeError(f"blocks must be 'auto' or a list of names, got {type(blocks).__name__}.")
