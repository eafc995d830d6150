"""R-FISTA: accelerated proximal gradient with restarts and a line search.

References
----------
Beck and Teboulle 2009 (FISTA with backtracking); O'Donoghue and Candes 2015 (restarts);
Mishkin, Sahiner and Pilanci 2022, section 4 and appendix (the combination, for this problem).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

import numpy as np

from cvxdistill.solvers.cone_projector import ConeProjector
from cvxdistill.solvers.gated_operator import products_work
from cvxdistill.solvers.principal_metric import (
    PrincipalComposite,
    has_principal_metric,
    principal_metric_pays,
)
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, IterativeSolver, Progress, State, continued
from cvxdistill.solvers.triangular_form import (
    TriangularOperator,
    triangular_form_pays,
    triangular_work,
)

# The smallest gap that is sought in single precision, and what is left of a larger tol for later;
# operations of an iteration from which on that is much faster, and bytes of a copy of X.
SINGLE_TOL, EARLY_SHARE = 1e-6, 0.9
DEAR, MOST_COPIED = 3e7, 2**30
# Looks at the gap in single precision that find none smaller, after which it is over.
MOST_IDLE = 10


class Composite(Protocol):
    """A smooth function of predictions A W and a penalty: all that R-FISTA asks for."""

    def prox(self, W: np.ndarray, s: float) -> np.ndarray:
        """argmin over V of 1/2 ||V - W||^2 + s alpha Omega(V), within any constraints."""
        ...

    def forward(self, W: np.ndarray) -> np.ndarray:
        """A W."""
        ...

    def residual(self, Z: np.ndarray) -> np.ndarray:
        """R such that C = adjoint(R) is minus the gradient in W."""
        ...

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """C, of the shape of W."""
        ...

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray) -> float:
        """Bregman distance of the smooth function from Z to Z_new."""
        ...


class PlainComposite:
    """A programme without constraints."""

    def __init__(self, problem: ConvexProblem, alpha: float):
        self.problem = problem
        self.alpha = alpha

    def prox(self, W: np.ndarray, s: float) -> np.ndarray:
        """Proximal operator of s alpha Omega."""
        return self.problem.regularizer.prox(W, s * self.alpha)

    def forward(self, W: np.ndarray) -> np.ndarray:
        """A W."""
        return self.problem.forward(W)

    def residual(self, Z: np.ndarray) -> np.ndarray:
        """-n grad L at the best intercept."""
        return self.problem.residual(Z)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """A^T R / n."""
        return self.problem.adjoint(R)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray) -> float:
        """Bregman distance of the loss."""
        return self.problem.bregman(Z_new, Z)


class ConeComposite(PlainComposite):
    """The programme of a ReLU network, whose proximal steps end in the cones.

    For a penalty of lengths the proximal operator is that of the penalty after the projection on
    to the cones. A column w + s M, M = X^T S_j Lambda_j with the multipliers of an earlier
    projection, is no shorter than the projection of w; if the penalty makes it 0, nothing
    has to be projected.
    """

    def __init__(self, problem: ReLUProblem, alpha: float):
        super().__init__(problem, alpha)
        if not problem.regularizer.of_lengths:
            raise ValueError(
                "RFISTA solves ReLU programmes whose penalty is of lengths of columns (neuron, "
                f"gate, ridge, none), got {problem.regularizer}; use AugmentedLagrangian or ADMM."
            )
        self.projector: ConeProjector = problem.projector()
        self.M = problem.zeros()

    def prox(self, W: np.ndarray, s: float) -> np.ndarray:
        """Projection on to the cones, then proximal operator of s alpha Omega."""
        size = np.asarray(s, W.dtype)
        t = s * self.alpha
        wanted = ~self.problem.regularizer.surely_zero(W + size * self.M, t)
        V = self.projector(W, wanted)
        shares = np.where(wanted[:, None, :], (V - W) / size, self.M)
        self.M = shares
        return self.problem.regularizer.prox(V, t)


@dataclass
class FISTAState(State):
    """State of R-FISTA: W is the extrapolated point and ZW its predictions."""

    composite: Composite
    W: np.ndarray
    ZW: np.ndarray
    t: float
    step_size: float


@dataclass(frozen=True, kw_only=True)
class RFISTA(IterativeSolver):
    """FISTA with restarts on the gradient mapping and a two-way line search.

    From the extrapolated point W, with C = -grad L(W) and step size s,

        V+ = prox_{s alpha Omega}(W + s C)

    is accepted when the quadratic upper bound holds,
    L(V+) <= L(W) - <C, V+ - W> + ||V+ - W||^2 / (2 s); otherwise s is multiplied by ``backtrack``.
    When the bound is loose by a factor of ``looseness`` or more, s grows by ``growth`` for the
    next step. Momentum restarts when <W - V+, V+ - V> > 0.

    Gated ReLU programmes of large float64 arrays are solved in single precision first, to tol or
    1e-6, and go on from there in double: mostly a tol of 1e-6 or more is only certified then. Where
    squared loss has far more examples than gated features, these are first summed over the
    examples (``cvxdistill.solvers.triangular_form``), and iterations do not depend on how many
    there are; the end is certified on all of them.

    Parameters
    ----------
    tol, max_iter, time_limit, check_every, verbose
        As for every iterative solver.
    metric : {"auto", "principal", "plain"}
        What lengths of steps are measured in: that of X^T X, for gated ReLU and the penalties
        "neuron" and "gate", which takes fewer steps where features are correlated (see
        ``cvxdistill.solvers.principal_metric``); or the weights'. By default the first where it is
        found at the cost of some steps.
    backtrack : float, default=0.8
    growth : float, default=1.1
    looseness : float, default=10
    """

    metric: str = "auto"
    backtrack: float = 0.8
    growth: float = 1.1
    looseness: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in ("auto", "principal", "plain"):
            raise ValueError(f"metric must be 'auto', 'principal' or 'plain', got {self.metric!r}.")
        if not 0 < self.backtrack < 1:
            raise ValueError(f"backtrack must lie in (0, 1), got {self.backtrack!r}.")
        if not self.growth >= 1:
            raise ValueError(f"growth must be at least 1, got {self.growth!r}.")
        if not self.looseness > 1:
            raise ValueError(f"looseness must exceed 1, got {self.looseness!r}.")

    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        start = time.perf_counter()
        early = self._early_forms(problem) if self.max_iter > 1 else []
        if not early:
            return super()._run(problem, alpha, V, callback)
        principal = self._in_principal_metric(problem)
        settings = replace(self, metric="principal" if principal else "plain")
        done, prepared = 0, time.perf_counter() - start
        past: Solution | None = None
        for form, tol in early:
            rest = settings._after(done, start)
            if rest.max_iter == 1:
                break
            watch = _EarlyWatch(continued(callback, done, time.perf_counter() - start))
            solver = replace(rest, tol=tol, max_iter=rest.max_iter - 1)
            found = IterativeSolver._run(solver, form, alpha, V.astype(form.dtype), watch)
            V = form.weights_from_user(found.V)
            past = found.later(prepared) if past is None else found.after(past)
            done = past.n_iter
            if watch.stopped:
                callback = _stop
                break
        assert past is not None
        then = continued(callback, done, time.perf_counter() - start)
        rest = settings._after(done, start)
        solution = IterativeSolver._run(rest, problem, alpha, V.astype(problem.dtype), then)
        return replace(solution.after(past), seconds=time.perf_counter() - start)

    def _early_forms(self, problem: ConvexProblem) -> list[tuple[GatedReLUProblem, float]]:
        """Cheaper forms of the programme that are solved first, and to which gap."""
        tol = EARLY_SHARE * self.tol
        roughly = max(tol, EARLY_SHARE * SINGLE_TOL)
        form = problem.triangular if triangular_form_pays(problem) else None
        if form is None:
            return [(problem.in_single, roughly)] if single_precision_pays(problem) else []
        single = [(form.in_single, roughly)] if single_precision_pays(form) else []
        return [*single, (form, tol)]

    def _after(self, n_iter: int, start: float) -> RFISTA:
        """What is left of the limits."""
        left = self.time_limit
        if left is not None:
            left = max(left - (time.perf_counter() - start), 1e-9)
        return replace(self, max_iter=self.max_iter - n_iter, time_limit=left)

    def init(self, problem: ConvexProblem, alpha: float, V: np.ndarray) -> FISTAState:
        """Start at V.

        Raises
        ------
        ValueError
            For a ReLU network with a penalty that is not one of lengths of columns, or another
            programme for which there is no principal metric but is asked for.
        """
        if isinstance(problem, ReLUProblem):
            return start(ConeComposite(problem, alpha), problem.feasible(V))
        if self._in_principal_metric(problem):
            principal = PrincipalComposite(problem, alpha)
            return start(principal, principal.from_weights(V))
        return start(PlainComposite(problem, alpha), V)

    def _in_principal_metric(self, problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
        if self.metric == "plain":
            return False
        if has_principal_metric(problem):
            return self.metric == "principal" or principal_metric_pays(problem)
        if self.metric == "auto":
            return False
        raise ValueError(
            "metric='principal' is for gated ReLU programmes with the penalty 'neuron' or 'gate', "
            f"got {problem!r}."
        )

    def seen(self, state: FISTAState) -> State:
        """The state in the problem's weights."""
        composite = state.composite
        if not isinstance(composite, PrincipalComposite):
            return state
        V, C = composite.weights(state.V), composite.gradient(state.C)
        return State(V, state.Z, state.R, C)

    def step(self, problem: ConvexProblem, alpha: float, state: FISTAState) -> FISTAState:
        """One accelerated proximal gradient step."""
        composite = state.composite
        W, ZW = state.W, state.ZW
        R = composite.residual(ZW)
        C = composite.adjoint(R)
        s = state.step_size
        while True:
            V = composite.prox(W + np.asarray(s, W.dtype) * C, s)
            Z = composite.forward(V)
            change = V - W
            length = float(np.vdot(change, change)) / (2 * s)
            curvature = composite.bregman(Z, ZW)
            if curvature <= length * (1 + 1e-6) or length == 0:
                break
            s *= self.backtrack
        next_s = s * self.growth if self.looseness * curvature <= length else s

        direction = V - state.V
        if float(np.vdot(change, direction)) < 0:
            return FISTAState(V, Z, R, C, composite, V, Z, 1.0, next_s, M=_multipliers(composite))
        t = (1 + math.sqrt(1 + 4 * state.t**2)) / 2
        momentum = np.asarray((state.t - 1) / t, V.dtype)
        W = V + momentum * direction
        ZW = Z + momentum * (Z - state.Z)
        return FISTAState(V, Z, R, C, composite, W, ZW, t, next_s, M=_multipliers(composite))


class _EarlyWatch:
    """A callback for what is done in another form first, which also ends it where it stalls."""

    def __init__(self, callback: Callback | None):
        self._callback = callback
        self.stopped = False
        self._best, self._idle = math.inf, 0

    def __call__(self, progress: Progress) -> bool:
        self._idle = 0 if progress.gap < 0.99 * self._best else self._idle + 1
        self._best = min(self._best, progress.gap)
        self.stopped = self._callback is not None and bool(self._callback(progress))
        return self.stopped or self._idle >= MOST_IDLE


def _stop(progress: Progress) -> bool:
    """A callback that ends a solve at its first look."""
    return True


def iteration_work(problem: GatedReLUProblem) -> float:
    """Operations of an iteration, masks and the interpreter among them."""
    A, c = problem.operator, problem.n_outputs
    if triangular_form_pays(problem):
        return triangular_work(A.p * A.d, c)
    return products_work(A.n, A.d, A.p, c)


def single_precision_pays(problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
    """Whether iterations in single precision cost far less and lose nothing but last digits."""
    A = problem.operator
    if not (isinstance(problem, GatedReLUProblem) and problem.regularizer.bounds_the_dual):
        return False
    features = A.F if isinstance(A, TriangularOperator) else A.X
    return (
        isinstance(features, np.ndarray)
        and problem.dtype == np.float64
        and features.nbytes // 2 <= MOST_COPIED
        and 4 * A.n * A.d * A.p * problem.n_outputs >= DEAR
        and all(_has_ordinary_size(values) for values in (features, problem.Y))
    )


def _has_ordinary_size(values: np.ndarray) -> bool:
    """Whether squares of the largest are well within single precision."""
    return 1e-12 <= max(values.max(), -values.min()) <= 1e12


def _multipliers(composite: Composite) -> np.ndarray | None:
    """The cones' share of the last projection."""
    return composite.M if isinstance(composite, ConeComposite) else None


def start(composite: Composite, V: np.ndarray) -> FISTAState:
    """The state of R-FISTA at V, with the exact step size along the gradient there."""
    Z = composite.forward(V)
    R = composite.residual(Z)
    C = composite.adjoint(R)
    # ||C||^2 / (2 bregman): the inverse curvature along the gradient, no smaller than 1/L.
    curvature = 2 * composite.bregman(Z + composite.forward(C), Z)
    squares = float(np.vdot(C, C))
    return FISTAState(
        V, Z, R, C, composite, V, Z, 1.0, squares / curvature if curvature > 0 else 1.0
    )
