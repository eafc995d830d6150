"""What a solver returns: the weights, the certificate, and why it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

CONVERGED = "converged"
ITERATION_LIMIT = "iteration limit"
TIME_LIMIT = "time limit"
STOPPED = "stopped by callback"
NO_PROGRESS = "no progress"


@dataclass(frozen=True)
class Trace:
    """What happened along a solve, one entry for each time that the gap was computed.

    Attributes
    ----------
    iteration, objective, gap, active_gates, violation, seconds : ndarray
        ``gap`` is the relative duality gap of that iterate with the best dual point so far;
        ``violation`` that of the cones before the iterate was moved into them (0 for gated
        ReLU); ``seconds`` since the start.
    """

    iteration: np.ndarray
    objective: np.ndarray
    gap: np.ndarray
    active_gates: np.ndarray
    violation: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.iteration)

    def __repr__(self) -> str:
        return f"Trace({len(self)} points)"

    def after(self, before: Trace) -> Trace:
        """Put the trace behind another, whose iterations and seconds go on."""
        if len(before) == 0:
            return self
        past = {"iteration": before.iteration[-1], "seconds": before.seconds[-1]}
        return Trace(
            *(
                np.concatenate([values, getattr(self, name) + past.get(name, 0)])
                for name, values in vars(before).items()
            )
        )


@dataclass(frozen=True)
class Solution:
    """A solution of a convex programme and its certificate.

    Attributes
    ----------
    V : ndarray of shape (p, d, c), or (2, p, d, c) for ReLU networks
        Weights, in the units of X; for ReLU networks V, then U.
    intercept : ndarray of shape (c,)
    alpha : float
    objective : float
        P(V, b).
    duality_gap : float
        Absolute: P(V, b) - P* is at most this; infinite without a penalty.
    kkt_residual : float
        How far V is from the first-order conditions (see ``KKTResidual``); for ReLU networks the
        larger of that and the relative complementarity <V, X^T S Lambda> / P(V, b).
    violation : float
        Largest relative violation of the cones by V; 0 for gated ReLU.
    n_iter : int
    seconds : float
    status : str
        "converged", "iteration limit", "time limit" or "stopped by callback".
    trace : Trace
    """

    V: np.ndarray = field(repr=False)
    intercept: np.ndarray = field(repr=False)
    alpha: float
    objective: float
    duality_gap: float
    kkt_residual: float
    violation: float
    n_iter: int
    seconds: float
    status: str
    trace: Trace = field(repr=False)

    @property
    def converged(self) -> bool:
        """Whether the gap (without a penalty the KKT residual) is within the tolerance."""
        return self.status == CONVERGED

    @property
    def relative_gap(self) -> float:
        """Duality gap divided by the objective; the absolute gap where the objective is 0."""
        return relative(self.duality_gap, self.objective)

    @property
    def n_active_gates(self) -> int:
        """Number of gates with V[j] != 0 (or U[j] != 0)."""
        sides = tuple(axis for axis in range(self.V.ndim) if axis != self.V.ndim - 3)
        return int(self.V.any(axis=sides).sum())

    def after(self, before: Solution) -> Solution:
        """Add the iterations, seconds and trace of the solution that this one went on from."""
        return replace(
            self,
            n_iter=before.n_iter + self.n_iter,
            seconds=before.seconds + self.seconds,
            trace=self.trace.after(before.trace),
        )

    def later(self, seconds: float) -> Solution:
        """Add seconds in which the solve was prepared."""
        trace = replace(self.trace, seconds=self.trace.seconds + seconds)
        return replace(self, seconds=self.seconds + seconds, trace=trace)

    @property
    def message(self) -> str:
        """Why the solver stopped, in a sentence."""
        reached = (
            f"relative duality gap {self.relative_gap:.1e}"
            if np.isfinite(self.duality_gap)
            else f"KKT residual {self.kkt_residual:.1e}"
        )
        return f"{self.status} after {self.n_iter} iterations and {self.seconds:.2f} s, {reached}"


def relative(gap: float, objective: float) -> float:
    """Gap divided by the objective; the gap itself where the objective is 0."""
    return gap / objective if objective > 0 else gap
