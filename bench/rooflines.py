"""The gated operator beside the machine's own matrix products: GFLOP/s of useful work.

    python bench/rooflines.py

Forward and adjoint of ``GatedOperator`` on n rows of d inputs, p gates and c outputs do 2 n d p c
useful operations. So does the plain product of (n, d) and (d, p c), with which they take turns.
Half of the pattern's entries are set. With several outputs the operator shares products, and its
rate may be above the machine's. Medians; all threads, or as many as OMP_NUM_THREADS says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import pandas as pd
from machine import describe_machine
from threadpoolctl import threadpool_limits

from cvxdistill.solvers import GatedOperator
from cvxdistill.solvers.gated_operator import as_weights
from cvxdistill.solvers.threads import n_threads

RESULTS = Path(__file__).resolve().parent / "results" / "rooflines.csv"
# n, d, p, c
SIZES = [
    (10_000, 256, 256, 1),
    (10_000, 256, 32, 8),
    (10_000, 1024, 100, 10),
    (60_000, 784, 100, 10),
    (10_000, 577, 8, 512),
    (100_000, 64, 64, 1),
]
# Turns, and calls in a row of each.
REPEATS, IN_A_ROW = 5, 5
# Before each turn: BLAS's threads go on spinning for some time after a product.
PAUSE = 0.1


def seconds_of(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, several calls a turn, after one that is not counted."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                call()
                found[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in found.items()}


def measure(size: tuple[int, int, int, int], dtype: str, repeats: int) -> dict[str, Any]:
    """One row: GFLOP/s of the plain product and of the operator's two, and their shares of it."""
    n, d, p, c = size
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d)).astype(dtype)
    D = rng.random((n, p)) < 0.5
    V = as_weights(rng.standard_normal((p, d, c)), dtype)
    R = rng.standard_normal((n, c)).astype(dtype)
    W = rng.standard_normal((d, p * c)).astype(dtype)
    A = GatedOperator(X, D)
    with threadpool_limits(n_threads()):
        calls = {
            "product": lambda: X @ W,
            "forward": lambda: A.forward(V),
            "adjoint": lambda: A.adjoint(R),
        }
        seconds = seconds_of(calls, repeats)
    rates = {name: 2 * n * d * p * c / 1e9 / value for name, value in seconds.items()}
    row = {**dict(zip("ndpc", size, strict=True)), "dtype": dtype, "threads": n_threads(), **rates}
    for name in ("forward", "adjoint"):
        row[f"{name} share"] = rates[name] / rates["product"]
    return row


@click.command()
@click.option("--repeats", default=REPEATS, show_default=True, type=click.IntRange(1))
def main(repeats: int) -> None:
    """Measure, print and write bench/results/rooflines.csv."""
    print(describe_machine("numpy", "numba", "cvxdistill"), flush=True)
    sizes = product(SIZES, ("float32", "float64"))
    table = pd.DataFrame([measure(size, dtype, repeats) for size, dtype in sizes])
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.4g")
    print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
