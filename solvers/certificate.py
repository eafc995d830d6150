"""Duality gaps: how far from the optimum a solution can be at most.

Any residual, scaled until it is dual feasible, gives a lower bound of the optimum. The last
residual is a poor one late in a solve, so several are tried and the best so far is kept.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from cvxdistill.solvers.problem import GatedReLUProblem, residual_and_adjoint


class DualCertificate:
    """The best dual point seen so far for one problem and one alpha, and the gap it certifies.

    With theta = s R, C = A^T theta / n and the penalty's conjugate,

        gap(V, b) = L(Z) + L*(-theta/n) + <Z, theta>/n
                    + alpha Omega(V) + (alpha Omega)*(C) - <A V, theta>/n   >=   P(V, b) - P*,

    summed in this order because subtracting two nearly equal objectives loses digits. theta has
    zero column sums when there is an intercept, because the residuals that it comes from have.

    Parameters
    ----------
    problem : GatedReLUProblem
    alpha : float
    memory : int, default=5
        Number of differences of residuals that extrapolation combines; 0 turns it off.

    References
    ----------
    Massias, Gramfort and Salmon 2018 (dual extrapolation); Tseng 2008, section 3 (the averaged
    gradients of an accelerated method as a dual sequence).
    """

    def __init__(self, problem: GatedReLUProblem, alpha: float, memory: int = 5):
        self.problem = problem
        self.alpha = alpha
        self.theta: np.ndarray | None = None
        self.value = -np.inf
        self._conjugate = np.inf
        self._recent: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=memory + 1)

    def offer(self, R: np.ndarray, C: np.ndarray) -> float:
        """Scale R (n, c), with C = A^T R / n (p, d, c), to a dual point; keep it if it is better.

        Returns
        -------
        float
            The dual value reached.
        """
        regularizer, loss, Y = self.problem.regularizer, self.problem.loss, self.problem.Y
        s = regularizer.feasible_scale(C, self.alpha)
        theta = R if s == 1 else R * np.asarray(s, R.dtype)
        conjugate = regularizer.conjugate(C if s == 1 else C * np.asarray(s, C.dtype), self.alpha)
        value = loss.dual_value(theta, Y) - conjugate
        if value > self.value or self.theta is None:
            self.value, self.theta, self._conjugate = value, theta, conjugate
        return value

    def extrapolate(self, R: np.ndarray, C: np.ndarray) -> None:
        """Offer the affine combination of the recent residuals whose differences cancel best."""
        self._recent.append((R, C))
        if len(self._recent) < (self._recent.maxlen or 0):
            return
        residuals = np.stack([r.ravel() for r, _ in self._recent])
        differences = np.diff(residuals, axis=0).astype(np.float64)
        gram = differences @ differences.T
        try:
            weights = np.linalg.solve(gram, np.ones(len(gram)))
        except np.linalg.LinAlgError:
            return
        if not np.isfinite(weights).all() or weights.sum() == 0:
            return
        weights = (weights / weights.sum()).astype(R.dtype)
        pairs = list(self._recent)[1:]
        combined_R, combined_C = np.zeros_like(R), np.zeros_like(C)
        for weight, (r, c) in zip(weights, pairs, strict=True):
            combined_R += weight * r
            combined_C += weight * c
        self.offer(combined_R, combined_C)

    def gap(self, V: np.ndarray, Z: np.ndarray, b: np.ndarray) -> float:
        """Absolute duality gap at V (p, d, c), its predictions Z (n, c) without b, and b (c,)."""
        if self.theta is None:
            return np.inf
        problem = self.problem
        fit = problem.loss.fenchel_gap(Z + b, self.theta, problem.Y)
        penalty = self.alpha * problem.regularizer.value(V) + self._conjugate
        inner = float(np.sum(Z * self.theta, dtype=np.float64)) / len(Z)
        return max(0.0, fit + penalty - inner)


def duality_gap(problem: GatedReLUProblem, V: np.ndarray, alpha: float) -> float:
    """Absolute duality gap of weights V with their best intercept, from their own residual.

    Parameters
    ----------
    problem : GatedReLUProblem
    V : array of shape (p, d, c)
        Weights in the units of X.
    alpha : float

    Returns
    -------
    float
        An upper bound on P(V, b) - P*, in units of the objective.

    Raises
    ------
    ValueError
        If the shape of V does not fit or alpha is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha!r}.")
    V = problem.weights_from_user(V)
    Z = problem.operator.forward(V)
    b = problem.intercept(Z)
    certificate = DualCertificate(problem, alpha, memory=0)
    certificate.offer(*residual_and_adjoint(problem, Z))
    return certificate.gap(V, Z, b)
