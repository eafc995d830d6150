"""pyscnn's augmented Lagrangian solver as a worker of ``bench/relu_solvers.py``.

Data, model, optimiser and loop are the ones that ``scnn.optimize.optimize_model`` builds, with its
default tolerances and iteration limit; only a time limit is added, because it has none. It stops
when its own test of the KKT conditions is met. What the weights are worth is measured by the
caller.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import lab
import numpy as np
from scnn.metrics import Metrics
from scnn.models import ConvexReLU
from scnn.private.interface import (
    build_internal_model,
    build_metrics_tuple,
    build_optimizer,
    get_logger,
    process_data,
    set_device,
)
from scnn.regularizers import NeuronGL1
from scnn.solvers import AL
from serving import serve


class Limited:
    """pyscnn's outer stopping test, which also stops at a time limit."""

    def __init__(self, criterion: Any, time_limit: float) -> None:
        self.criterion = criterion
        self.time_limit = time_limit
        self.iterations = 0
        self.met = False
        self.start = time.perf_counter()

    def __call__(self, *arguments: Any) -> bool:
        self.iterations += 1
        self.met = bool(self.criterion(*arguments))
        return self.met or time.perf_counter() - self.start > self.time_limit


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job, write the weights to its ``result`` file, and return times and counts."""
    with np.load(job["data"]) as file:
        X, Y, G = file["X"], file["Y"], file["G"]
    set_device("cpu", "float64")
    regularizer = NeuronGL1(job["alpha"])
    model = ConvexReLU(G)
    metrics = Metrics(metric_freq=10**9, objective=False, grad_norm=False, time=False)
    train, test, _ = process_data(X, Y, None, None, unitize_data=False)
    internal_model = build_internal_model(model, regularizer, train[0])
    procedure = build_optimizer(AL(model), regularizer, metrics)
    procedure.metric_freq = procedure.log_freq = 10**9
    limited = Limited(procedure.outer_term_criterion, job["time_limit"])
    procedure.outer_term_criterion = limited
    logger = get_logger("scnn")
    start = limited.start = time.perf_counter()
    _, internal_model, _ = procedure(
        logger, internal_model, lambda model: model, train, test, build_metrics_tuple(metrics)
    )
    seconds = time.perf_counter() - start
    D = lab.to_np(internal_model.D) > 0
    weights = lab.to_np(internal_model.weights)  # (2, 1, p, d): V then U of the one output
    np.savez(job["result"], D=D, V=weights.reshape(2, -1, X.shape[1]))
    return {
        "seconds": seconds,
        "n_iter": limited.iterations,
        "status": "converged" if limited.met else "limit",
        "versions": f"pyscnn {version('pyscnn')}, numpy {np.__version__}",
    }


if __name__ == "__main__":
    serve(solve)
