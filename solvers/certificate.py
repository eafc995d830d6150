"""Certificates: how far from the optimum a solution can be at most.

Any residual, scaled until it is dual feasible, gives a lower bound of the optimum. The last
residual is a poor one late in a solve: a small excess in one gate shrinks it all. So the excess is
taken out where it is, and the best bound so far is kept. Without a penalty no scaling helps, and
the KKT residual decides.
"""

from __future__ import annotations

import numpy as np

from cvxdistill.solvers.dual_correction import residual_correction
from cvxdistill.solvers.problem import ConvexProblem

MOST_CORRECTIONS = 2


class DualCertificate:
    """The best dual point seen so far for one problem and one alpha, and the gap it certifies.

    With theta = s R, C = A^T theta / n and the penalty's conjugate,

        gap(W, b) = L(Z) + L*(-theta/n) + <Z, theta>/n
                    + alpha Omega(W) + (alpha Omega)*(C) - <A W, theta>/n   >=   P(W, b) - P*,

    summed in this order because subtracting two nearly equal objectives loses digits. theta has
    zero column sums when there is an intercept, because the residuals that it comes from have.

    For ReLU networks C also holds the multipliers' share X^T S_j Lambda_j, scaled by the same s:
    any Lambda >= 0 will do, and it does not show in the gap, whose W must lie in the cones.

    Outputs whose programmes are of their own (``ConvexProblem.parts``) have scales and best points
    of their own.

    Parameters
    ----------
    problem : ConvexProblem
    alpha : float
    """

    def __init__(self, problem: ConvexProblem, alpha: float):
        self.problem = problem
        self.alpha = alpha
        self.theta: np.ndarray | None = None
        # Of each part.
        self._values = np.full(len(problem.parts), -np.inf)
        self._conjugates = np.full(len(problem.parts), np.inf)

    @property
    def value(self) -> float:
        """The best dual value; minus infinity before there is any."""
        return float(self._values.sum())

    def offer(self, R: np.ndarray, C: np.ndarray) -> float:
        """Scale R (n, c), with C = A^T R / n (blocks, d, c), to a dual point; keep the best.

        Returns
        -------
        float
            The dual value reached; minus infinity where there is none.
        """
        problem, regularizer = self.problem, self.problem.regularizer
        if not regularizer.bounds_the_dual:
            return -np.inf
        # One for each output, or one for all.
        s = np.array([regularizer.feasible_scale(C[:, :, k], self.alpha) for k in problem.parts])
        if (s < 1).any():
            R, C = R * s.astype(R.dtype), C * s.astype(C.dtype)
        conjugates = np.array(
            [regularizer.conjugate(C[:, :, k], self.alpha) for k in problem.parts]
        )
        values = problem.loss.dual_values(R, by_output=len(s) > 1) - conjugates
        better = values > self._values
        self.theta = R if self.theta is None or better.all() else np.where(better, R, self.theta)
        self._values = np.where(better, values, self._values)
        self._conjugates = np.where(better, conjugates, self._conjugates)
        return float(values.sum())

    def offer_corrected(
        self, R: np.ndarray, C: np.ndarray, W: np.ndarray, M: np.ndarray | None = None
    ) -> None:
        """Offer R moved on to the constraints of groups active at W or violated at C + M.

        Where groups come or go on the way, it is moved once more from there. See
        ``cvxdistill.solvers.dual_correction``; M of ReLU networks is the multipliers' share.
        """
        problem = self.problem
        with_M = C if M is None else C + M
        for _ in range(MOST_CORRECTIONS):
            correction = residual_correction(problem, self.alpha, R, with_M, W)
            if correction is None:
                return
            delta, moved = correction
            R, C = R + delta, C + problem.adjoint(delta)
            with_M = problem.with_multipliers(C, M, self.alpha)
            self.offer(R, with_M)
            if np.array_equal(W.any(axis=1), moved.any(axis=1)):
                return
            W = moved

    def gap(self, W: np.ndarray, Z: np.ndarray, b: np.ndarray) -> float:
        """Absolute duality gap at W, its predictions Z (n, c) without b, and b (c,)."""
        if self.theta is None:
            return np.inf
        problem = self.problem
        fit = problem.loss.fenchel_gap(Z + b, self.theta)
        penalty = self.alpha * problem.regularizer.value(W) + float(self._conjugates.sum())
        inner = float(np.sum(Z * self.theta, dtype=np.float64)) / len(Z)
        # Not max(), which would turn NaN into a gap of 0.
        return float(np.maximum(0.0, fit + penalty - inner))


class KKTResidual:
    """How far weights are from the first-order conditions, relative to where they start.

        || W - prox_{alpha Omega}(W + C) ||_F / || C_0 ||_F

    with C = A^T R / n at W (for ReLU networks with the multipliers' share) and C_0 at W = 0: zero
    exactly at optima. Without a penalty it is ||A^T R|| / ||A^T R_0||, the size of the gradient.

    Parameters
    ----------
    problem : ConvexProblem
    alpha : float
    """

    def __init__(self, problem: ConvexProblem, alpha: float):
        self.problem = problem
        self.alpha = alpha
        at_zero = problem.adjoint(problem.residual(np.zeros_like(problem.Y)))
        self._unit = float(np.linalg.norm(at_zero)) or 1.0

    def __call__(self, W: np.ndarray, C: np.ndarray) -> float:
        """Residual of weights W (blocks, d, c) and C of the same shape."""
        moved = self.problem.regularizer.prox(W + C, self.alpha)
        return float(np.linalg.norm(W - moved)) / self._unit


def duality_gap(problem: ConvexProblem, V: np.ndarray, alpha: float) -> float:
    """Absolute duality gap of weights V with their best intercept, from their own residual.

    Parameters
    ----------
    problem : ConvexProblem
    V : array of shape (p, d, c), or (2, p, d, c) for ReLU networks
        Weights in the units of X. For ReLU networks they must lie in their cones, and with the
        penalties "nuclear", "feature" and "l1" the bound is a weak one: it knows no multipliers.
    alpha : float

    Returns
    -------
    float
        An upper bound on P(V, b) - P*, in units of the objective; infinite without a penalty.

    Raises
    ------
    ValueError
        If the shape of V does not fit or alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}.")
    W = problem.weights_from_user(V)
    Z = problem.forward(W)
    b = problem.intercept(Z)
    certificate = DualCertificate(problem, alpha)
    R = problem.residual(Z)
    C = problem.adjoint(R)
    with_M = problem.with_multipliers(C, None, alpha)
    certificate.offer(R, with_M)
    certificate.offer_corrected(R, C, W, with_M - C)
    return certificate.gap(W, Z, b)
