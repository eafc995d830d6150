"""The driver: what every iterative solver shares.

A solver says how to start and how to take one step. The driver owns the iteration and time
limits, the certificate, the trace, the callback, the progress bar and the verdict.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.certificate import DualCertificate
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.solution import Solution, Trace, relative
from cvxdistill.solvers.threads import one_blas_thread


@dataclass
class State:
    """Where a solver stands.

    Attributes
    ----------
    V : ndarray of shape (p, d, c)
        Weights, in the solver's units.
    Z : ndarray of shape (n, c)
        Their predictions, without intercept.
    R, C : ndarray of shapes (n, c) and (p, d, c)
        The last residual that the solver computed, anywhere near V, and A^T R / n: a direction
        for a dual point.
    """

    V: np.ndarray
    Z: np.ndarray
    R: np.ndarray
    C: np.ndarray


@dataclass(frozen=True)
class Progress:
    """What a callback is told.

    Attributes
    ----------
    iteration : int
    objective : float
    gap : float
        Relative duality gap.
    active_gates : int
    seconds : float
    """

    iteration: int
    objective: float
    gap: float
    active_gates: int
    seconds: float


Callback = Callable[[Progress], Any]


@dataclass(frozen=True, kw_only=True)
class Solver(ABC):
    """Settings that all solvers share; subclasses add ``init`` and ``step``.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol * P(V).
    max_iter : int, default=10_000
    time_limit : float, optional
        Seconds.
    check_every : int, default=20
        Iterations between two computations of the gap.
    verbose : int, default=0
        1 shows a progress bar.
    """

    tol: float = 1e-4
    max_iter: int = 10_000
    time_limit: float | None = None
    check_every: int = 20
    verbose: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.tol, (int, float)) and self.tol >= 0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}.")
        for name in ("max_iter", "check_every"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive or None, got {self.time_limit!r}.")

    @abstractmethod
    def init(self, problem: GatedReLUProblem, alpha: float, V: np.ndarray) -> Any:
        """Return the state at weights V (in the solver's units)."""

    @abstractmethod
    def step(self, problem: GatedReLUProblem, alpha: float, state: Any) -> Any:
        """Return the state one iteration later."""

    def solve(
        self,
        problem: GatedReLUProblem,
        alpha: float,
        *,
        warm_start: Solution | np.ndarray | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Minimise L(Z, Y) + alpha * sum_j R(V[j]) to a certified relative duality gap.

        Parameters
        ----------
        problem : GatedReLUProblem
        alpha : float
            Regularisation strength, positive.
        warm_start : Solution or array of shape (p, d, c), optional
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
        _check_alpha(alpha)
        if warm_start is None:
            V = problem.zeros()
        else:
            V = problem.weights_from_user(getattr(warm_start, "V", warm_start))
        with one_blas_thread():
            return self._run(problem, float(alpha), V, callback)

    def _run(
        self, problem: GatedReLUProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        start = time.perf_counter()
        certificate = DualCertificate(problem, alpha)
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
                    b = problem.intercept(state.Z)
                    certificate.offer(state.R, state.C)
                    certificate.offer_corrected(state.R, state.C, state.V)
                    gap = certificate.gap(state.V, state.Z, b)
                    objective = problem.loss.value(state.Z + b, problem.Y)
                    objective += alpha * problem.regularizer.value(state.V)
                    now = Progress(
                        iteration,
                        objective,
                        relative(gap, objective),
                        int(state.V.any(axis=(1, 2)).sum()),
                        time.perf_counter() - start,
                    )
                    history.append(now)
                    bar.set_postfix_str(f"gap {now.gap:.1e}, {now.active_gates} gates", False)
                    verdict = self._verdict(now, callback)
                    if verdict is not None:
                        break
                state = self.step(problem, alpha, state)
                iteration += 1
                bar.update()
        columns = zip(*map(astuple, history), strict=True)
        return Solution(
            V=problem.weights_to_user(state.V),
            intercept=b,
            alpha=alpha,
            objective=objective,
            duality_gap=gap,
            n_iter=iteration,
            seconds=time.perf_counter() - start,
            status=verdict,
            trace=Trace(*map(np.array, columns)),
        )

    def _verdict(self, now: Progress, callback: Callback | None) -> str | None:
        """Why to stop here, or None."""
        stop = callback is not None and callback(now)
        if now.gap <= self.tol:
            return status.CONVERGED
        if stop:
            return status.STOPPED
        if now.iteration == self.max_iter:
            return status.ITERATION_LIMIT
        if self.time_limit is not None and now.seconds > self.time_limit:
            return status.TIME_LIMIT
        return None


def _check_alpha(alpha: float) -> None:
    if not isinstance(alpha, (int, float, np.number)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}.")
