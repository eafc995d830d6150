"""Our ``choose_solver`` as a worker of ``bench/suite.py``, so that both sides are timed alike."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
from memory import PeakMemory
from serving import serve

from cvxdistill.solvers import GatedReLUProblem, choose_solver


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job to its ``tol``, write the weights, and return seconds and gap."""
    with np.load(job["data"]) as file:
        X, Y, D = file["X"], file["Y"], file["D"]
    with PeakMemory() as memory:
        start = time.perf_counter()
        problem = GatedReLUProblem(X, Y, D, penalty=job["penalty"])
        limits = {"max_iter": 10**9, "time_limit": job["time_limit"]}
        solver = choose_solver(problem, tol=job["tol"], **limits)
        solution = solver.solve(problem, job["alpha"])
        seconds = time.perf_counter() - start
    np.savez(job["result"], D=D, V=solution.V)
    return {
        "seconds": seconds,
        "solver": type(solver).__name__,
        "relative_gap": solution.relative_gap,
        "peak_growth": memory.growth,
        "versions": f"cvxdistill {version('cvxdistill')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
