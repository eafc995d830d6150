"""Duality gaps: how far from the optimum a solution can be at most.

Any residual, scaled until it is dual feasible, gives a lower bound of the optimum. The last
residual is a poor one late in a solve: a small excess in one gate shrinks it all. So the excess is
taken out where it is, and the best bound so far is kept.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import LinAlgError, solve

from cvxdistill.solvers.problem import GatedReLUProblem, residual_and_adjoint

# Entries of the correction's linear systems beyond which it is left out: 0.5 GB.
MOST_GRAM_ENTRIES = 2**26


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
    """

    def __init__(self, problem: GatedReLUProblem, alpha: float):
        self.problem = problem
        self.alpha = alpha
        self.theta: np.ndarray | None = None
        self.value = -np.inf
        self._conjugate = np.inf

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

    def offer_corrected(self, R: np.ndarray, C: np.ndarray, V: np.ndarray) -> None:
        """Offer R moved on to the dual constraints, to first order, instead of shrunk into them.

        At the optimum R°(C_g) = alpha for every group g of weights that is not zero. With the
        polar directions U_g, <U_g, C_g> = R°(C_g), and T_g = diag(D_g) X U_g, the smallest move
        R + sum_g t_g T_g that makes R°(C_g) = alpha to first order, for the groups that are active
        at V or violated at C, solves

            (T^T T / n) t = alpha - R°(C).

        The excess that is left is of second order, as is the error of the objective; scaling
        alone leaves a gap of first order. For a blended penalty the gap of the plain residual is
        of second order already, and nothing is done; nor where the systems would not fit in
        memory.

        Parameters
        ----------
        R : ndarray of shape (n, c)
        C : ndarray of shape (p, d, c)
            A^T R / n.
        V : ndarray of shape (p, d, c)
        """
        problem = self.problem
        A, n = problem.operator, problem.operator.n
        polar = problem.regularizer.polar(C)
        if polar is None:
            return
        norms, U = polar
        per_output = norms.ndim == 2
        wanted = (norms > self.alpha) | V.any(axis=1 if per_output else (1, 2))
        gates = np.flatnonzero(wanted.any(axis=1) if per_output else wanted)
        systems = norms.shape[1] if per_output else 1
        if len(gates) == 0 or systems * len(gates) ** 2 > MOST_GRAM_ENTRIES:
            return
        grams = A.contribution_gram(U, gates, center=problem.fit_intercept, per_output=per_output)
        excess = (self.alpha - norms[gates]).reshape(len(gates), -1)
        chosen = wanted[gates].reshape(len(gates), -1)
        t = np.zeros_like(excess, dtype=np.float64)
        for k, gram in enumerate(grams):
            rows = np.flatnonzero(chosen[:, k])
            try:
                t[rows, k] = _solve_regularized(gram[np.ix_(rows, rows)] / n, excess[rows, k], R)
            except LinAlgError:
                return
        move = np.zeros_like(U)
        move[gates] = U[gates] * t[:, None, :].astype(U.dtype)
        delta = A.forward(move)
        if problem.fit_intercept:
            delta -= delta.mean(axis=0, dtype=np.float64).astype(delta.dtype)
        self.offer(R + delta, C + A.adjoint(delta) / np.asarray(n, C.dtype))

    def gap(self, V: np.ndarray, Z: np.ndarray, b: np.ndarray) -> float:
        """Absolute duality gap at V (p, d, c), its predictions Z (n, c) without b, and b (c,)."""
        if self.theta is None:
            return np.inf
        problem = self.problem
        fit = problem.loss.fenchel_gap(Z + b, self.theta, problem.Y)
        penalty = self.alpha * problem.regularizer.value(V) + self._conjugate
        inner = float(np.sum(Z * self.theta, dtype=np.float64)) / len(Z)
        # Not max(), which would turn NaN into a gap of 0.
        return float(np.maximum(0.0, fit + penalty - inner))


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
    certificate = DualCertificate(problem, alpha)
    R, C = residual_and_adjoint(problem, Z)
    certificate.offer(R, C)
    certificate.offer_corrected(R, C, V)
    return certificate.gap(V, Z, b)


def _solve_regularized(gram: np.ndarray, rhs: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Solve a positive semidefinite system, with a ridge of the order of what rounding leaves."""
    if len(gram) == 0:
        return rhs
    ridge = np.finfo(like.dtype).eps ** 0.75 * np.trace(gram) / len(gram)
    return solve(gram + max(ridge, 1e-300) * np.eye(len(gram)), rhs, assume_a="pos")
