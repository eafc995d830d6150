"""pyscnn's R-FISTA as a worker of ``bench/suite.py``, stopped as by an oracle.

In the peers' environment. It runs until its objective has met all targets, or for the time limit.
Its squared loss of c outputs is their mean: it gets alpha / c, and its objective is 1 / c of ours.
"""

from __future__ import annotations

import time
from typing import Any

import lab
import numpy as np
from ladder import Marks
from memory import PeakMemory
from pyscnn_rfista import optimise
from scnn.private.methods.termination_criteria import TerminationCriterion
from serving import serve


class MarksCriterion(TerminationCriterion):
    """Stops at the last of several objectives."""

    def __init__(self, marks: Marks) -> None:
        super().__init__(0.0)
        self.marks = marks
        self.start = time.perf_counter()

    def __call__(self, model: Any, X: Any, y: Any, objective: Any = None, grad: Any = None) -> bool:
        return self.marks.stop(float(objective), time.perf_counter() - self.start)


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job, write the weights V (p, d, c) to its ``result`` file, and return times."""
    with np.load(job["data"]) as file:
        c = file["Y"].shape[1]
    marks = Marks([target / c for target in job["targets"]], job["time_limit"])
    job = {**job, "dtype": "float64", "alpha": job["alpha"] / c}
    with PeakMemory() as memory:
        model, versions = optimise(job, MarksCriterion(marks))
    V = lab.to_np(model.weights).transpose(1, 2, 0)
    np.savez(job["result"], D=lab.to_np(model.D) > 0, V=V)
    return {"seconds": marks.seconds, "peak_growth": memory.growth, "versions": versions}


if __name__ == "__main__":
    serve(solve)
