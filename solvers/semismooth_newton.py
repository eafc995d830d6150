"""Semismooth Newton's method for gated ReLU programmes, after R-FISTA where that is sooner.

For the squared loss and penalties of gates' lengths, each output by itself or all together. The
method is in ``cvxdistill.solvers.dual_newton``, and what makes R-FISTA go first in
``cvxdistill.solvers.first_order_start``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np

from cvxdistill.solvers.dual_newton import DualNewton
from cvxdistill.solvers.first_order_start import FirstOrderStart
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.parts import PartwiseSolve
from cvxdistill.solvers.penalties import GatePenalty, NeuronPenalty
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem
from cvxdistill.solvers.scaled_gates import ScaledGates
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, Solver, check_alpha, continued
from cvxdistill.solvers.threads import one_blas_thread


def has_gate_lengths(problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
    """Whether a programme is one of these: squared loss, a penalty of gates' lengths."""
    return (
        isinstance(problem, GatedReLUProblem)
        and isinstance(problem.loss.loss, SquaredLoss)
        and isinstance(problem.regularizer.penalty, (NeuronPenalty, GatePenalty))
        and problem.regularizer.l1_ratio > 0
    )


@dataclass(frozen=True, kw_only=True)
class SemismoothNewton(Solver):
    """Semismooth Newton's method on the dual, for gated ReLU with squared loss.

    For the penalties "neuron" and "gate" (with a share of ridge or none). It certifies small gaps
    in some tens of Newton's steps however small alpha is. Each factorises a matrix of the examples
    or of the features of the gates that are not zero, whichever is cheaper; where both are beyond
    some thousands, R-FISTA is faster. Where a step costs many of R-FISTA's, these come first, until
    they are seen not to end sooner.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol times the objective.
    max_iter : int, default=1000
        Newton's steps, for each output where these are programmes of their own; of R-FISTA's before
        them as many at most.
    time_limit : float, optional
        Seconds.
    verbose : int, default=0
        1 shows a progress bar.

    References
    ----------
    Li, Sun and Toh 2018; Zhang, Zhang, Sun and Toh 2020.
    """

    max_iter: int = 1000

    def successive(self, problem: ConvexProblem) -> Callable[[float, Callback | None], Solution]:
        """A function of alpha and callback that solves from where its last call ended.

        It keeps what a call has computed of gates and examples.
        """
        steps = NewtonSolve(self, _checked(problem), problem.zeros())

        def solve(alpha: float, callback: Callback | None) -> Solution:
            check_alpha(alpha)
            with one_blas_thread():
                return steps.solve(float(alpha), callback)

        return solve

    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        return NewtonSolve(self, _checked(problem), V).solve(alpha, callback)


def _checked(problem: ConvexProblem) -> GatedReLUProblem:
    if not has_gate_lengths(problem):
        raise ValueError(
            "SemismoothNewton solves gated ReLU programmes with squared loss and the penalty "
            f"'neuron' or 'gate', got {problem!r}."
        )
    return problem


class NewtonSolve(PartwiseSolve):
    """A programme, where its solution stands, and how to go on for an alpha.

    Parameters
    ----------
    settings : SemismoothNewton
    problem : GatedReLUProblem
    V : ndarray of shape (p, d, c)
        Where to start.
    """

    def __init__(self, settings: SemismoothNewton, problem: GatedReLUProblem, V: np.ndarray):
        self.gated, gates = problem, ScaledGates(problem)
        rho = problem.regularizer.l1_ratio
        self.newton = [DualNewton(settings, gates, columns, rho, V) for columns in problem.parts]
        super().__init__(settings, problem, problem.parts, list(self.newton))

    def solve(self, alpha: float, callback: Callback | None) -> Solution:
        """Solve from where the last call ended, or from the line through the last two ends."""
        for part in self.newton:
            part.look_ahead(alpha)
        found = self._solve(alpha, callback)
        for part in self.newton:
            part.past.add(alpha, part.B, part.u.copy())
        return found

    def _solve(self, alpha: float, callback: Callback | None) -> Solution:
        """R-FISTA for as long as it pays, then Newton's method for one part after another."""
        start = FirstOrderStart(self.settings, self.gated, alpha, self.weights(), callback)
        if start.solution is None:
            return super().solve(alpha, callback)
        V = self.gated.weights_from_user(start.solution.V)
        for part in self.newton:
            part.move(V)
        if start.done:
            return start.solution
        then = continued(callback, start.solution.n_iter, start.solution.seconds)
        return self.advance(alpha, then, start.time_left).after(start.solution)
