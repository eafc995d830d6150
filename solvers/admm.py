"""ADMM for ReLU networks: one linear system, then proximal operators and cones.

    minimise over W, Y_1, ...   L(A W) + sum_i h_i(Y_i)   subject to   Y_i = W

with alpha Omega and the indicator of the cones in one h where their joint proximal operator is
known (penalties of lengths of columns), in two otherwise. With multipliers rho U_i,

    W   <- W + (beta H + m rho I)^-1 (A^T R(W) / n + rho sum_i (Y_i - U_i - W)),
    Y_i <- prox of h_i / rho at B_i = kappa W + (1 - kappa) Y_i + U_i,    U_i <- B_i - Y_i,

m the number of copies, kappa the over-relaxation, and H = A^T diag(omega) A / n, centred where
there is an intercept: beta H is the Hessian of the squared loss for beta = 1, and for other losses
bounds the curvature along the step, which is checked.

References
----------
Boyd et al. 2011, sections 3.4 (over-relaxation, varying penalty) and 7; Feng, Frangella and
Pilanci 2024 (CRONOS: ADMM with Nystrom-preconditioned conjugate gradients for these networks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cvxdistill.solvers.cone_projector import ConeProjector
from cvxdistill.solvers.difference_system import DifferenceSystem
from cvxdistill.solvers.fista import ConeComposite
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solver import IterativeSolver, State

# rho begins at this share of the mean eigenvalue of beta H.
FIRST_RHO = 0.3
# Primal over dual residual (each relative) that rho is steered to, and how far off it may be.
BALANCE, IMBALANCE = 4.0, 4.0
# rho goes no lower than this share of its first value: without a penalty nothing else holds it.
LEAST_SHARE = 1e-3
# After so many changes rho and beta stay as they are, so that the method converges.
MOST_CHANGES = 30
# beta is lowered where it exceeds the curvature seen by this factor.
LOOSENESS = 4.0
# Relative residual at which conjugate gradients stop.
INNER_ACCURACY = 0.2


@dataclass
class ADMMState(State):
    """State of ADMM: W and its predictions, Y and U of each copy, the last one's prox(B, 1 / rho).

    R and C belong to W; ``steepest`` is the largest curvature since beta was last looked at.
    """

    W: np.ndarray
    ZW: np.ndarray
    copies: list[np.ndarray]
    duals: list[np.ndarray]
    rho: float
    least_rho: float
    beta: float
    steepest: float
    steps: int
    changes: int
    system: DifferenceSystem
    cones: ConeComposite | ConeProjector


@dataclass(frozen=True, kw_only=True)
class ADMM(IterativeSolver):
    """Alternating direction method of multipliers for ReLU networks, any loss and penalty.

    The linear systems are solved with a cached factorisation on the smaller side of A, or by
    preconditioned conjugate gradients where both are large (see ``DifferenceSystem``).

    Parameters
    ----------
    tol, max_iter, time_limit, check_every, verbose
        As for every iterative solver.
    relaxation : float in [1, 2), default=1.8
    rho : float, optional
        Penalty parameter to begin with; by default 0.3 times the mean eigenvalue of beta H.
    adapt_every : int, default=10
        Iterations between changes of rho and beta.
    """

    relaxation: float = 1.8
    rho: float | None = None
    adapt_every: int = 10

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
        Z = problem.forward(V)
        R = problem.residual(Z)
        C = problem.adjoint(R)
        system = DifferenceSystem(problem)
        cones: ConeComposite | ConeProjector
        if problem.regularizer.of_lengths:
            count, cones = 1, ConeComposite(problem, alpha)
        else:
            count, cones = 2, problem.projector()
        beta = problem.loss.smoothness
        rho = self.rho or FIRST_RHO * beta * system.mean_eigenvalue or 1.0
        duals = [np.zeros_like(V)] * count
        if V.any():
            # At the optimum the multipliers rho U add up to C; the cones' share is unknown.
            duals[0] = C / np.asarray(rho, C.dtype)
        return ADMMState(
            V,
            Z,
            R,
            C,
            W=V,
            ZW=Z,
            copies=[V] * count,
            duals=duals,
            rho=rho,
            least_rho=LEAST_SHARE * rho,
            beta=beta,
            steepest=0.0,
            steps=0,
            changes=0,
            system=system,
            cones=cones,
        )

    def step(self, problem: ConvexProblem, alpha: float, state: ADMMState) -> ADMMState:
        """One round: the linear system, then every copy."""
        count, dtype = len(state.copies), problem.dtype
        W, ZW, beta, curvature = _linear_step(problem, state)
        R = problem.residual(ZW)
        C = problem.adjoint(R)
        kappa = np.asarray(self.relaxation, dtype)
        copies, duals = [], []
        for i, (Y, U) in enumerate(zip(state.copies, state.duals, strict=True)):
            B = kappa * W + (1 - kappa) * Y + U
            if i == count - 1:
                new = _into_cones(state.cones, B, 1 / state.rho)
            else:
                new = problem.regularizer.prox(B, alpha / state.rho)
            copies.append(new)
            duals.append(B - new)
        rho, changes = state.rho, state.changes
        steps, steepest = state.steps + 1, max(state.steepest, curvature)
        if steps % self.adapt_every == 0 and changes < MOST_CHANGES:
            if 0 < LOOSENESS * steepest < beta:
                beta, changes = 2 * steepest, changes + 1
            steepest = 0.0
            factor = max(_imbalance(W, copies, state.copies, duals), state.least_rho / rho)
            if factor != 1:
                rho, changes = rho * factor, changes + 1
                duals = [U / np.asarray(factor, dtype) for U in duals]
        V = copies[0]
        return ADMMState(
            V,
            problem.forward(V),
            R,
            C,
            W=W,
            ZW=ZW,
            copies=copies,
            duals=duals,
            rho=rho,
            least_rho=state.least_rho,
            beta=beta,
            steepest=steepest,
            steps=steps,
            changes=changes,
            system=state.system,
            cones=state.cones,
            M=_multipliers(state.cones, rho, duals),
        )


def _linear_step(
    problem: ConvexProblem, state: ADMMState
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """W and its predictions, the bound beta that held on the way there, and the curvature met."""
    rho = np.asarray(state.rho, problem.dtype)
    pull = state.C.copy()
    for Y, U in zip(state.copies, state.duals, strict=True):
        pull += rho * (Y - U - state.W)
    beta, mu = state.beta, len(state.copies) * state.rho
    while True:
        W = state.W + state.system.solve(pull, mu, INNER_ACCURACY, beta)
        ZW = problem.forward(W)
        if isinstance(problem.loss.loss, SquaredLoss):
            return W, ZW, beta, beta
        length = state.system.squares(ZW - state.ZW)
        if length == 0:
            return W, ZW, beta, 0.0
        curvature = 2 * problem.bregman(ZW, state.ZW) / length
        if curvature <= beta * (1 + 1e-6) or beta == problem.loss.smoothness:
            return W, ZW, beta, curvature
        beta = min(2 * curvature, problem.loss.smoothness)


def _into_cones(cones: ConeComposite | ConeProjector, B: np.ndarray, s: float) -> np.ndarray:
    """The last copy: the projection of B on to the cones, with the penalty's operator if joint."""
    return cones.prox(B, s) if isinstance(cones, ConeComposite) else cones(B)


def _multipliers(
    cones: ConeComposite | ConeProjector, rho: float, duals: list[np.ndarray]
) -> np.ndarray:
    """The cones' share of the multipliers: -rho U of their copy, or what the last prox found."""
    if isinstance(cones, ConeComposite):
        return cones.M
    return -np.asarray(rho, duals[-1].dtype) * duals[-1]


def _imbalance(
    W: np.ndarray, copies: list[np.ndarray], before: list[np.ndarray], duals: list[np.ndarray]
) -> float:
    """What to multiply rho by, between 1/10 and 10, so that the residuals are in balance."""
    primal = sum(float(np.sum((W - Y) ** 2)) for Y in copies)
    lengths = sum(float(np.sum(Y**2)) for Y in copies)
    primal /= max(float(np.sum(W**2)) * len(copies), lengths, 1e-300)
    dual = sum(float(np.sum((Y - old) ** 2)) for Y, old in zip(copies, before, strict=True))
    dual /= max(sum(float(np.sum(U**2)) for U in duals), 1e-300)
    if primal == 0 or dual == 0:
        return 1.0
    ratio = math.sqrt(primal / dual) / BALANCE
    if 1 / IMBALANCE <= ratio <= IMBALANCE:
        return 1.0
    return min(max(math.sqrt(ratio), 0.1), 10.0)
