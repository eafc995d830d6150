"""pyscnn's R-FISTA as a worker of ``bench/uci_rfista.py``; it runs in the peers' environment.

``scnn.optimize.optimize_model`` is taken apart for two reasons only: the solver has no time limit,
and the conversion of the data (through lists) is not to be timed. Data, model, optimiser and loop
are the ones that it builds. Only its stopping test is replaced, by one that costs the same: the
loop evaluates ``sum(grad ** 2) <= tol`` for a whole ladder of tolerances at once. Its iterates do
not depend on the tolerance, so one run tells at what time each tolerance would have stopped it.
"""

from __future__ import annotations

import time
from typing import Any

import lab
import numpy as np
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


class LadderOfTolerances(TerminationCriterion):
    """Stop where the loosest tolerance does whose result is good enough, or at the time limit.

    Attributes
    ----------
    seconds_to_objective : float or None
        When the objective first was at most the target: an oracle would have stopped there.
    seconds, stopped_by : float, float or None
        When it stopped, and the tolerance (pyscnn's ``tol``: the squared norm of the smallest
        subgradient) that did; None at the time limit.
    """

    def __init__(self, ladder: list[float], target: float, time_limit: float) -> None:
        super().__init__(min(ladder))
        self.ladder = sorted(ladder, reverse=True)
        self.target = target
        self.time_limit = time_limit
        self.seconds_to_objective: float | None = None
        self.stopped_by: float | None = None
        self.iteration = -1
        self.seconds = 0.0
        self.start = time.perf_counter()

    def __call__(
        self, model: Any, X: Any, y: Any, objective: Any = None, grad: Any = None
    ) -> bool:
        self.iteration += 1
        squares = float(lab.sum(grad**2))
        self.seconds = time.perf_counter() - self.start
        reached = float(objective) <= self.target
        if reached and self.seconds_to_objective is None:
            self.seconds_to_objective = self.seconds
        met = None
        while self.ladder and squares <= self.ladder[0]:
            met = self.ladder.pop(0)  # any of these would have stopped it here, good or not
        if met is not None and reached:
            self.stopped_by = met
            return True
        return self.seconds > self.time_limit


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one job, write the weights to its ``result`` file, and return times and counts."""
    with np.load(job["data"]) as file:
        X, Y, G = file["X"], file["Y"], file["G"]
    set_device("cpu", job["dtype"])
    regularizer = NeuronGL1(job["alpha"])
    model = ConvexGatedReLU(G)
    metrics = Metrics(metric_freq=10**9, objective=False, grad_norm=False, time=False)
    train, test, _ = process_data(X, Y, None, None, unitize_data=False)
    internal_model = build_internal_model(model, regularizer, train[0])
    # 10**9 stands for no limit; the criterion has the time limit.
    procedure = build_optimizer(RFISTA(model, max_iters=10**9), regularizer, metrics)
    procedure.metric_freq = 10**9
    logger = get_logger("scnn")
    criterion = LadderOfTolerances(job["ladder"], job["target_objective"], job["time_limit"])
    procedure.term_criterion = criterion
    status, internal_model, _ = procedure(
        logger, internal_model, lambda model: model, train, test, build_metrics_tuple(metrics)
    )
    D = lab.to_np(internal_model.D) > 0
    V = lab.to_np(internal_model.weights)
    np.savez(job["result"], D=D, V=V)
    return {
        "seconds": criterion.seconds,
        "seconds_to_objective": criterion.seconds_to_objective,
        "tolerance": criterion.stopped_by,
        "n_iter": criterion.iteration,
        "dtype": str(V.dtype),
        "diverged": status.get("success") is False,
    }


if __name__ == "__main__":
    serve(solve)
