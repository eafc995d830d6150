"""What all solvers share, and the driver of the iterative ones.

An iterative solver says how to start and how to take one step. The driver owns the iteration and
time limits, the certificate, the trace, the callback, the progress bar and the verdict.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.certificate import DualCertificate, KKTResidual
from cvxdistill.solvers.extrapolation import LastTwo
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.solution import Solution, Trace, relative
from cvxdistill.solvers.threads import one_blas_thread


@dataclass
class State:
    """Where a solver stands.

    Attributes
    ----------
    V : ndarray of shape (blocks, d, c)
        Weights, in the solver's units.
    Z : ndarray of shape (n, c)
        Their predictions, without intercept.
    R, C : ndarray of shapes (n, c) and (blocks, d, c)
        The last residual that the solver computed, anywhere near V, and A^T R / n: a direction
        for a dual point.
    M : ndarray of shape (blocks, d, c), optional
        X^T S_j Lambda_j with the solver's multipliers Lambda >= 0 of the cones of a ReLU network.
    """

    V: np.ndarray
    Z: np.ndarray
    R: np.ndarray
    C: np.ndarray
    M: np.ndarray | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Progress:
    """What a callback is told.

    Attributes
    ----------
    iteration : int
    objective : float
    gap : float
        Relative duality gap; infinite without a penalty.
    active_gates : int
        Blocks of weights that are not zero.
    violation : float
        Of the cones, before the iterate is moved into them; 0 for gated ReLU.
    seconds : float
    """

    iteration: int
    objective: float
    gap: float
    active_gates: int
    violation: float
    seconds: float


Callback = Callable[[Progress], Any]


def continued(callback: Callback | None, n_iter: int, seconds: float) -> Callback | None:
    """The callback for what goes on after so many iterations and seconds, which are added."""
    if callback is None:
        return None

    def go_on(progress: Progress) -> Any:
        return callback(
            replace(
                progress,
                iteration=n_iter + progress.iteration,
                seconds=seconds + progress.seconds,
            )
        )

    return go_on


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Settings that all solvers share, and the checks of what they are given.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol * P(V), or, without a penalty, the KKT residual
        at most tol.
    max_iter : int, default=10_000
    time_limit : float, optional
        Seconds.
    verbose : int, default=0
        1 shows a progress bar.
    """

    tol: float = 1e-4
    max_iter: int = 10_000
    time_limit: float | None = None
    verbose: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.tol, (int, float)) and self.tol >= 0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}.")
        check_count("max_iter", self.max_iter)
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive or None, got {self.time_limit!r}.")

    def solve(
        self,
        problem: ConvexProblem,
        alpha: float,
        *,
        warm_start: Solution | np.ndarray | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Minimise L(Z, Y) + alpha * sum_j R(V[j]) to a certified relative duality gap.

        Parameters
        ----------
        problem : ConvexProblem
            ``GatedReLUProblem`` or ``ReLUProblem``.
        alpha : float
            Regularisation strength, positive.
        warm_start : Solution or array of the shape of the weights, optional
            Start here instead of at zero.
        callback : callable, optional
            Called with a ``Progress`` each time that the gap is computed; a true return stops.

        Returns
        -------
        Solution

        Raises
        ------
        ValueError
            If alpha is not positive and finite, the warm start does not fit, or the rows of a row
            source are not finite.
        """
        check_alpha(alpha)
        if warm_start is None:
            V = problem.zeros()
        else:
            V = problem.weights_from_user(getattr(warm_start, "V", warm_start))
        with one_blas_thread():
            return self._run(problem, float(alpha), V, callback)

    def successive(self, problem: ConvexProblem) -> Callable[[float, Callback | None], Solution]:
        """A function of alpha and callback that solves from where its last calls ended.

        Where alphas decrease slowly it starts on the line through the last two solutions.
        """
        past = LastTwo()

        def solve(alpha: float, callback: Callback | None) -> Solution:
            (start,) = past.ahead(alpha) or past.last() or (None,)
            found = self.solve(problem, alpha, warm_start=start, callback=callback)
            past.add(alpha, found.V)
            return found

        return solve

    @abstractmethod
    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        """Solve from V, in the solver's units."""


@dataclass(frozen=True, kw_only=True)
class IterativeSolver(Solver):
    """A solver that goes step by step; subclasses add ``init`` and ``step``.

    Parameters
    ----------
    tol, max_iter, time_limit, verbose
        As for every solver.
    check_every : int, default=20
        Iterations between two computations of the gap.
    """

    check_every: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("check_every", self.check_every)

    @abstractmethod
    def init(self, problem: Any, alpha: float, V: np.ndarray) -> Any:
        """Return the state at weights V (in the solver's units)."""

    @abstractmethod
    def step(self, problem: Any, alpha: float, state: Any) -> Any:
        """Return the state one iteration later."""

    def seen(self, state: Any) -> State:
        """The state in the problem's weights, for those that step in others: itself."""
        found: State = state
        return found

    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        start = time.perf_counter()
        certificate, kkt = DualCertificate(problem, alpha), KKTResidual(problem, alpha)
        certified = problem.regularizer.bounds_the_dual
        state = self.init(problem, alpha, V)
        if not np.isfinite(state.C).all():
            # A row source is not scanned for these, and no line search would end.
            raise ValueError("X must be finite: its products with the residual are not.")
        history: list[Progress] = []
        iteration = 0
        bar = tqdm(
            total=self.max_iter, disable=not self.verbose, desc=type(self).__name__, leave=False
        )
        with bar:
            while True:
                late = self.time_limit is not None and time.perf_counter() - start > self.time_limit
                if iteration % self.check_every == 0 or iteration == self.max_iter or late:
                    seen = self.seen(state)
                    W = problem.feasible(seen.V)
                    Z = seen.Z if W is seen.V else problem.forward(W)
                    b = problem.intercept(Z)
                    objective = problem.loss.value(Z + b) + alpha * problem.regularizer.value(W)
                    C = problem.with_multipliers(seen.C, seen.M, alpha)
                    certificate.offer(seen.R, C)
                    share = None if C is seen.C else C - seen.C
                    certificate.offer_corrected(seen.R, seen.C, W, share)
                    gap = certificate.gap(W, Z, b)
                    now = Progress(
                        iteration,
                        objective,
                        relative(gap, objective),
                        int(W.any(axis=(1, 2)).sum()),
                        problem.violation(seen.V),
                        time.perf_counter() - start,
                    )
                    history.append(now)
                    bar.set_postfix_str(f"gap {now.gap:.1e}, {now.active_gates} gates", False)
                    error = now.gap if certified else _kkt(problem, kkt, W, Z, seen.M, objective)
                    verdict = self._verdict(now, error, callback)
                    if verdict is not None:
                        break
                state = self.step(problem, alpha, state)
                iteration += 1
                bar.update()
        columns = zip(*(vars(now).values() for now in history), strict=True)
        return Solution(
            V=problem.weights_to_user(W),
            intercept=b,
            alpha=alpha,
            objective=objective,
            duality_gap=gap,
            kkt_residual=_kkt(problem, kkt, W, Z, seen.M, objective),
            violation=problem.violation(W),
            n_iter=iteration,
            seconds=time.perf_counter() - start,
            status=verdict,
            trace=Trace(*map(np.array, columns)),
        )

    def _verdict(self, now: Progress, error: float, callback: Callback | None) -> str | None:
        """Why to stop here, or None."""
        stop = callback is not None and callback(now)
        if error <= self.tol:
            return status.CONVERGED
        if stop:
            return status.STOPPED
        if now.iteration == self.max_iter:
            return status.ITERATION_LIMIT
        if self.time_limit is not None and now.seconds > self.time_limit:
            return status.TIME_LIMIT
        return None


def _kkt(
    problem: ConvexProblem,
    kkt: KKTResidual,
    W: np.ndarray,
    Z: np.ndarray,
    M: np.ndarray | None,
    objective: float,
) -> float:
    """KKT residual at W with predictions Z and the multipliers' share M."""
    C = problem.adjoint(problem.residual(Z))
    with_M = problem.with_multipliers(C, M)
    complementarity = abs(float(np.sum(W * (with_M - C), dtype=np.float64)))
    return max(kkt(W, with_M), relative(complementarity, objective))


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless the setting of that name is a positive integer."""
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def check_alpha(alpha: float) -> None:
    """Raise TypeError or ValueError unless alpha is positive and finite."""
    if not isinstance(alpha, (int, float, np.number)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}.")
