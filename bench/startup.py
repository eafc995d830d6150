"""Seconds until the suite's solvers have started, and what of them is compilation.

Each solver's process imports what it needs and solves a problem of 60 examples and 12 gates, which
``suite.py`` never counts: with an empty cache of compiled code, with that cache, and once more in
the same process.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import click
import pandas as pd
from machine import describe_machine
from peers.serving import Worker
from suite import OURS, PEERS, small_job, worker

RESULTS = Path(__file__).resolve().parent / "results" / "startup.csv"


def seconds_of(process: Worker, job: dict[str, Any]) -> float:
    """Seconds until a job is answered."""
    start = time.perf_counter()
    process(**job)
    return time.perf_counter() - start


def measure(name: str) -> dict[str, Any]:
    """One row: from the start of a process to its first answer, twice, and its second answer."""
    row: dict[str, Any] = {"solver": name}
    with TemporaryDirectory() as place:
        folder = Path(place)
        with patch.dict(os.environ, NUMBA_CACHE_DIR=str(folder / "numba")):
            for what in ("empty cache", "cached"):
                with worker(name, folder) as process:
                    # The process starts, and does the small job once unasked, when it is asked.
                    seconds = [seconds_of(process, small_job(name, folder)) for _ in range(2)]
                row[what], row["again"] = seconds[0] - seconds[1], seconds[1]
    return row


@click.command()
@click.option("--solvers", "chosen", multiple=True, type=click.Choice([OURS, *PEERS]))
def main(chosen: tuple[str, ...]) -> None:
    """Measure, print and write bench/results/startup.csv."""
    print(describe_machine("numpy", "numba", "cvxdistill"), flush=True)
    table = pd.DataFrame([measure(name) for name in chosen or (OURS, *PEERS)])
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.3g")
    print(table.to_string(index=False, float_format="%.3g"))


if __name__ == "__main__":
    main()
