"""pyscnn's R-FISTA as a worker of ``bench/uci_rfista.py``; it runs in the peers' environment.

``scnn.optimize.optimize_model`` is taken apart for two reasons only: the solver has no time limit,
and the conversion of the data (through lists) is not to be timed. Data, model, optimiser and loop
are the ones that it builds. Only its stopping test is replaced, by one that costs the same: the
loop evaluates ``sum(grad ** 2) <= tol`` for a whole ladder of tolerances at once. Its iterates do
not depend on the tolerance, so one run tells at what time each tolerance would have stopped it.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import lab
import numpy as np
from ladder import Ladder
from scnn.metrics import Metrics
from scnn.models import ConvexGatedReLU
from scnn.private.interface import (
    build_internal_model,
    build_metrics_tuple,
    build_optimizer,
    get_logger,
    process_data,
    set_device,
)
from scnn.private.methods.termination_criteria import TerminationCriterion
from scnn.regularizers import NeuronGL1
from scnn.solvers import RFISTA
from serving import serve


class LadderCriterion(TerminationCriterion):
    """pyscnn's GradientNorm, the squared norm of the smallest subgradient, for all of a ladder."""

    def __init__(self, ladder: Ladder) -> None:
        super().__init__(0.0)
        self.ladder = ladder
        self.iteration = -1
        self.start = time.perf_counter()

    def __call__(self, model: Any, X: Any, y: Any, objective: Any = None, grad: Any = None) -> bool:
        self.iteration += 1
        squares = float(lab.sum(grad**2))
        return self.ladder.stop(squares, float(objective), time.perf_counter() - self.start)


def optimise(job: dict[str, Any], criterion: TerminationCriterion) -> tuple[Any, str]:
    """pyscnn's model at the iterate where the criterion stopped, and the versions."""
    with np.load(job["data"]) as file:
        X, Y, G = file["X"], file["Y"], file["G"]
    set_device("cpu", job["dtype"])
    regularizer = NeuronGL1(job["alpha"])
    model = ConvexGatedReLU(G) if Y.ndim == 1 else ConvexGatedReLU(G, c=Y.shape[1])
    metrics = Metrics(metric_freq=10**9, objective=False, grad_norm=False, time=False)
    train, test, _ = process_data(X, Y, None, None, unitize_data=False)
    internal_model = build_internal_model(model, regularizer, train[0])
    # 10**9 stands for no limit; the criterion has the time limit.
    procedure = build_optimizer(RFISTA(model, max_iters=10**9), regularizer, metrics)
    procedure.metric_freq = 10**9
    logger = get_logger("scnn")
    procedure.term_criterion = criterion
    criterion.start = time.perf_counter()
    _, internal_model, _ = procedure(
        logger, internal_model, lambda model: model, train, test, build_metrics_tuple(metrics)
    )
    return internal_model, f"pyscnn {version('pyscnn')}, numpy {np.__version__}"


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job, write the weights to its ``result`` file, and return times and counts."""
    ladder = Ladder(job["ladder"], job["target_objective"], job["time_limit"])
    criterion = LadderCriterion(ladder)
    model, versions = optimise(job, criterion)
    V = lab.to_np(model.weights)[0]  # of the one output, (p, d)
    np.savez(job["result"], D=lab.to_np(model.D) > 0, V=V)
    return {
        "seconds": ladder.seconds,
        "seconds_to_objective": ladder.seconds_to_objective,
        "tolerance": ladder.stopped_by,
        "n_iter": criterion.iteration,
        "dtype": str(V.dtype),
        "versions": versions,
    }


if __name__ == "__main__":
    serve(solve)
