"""Which student takes the block's place: the choice among candidates, with or without polishing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cvxdistill.candidates import Candidate, FitData
from cvxdistill.polishing_input import block_rows, read_student
from cvxdistill.solvers import Polishing, polish_neurons

# "auto" takes the smallest student whose held-out error is within this share of the best.
AUTO_TOLERANCE = 0.02


@dataclass(frozen=True)
class PolishedCandidate:
    """A student before and after polishing; the same where nothing was better.

    Attributes
    ----------
    before, after : Candidate
    polishing : Polishing
        The path.
    """

    before: Candidate
    after: Candidate
    polishing: Polishing = field(repr=False)

    @property
    def changed(self) -> bool:
        """Whether there is a polished student."""
        return self.after is not self.before


def choose(candidates: Sequence[Candidate], kind: str, block_parameters: int) -> Candidate:
    """The smallest student of this kind whose error is within 2 % of the best."""
    eligible = _of_kind(candidates, kind)
    if not eligible:
        raise ValueError(
            f"No {kind} student is smaller than the block, which has {block_parameters:,} "
            "parameters; ask for fewer n_neurons or n_gates."
        )
    best = min(candidate.error for candidate in eligible)
    good = [c for c in eligible if c.error <= (1 + AUTO_TOLERANCE) * best]
    return min(good, key=lambda candidate: (candidate.parameters, candidate.error))


def _of_kind(candidates: Sequence[Candidate], kind: str) -> list[Candidate]:
    return [c for c in candidates if kind in ("auto", c.kind.partition(",")[0])]


def choose_polished(
    fit: FitData,
    candidates: Sequence[Candidate],
    kind: str,
    block_parameters: int,
    max_neurons: int | None,
    verbose: int,
) -> tuple[Candidate, tuple[PolishedCandidate, ...]]:
    """The student to take, and those that were polished.

    Without ``max_neurons`` the smallest that is no worse than the choice without polishing; with
    it ``choose`` among those of at most so many units.
    """
    chosen = choose(candidates, kind, block_parameters)
    eligible = _of_kind(candidates, kind)
    best = {c.kind: c for c in sorted(eligible, key=lambda c: -c.error)}
    if max_neurons is not None:
        results = polish_candidates(fit, [*best.values()], max_neurons=max_neurons, verbose=verbose)
        few = [c for c in eligible + _afters(results) if c.n_neurons <= max_neurons]
        return choose(few, "auto", block_parameters), results
    sources = [c for c in best.values() if c.error <= chosen.error and c is not chosen]
    results = polish_candidates(fit, [chosen, *sources], max_error=chosen.error, verbose=verbose)
    good = [
        c
        for c in [chosen, *_afters(results)]
        if c.error <= chosen.error and c.parameters <= chosen.parameters
    ]
    return min(good, key=lambda c: (c.parameters, c.error)), results


def _afters(results: Sequence[PolishedCandidate]) -> list[Candidate]:
    return [result.after for result in results if result.changed]


def polish_candidates(
    data: FitData,
    candidates: Sequence[Candidate],
    *,
    max_neurons: int | None = None,
    max_error: float | None = None,
    verbose: int = 0,
) -> tuple[PolishedCandidate, ...]:
    """Polish students that ``distill`` fitted, judged by its own held-out examples.

    Parameters
    ----------
    data : FitData
    candidates : sequence of Candidate
    max_neurons, max_error : optional
        As for ``polish_neurons``.
    verbose : int
    """
    return tuple(
        _polish_candidate(data, candidate, max_neurons, max_error, verbose)
        for candidate in candidates
    )


def _polish_candidate(
    data: FitData,
    candidate: Candidate,
    max_neurons: int | None,
    max_error: float | None,
    verbose: int,
) -> PolishedCandidate:
    start = time.perf_counter()
    read = read_student(candidate.student)
    held_out = block_rows(data.layout, data.inputs, data.outputs).of(data.held_out)
    polishing = polish_neurons(
        read.neurons,
        read.intercept,
        read.operator(data.X),
        data.Y,
        read.operator(held_out[0]),
        held_out[1],
        max_neurons=max_neurons,
        max_error=max_error,
        measure=read.measure,
        verbose=verbose,
    )
    if not polishing.changed:
        return PolishedCandidate(candidate, candidate, polishing)
    student = read.build(polishing)
    after = replace(
        candidate,
        kind=f"{candidate.kind}, polished",
        student=student,
        alpha=polishing.after.alpha or 0.0,
        n_neurons=polishing.after.n_neurons,
        n_gates=student.n_gates,
        parameters=student.parameters_stored,
        trainable=student.trainable,
        error=data.error(student),
        duality_gap=polishing.after.duality_gap,
        seconds=candidate.seconds + time.perf_counter() - start,
    )
    return PolishedCandidate(candidate, after, polishing)
