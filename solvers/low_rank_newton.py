"""One step of the factored programme: a Newton direction by conjugate gradients, how far to go.

With the residual R, the products C_j = A_j^T R / n and K = H^T H / n, the Hessian is

    dU[h] -> A_j(h)^T (dH W + H dW) W[h] / n - C_j(h) dW[h] + alpha dU[h]
    dW    -> H^T (dH W + H dW) / n - (C_j(h)^T dU[h])_h + alpha dW

and the objective along a direction is a polynomial of degree four, whose minimum is found exactly.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from cvxdistill.solvers.low_rank_operator import LowRankOperator, gate_slices
from cvxdistill.solvers.low_rank_problem import Factors, Point, SingularPairs, residual_products

Direction = tuple[np.ndarray, np.ndarray]


class Hessian:
    """Products with a Hessian at a point, and with an approximate inverse, in the data's type.

    Of C_j the singular values above alpha are taken as alpha. The Hessian is then positive
    semidefinite, and the true one wherever the certificate holds; where it does not, the directions
    of negative curvature are new units, which is what growing is for.

    The inverse is that of the two diagonal blocks, without what couples units of different gates:
    balanced units of one gate have W_j W_j^T = diag(s), so that U's block is s_h A_j^T A_j / n +
    alpha, diagonal in the gate's eigenbasis; W's is K + alpha.
    """

    def __init__(self, operator: LowRankOperator, point: Point, pairs: SingularPairs):
        self.operator, self.factors = operator, point.factors
        dtype = operator.dtype
        self.alpha = dtype.type(point.alpha)
        self.U, self.W, self.T, self.K, self.C = (
            a.astype(dtype, copy=False)
            for a in (point.factors.U, point.factors.W, point.T, point.K, point.C)
        )
        if len(pairs.values):
            self.C = np.array(self.C)
            excess = (pairs.values - point.alpha)[:, None] * pairs.U
            for j, own in gate_slices(pairs.gate):
                self.C[j] -= (excess[own].T @ pairs.W[own]).astype(dtype)
        self.WW = self.W @ self.W.T
        curvature = point.K + point.alpha * np.eye(len(point.K))
        self._factor = cho_factor(curvature.astype(dtype), check_finite=False)
        self._scale = (point.factors.W**2).sum(axis=1).astype(dtype)

    def __call__(self, direction: Direction) -> Direction:
        """H (dU, dW)."""
        dU, dW = direction
        A, units = self.operator, self.factors.units
        dT = A.hidden(dU, units, every_gate=False)
        CW, UC = residual_products(self.C, Factors(dU, dW, self.factors.gate))
        in_U = A.normal(dT, self.WW, units)
        in_U += A.normal(self.T, self.W @ dW.T, units)
        in_U -= CW
        in_U += self.alpha * dU
        in_W = A.inner(self.U, self.T, dT, units) @ self.W
        in_W += self.K @ dW
        in_W -= UC
        in_W += self.alpha * dW
        return in_U, in_W

    def precondition(self, gradient: Direction) -> Direction:
        """M^-1 (gU, gW)."""
        gU, gW = gradient
        result = np.empty_like(gU)
        for j, own in self.factors.units:
            Q, values = self.operator.eigenbasis(j)
            curvature = self._scale[own, None] * values.astype(gU.dtype) + self.alpha
            if Q is None:
                result[own] = gU[own] / curvature
            else:
                result[own] = (gU[own] @ Q / curvature) @ Q.T
        return result, cho_solve(self._factor, gW, check_finite=False)


def gradient(point: Point) -> Direction:
    """Gradient of the factored programme."""
    factors = point.factors
    return point.alpha * factors.U - point.CW, point.alpha * factors.W - point.UC


def newton_direction(
    hessian: Hessian, gradient: Direction, tol: float, max_products: int
) -> tuple[Direction, int]:
    """Solve H x = -gradient by preconditioned conjugate gradients.

    Parameters
    ----------
    hessian : Hessian
    gradient : pair of ndarray
    tol : float
        Stop when the preconditioned norm of the residual is this share of the gradient's.
    max_products : int

    Returns
    -------
    x : pair of ndarray
    products : int
    """
    dtype = hessian.U.dtype
    shape = gradient[0].shape, gradient[1].shape
    size = gradient[0].size

    def split(v: np.ndarray) -> Direction:
        return v[:size].reshape(shape[0]), v[size:].reshape(shape[1])

    def join(pair: Direction) -> np.ndarray:
        return np.concatenate([pair[0].ravel(), pair[1].ravel()]).astype(dtype, copy=False)

    residual = -join(gradient)
    x = np.zeros_like(residual)
    z = join(hessian.precondition(split(residual)))
    step = z.copy()
    rho = first = float(residual @ z)
    products = 0
    while products < max_products:
        products += 1
        q = join(hessian(split(step)))
        curvature = float(step @ q)
        if curvature <= 0:  # by rounding alone
            break
        length = dtype.type(rho / curvature)
        x += length * step
        residual -= length * q
        z = join(hessian.precondition(split(residual)))
        rho_new = float(residual @ z)
        if not rho_new > tol**2 * first:
            break
        step *= dtype.type(rho_new / rho)
        step += z
        rho = rho_new
    return split(x), products


def step_length(operator: LowRankOperator, point: Point, direction: Direction) -> float:
    """The t that minimises the objective at (U + t dU, W + t dW), a polynomial of degree four."""
    dU, dW = direction
    U, W, units = point.factors.U, point.factors.W, point.factors.units
    dT = operator.hidden(dU, units, every_gate=False)
    dU, dW = dU.astype(np.float64), dW.astype(np.float64)
    T = point.T.astype(dT.dtype, copy=False)
    K1 = operator.inner(U.astype(dT.dtype), T, dT, units).astype(np.float64)
    K2 = operator.inner(direction[0], dT, dT, units).astype(np.float64)
    change = Factors(dU, dW, point.factors.gate)
    CW, _ = residual_products(point.C, change)
    R_Q = float(np.sum(CW * dU))
    R_L = float(np.sum(point.CW * dU) + np.sum(point.UC * dW))
    WW, WdW, dWdW = W @ W.T, W @ dW.T, dW @ dW.T
    L_L = float(np.sum(K2 * WW) + 2 * np.sum(K1 * WdW.T) + np.sum(point.K * dWdW))
    L_Q = float(np.sum(K2 * WdW) + np.sum(K1 * dWdW))
    Q_Q = float(np.sum(K2 * dWdW))
    decay_1 = float(np.sum(U * dU) + np.sum(W * dW))
    decay_2 = float(np.sum(dU**2) + np.sum(dW**2))
    alpha = point.alpha
    quartic = np.array(
        [
            Q_Q / 2,
            L_Q,
            L_L / 2 - R_Q + alpha * decay_2 / 2,
            -R_L + alpha * decay_1,
            0.0,
        ]
    )
    if not np.isfinite(quartic).all():
        return 0.0
    roots = np.roots(np.polyder(quartic))
    real = roots.real[np.abs(roots.imag) <= 1e-9 * np.maximum(1, np.abs(roots))]
    candidates = np.concatenate([[0.0], real])
    return float(candidates[np.argmin(np.polyval(quartic, candidates))])
