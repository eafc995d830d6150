"""Proximal gradients in the metric of X^T X, in which correlated features are no obstacle.

With the principal axes of the examples, X^T diag(h) X / n = Q diag(e) Q^T, the steps are taken in

    U_j = diag(mu)^1/2 Q^T V_j,        mu = (e + FLOOR mean(e)) / (mean(e) (1 + FLOOR))

for each gate j alike. Rotations change no length, and so the penalty stays one of lengths of
diag(mu)^-1/2 U_j, whose proximal operator takes a root of one equation for each group (as in
``cvxdistill.solvers.block_descent``).
"""

from __future__ import annotations

from typing import TypeGuard

import numba
import numpy as np

from cvxdistill.solvers.block_descent import length_of_block
from cvxdistill.solvers.gated_operator import as_weights, empty_weights
from cvxdistill.solvers.penalties import GatePenalty, NeuronPenalty
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem

# Share of the mean eigenvalue that is added to all.
FLOOR = 0.1
# Iterations that finding the axes may cost, and operations of an eigendecomposition by d^3.
MOST_ITERATIONS, EIGEN_WORK = 20.0, 10.0


def has_principal_metric(problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
    """Whether the proximal operator in this metric is known."""
    return isinstance(problem, GatedReLUProblem) and isinstance(
        problem.regularizer.penalty, (NeuronPenalty, GatePenalty)
    )


def principal_metric_pays(problem: GatedReLUProblem) -> bool:
    """Whether the metric is found within some iterations and rotations cost little beside them."""
    A, c = problem.operator, problem.n_outputs
    first = A.n * A.d**2 + EIGEN_WORK * A.d**3
    return 1 < A.d <= A.n and first <= MOST_ITERATIONS * 4 * A.n * A.d * A.p * c


class PrincipalComposite:
    """A programme in the weights U (p, d, c).

    Parameters
    ----------
    problem : GatedReLUProblem
    alpha : float

    Raises
    ------
    ValueError
        If X is not finite.
    """

    def __init__(self, problem: GatedReLUProblem, alpha: float):
        self.problem = problem
        self.norm = alpha * problem.regularizer.l1_ratio
        self.ridge = alpha * (1 - problem.regularizer.l1_ratio)
        self.shared = isinstance(problem.regularizer.penalty, GatePenalty)
        eigenvalues, Q = problem.principal_axes
        mean = max(float(eigenvalues.mean()), np.finfo(np.float64).tiny)
        self.mu = (eigenvalues / mean + FLOOR) / (1 + FLOOR)
        root = np.sqrt(self.mu)
        # V_j = into U_j, and U_j = back V_j.
        self.into = (Q / root).astype(problem.dtype)
        self.back = (Q * root).T.astype(problem.dtype)

    def weights(self, U: np.ndarray) -> np.ndarray:
        """V from U."""
        return _transformed(self.into, U)

    def gradient(self, C: np.ndarray) -> np.ndarray:
        """C with respect to V from that with respect to U."""
        return _transformed(self.back.T, C)

    def from_weights(self, V: np.ndarray) -> np.ndarray:
        """U from V."""
        return _transformed(self.back, V)

    def prox(self, U: np.ndarray, s: float) -> np.ndarray:
        """Proximal operator of s alpha Omega."""
        out = as_weights(U, U.dtype)
        _proximal(out.transpose(0, 2, 1), self.mu, s, self.norm, self.ridge, self.shared)
        return out

    def forward(self, U: np.ndarray) -> np.ndarray:
        """A V."""
        return self.problem.forward(self.weights(U))

    def residual(self, Z: np.ndarray) -> np.ndarray:
        """-n grad L at the best intercept."""
        return self.problem.residual(Z)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """A^T R / n with respect to U."""
        return _transformed(self.into.T, self.problem.adjoint(R))

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray) -> float:
        """Bregman distance of the loss."""
        return self.problem.bregman(Z_new, Z)


def _transformed(T: np.ndarray, V: np.ndarray) -> np.ndarray:
    """T V_j for each gate that is not zero; V (p, d, c) in the memory order (p, c, d)."""
    p, d, c = V.shape
    out = empty_weights(p, d, c, V.dtype)
    rows = np.ascontiguousarray(V.transpose(0, 2, 1)).reshape(p * c, d)
    used = rows.any(axis=1)
    flat = out.transpose(0, 2, 1).reshape(p * c, d)
    if used.all():
        np.dot(rows, T.T, out=flat)
    else:
        flat[...] = 0
        flat[used] = rows[used] @ T.T
    return out


@numba.njit(cache=True, nogil=True)
def _proximal(U, mu, s, norm, ridge, shared):  # type: ignore[no-untyped-def]
    """In place, for U (p, c, d): groups are gates if ``shared``, or rows."""
    p, c, d = U.shape
    rates, roots = mu / s, np.sqrt(mu)
    squares = np.empty(d)
    for g in range(p):
        for first in range(0, c, c if shared else 1):
            last = c if shared else first + 1
            total = 0.0
            squares[:] = 0
            # In y = mu^-1/2 U: minimise sum_i rates_i / 2 (y_i - ...)^2 + norm ||y|| + ...
            for k in range(first, last):
                for i in range(d):
                    pull = roots[i] / s * U[g, k, i]
                    squares[i] += pull * pull
            for i in range(d):
                total += squares[i]
            length = 0.0
            if norm > 0:
                if total > norm * norm:
                    length = length_of_block(squares, rates, norm, ridge)
                if not length > 0:
                    U[g, first:last] = 0
                    continue
            for k in range(first, last):
                for i in range(d):
                    under = rates[i] + ridge
                    if norm > 0:
                        under += norm / length
                    U[g, k, i] *= rates[i] / under
