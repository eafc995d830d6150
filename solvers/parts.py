"""Programmes that are sums of parts with weights of their own: one part is solved after the other.

With the penalty "neuron", each output of a gated ReLU programme is such a part, unless the loss
couples them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.certificate import KKTResidual
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.solution import Solution, Trace, relative
from cvxdistill.solvers.solver import Callback, Progress, Solver

# Told objective, duality gap and iterations each time that they are known; true to stop.
Watch = Callable[[float, float, int], bool]


class Part(Protocol):
    """Where the solution of a part stands."""

    def certify(self, alpha: float) -> tuple[float, float]:
        """Objective and duality gap."""
        ...

    def advance(self, alpha: float, watch: Watch, time_limit: float | None) -> str:
        """Solve for alpha from here; return the status."""
        ...

    def weights(self) -> np.ndarray:
        """Weights (p, d, outputs of the part), in the solver's units."""
        ...

    def gap_at(self, W: np.ndarray, alpha: float) -> float:
        """Duality gap at other weights, close to these."""
        ...


class PartwiseSolve:
    """The parts of a programme and how to solve them.

    Parameters
    ----------
    settings : Solver
    problem : ConvexProblem
    outputs : list of slice
        The outputs of each part.
    parts : list of Part
    """

    def __init__(
        self, settings: Solver, problem: ConvexProblem, outputs: list[slice], parts: list[Part]
    ):
        self.settings = settings
        self.problem = problem
        self.outputs = outputs
        self.parts = parts

    def solve(self, alpha: float, callback: Callback | None) -> Solution:
        """Solve part after part."""
        return self.advance(alpha, callback, self.settings.time_limit)

    def advance(
        self, alpha: float, callback: Callback | None, time_limit: float | None
    ) -> Solution:
        """The same, with another limit in seconds."""
        start = time.perf_counter()
        # Objective, gap and iterations of each part, and which gates it uses.
        found = np.array([(*part.certify(alpha), 0) for part in self.parts], dtype=np.float64)
        used = np.array([_used_gates(part) for part in self.parts])
        history: list[Progress] = []
        settings, verdict = self.settings, status.CONVERGED
        bar = tqdm(disable=not settings.verbose, desc=type(settings).__name__, leave=False)

        def now() -> Progress:
            objective, gap, iterations = map(float, found.sum(axis=0))
            active = int(used.any(axis=0).sum())
            seconds = time.perf_counter() - start
            gap = relative(gap, objective)
            return Progress(int(iterations), objective, gap, active, 0.0, seconds)

        with bar:
            for k, part in enumerate(self.parts):

                def watch(objective: float, gap: float, iterations: int, k: int = k) -> bool:
                    bar.update(iterations - found[k, 2])
                    found[k] = objective, gap, iterations
                    used[k] = _used_gates(self.parts[k])
                    history.append(now())
                    bar.set_postfix_str(
                        f"gap {history[-1].gap:.1e}, {history[-1].active_gates} gates", False
                    )
                    return callback is not None and bool(callback(history[-1]))

                left = None
                if time_limit is not None:
                    left = max(time_limit - (time.perf_counter() - start), 1e-9)
                ended = part.advance(alpha, watch, left)
                if ended != status.CONVERGED:
                    verdict = ended
                if ended in (status.STOPPED, status.TIME_LIMIT):
                    break
        return self._solution(alpha, verdict, history, start)

    def weights(self) -> np.ndarray:
        """Weights (p, d, c), in the solver's units."""
        if len(self.parts) == 1:
            return self.parts[0].weights()
        W = self.problem.zeros()
        for columns, part in zip(self.outputs, self.parts, strict=True):
            W[:, :, columns] = part.weights()
        return W

    def _solution(
        self, alpha: float, verdict: str, history: list[Progress], start: float
    ) -> Solution:
        """The weights in the type of the data, and what is certified of these."""
        problem = self.problem
        W = problem.zeros()
        W[...] = self.weights()
        Z = problem.forward(W)
        b = problem.intercept(Z)
        objective = problem.loss.value(Z + b) + alpha * problem.regularizer.value(W)
        # Of each part its own: a dual point of all parts together would be scaled by the worst.
        parts = zip(self.parts, self.outputs, strict=True)
        gap = sum(part.gap_at(W[:, :, columns], alpha) for part, columns in parts)
        enough = self.settings.tol * objective if objective > 0 else self.settings.tol
        if gap <= enough:
            verdict = status.CONVERGED
        elif verdict == status.CONVERGED:
            verdict = status.NO_PROGRESS
        columns = zip(*(vars(now).values() for now in history), strict=True)
        return Solution(
            V=problem.weights_to_user(W),
            intercept=b,
            alpha=alpha,
            objective=objective,
            duality_gap=gap,
            kkt_residual=KKTResidual(problem, alpha)(
                W, problem.adjoint(problem.loss.residual(Z + b))
            ),
            violation=0.0,
            n_iter=history[-1].iteration,
            seconds=time.perf_counter() - start,
            status=verdict,
            trace=Trace(*map(np.array, columns)),
        )


def _used_gates(part: Part) -> np.ndarray:
    """Which gates have weights, (p,)."""
    return np.asarray(part.weights().any(axis=(1, 2)))
