"""Our R-FISTA behind the same protocol as the peers, so that both sides are timed alike."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
from serving import serve

from cvxdistill.solvers import RFISTA, GatedReLUProblem


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job, write the weights to its ``result`` file, and return times and counts."""
    with np.load(job["data"]) as file:
        X, Y, D = file["X"].astype(job["dtype"]), file["Y"], file["D"]
    problem = GatedReLUProblem(X, Y, D, penalty="neuron")
    limits = {"max_iter": 10**9, "time_limit": job["time_limit"]}
    # The steps that pyscnn takes, too.
    solver = RFISTA(tol=job["tol"], metric="plain", **limits)
    solution = solver.solve(problem, job["alpha"])
    reached = solution.trace.seconds[solution.trace.objective <= job["target_objective"]]
    np.savez(job["result"], D=D, V=solution.V[:, :, 0])
    return {
        "seconds": solution.seconds,
        "seconds_to_objective": float(reached[0]) if len(reached) else None,
        "tolerance": job["tol"] if solution.converged else None,
        "relative_gap": solution.relative_gap,
        "n_iter": solution.n_iter,
        "dtype": str(solution.V.dtype),
        "versions": f"cvxdistill {version('cvxdistill')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
