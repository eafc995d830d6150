"""Accelerated gradients in front of Newton's method: for as long as they will be done sooner."""

from __future__ import annotations

import math

import numpy as np

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.fista import RFISTA, iteration_work
from cvxdistill.solvers.gated_newton import step_work
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, Progress, Solver

# R-FISTA goes first where one of Newton's steps, with such a share of the gates, takes so many
# operations; or where so many iterations cost no more than all of these steps.
LEAST_WORK, USUAL_SHARE, MANY = 2.5e9, 0.2, 400
# Newton's steps that will be needed, about; iterations between two looks, and operations that looks
# add to an iteration.
USUAL_STEPS, LOOK, LOOKING = 20, 20, 1e7


class FirstOrderStart:
    """R-FISTA until it is done, or will not be sooner than Newton's method.

    How long it will take is told by the rate at which its gap has fallen between the last looks.

    Parameters
    ----------
    settings : Solver
        ``tol``, ``max_iter``, ``time_limit`` and ``verbose`` are taken over.
    problem : GatedReLUProblem
    alpha : float
    V : ndarray of shape (p, d, c)
        Where to start, in the solver's units.
    callback : callable, optional
        A true return stops.

    Attributes
    ----------
    solution : Solution or None
        None where it is not worth a try.
    done : bool
        Whether it is the end: it has converged, or was stopped from outside.
    """

    def __init__(
        self,
        settings: Solver,
        problem: GatedReLUProblem,
        alpha: float,
        V: np.ndarray,
        callback: Callback | None,
    ):
        self.problem = problem
        self.solution: Solution | None = None
        self.done, self._callback = False, callback
        self._tol, self._time_limit = settings.tol, settings.time_limit
        self._gaps: dict[int, float] = {}  # By iteration.
        p = problem.operator.p
        first = math.ceil(USUAL_SHARE * p)
        usual = max(first, np.count_nonzero(V.any(axis=(1, 2))))
        enough = self._enough(p)
        dear = step_work(problem, usual) >= LEAST_WORK and enough >= 2 * LOOK
        if not dear and self._enough(first) < MANY:
            return
        solver = RFISTA(
            tol=settings.tol,
            max_iter=min(enough, settings.max_iter),
            time_limit=settings.time_limit,
            check_every=LOOK,
            verbose=settings.verbose,
        )
        warm_start = problem.weights_to_user(V)
        self.solution = solver.solve(problem, alpha, warm_start=warm_start, callback=self._watch)
        self.done |= self.solution.status in (status.CONVERGED, status.TIME_LIMIT)

    @property
    def time_left(self) -> float | None:
        """Seconds."""
        if self._time_limit is None or self.solution is None:
            return self._time_limit
        return max(self._time_limit - self.solution.seconds, 1e-9)

    def _watch(self, progress: Progress) -> bool:
        # In double precision for the first time, an iteration is seen again.
        self._gaps[progress.iteration] = progress.gap
        self.done = self._callback is not None and bool(self._callback(progress))
        return self.done or self._is_late(progress.active_gates)

    def _enough(self, gates: int) -> int:
        """Iterations that cost as much as Newton's method with so many gates that are not zero."""
        iteration = iteration_work(self.problem) + LOOKING
        return int(USUAL_STEPS * step_work(self.problem, gates) / iteration)

    def _is_late(self, gates: int) -> bool:
        if len(self._gaps) < 3:
            return False
        gaps = list(self._gaps.values())
        past, now = gaps[-3], gaps[-1]
        if not 0 < self._tol <= now < past:
            return True
        # The gap falls by past / now in two looks.
        looks = 2 * math.log(now / self._tol) / math.log(past / now)
        return (len(gaps) - 1 + looks) * LOOK > self._enough(gates)
