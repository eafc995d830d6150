"""The augmented Lagrangian method for ReLU networks, with R-FISTA inside.

The cones' constraints T_j = S_j N X W[j] >= 0, rows scaled to unit length by N, move into the
objective, with multipliers Lambda and a penalty of strength delta; R-FISTA minimises

    L(A W) + delta/2 sum_j || [Lambda_j / delta - T_j]_+ ||^2 + alpha Omega(W)

for fixed multipliers, and once that is good enough Lambda becomes [Lambda - delta T]_+.

References
----------
Mishkin, Sahiner and Pilanci 2022, section 4 (the method for this programme); Rockafellar 1976
and Eckstein and Silva 2013 (how exactly the subproblems have to be solved).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cvxdistill.solvers.augmented_subproblem import Subproblem, row_scale
from cvxdistill.solvers.cones import cone_projection
from cvxdistill.solvers.fista import RFISTA, FISTAState
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solver import IterativeSolver

# Iterations between two looks at whether the subproblem is solved well enough, and the most that
# one subproblem gets: in float32 what a step promises ends up as rounding.
LOOK_EVERY, MOST_ITERATIONS = 5, 2000
# Where the penalty's share of the curvature should lie, and what delta changes by if it does not.
LEAST_SHARE, LARGEST_SHARE, ADJUSTMENT = 0.4, 0.6, 1.5


@dataclass
class AugmentedLagrangianState:
    """Where the method stands; what the driver reads of it is computed when it asks.

    Attributes
    ----------
    subproblem : Subproblem
    inner : FISTAState
        R-FISTA's, on the subproblem.
    iterations : int
        Spent on the subproblem.
    multipliers : ndarray of shape (n, 2p c)
        Lambda of all blocks.
    shares : ndarray of shape (2p, d, c)
        X^T N S_j Lambda_j.
    """

    subproblem: Subproblem
    inner: FISTAState
    iterations: int
    multipliers: np.ndarray
    shares: np.ndarray

    @cached_property
    def V(self) -> np.ndarray:  # noqa: N802
        """Weights of all blocks, (2p, d, c)."""
        V = self.subproblem.problem.zeros()
        V[self.subproblem.blocks] = self.inner.V
        return V

    @cached_property
    def Z(self) -> np.ndarray:  # noqa: N802
        """Their predictions, (n, c)."""
        return self.subproblem.predictions(self.inner.Z)

    @cached_property
    def R(self) -> np.ndarray:  # noqa: N802
        """Their residual, (n, c)."""
        return self.subproblem.problem.residual(self.Z)

    @cached_property
    def C(self) -> np.ndarray:  # noqa: N802
        """A^T R / n, (2p, d, c)."""
        return self.subproblem.problem.adjoint(self.R)

    @cached_property
    def M(self) -> np.ndarray:  # noqa: N802
        """X^T N S_j [Lambda_j - delta T_j]_+, (2p, d, c)."""
        M = self.shares.copy()
        M[self.subproblem.blocks] = self.subproblem.multipliers_share(self.inner.Z)
        return M


@dataclass(frozen=True, kw_only=True)
class AugmentedLagrangian(IterativeSolver):
    """Augmented Lagrangian method for ReLU networks, for any loss and penalty.

    One iteration is one step of R-FISTA on the subproblem, from W to V+ with step size s. The
    multipliers are updated when the decrease that a step promises is small beside what they move,

        ||V+ - W||^2 / (2 s) <= accuracy * ||Lambda+ - Lambda||^2 / (2 delta),

    as inexact proximal points of the dual demand it: there are no tolerances to tighten. Then
    delta is adapted. Of the Bregman distances that the subproblem's steps covered the penalty's
    share should be about a half: with less the multipliers move too slowly, with more the
    subproblem is worse conditioned than the loss alone. A subproblem only sees the blocks of
    weights that are not zero or would not stay zero.

    Parameters
    ----------
    tol, max_iter, time_limit, verbose
        As for every solver.
    check_every : int, default=100
    accuracy : float, default=0.03

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022, section 4; Eckstein and Silva 2013.
    """

    check_every: int = 100
    accuracy: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.accuracy < np.inf:
            raise ValueError(f"accuracy must be positive and finite, got {self.accuracy!r}.")

    def init(self, problem: ConvexProblem, alpha: float, V: np.ndarray) -> AugmentedLagrangianState:
        """Start at V: with multipliers of 0 at V = 0, else those of the projection of C.

        At an optimum these are the multipliers, if the penalty is one of lengths.

        Raises
        ------
        ValueError
            If the programme has no cones.
        """
        if not isinstance(problem, ReLUProblem):
            raise ValueError(
                f"AugmentedLagrangian solves the programmes of ReLU networks, got {problem!r}; "
                "use RFISTA."
            )
        A = problem.operator
        C = problem.adjoint(problem.residual(problem.forward(V)))
        scale, everything = row_scale(problem), np.arange(A.n_blocks)
        multipliers = np.zeros((A.n, A.n_blocks * problem.n_outputs), dtype=A.dtype)
        whole = Subproblem(problem, alpha, everything, scale, 1.0, multipliers)
        delta, step_size = _balance(whole, C)
        shares = problem.zeros()
        if V.any() and problem.regularizer.of_lengths:
            X = A.X if A.scale is None else A.X[:] / A.scale
            projected, of_rows = cone_projection(X, A.D, C)
            shares = projected - C
            np.divide(of_rows, scale[:, None], out=multipliers, where=scale[:, None] > 0)
        return _begin(whole, delta, V, C, multipliers, shares, step_size)

    def step(
        self, problem: ConvexProblem, alpha: float, state: AugmentedLagrangianState
    ) -> AugmentedLagrangianState:
        """One step of R-FISTA, and new multipliers if the subproblem is solved well enough."""
        subproblem = state.subproblem
        inner = RFISTA().step(problem, alpha, state.inner)
        new_state = AugmentedLagrangianState(
            subproblem, inner, state.iterations + 1, state.multipliers, state.shares
        )
        if new_state.iterations % LOOK_EVERY:
            return new_state
        change = inner.V - state.inner.W
        promised = float(np.vdot(change, change)) / (2 * inner.step_size)
        multipliers, moved = subproblem.next_multipliers(inner.Z)
        enough = promised <= self.accuracy * moved / (2 * subproblem.delta)
        if enough or new_state.iterations >= MOST_ITERATIONS:
            return _update(new_state, multipliers)
        return new_state


def _update(state: AugmentedLagrangianState, new: np.ndarray) -> AugmentedLagrangianState:
    """The next subproblem; ``new`` (n, m c) are the multipliers of the last one's blocks."""
    last = state.subproblem
    loss, penalty = last.curved
    delta = last.delta
    if penalty < LEAST_SHARE * (loss + penalty):
        delta *= ADJUSTMENT
    elif penalty > LARGEST_SHARE * (loss + penalty):
        delta /= ADJUSTMENT
    # In place: the last state is of no more use, and this is the largest array of all.
    state.multipliers[:, _columns(last.blocks, last.problem.n_outputs)] = new
    return _begin(last, delta, state.V, state.C, state.multipliers, state.M, state.inner.step_size)


def _begin(
    last: Subproblem,
    delta: float,
    V: np.ndarray,
    C: np.ndarray,
    multipliers: np.ndarray,
    shares: np.ndarray,
    step_size: float,
) -> AugmentedLagrangianState:
    """Start a subproblem on the blocks that are not zero at V or after one step from there."""
    problem, alpha = last.problem, last.alpha
    moved = last.prox(V + np.asarray(step_size, V.dtype) * (C + shares), step_size)
    blocks = np.flatnonzero(V.any(axis=(1, 2)) | moved.any(axis=(1, 2)))
    mine = multipliers[:, _columns(blocks, problem.n_outputs)]
    subproblem = Subproblem(problem, alpha, blocks, last.row_scale, delta, mine)
    W = V[blocks]
    P = subproblem.forward(W)
    inner = FISTAState(W, P, P, W, subproblem, W, P, 1.0, step_size)
    return AugmentedLagrangianState(subproblem, inner, 0, multipliers, shares)


def _balance(whole: Subproblem, C: np.ndarray) -> tuple[float, float]:
    """delta and a step size such that loss and penalty are curved alike along C from 0."""
    n = whole.problem.operator.n
    P = whole.forward(C)
    largest = float(np.abs(whole.predictions(P)).max())
    if largest == 0:
        return 1 / n, 1.0
    # Predictions of size 1: losses that grow linearly hardly curve beyond.
    loss, penalty = whole.curvatures(P / np.asarray(largest, P.dtype), np.zeros_like(P))
    if not (loss > 0 and penalty > 0):
        return 1 / n, 1.0
    return float(loss / penalty), float(np.vdot(C, C)) / largest**2 / (4 * float(loss))


def _columns(blocks: np.ndarray, c: int) -> np.ndarray:
    """Columns (j c + k) of the blocks j."""
    return (blocks[:, None] * c + np.arange(c)).ravel()
