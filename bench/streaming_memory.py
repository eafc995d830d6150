"""Seconds and memory of a fit to rows that are never all there, as their number grows.

    python bench/streaming_memory.py

Rows come in batches of 4,096, are turned into sums (``GatedStatistics``) and forgotten; then the
nuclear programme of the sums is solved to a certified relative gap of 1e-4. Beside it stands the
same with all rows in memory, solved by the solver that suits the programme with the penalty
"neuron". Each size has a process of its own, whose resident memory's peak above that at the start
is told: none of the data is there at the start.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from machine import describe_machine
from suite_report import exponent

from cvxdistill.solvers import (
    GatedReLUProblem,
    GatedStatistics,
    LowRankNewton,
    LowRankProblem,
    activation_patterns,
    choose_solver,
    sample_gates,
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "streaming_memory.csv"
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BATCH, D, GATES, OUTPUTS = 4096, 64, 16, 4
GAP, STRENGTH = 1e-4, 0.03
IN_MEMORY, STREAMED = "in memory", "streamed"


def batches(n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Gaussian rows (m, D), and what a random network of ReLU units makes of them, with noise."""
    rng = np.random.default_rng(0)
    W, V = rng.standard_normal((D, 8)) / np.sqrt(D), rng.standard_normal((8, OUTPUTS))
    for start in range(0, n, BATCH):
        X = rng.standard_normal((min(BATCH, n - start), D))
        yield X, np.maximum(X @ W, 0) @ V + 0.3 * rng.standard_normal((len(X), OUTPUTS))


def streamed(n: int) -> Any:
    """Fit to batches, one after the other."""
    G = sample_gates(D, GATES, random_state=0)
    sums = GatedStatistics(G.shape[1], D, OUTPUTS, gates=G)
    for X, Y in batches(n):
        sums.update(X, Y)
    problem = LowRankProblem(sums)
    return LowRankNewton(tol=GAP).solve(problem, STRENGTH * problem.alpha_max())


def in_memory(n: int) -> Any:
    """Fit to all rows at once."""
    X, Y = (np.concatenate(parts) for parts in zip(*batches(n), strict=True))
    patterns, _ = activation_patterns(X, sample_gates(D, GATES, random_state=0))
    problem = GatedReLUProblem(X, Y, patterns, fit_intercept=True)
    return choose_solver(problem, tol=GAP).solve(problem, STRENGTH * problem.alpha_max())


def measure(how: str, n: int) -> dict[str, Any]:
    """One row, of a process that has compiled already."""
    sys.path.insert(0, str(HERE / "peers"))
    from memory import PeakMemory

    fit = {STREAMED: streamed, IN_MEMORY: in_memory}[how]
    fit(500)
    with PeakMemory() as memory:
        start = time.perf_counter()
        solution = fit(n)
        seconds = time.perf_counter() - start
    growth = None if memory.growth is None else memory.growth / 2**20
    row = {"rows": how, "n": n, "seconds": seconds, "peak_MiB": growth}
    return row | {"relative_gap": solution.relative_gap, "status": solution.status}


@click.command()
@click.option("--largest", default=SIZES[-1], show_default=True, type=click.IntRange(SIZES[0]))
def main(largest: int) -> None:
    """Measure, print the table with its exponents, and write it."""
    print(describe_machine("numpy", "numba", "cvxdistill"))
    rows = []
    for how in (STREAMED, IN_MEMORY):
        for n in SIZES:
            if n > largest:
                continue
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                rows.append(process.submit(measure, how, n).result())
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.5g")
    print(table.to_string(index=False, float_format="%.3g"))
    for how, line in table.groupby("rows", sort=False):
        for what in ("seconds", "peak_MiB"):
            if len(line) > 1 and line[what].notna().all():
                b = exponent(line["n"].to_numpy(), line[what].to_numpy())
                print(f"{how}: {what} grow as n^{b:.2f}")


if __name__ == "__main__":
    main()
