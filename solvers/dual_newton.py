"""Semismooth Newton's method on the augmented Lagrangian of the dual, for a part of a programme.

For the outputs of the part, which are one or all,

    minimise over V   1/(2n) ||U_0 - A V||^2 + sum_j (t ||V_j|| + r/2 ||V_j||^2),

t = alpha rho and r = alpha (1 - rho), with A and U_0 of ``cvxdistill.solvers.scaled_gates``. A step
of the augmented Lagrangian, which is one of the proximal point method in V, takes V to

    B = prox(V + sigma A^T u / n),      prox(W)_j = s_j W_j / (1 + sigma r),
                                        s_j = max(0, 1 - sigma t / ||W_j||)

at the minimiser u of a smooth and strongly convex function, where

    n grad(u) = u - U_0 + A B = 0.

Newton's directions on it solve (I + kappa A M A^T) delta = -n grad, with kappa = sigma /
((1 + sigma r) n) and M_j = s_j I + (1 - s_j) w_j w_j^T of the gates that are not zero, w_j = W_j /
||W_j||. Only these cost anything but the products A^T delta and A B; the line search is exact and
costs none. Where a factorisation is dear, a few conjugate gradients do for the first directions. A
gap is certified at each of Newton's steps by B and u, scaled until it is feasible.

References
----------
Li, Sun and Toh 2018, SIAM J. Optim. 28(1) (lasso); Zhang, Zhang, Sun and Toh 2020, Math. Program.
179 (sparse group lasso).
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numba
import numpy as np

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.extrapolation import LastTwo
from cvxdistill.solvers.newton_directions import NewtonDirections
from cvxdistill.solvers.parts import Watch
from cvxdistill.solvers.scaled_gates import ScaledGates
from cvxdistill.solvers.solver import Solver

# sigma at first, in units of one over the mean square of the gated features; then times GROWTH.
FIRST_SIGMA, GROWTH, LARGEST_SIGMA = 20.0, 10.0, 1e12
# Of the line search: the share of its slope that may be left, and most trials.
SLOPE_LEFT, TRIALS = 0.1, 40
# By how much a length is beyond its threshold, and not by rounding.
OVER = 1 + 1e-13
# Newton's steps without a smaller gap after which rounding is all that is left.
MOST_IDLE = 50


class Point(NamedTuple):
    """What is known at the proximal point B of V + sigma C.

    Attributes
    ----------
    B : ndarray of shape (p, c d)
    shares : ndarray of shape (p,)
        s_j, 0 for gates that are zero.
    gradient : ndarray of shape (n, c)
        u - U_0 + A B.
    objective, gap : float
        At B; the gap with u.
    """

    B: np.ndarray
    shares: np.ndarray
    gradient: np.ndarray
    objective: float
    gap: float


class DualNewton:
    """Where the method stands for one part of a programme.

    Parameters
    ----------
    settings : Solver
        ``tol`` and ``max_iter``, Newton's steps.
    gates : ScaledGates
        Shared by the parts.
    outputs : slice
    l1_ratio : float
    V : ndarray of shape (p, d, c)
        Where to start, of all outputs.
    """

    def __init__(
        self,
        settings: Solver,
        gates: ScaledGates,
        outputs: slice,
        l1_ratio: float,
        V: np.ndarray,
    ):
        self.settings = settings
        self.gates = gates
        self.outputs = outputs
        self.rho = l1_ratio
        self.targets = np.ascontiguousarray(gates.targets[:, outputs])
        self.unit = 1 / max(gates.mean_square, 1e-300)
        self.past = LastTwo()
        self.move(V)

    def move(self, V: np.ndarray) -> None:
        """Go to weights (p, d, c) of all outputs, with their residual for a dual point."""
        # The multipliers V of the augmented Lagrangian, and the last proximal point B.
        self.V = self.B = self.gates.flat(V[:, :, self.outputs])
        self.u = self._residual(self.B)
        self.C = self.gates.adjoint(self.u)

    def look_ahead(self, alpha: float) -> None:
        """Go to the line through where the last two solves ended, if that is worth it."""
        ahead = self.past.ahead(alpha)
        if ahead is not None:
            self.B, self.u = ahead
            self.V = self.B
            self.C = self.gates.adjoint(self.u)

    def certify(self, alpha: float) -> tuple[float, float]:
        """Objective and duality gap."""
        return self._certified(self.B, self._residual(self.B), alpha)

    def weights(self) -> np.ndarray:
        """Weights (p, d, c)."""
        A = self.gates
        return self.B.reshape(A.p, -1, A.d).transpose(0, 2, 1)

    def gap_at(self, W: np.ndarray, alpha: float) -> float:
        """Duality gap at other weights (p, d, c), with the dual point here."""
        B = self.gates.flat(W)
        self.C = self.gates.adjoint(self.u)
        return self._certified(B, self._residual(B), alpha)[1]

    def _residual(self, B: np.ndarray) -> np.ndarray:
        return self.targets - self.gates.forward(B)

    def _certified(self, B: np.ndarray, R: np.ndarray, alpha: float) -> tuple[float, float]:
        """Objective at B with its residual R, and the gap to u scaled until it is feasible.

        Summed so that nothing large cancels: with theta = s u and its conjugate,

            ||R - theta||^2 / (2n) + alpha Omega(B) + (alpha Omega)*(s C) - s <B, C>.
        """
        rho, n = self.rho, self.gates.n
        lengths = np.sqrt(np.einsum("pk,pk->p", self.C, self.C))
        penalty = alpha * rho * float(np.sqrt(np.einsum("pk,pk->p", B, B)).sum())
        s, conjugate = 1.0, 0.0
        if rho < 1:
            penalty += alpha * (1 - rho) / 2 * float(np.vdot(B, B))
            over = np.maximum(lengths - alpha * rho, 0)
            conjugate = float(over @ over) / (2 * alpha * (1 - rho))
        else:
            s = min(1.0, alpha / max(float(lengths.max()), 1e-300))
        off = R - s * self.u
        gap = (
            float(np.vdot(off, off)) / (2 * n) + penalty + conjugate - s * float(np.vdot(B, self.C))
        )
        return float(np.vdot(R, R)) / (2 * n) + penalty, max(gap, 0.0)

    def advance(self, alpha: float, watch: Watch, time_limit: float | None) -> str:
        """Solve for alpha from here; return the status."""
        settings, n = self.settings, self.gates.n
        start = time.perf_counter()
        directions = NewtonDirections(self.gates)
        if not self.B.any():
            self._scale(alpha)
        sigma, steps, inner = FIRST_SIGMA * self.unit, 0, 0
        best, idle = np.inf, 0
        while True:
            point = self._point(alpha, sigma)
            verdict = None
            idle = 0 if point.gap < 0.999 * best else idle + 1
            best = min(best, point.gap)
            late = time_limit is not None and time.perf_counter() - start > time_limit
            self.B = point.B
            stop = watch(point.objective, point.gap, steps)
            enough = settings.tol * point.objective if point.objective > 0 else settings.tol
            if point.gap <= enough:
                verdict = status.CONVERGED
            elif stop:
                verdict = status.STOPPED
            elif steps >= settings.max_iter:
                verdict = status.ITERATION_LIMIT
            elif late:
                verdict = status.TIME_LIMIT
            elif idle > MOST_IDLE or not np.isfinite(point.gap):
                verdict = status.NO_PROGRESS
            if verdict is not None:
                return verdict
            error = np.linalg.norm(point.gradient) / np.sqrt(n)
            moved = np.linalg.norm(self.B - self.V) / np.sqrt(sigma)
            rounding = 1e-14 * np.linalg.norm(self.targets) / np.sqrt(n)
            if (inner > 0 and error <= moved) or error <= rounding:
                self.V = self.B
                sigma, inner = min(sigma * GROWTH, LARGEST_SIGMA * self.unit), 0
            else:
                self._step(directions, point, alpha, sigma)
                steps, inner = steps + 1, inner + 1

    def _scale(self, alpha: float) -> None:
        """From u, to where no gate leaves 0: Newton's steps then take up one gate after another."""
        longest = float(np.sqrt(np.einsum("pk,pk->p", self.C, self.C).max()))
        share = min(1.0, alpha * self.rho / max(longest, 1e-300))
        self.u = self.u * share
        self.C = self.C * share

    def _point(self, alpha: float, sigma: float) -> Point:
        B, shares = _proximal(
            self.V, self.C, sigma, sigma * alpha * self.rho, self._shrink(alpha, sigma)
        )
        R = self._residual(B)
        return Point(B, shares, self.u - R, *self._certified(B, R, alpha))

    def _shrink(self, alpha: float, sigma: float) -> float:
        return 1 / (1 + sigma * alpha * (1 - self.rho))

    def _step(self, directions: NewtonDirections, point: Point, alpha: float, sigma: float) -> None:
        """Newton's step."""
        A, n, shrink = self.gates, self.gates.n, self._shrink(alpha, sigma)
        # Rounding that is not centred may be larger than the direction.
        gradient = A.centred(point.gradient)
        direction = directions(point.shares, point.B, gradient, sigma * shrink / n)
        delta = -A.centred(direction)
        change = A.adjoint(delta)
        a = _best_step(
            *(self.V, self.C, change, sigma, sigma * alpha * self.rho, shrink),
            float(np.vdot(delta, self.u - self.targets)) / n,
            float(np.vdot(delta, delta)) / n,
        )
        self.u += a * delta
        self.C += a * change


@numba.njit(cache=True, nogil=True)
def _proximal(V, C, sigma, t, shrink):  # type: ignore[no-untyped-def]
    """prox(V + sigma C), and the shares s of its gates."""
    p, k = V.shape
    B, shares = np.empty((p, k)), np.zeros(p)
    for g in range(p):
        square = 0.0
        for i in range(k):
            B[g, i] = V[g, i] + sigma * C[g, i]
            square += B[g, i] * B[g, i]
        length = np.sqrt(square)
        if length > t * OVER:
            shares[g] = 1 - t / length
        B[g] *= shares[g] * shrink
    return B, shares


@numba.njit(cache=True, nogil=True)
def _best_step(V, C, change, sigma, t, shrink, linear, quadratic):  # type: ignore[no-untyped-def]
    """Step a with linear + a quadratic + <prox(V + sigma (C + a change)), change> close to 0.

    The slope of a convex function, negative at 0: Newton's method within a bracket.
    """
    low, high, a = 0.0, np.inf, 1.0
    first = _slope(V, C, change, sigma, t, shrink, 0.0)[0] + linear
    for _ in range(TRIALS):
        slope, curvature = _slope(V, C, change, sigma, t, shrink, a)
        slope += linear + a * quadratic
        if abs(slope) <= SLOPE_LEFT * abs(first):
            break
        if slope > 0:
            high = a
        else:
            low = a
        a -= slope / (curvature + quadratic)
        if not low < a < high:
            a = (low + high) / 2 if high < np.inf else 2 * low
    return a


@numba.njit(cache=True, nogil=True)
def _slope(V, C, change, sigma, t, shrink, a):  # type: ignore[no-untyped-def]
    """<prox(V + sigma (C + a change)), change> and its derivative by a."""
    slope, curvature = 0.0, 0.0
    for g in range(len(V)):
        square, inner, own = 0.0, 0.0, 0.0
        for i in range(V.shape[1]):
            w = V[g, i] + sigma * (C[g, i] + a * change[g, i])
            square += w * w
            inner += w * change[g, i]
            own += change[g, i] * change[g, i]
        length = np.sqrt(square)
        if length > t * OVER:
            s = 1 - t / length
            slope += shrink * s * inner
            curvature += shrink * sigma * (s * own + (1 - s) * inner * inner / square)
    return slope, curvature
