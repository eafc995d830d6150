"""R-FISTA: accelerated proximal gradient with restarts and a line search.

References
----------
Beck and Teboulle 2009 (FISTA with backtracking); O'Donoghue and Candes 2015 (restarts);
Mishkin, Sahiner and Pilanci 2022, section 4 and appendix (the combination, for this problem).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cvxdistill.solvers.problem import GatedReLUProblem, residual_and_adjoint
from cvxdistill.solvers.solver import Solver, State


@dataclass
class FISTAState(State):
    """State of R-FISTA: W is the extrapolated point and ZW its predictions."""

    W: np.ndarray
    ZW: np.ndarray
    t: float
    step_size: float


@dataclass(frozen=True, kw_only=True)
class RFISTA(Solver):
    """FISTA with restarts on the gradient mapping and a two-way line search.

    From the extrapolated point W, with C = -grad L(W) and step size s,

        V+ = prox_{s alpha Omega}(W + s C)

    is accepted when the quadratic upper bound holds,
    L(V+) <= L(W) - <C, V+ - W> + ||V+ - W||^2 / (2 s); otherwise s is multiplied by ``backtrack``.
    When the bound is loose by a factor of ``looseness`` or more, s grows by ``growth`` for the
    next step. Momentum restarts when <W - V+, V+ - V> > 0.

    Parameters
    ----------
    tol, max_iter, time_limit, check_every, verbose
        As for every solver.
    backtrack : float, default=0.8
    growth : float, default=1.1
    looseness : float, default=10
    """

    backtrack: float = 0.8
    growth: float = 1.1
    looseness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.backtrack < 1:
            raise ValueError(f"backtrack must lie in (0, 1), got {self.backtrack!r}.")
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}.")
        if not self.looseness > 1:
            raise ValueError(f"looseness must exceed 1, got {self.looseness!r}.")

    def init(self, problem: GatedReLUProblem, alpha: float, V: np.ndarray) -> FISTAState:
        """Start at V with the exact step size along the gradient there."""
        Z = problem.operator.forward(V)
        R, C = residual_and_adjoint(problem, Z)
        return FISTAState(V, Z, R, C, V, Z, 1.0, _initial_step_size(problem, Z, C))

    def step(self, problem: GatedReLUProblem, alpha: float, state: FISTAState) -> FISTAState:
        """One accelerated proximal gradient step."""
        loss, regularizer, A = problem.loss, problem.regularizer, problem.operator
        W, ZW = state.W, state.ZW
        R, C = residual_and_adjoint(problem, ZW)
        ZW_b = ZW + problem.intercept(ZW)
        s = state.step_size
        while True:
            V = regularizer.prox(W + np.asarray(s, W.dtype) * C, s * alpha)
            Z = A.forward(V)
            change = V - W
            length = float(np.vdot(change, change)) / (2 * s)
            curvature = loss.bregman(Z + problem.intercept(Z), ZW_b, problem.Y)
            if curvature <= length * (1 + 1e-6) or length == 0:
                break
            s *= self.backtrack
        next_s = s * self.growth if self.looseness * curvature <= length else s

        direction = V - state.V
        if float(np.vdot(change, direction)) < 0:
            return FISTAState(V, Z, R, C, V, Z, 1.0, next_s)
        t = (1 + math.sqrt(1 + 4 * state.t**2)) / 2
        momentum = np.asarray((state.t - 1) / t, V.dtype)
        W = V + momentum * direction
        ZW = Z + momentum * (Z - state.Z)
        return FISTAState(V, Z, R, C, W, ZW, t, next_s)


def _initial_step_size(problem: GatedReLUProblem, Z: np.ndarray, C: np.ndarray) -> float:
    """||C||^2 / (2 bregman(A C)): the inverse curvature along the gradient, no smaller than 1/L."""
    ZC = problem.operator.forward(C)
    curvature = 2 * problem.loss.bregman(Z + ZC, Z, problem.Y)
    squares = float(np.vdot(C, C))
    return squares / curvature if curvature > 0 else 1.0
