"""The ridge penalty solved directly, by Newton steps with the exact Hessian.

With R = 1/2 ||.||_F^2 the programme is ridge regression on the p d gated features. This is also
the plain linear student: one gate that is always on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from cvxdistill.solvers.gated_operator import empty_weights
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.normal_equations import gram_matrix
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.solver import IterativeSolver, State

# The Hessian of this many gated features takes 0.5 GB.
MOST_FEATURES = 8192


@dataclass
class NewtonState(State):
    """State of the direct solver: the Cholesky factor of the Hessian at this alpha."""

    factor: tuple[np.ndarray, bool]


@dataclass(frozen=True, kw_only=True)
class RidgeNewton(IterativeSolver):
    """Newton's method for squared loss with a ridge: V+ = V - H^-1 grad, exact in one step.

    H = A^T A / n + alpha I (with centred A when there is an intercept) is factored in float64;
    further steps only refine what float32 gradients lose. ``gram`` may hold A^T A / n from
    ``gram_matrix``, to share it along a path.

    Parameters
    ----------
    tol, max_iter, time_limit, check_every, verbose
        As for every iterative solver; here the gap is computed at every step.
    gram : ndarray of shape (p d, p d), optional
        With the same centring and sample weights as the problem.

    Raises
    ------
    ValueError
        From ``solve``: the penalty is not a pure ridge, the loss not squared, or p d is too large.
    """

    max_iter: int = 10
    check_every: int = 1
    gram: np.ndarray | None = None

    def init(self, problem: GatedReLUProblem, alpha: float, V: np.ndarray) -> NewtonState:
        """Form and factor the Hessian."""
        if not isinstance(problem, GatedReLUProblem):
            raise ValueError(f"RidgeNewton solves gated ReLU programmes, got {problem!r}.")
        A = problem.operator
        if problem.regularizer.l1_ratio != 0 or not isinstance(problem.loss.loss, SquaredLoss):
            raise ValueError(
                f"RidgeNewton needs penalty='ridge' and the squared loss, got {problem!r}."
            )
        if A.p * A.d > MOST_FEATURES:
            raise ValueError(
                f"RidgeNewton factors a matrix of p * d = {A.p * A.d} rows, at most "
                f"{MOST_FEATURES}; use RFISTA."
            )
        gram = self.gram
        if gram is None:
            gram = gram_matrix(A, center=problem.fit_intercept, weights=problem.loss.weights)
        hessian = gram + alpha * np.eye(len(gram))
        return _state(problem, V, cho_factor(hessian))

    def step(self, problem: GatedReLUProblem, alpha: float, state: NewtonState) -> NewtonState:
        """One Newton step."""
        p, d, c = state.V.shape
        gradient = (alpha * state.V - state.C).reshape(p * d, c)
        V = empty_weights(p, d, c, problem.dtype)
        V[...] = state.V - cho_solve(state.factor, gradient).reshape(p, d, c)
        return _state(problem, V, state.factor)


def _state(
    problem: GatedReLUProblem, V: np.ndarray, factor: tuple[np.ndarray, bool]
) -> NewtonState:
    Z = problem.forward(V)
    R = problem.residual(Z)
    return NewtonState(V, Z, R, problem.adjoint(R), factor)
