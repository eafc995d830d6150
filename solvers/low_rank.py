"""Newton's method for the programme with the nuclear penalty, in factored form and certified.

At a stationary point of the factored programme (``low_rank_problem.py``) the residual R is an
optimal dual point of the convex one exactly if no C_j = A_j^T R / n has a singular value above
alpha, for any gate, used or not. So the method alternates: Newton steps on the units that there
are (``low_rank_newton.py``), and new units along the singular pairs above alpha, until the
duality gap says that none is missing.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.low_rank_newton import Hessian, gradient, newton_direction, step_length
from cvxdistill.solvers.low_rank_operator import LowRankOperator
from cvxdistill.solvers.low_rank_problem import (
    Factors,
    LowRankProblem,
    Point,
    SingularPairs,
    balanced,
    duality_gap,
    leading_pairs,
)
from cvxdistill.solvers.network import Neurons
from cvxdistill.solvers.path import SolutionPath, decreasing_alphas
from cvxdistill.solvers.solution import relative
from cvxdistill.solvers.threads import one_blas_thread

NEURON_LIMIT = "stationary with max_neurons"
# Units in the first growth; later ones at most double their number.
FIRST_UNITS = 64
# New units are due once what they can bring is more than this share of the last step's decrease.
WORTHWHILE = 0.03
# At the limit of units: a step that lowers the objective by less than this share of the tolerance.
SETTLED = 0.1
# Relative changes of the objective that mean nothing. The gap still falls then: it is of first
# order in the distance to the optimum, the objective of second.
ROUNDING = 1e-13
# Conjugate gradients: relative residual, and most products in one step, with new units and without.
CG_TOL, MOST_PRODUCTS = 0.1, (15, 30)
# Steps without progress, one after the other, that end a solve.
MOST_STALLED = 3


@dataclass(frozen=True)
class LowRankSolution:
    """A network and how far it is from the convex programme's minimum.

    Attributes
    ----------
    neurons : Neurons
        Balanced: V[j] = W1_j W2_j has ||W1_j||^2 = ||W2_j||^2 = ||V[j]||_*.
    intercept : ndarray of shape (c,)
    alpha, objective : float
    duality_gap : float
        Absolute: the objective is above the convex minimum by at most this.
    globally_optimal : bool
        Whether the relative gap is within the tolerance.
    n_iter : int
        Newton steps.
    seconds : float
    status : str
        "converged", "stationary with max_neurons", "iteration limit", "time limit", or "no
        progress", where rounding keeps the gap above the tolerance.
    """

    neurons: Neurons
    intercept: np.ndarray = field(repr=False)
    alpha: float
    objective: float
    duality_gap: float
    globally_optimal: bool
    n_iter: int
    seconds: float
    status: str

    @property
    def rank(self) -> int:
        """Number of hidden units: the sum of the ranks of all V[j]."""
        return len(self.neurons)

    @property
    def relative_gap(self) -> float:
        """Duality gap divided by the objective; the absolute gap where the objective is 0."""
        return relative(self.duality_gap, self.objective)

    @property
    def converged(self) -> bool:
        """The same as ``globally_optimal``."""
        return self.globally_optimal


class LowRankPath(SolutionPath[LowRankSolution]):
    """Solutions over decreasing alphas."""

    @property
    def ranks(self) -> np.ndarray:
        """Hidden units of each point."""
        return self._column("rank")


@dataclass(frozen=True, kw_only=True)
class LowRankNewton:
    """Newton's method on the layers of a network of few hidden units, with a duality gap.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol times the objective.
    max_neurons : int, optional
        Most hidden units; with fewer than the optimum has, the solve ends at a stationary point and
        reports its gap.
    max_iter : int, default=500
        Newton steps.
    time_limit : float, optional
        Seconds.
    verbose : int, default=0
        1 shows a progress bar.

    Raises
    ------
    ValueError
        If a setting is out of range.

    References
    ----------
    Burer and Monteiro 2003; Haeffele and Vidal 2015 (local minima with room for one more unit are
    global).
    """

    tol: float = 1e-4
    max_neurons: int | None = None
    max_iter: int = 500
    time_limit: float | None = None
    verbose: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.tol, (int, float)) and self.tol >= 0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}.")
        for name in ("max_neurons", "max_iter"):
            value = getattr(self, name)
            if name == "max_neurons" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive or None, got {self.time_limit!r}.")

    def solve(
        self,
        problem: LowRankProblem,
        alpha: float,
        *,
        warm_start: LowRankSolution | Neurons | None = None,
    ) -> LowRankSolution:
        """Minimise the factored programme to a certified relative duality gap.

        Parameters
        ----------
        problem : LowRankProblem
        alpha : float
        warm_start : LowRankSolution or Neurons, optional
            Start here instead of without units; with more than ``max_neurons`` from the largest.

        Returns
        -------
        LowRankSolution

        Raises
        ------
        TypeError, ValueError
            If an argument does not fit.
        """
        if not isinstance(problem, LowRankProblem):
            raise TypeError(f"problem must be a LowRankProblem, got {type(problem).__name__}.")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float, np.number)):
            raise TypeError(f"alpha must be a number, got {alpha!r}.")
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ValueError(f"alpha must be positive and finite, got {alpha!r}.")
        A = problem.operator
        start = Neurons(np.zeros((A.d, 0)), np.zeros((0, A.c)), np.zeros(0, int))
        if warm_start is not None:
            if not isinstance(warm_start, (Neurons, LowRankSolution)):
                raise TypeError(
                    "warm_start must be Neurons or a LowRankSolution, got "
                    f"{type(warm_start).__name__}."
                )
            start = warm_start if isinstance(warm_start, Neurons) else warm_start.neurons
        return self._run(problem, float(alpha), problem.factors(start))

    def path(self, problem: LowRankProblem, alphas: Any) -> LowRankPath:
        """Solve for each alpha, from the largest down, starting at the solution before."""
        solutions: list[LowRankSolution] = []
        for alpha in decreasing_alphas(alphas):
            last = solutions[-1] if solutions else None
            solutions.append(self.solve(problem, float(alpha), warm_start=last))
        return LowRankPath(solutions)

    def _run(self, problem: LowRankProblem, alpha: float, factors: Factors) -> LowRankSolution:
        start = time.perf_counter()
        most = math.inf if self.max_neurons is None else self.max_neurons
        if len(factors) > most:
            factors = factors.keep(np.sort(np.argsort(-_sizes(factors))[: self.max_neurons]))
        point = problem.evaluate(factors, alpha)
        iteration, stalled, decrease, last_gap, capped = 0, 0, math.inf, math.inf, False
        bar = tqdm(
            total=self.max_iter, disable=not self.verbose, desc=type(self).__name__, leave=False
        )
        # The pools of NumPy's and SciPy's BLAS would wait for each other.
        with bar, one_blas_thread():
            while True:
                pairs = leading_pairs(point.C, alpha)
                gap = duality_gap(point, pairs.largest)
                bar.set_postfix_str(
                    f"gap {relative(gap, point.objective):.1e}, {len(point.factors)} units", False
                )
                if decrease > ROUNDING * point.objective or gap < 0.9 * last_gap:
                    stalled = 0
                else:
                    stalled += 1
                last_gap = min(gap, last_gap)
                # What would be left of the gap were no singular value above alpha.
                distance = abs(alpha * point.decay - point.fit)
                settled = decrease <= SETTLED * self.tol * point.objective and distance < gap / 2
                verdict = self._verdict(point, gap, iteration, start, stalled, capped and settled)
                if verdict is not None:
                    break
                before, units = point.objective, len(point.factors)
                if gap - distance > max(distance, WORTHWHILE * decrease) or iteration == 0:
                    room = min(most - len(point.factors), max(FIRST_UNITS, len(point.factors)))
                    grown = grow(problem, point, pairs, int(room))
                    if grown is not point:
                        point, pairs = grown, leading_pairs(grown.C, alpha)
                capped = len(point.factors) == most
                products = MOST_PRODUCTS[len(point.factors) == units]
                moved = self._newton_step(problem, point, pairs, products)
                if moved.objective <= point.objective * (1 + ROUNDING):
                    point = moved
                decrease = before - point.objective
                iteration += 1
                bar.update()
        neurons = problem.neurons(point.factors)
        return LowRankSolution(
            neurons=neurons,
            intercept=problem.intercept(point.factors).astype(problem.operator.dtype),
            alpha=alpha,
            objective=point.objective,
            duality_gap=gap,
            globally_optimal=verdict == status.CONVERGED,
            n_iter=iteration,
            seconds=time.perf_counter() - start,
            status=verdict,
        )

    def _verdict(
        self,
        point: Point,
        gap: float,
        iteration: int,
        start: float,
        stalled: int,
        limited: bool,
    ) -> str | None:
        """Why to stop here, or None."""
        if gap <= self.tol * point.objective or point.objective == 0:
            return status.CONVERGED
        if limited:
            return NEURON_LIMIT
        if stalled >= MOST_STALLED:
            return status.NO_PROGRESS
        if iteration >= self.max_iter:
            return status.ITERATION_LIMIT
        if self.time_limit is not None and time.perf_counter() - start > self.time_limit:
            return status.TIME_LIMIT
        return None

    def _newton_step(
        self, problem: LowRankProblem, point: Point, pairs: SingularPairs, products: int
    ) -> Point:
        """One Newton direction, an exact step along it, and units that are hardly there removed."""
        if len(point.factors) == 0:
            return point
        A = problem.operator
        hessian = Hessian(A, point, pairs)
        direction, _ = newton_direction(hessian, gradient(point), CG_TOL, products)
        t = step_length(A, point, direction)
        f = point.factors
        factors = balanced(f.U + t * direction[0], f.W + t * direction[1], f.gate)
        moved = problem.evaluate(factors, point.alpha)
        smaller = pruned(problem, moved, 0.01 * self.tol)
        allowed = 0.1 * (point.objective - moved.objective) + ROUNDING * point.objective
        return smaller if smaller.objective - moved.objective <= allowed else moved


def _sizes(factors: Factors) -> np.ndarray:
    """Singular values that balanced units stand for."""
    return (factors.U**2).sum(axis=1)


def pruned(problem: LowRankProblem, point: Point, share: float) -> Point:
    """The point without units whose loss cannot cost more than this share of the objective.

    At a stationary point, units T tau cost 1/2 ||sum_h H_h tau_h||^2 / n at most.
    """
    sizes = _sizes(point.factors)
    lengths = np.sqrt(sizes * np.maximum(np.diagonal(point.K), 0) / 2)
    order = np.argsort(lengths)
    gone = order[np.cumsum(lengths[order]) ** 2 <= share * point.objective]
    if len(gone) == 0:
        return point
    kept = np.ones(len(sizes), dtype=bool)
    kept[gone] = False
    smaller = problem.evaluate(point.factors.keep(kept), point.alpha)
    return smaller


def grow(problem: LowRankProblem, point: Point, pairs: SingularPairs, room: int) -> Point:
    """The point with at most ``room`` new units along singular pairs, of the best sizes t >= 0.

    minimise over t >= 0   -sum_k t_k (sigma_k - alpha) + 1/2 t^T Q t,
    Q_kl = <A u_k w_k^T, A u_l w_l^T> / n
    """
    A, alpha = problem.operator, point.alpha
    slope = pairs.values - alpha
    if room == 0 or not (slope > 0).any():
        return point
    gains = slope**2 / _curvatures(A, pairs)
    chosen = np.argsort(-gains)[:room]
    chosen = np.sort(chosen[gains[chosen] > 1e-3 * gains.max()])
    new = Factors(pairs.U[chosen], pairs.W[chosen], pairs.gate[chosen])
    U = new.U.astype(A.dtype)
    T = A.hidden(U, new.units, every_gate=False)
    Q = A.inner(U, T, T, new.units).astype(np.float64) * (new.W @ new.W.T)
    Q[np.diag_indices(len(Q))] *= 1 + 1e-6
    t = _nonnegative_minimum(Q, slope[chosen], 200)
    good = t > 1e-6 * t.max()
    root = np.sqrt(t[good])[:, None]
    factors = balanced(
        np.vstack([point.factors.U, root * new.U[good]]),
        np.vstack([point.factors.W, root * new.W[good]]),
        np.concatenate([point.factors.gate, new.gate[good]]),
    )
    grown = problem.evaluate(factors, alpha)
    return grown if grown.objective < point.objective else point


def _curvatures(A: LowRankOperator, pairs: SingularPairs) -> np.ndarray:
    """u^T A_j^T A_j u / n of each pair."""
    result = np.empty(len(pairs.values))
    for j in np.unique(pairs.gate):
        mine = pairs.gate == j
        Q, values = A.eigenbasis(int(j))
        U = pairs.U[mine] if Q is None else pairs.U[mine] @ Q
        result[mine] = U**2 @ values
    return np.maximum(result, np.finfo(float).tiny)


@numba.njit(cache=True)
def _nonnegative_minimum(Q, slope, sweeps):  # type: ignore[no-untyped-def]
    """Coordinate descent for min over t >= 0 of -slope t + 1/2 t^T Q t."""
    m = len(slope)
    t = np.zeros(m)
    residual = slope.copy()
    for _ in range(sweeps):
        largest = 0.0
        for k in range(m):
            if Q[k, k] <= 0:
                continue
            new = max(0.0, t[k] + residual[k] / Q[k, k])
            change = new - t[k]
            if change != 0.0:
                t[k] = new
                for i in range(m):
                    residual[i] -= change * Q[i, k]
                largest = max(largest, abs(change) * Q[k, k] / slope[k])
        if largest < 1e-3:
            break
    return t
