"""Block coordinate descent for gated ReLU programmes: that of their parts, one after the other.

The parts are the group elastic nets of ``cvxdistill.solvers.group_form``.
"""

from __future__ import annotations

import time
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.certificate import KKTResidual
from cvxdistill.solvers.group_form import GroupForm
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.solution import Solution, Trace, relative
from cvxdistill.solvers.solver import Callback, Progress
from cvxdistill.solvers.working_set_descent import WorkingSetDescent

if TYPE_CHECKING:
    from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent


class GateGroupDescent:
    """Where the descent for one gated ReLU programme stands.

    Parameters
    ----------
    settings : BlockCoordinateDescent
    problem : ConvexProblem
    V : ndarray of shape (p, d, c)
        Where to start, in the solver's units.

    Raises
    ------
    ValueError
        If the programme is none of groups.
    """

    def __init__(self, settings: BlockCoordinateDescent, problem: ConvexProblem, V: np.ndarray):
        self.settings = settings
        self.problem = problem
        self.form = GroupForm(problem)
        coefficients = self.form.coefficients(V)
        self.parts = [
            WorkingSetDescent(settings, part, B)
            for part, B in zip(self.form.parts, coefficients, strict=True)
        ]

    def solve(self, alpha: float, callback: Callback | None) -> Solution:
        """Solve part after part."""
        start = time.perf_counter()
        # Objective, gap and sweeps of each part.
        found = [(*part.certify(alpha), 0) for part in self.parts]
        history: list[Progress] = []
        settings, verdict = self.settings, status.CONVERGED
        bar = tqdm(disable=not settings.verbose, desc=type(settings).__name__, leave=False)

        def now(W: np.ndarray) -> Progress:
            objective, gap, sweeps = (sum(column) for column in zip(*found, strict=True))
            active = int(W.any(axis=(1, 2)).sum())
            seconds = time.perf_counter() - start
            return Progress(int(sweeps), objective, relative(gap, objective), active, 0.0, seconds)

        with bar:
            for k, part in enumerate(self.parts):

                def watch(objective: float, gap: float, sweeps: int, k: int = k) -> bool:
                    bar.update(sweeps - found[k][2])
                    found[k] = objective, gap, sweeps
                    history.append(now(self._weights()))
                    bar.set_postfix_str(
                        f"gap {history[-1].gap:.1e}, {history[-1].active_gates} gates", False
                    )
                    return callback is not None and bool(callback(history[-1]))

                if settings.time_limit is not None:
                    left = settings.time_limit - (time.perf_counter() - start)
                    part.settings = replace(settings, time_limit=max(left, 1e-9))
                ended = part.solve(alpha, watch).status
                if ended != status.CONVERGED:
                    verdict = ended
                if ended in (status.STOPPED, status.TIME_LIMIT):
                    break
        return self._solution(alpha, verdict, history, start)

    def _weights(self) -> np.ndarray:
        return self.form.weights([part.coefficients() for part in self.parts])

    def _solution(
        self, alpha: float, verdict: str, history: list[Progress], start: float
    ) -> Solution:
        """The weights in the type of the data, and what is certified of these."""
        problem = self.problem
        W = self._weights()
        Z = problem.forward(W)
        b = problem.intercept(Z)
        objective = problem.loss.value(Z + b) + alpha * problem.regularizer.value(W)
        # Of each part its own: a dual point of all parts together would be scaled by the worst.
        parts = zip(self.form.parts, self.form.coefficients(W), strict=True)
        gap = sum(part.duality_gap(B, alpha) for part, B in parts)
        enough = self.settings.tol * objective if objective > 0 else self.settings.tol
        if gap <= enough:
            verdict = status.CONVERGED
        elif verdict == status.CONVERGED:
            verdict = status.NO_PROGRESS
        columns = zip(*map(astuple, history), strict=True)
        return Solution(
            V=problem.weights_to_user(W),
            intercept=b,
            alpha=alpha,
            objective=objective,
            duality_gap=gap,
            kkt_residual=KKTResidual(problem, alpha)(
                W, problem.adjoint(problem.loss.residual(Z + b))
            ),
            violation=0.0,
            n_iter=history[-1].iteration,
            seconds=time.perf_counter() - start,
            status=verdict,
            trace=Trace(*map(np.array, columns)),
        )
