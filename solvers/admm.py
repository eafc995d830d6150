"""ADMM for ReLU networks: one linear system, then proximal operators and cones.

    minimise over W, Y_1, ...   L(A W) + sum_i h_i(Y_i)   subject to   Y_i = W

with alpha Omega and the indicator of the cones in one h where their joint proximal operator is
known (penalties of lengths of columns), in two otherwise. With multipliers rho U_i,

    W   <- W + (H + m rho I)^-1 (A^T R(W) / n + rho sum_i (Y_i - U_i - W)),
    Y_i <- prox of h_i / rho at B_i = kappa W + (1 - kappa) Y_i + U_i,    U_i <- B_i - Y_i,

m the number of copies, kappa the over-relaxation, and H = beta A^T diag(omega) A / n, centred where
there is an intercept: the Hessian of the squared loss, and an upper bound of that of others.

References
----------
Boyd et al. 2011, sections 3.4 (over-relaxation, varying penalty) and 7; Feng, Frangella and
Pilanci 2024 (CRONOS: ADMM with Nystrom-preconditioned conjugate gradients for these networks).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cvxdistill.solvers.difference_system import DifferenceSystem
from cvxdistill.solvers.fista import ConeComposite
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solver import Solver, State


@dataclass
class ADMMState(State):
    """State of ADMM: W, its predictions, Y and U of each copy, the last one's prox(B, 1 / rho)."""

    W: np.ndarray
    ZW: np.ndarray
    copies: list[np.ndarray]
    duals: list[np.ndarray]
    rho: float
    steps: int
    changes: int
    system: DifferenceSystem
    cones: Callable[[np.ndarray, float], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ADMM(Solver):
    """Alternating direction method of multipliers for ReLU networks, any loss and penalty.

    The linear systems are solved with a cached factorisation on the smaller side of A, or by
    preconditioned conjugate gradients where both are large (see ``DifferenceSystem``).

    Parameters
    ----------
    tol, max_iter, time_limit, check_every, verbose
        As for every solver.
    relaxation : float in [1, 2), default=1.6
    rho : float, optional
        Penalty parameter to begin with; by default the mean eigenvalue of H.
    adapt_every : int, default=10
        Iterations between changes of rho, which balance the primal and the dual residual; after
        ``most_changes`` rho stays, so that it converges.
    most_changes : int, default=30
    """

    relaxation: float = 1.6
    rho: float | None = None
    adapt_every: int = 10
    most_changes: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.relaxation < 2:
            raise ValueError(f"relaxation must lie in [1, 2), got {self.relaxation!r}.")
        if self.rho is not None and not 0 < self.rho < np.inf:
            raise ValueError(f"rho must be positive and finite, or None, got {self.rho!r}.")
        if not isinstance(self.adapt_every, (int, np.integer)) or self.adapt_every < 1:
            raise ValueError(f"adapt_every must be a positive integer, got {self.adapt_every!r}.")

    def init(self, problem: ConvexProblem, alpha: float, V: np.ndarray) -> ADMMState:
        """Form the system, start every copy at V.

        Raises
        ------
        ValueError
            If the programme is not that of a ReLU network.
        """
        if not isinstance(problem, ReLUProblem):
            raise ValueError(f"ADMM solves ReLU programmes, got {problem!r}.")
        system = DifferenceSystem(problem)
        cones: Callable[[np.ndarray, float], np.ndarray]
        if problem.regularizer.of_lengths:
            count, cones = 1, ConeComposite(problem, alpha).prox
        else:
            project = problem.projector()
            count, cones = 2, lambda B, s: project(B)
        rho = self.rho or system.mean_eigenvalue or 1.0
        Z = problem.forward(V)
        R = problem.residual(Z)
        return ADMMState(
            V,
            Z,
            R,
            problem.adjoint(R),
            W=V,
            ZW=Z,
            copies=[V] * count,
            duals=[np.zeros_like(V)] * count,
            rho=rho,
            steps=0,
            changes=0,
            system=system,
            cones=cones,
        )

    def step(self, problem: ConvexProblem, alpha: float, state: ADMMState) -> ADMMState:
        """One round: the linear system, then every copy."""
        count, dtype = len(state.copies), problem.dtype
        rho = np.asarray(state.rho, dtype)
        R = problem.residual(state.ZW)
        C = problem.adjoint(R)
        pull = C.copy()
        for Y, U in zip(state.copies, state.duals, strict=True):
            pull += rho * (Y - U - state.W)
        accuracy = 0.01 / (1 + state.steps) ** 1.5
        W = state.W + state.system.solve(pull, count * state.rho, accuracy)
        kappa = np.asarray(self.relaxation, dtype)
        copies, duals = [], []
        for i, (Y, U) in enumerate(zip(state.copies, state.duals, strict=True)):
            B = kappa * W + (1 - kappa) * Y + U
            if i == count - 1:
                new = state.cones(B, 1 / state.rho)
            else:
                new = problem.regularizer.prox(B, alpha / state.rho)
            copies.append(new)
            duals.append(B - new)
        rho_next, changes = state.rho, state.changes
        steps = state.steps + 1
        if steps % self.adapt_every == 0 and changes < self.most_changes:
            factor = _imbalance(W, copies, state.copies, duals)
            if not 0.5 <= factor <= 2:
                rho_next, changes = state.rho * factor, changes + 1
                duals = [U / np.asarray(factor, dtype) for U in duals]
        M = -np.asarray(rho_next, dtype) * duals[1] if count == 2 else None
        V = copies[0]
        return ADMMState(
            V,
            problem.forward(V),
            R,
            C,
            W=W,
            ZW=problem.forward(W),
            copies=copies,
            duals=duals,
            rho=rho_next,
            steps=steps,
            changes=changes,
            system=state.system,
            cones=state.cones,
            M=M,
        )


def _imbalance(
    W: np.ndarray, copies: list[np.ndarray], before: list[np.ndarray], duals: list[np.ndarray]
) -> float:
    """Square root of the ratio of relative primal and dual residual, between 1/10 and 10."""
    primal = sum(float(np.sum((W - Y) ** 2)) for Y in copies)
    primal /= max(
        float(np.sum(W**2)) * len(copies), sum(float(np.sum(Y**2)) for Y in copies), 1e-300
    )
    dual = sum(float(np.sum((Y - old) ** 2)) for Y, old in zip(copies, before, strict=True))
    dual /= max(sum(float(np.sum(U**2)) for U in duals), 1e-300)
    if primal == 0 or dual == 0:
        return 1.0
    return min(max(math.sqrt(math.sqrt(primal / dual)), 0.1), 10.0)
