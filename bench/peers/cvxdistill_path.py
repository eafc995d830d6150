"""Our group elastic net behind the same protocol as the peers, so that both sides are timed alike.

A job names ``data`` (X, Y and, for gated features, D), ``result``, ``alphas``, ``groups`` (a size),
``loss``, ``intercept``, ``tol`` and ``time_limit`` for the path.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
from memory import PeakMemory
from serving import serve

from cvxdistill.solvers import BlockCoordinateDescent, GatedOperator, GroupElasticNetProblem


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one path, write its coefficients, and return seconds and counts."""
    with np.load(job["data"]) as file:
        X, Y, D = file["X"], file["Y"], file.get("D")
    A = X if D is None else GatedOperator(X, D)
    with PeakMemory() as memory:
        start = time.perf_counter()
        problem = GroupElasticNetProblem(
            A, Y, job["groups"], loss=job["loss"], fit_intercept=job["intercept"]
        )
        solver = BlockCoordinateDescent(tol=job["tol"])
        limit = start + job["time_limit"]
        path = solver.path(problem, job["alphas"], callback=lambda s: time.perf_counter() > limit)
        seconds = time.perf_counter() - start
    np.save(job["result"], path.coefs)
    return {
        "seconds": seconds,
        "alphas_done": len(path),
        "alpha_seconds": path.seconds.tolist(),
        "n_iter": sum(solution.n_iter for solution in path),
        "peak_growth": memory.growth,
        "versions": f"cvxdistill {version('cvxdistill')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
