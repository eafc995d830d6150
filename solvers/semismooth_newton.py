"""Semismooth Newton's method on the augmented Lagrangian of the dual of gated ReLU programmes.

For the squared loss and penalties of gates' lengths, each output by itself or all together,

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
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeGuard

import numba
import numpy as np

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.extrapolation import ahead, share_ahead
from cvxdistill.solvers.first_order_start import FirstOrderStart
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.newton_directions import NewtonDirections
from cvxdistill.solvers.parts import PartwiseSolve, Watch
from cvxdistill.solvers.penalties import GatePenalty, NeuronPenalty
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem
from cvxdistill.solvers.scaled_gates import ScaledGates
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, Solver, check_alpha, continued
from cvxdistill.solvers.threads import one_blas_thread

# sigma at first, in units of one over the mean square of the gated features; then times GROWTH.
FIRST_SIGMA, GROWTH, LARGEST_SIGMA = 20.0, 10.0, 1e12
# Of the line search: the share of its slope that may be left, and most trials.
SLOPE_LEFT, TRIALS = 0.1, 40
# By how much a length is beyond its threshold, and not by rounding.
OVER = 1 + 1e-13
# Newton's steps without a smaller gap after which rounding is all that is left.
MOST_IDLE = 50


def has_gate_lengths(problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
    """Whether a programme is one of these: squared loss, a penalty of gates' lengths."""
    return (
        isinstance(problem, GatedReLUProblem)
        and isinstance(problem.loss.loss, SquaredLoss)
        and isinstance(problem.regularizer.penalty, (NeuronPenalty, GatePenalty))
        and problem.regularizer.l1_ratio > 0
    )


@dataclass(frozen=True, kw_only=True)
class SemismoothNewton(Solver):
    """Semismooth Newton's method on the dual, for gated ReLU with squared loss.

    For the penalties "neuron" and "gate" (with a share of ridge or none). It certifies small gaps
    in some tens of Newton's steps however small alpha is. Each factorises a matrix of the examples
    or of the features of the gates that are not zero, whichever is cheaper; where both are beyond
    some thousands, R-FISTA is faster. Where a step costs many of R-FISTA's, these come first, until
    they are seen not to end sooner.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol times the objective.
    max_iter : int, default=1000
        Newton's steps, for each output where these are programmes of their own; of R-FISTA's before
        them as many at most.
    time_limit : float, optional
        Seconds.
    verbose : int, default=0
        1 shows a progress bar.

    References
    ----------
    Li, Sun and Toh 2018; Zhang, Zhang, Sun and Toh 2020.
    """

    max_iter: int = 1000

    def successive(self, problem: ConvexProblem) -> Callable[[float, Callback | None], Solution]:
        """A function of alpha and callback that solves from where its last call ended.

        It keeps what a call has computed of gates and examples.
        """
        steps = NewtonSolve(self, _checked(problem), problem.zeros())

        def solve(alpha: float, callback: Callback | None) -> Solution:
            check_alpha(alpha)
            with one_blas_thread():
                return steps.solve(float(alpha), callback)

        return solve

    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        return NewtonSolve(self, _checked(problem), V).solve(alpha, callback)


def _checked(problem: ConvexProblem) -> GatedReLUProblem:
    if not has_gate_lengths(problem):
        raise ValueError(
            "SemismoothNewton solves gated ReLU programmes with squared loss and the penalty "
            f"'neuron' or 'gate', got {problem!r}."
        )
    return problem


# The last proximal point B and u of a part.
End = tuple[np.ndarray, np.ndarray]


class NewtonSolve(PartwiseSolve):
    """A programme, where its solution stands, and how to go on for an alpha.

    Parameters
    ----------
    settings : SemismoothNewton
    problem : GatedReLUProblem
    V : ndarray of shape (p, d, c)
        Where to start.
    """

    def __init__(self, settings: SemismoothNewton, problem: GatedReLUProblem, V: np.ndarray):
        self.gated, gates = problem, ScaledGates(problem)
        rho = problem.regularizer.l1_ratio
        self.newton = [DualNewton(settings, gates, columns, rho, V) for columns in problem.parts]
        # Alphas of the last two solves, and where their parts ended.
        self._past: list[tuple[float, list[End]]] = []
        super().__init__(settings, problem, problem.parts, list(self.newton))

    def solve(self, alpha: float, callback: Callback | None) -> Solution:
        """Solve from where the last call ended, or from the line through the last two ends."""
        if len(self._past) == 2:
            (before, older), (last, newer) = self._past
            share = share_ahead(alpha, last, before)
            for part, first, second in zip(self.newton, older, newer, strict=True):
                part.extrapolate(first, second, share)
        found = self._solve(alpha, callback)
        self._past = [*self._past[-1:], (alpha, [part.end for part in self.newton])]
        return found

    def _solve(self, alpha: float, callback: Callback | None) -> Solution:
        """R-FISTA for as long as it pays, then Newton's method for one part after another."""
        start = FirstOrderStart(self.settings, self.gated, alpha, self.weights(), callback)
        if start.solution is None:
            return super().solve(alpha, callback)
        V = self.gated.weights_from_user(start.solution.V)
        for part in self.newton:
            part.move(V)
        if start.done:
            return start.solution
        then = continued(callback, start.solution)
        return self.advance(alpha, then, start.time_left).after(start.solution)


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
    settings : SemismoothNewton
    gates : ScaledGates
        Shared by the parts.
    outputs : slice
    l1_ratio : float
    V : ndarray of shape (p, d, c)
        Where to start, of all outputs.
    """

    def __init__(
        self,
        settings: SemismoothNewton,
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
        self.directions = NewtonDirections(gates)
        self.move(V)

    def move(self, V: np.ndarray) -> None:
        """Go to weights (p, d, c) of all outputs, with their residual for a dual point."""
        # The multipliers V of the augmented Lagrangian, and the last proximal point B.
        self.V = self.B = self.gates.flat(V[:, :, self.outputs])
        self.u = self._residual(self.B)
        self.C = self.gates.adjoint(self.u)

    @property
    def end(self) -> End:
        """Where the last solve ended."""
        return self.B, self.u.copy()

    def extrapolate(self, before: End, last: End, share: float) -> None:
        """To last + share (last - before), unless the share is 0."""
        if share > 0:
            self.V = self.B = ahead(last[0], before[0], share)
            self.u = last[1] + share * (last[1] - before[1])
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
        self.directions.renew()
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
                self._step(point, alpha, sigma)
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

    def _step(self, point: Point, alpha: float, sigma: float) -> None:
        """Newton's step."""
        A, n, shrink = self.gates, self.gates.n, self._shrink(alpha, sigma)
        # Rounding that is not centred may be larger than the direction.
        gradient = A.centred(point.gradient)
        direction = self.directions(point.shares, point.B, gradient, sigma * shrink / n)
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
