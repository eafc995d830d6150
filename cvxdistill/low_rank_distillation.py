"""Students with the nuclear penalty: from streamed sums, for all outputs, globally optimal.

The block's activations are not recorded. Batch by batch they become sums (``GatedStatistics``), of
one size however many examples there are, and these are all that the factored programme needs.
Linear operations that follow the block can be part of what is fitted: where positions are averaged
later, so are the features.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.candidates import UNITS, Candidate, PathPoint
from cvxdistill.solvers import (
    GatedStatistics,
    HiddenStatistics,
    LowRankNewton,
    LowRankProblem,
    LowRankSolution,
    Neurons,
)
from cvxdistill.streamed_block import StreamedBlock, record_held_out, stream
from cvxdistill.student_curves import Weighting

if TYPE_CHECKING:
    from torch import nn

    from cvxdistill.adapters import ConvLayout, DenseLayout, Examples, FollowingMap, Span

# The path: this many alphas, from the first share of alpha_max down to the second.
PATH = (6, 0.1, 1e-3)
# Hidden units at most, where nobody says.
MOST_NEURONS = 256
# Examples that say how the network uses a block's outputs.
METRIC_EXAMPLES = 400
# Held-out examples are recorded: at most so many.
MOST_HELD_OUT = 2000


def candidates(
    block: StreamedBlock,
    kind: str,
    *,
    alpha: float | None,
    n_neurons: int | None,
    most_parameters: int,
    refit: bool,
    tol: float,
    max_iter: int,
    time_limit: float | None,
    verbose: int,
) -> tuple[list[Candidate], list[PathPoint]]:
    """Students of a path of alphas, for each size the best and each solution whole; and the path.

    The path ends where solutions have more units than there may be, or nothing gets better.
    """
    linear = kind == "linear"
    statistics = block.linear_statistics if linear else block.statistics
    start = time.perf_counter()
    problem = LowRankProblem(statistics)
    most = n_neurons or MOST_NEURONS
    solver = LowRankNewton(
        tol=tol, max_neurons=most, max_iter=max_iter, time_limit=time_limit, verbose=verbose
    )
    count, first, last = PATH
    alpha_max = problem.alpha_max()
    if alpha is None and alpha_max == 0:
        alphas = [1.0]
    else:
        alphas = (
            [alpha] if alpha is not None else list(alpha_max * np.geomspace(first, last, count))
        )
    sizes = [n_neurons] if n_neurons else [m for m in UNITS if m <= most]
    best: dict[int, Candidate] = {}
    path = []
    solution: LowRankSolution | None = None
    without_progress = 0
    for strength in alphas:
        solution = solver.solve(problem, float(strength), warm_start=solution)
        progress = False
        sized = _of_solution(block, kind, statistics, solution, sizes, refit, start)
        # By size: the first that is too large is the last.
        few = list(takewhile(lambda found: found.parameters <= most_parameters, sized))
        path.append(PathPoint.best_of(kind, solution.alpha, solution.relative_gap, few))
        for found in few:
            known = best.get(found.n_neurons)
            if known is None or found.error < known.error:
                progress = True
                best[found.n_neurons] = found
        without_progress = 0 if progress else without_progress + 1
        if without_progress == 2:
            break
    return [best[m] for m in sorted(best)], path


def _of_solution(
    block: StreamedBlock,
    kind: str,
    statistics: GatedStatistics,
    solution: LowRankSolution,
    sizes: list[int],
    refit: bool,
    start: float,
) -> Iterator[Candidate]:
    """The solution's leading units, in each of these numbers and all of them."""
    from cvxdistill.adapters import build_student

    units = solution.neurons
    hidden = HiddenStatistics.of_neurons(statistics, units)
    energy = np.diag(hidden.gram) * np.sum(units.W2.astype(np.float64) ** 2, axis=1)
    order = np.argsort(-energy, kind="stable")
    units = Neurons(units.W1[:, order], units.W2[order], units.gate[order])
    hidden = HiddenStatistics.of_neurons(statistics, units)
    seconds = time.perf_counter() - start
    for m in [*(m for m in sizes if m < len(units)), len(units)]:
        W2, b = units.W2[:m], solution.intercept
        if refit:
            W2, b = hidden.first(m).second_layer()
        elif m < len(units):
            b = hidden.target_mean - hidden.hidden_mean[:m] @ W2
        if block.following is not None:
            W2, b = block.following.before(W2), block.following.offset_before(b)
        student = build_student(
            block.layout, units.W1[:, :m], W2, units.gate[:m], block.G, b
        ).eval()
        yield Candidate(
            kind=kind,
            student=student,
            alpha=solution.alpha,
            n_neurons=m,
            n_gates=student.n_gates,
            parameters=student.parameters_stored,
            trainable=student.trainable,
            error=block.error(student),
            duality_gap=solution.relative_gap,
            seconds=seconds,
        )


def distill_low_rank(model: nn.Module, block: str, data: Any, options: dict[str, Any]) -> Any:
    """``distill`` with the nuclear penalty; ``options`` are its checked arguments."""
    from cvxdistill.adapters import Examples, get_block, swap_block
    from cvxdistill.adapters.call_structure import StructuredBlock
    from cvxdistill.adapters.module_tree import span_modules
    from cvxdistill.adapters.span_search import search_span
    from cvxdistill.distillation import Distillation, choose_gates, most_parameters, timed
    from cvxdistill.report import Report
    from cvxdistill.selection import choose

    rng = np.random.default_rng(options["random_state"])
    verbose, student, match = options["verbose"], options["student"], options["match"]
    seconds: dict[str, float] = {}
    with timed(seconds, "data"):
        examples = Examples(
            data,
            model,
            batch_size=options["batch_size"],
            max_examples=options["max_examples"],
            mask=options["mask"],
            rng=rng,
        )
        span = search_span(model, block, examples.small_batch)
        replaced = span_modules(model, span)
        target = replaced[0] if len(replaced) == 1 else replaced
        block_parameters = sum(p.numel() for p in replaced.parameters())
        model_parameters = sum(p.numel() for p in model.parameters())
        count = round(len(examples) * options["validation_fraction"])
        count = max(1, min(count, MOST_HELD_OUT, len(examples) - 1))
        share = count / len(examples)
        following = _following(model, block, match, examples, span, share, rng)
        layout, held_out = record_held_out(model, examples, span, share, options)
        limit = most_parameters(layout, options["n_neurons"], block_parameters)
        G, source = np.zeros((layout.n_features, 1), np.float32), "none"
        if student != "linear":
            G, source = choose_gates(
                options["gates"], options["n_gates"], target, held_out[0], layout, rng
            )
        _check_memory(G, layout, options["memory_limit"])
    with timed(seconds, "sums"):
        streamed = stream(
            model,
            examples,
            span,
            layout,
            following,
            G,
            held_out,
            share,
            options["max_rows"],
            rng,
            verbose,
        )
    found: list[Candidate] = []
    path: list[PathPoint] = []
    names = ("alpha", "n_neurons", "refit", "tol", "max_iter", "time_limit", "verbose")
    settings = {name: options[name] for name in names}
    for kind in ("linear",) if student == "linear" else ("linear", "gated"):
        with timed(seconds, kind):
            students, points = candidates(streamed, kind, most_parameters=limit, **settings)
        found += students
        path += points
    chosen = choose(found, student, block_parameters)
    positions = 1 if following is not None and following.pooled else layout.n_positions
    swapped = swap_block(model, span, chosen.student, inplace=options["inplace"])
    report = Report(
        block=block,
        replaced=span.names,
        block_parameters=block_parameters,
        model_parameters=model_parameters,
        layout=layout,
        gate_source=source,
        examples=len(examples),
        held_out=count,
        rows=streamed.statistics.n,
        available_rows=max(streamed.statistics.n, (len(examples) - count) * positions),
        seconds=seconds,
        candidates=tuple(found),
        path=tuple(path),
        chosen=chosen,
        original=None if options["inplace"] else model,
        model=swapped,
        example=examples.small_batch,
        match=match,
    )
    placed: Any = get_block(swapped, span.first)
    placed = placed.student if isinstance(placed, StructuredBlock) else placed
    return Distillation(swapped, placed, report, tuple(found), span, examples.small_batch)


def _following(
    model: nn.Module,
    block: str,
    match: str,
    examples: Examples,
    span: Span,
    share: float,
    rng: np.random.Generator,
) -> FollowingMap | None:
    """What students are fitted through: what follows the block, or a weighting of its outputs."""
    from cvxdistill.adapters import FollowingMap, find_following, output_metrics

    if match == "outputs":
        return None
    if match != "network":
        return find_following(model, block, match, examples.small_batch)
    end = min(1.0, share + METRIC_EXAMPLES / len(examples))
    batches = (batch for batch, _ in examples.between(share, end))
    (metric,) = output_metrics(model, [span], batches, rng)
    weighting = None if metric is None else Weighting.of(metric.matrix)
    if weighting is None:
        raise ValueError("match='network' needs a model that gives gradients of its output.")
    return FollowingMap(match, False, weighting.root, np.zeros(len(weighting.root)))


def _check_memory(G: np.ndarray, layout: ConvLayout | DenseLayout, memory_limit: int) -> None:
    size = (G.shape[1] * layout.n_features) ** 2 * 8
    if size > memory_limit:
        most = int((memory_limit / 8) ** 0.5) // layout.n_features - 1
        raise ValueError(
            f"sums over {G.shape[1] - 1} gates and {layout.n_features} features take "
            f"{size / 2**30:.1f} GiB, more than memory_limit ({memory_limit / 2**30:.1f} GiB): "
            + (f"at most n_gates={most} fit." if most > 0 else "raise it.")
        )
