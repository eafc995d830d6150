"""The group elastic net by block coordinate descent on a working set of groups.

At each alpha the working set are the groups of the last solution and those that the sequential
strong rule keeps,

    ||C_g|| >= rho w_g (2 alpha - alpha_last),    C = X^T R / n at the last solution;

on it a quadratic model of the loss is minimised by ``cvxdistill.solvers.block_descent``, again and
again for losses that are not quadratic (proximal Newton). Then all groups are looked at: those that
violate their condition ||C_g|| <= alpha rho w_g join, until the duality gap over all groups is
within the tolerance.

References
----------
Tibshirani et al. 2012 (strong rules); Lee, Sun and Saunders 2014 (proximal Newton methods).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.block_descent import (
    BlockDescent,
    CovarianceDescent,
    NaiveDescent,
    Penalties,
)
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem, row_weights
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.path import alpha_grid
from cvxdistill.solvers.rows import row_blocks
from cvxdistill.solvers.solution import relative

# Features whose whole Gram matrix is formed at once, if there are as many examples.
MOST_GRAM_FEATURES = 2000
# The largest Gram matrix: 1 GB.
MOST_COVARIANCE_FEATURES = 11_000
# An alpha at which all penalised coefficients are 0.
HUGE = 1e150
# Share of the gap at which the quadratic model of another loss is left.
INNER_SHARE = 0.1


@dataclass(frozen=True)
class GroupSolution:
    """A solution of the group elastic net and its certificate.

    Attributes
    ----------
    features : ndarray of int, shape (k,)
        Features with coefficients that are not zero.
    values : ndarray of shape (k, c)
        These coefficients.
    shape : tuple of int
        (d, c).
    intercept : ndarray of shape (c,)
    alpha, objective : float
    duality_gap : float
        Absolute: the objective is above its minimum by at most this.
    n_active_groups : int
    n_iter : int
        Sweeps.
    seconds : float
    status : str
        "converged", "iteration limit", "time limit" or "stopped by callback".
    """

    features: np.ndarray = field(repr=False)
    values: np.ndarray = field(repr=False)
    shape: tuple[int, int]
    intercept: np.ndarray = field(repr=False)
    alpha: float
    objective: float
    duality_gap: float
    n_active_groups: int
    n_iter: int
    seconds: float
    status: str

    @property
    def coef(self) -> np.ndarray:
        """All coefficients, (d, c)."""
        B = np.zeros(self.shape)
        B[self.features] = self.values
        return B

    @property
    def converged(self) -> bool:
        """Whether the gap is within the tolerance."""
        return self.status == status.CONVERGED

    @property
    def relative_gap(self) -> float:
        """Gap divided by the objective; the absolute gap where the objective is 0."""
        return relative(self.duality_gap, self.objective)

    @property
    def message(self) -> str:
        """Why the solver stopped, in a sentence."""
        return (
            f"{self.status} after {self.n_iter} sweeps and {self.seconds:.2f} s, "
            f"relative duality gap {self.relative_gap:.1e}"
        )


class GroupPath(tuple[GroupSolution, ...]):
    """Solutions in order of decreasing alpha, with their figures as arrays."""

    def _column(self, name: str) -> np.ndarray:
        return np.array([getattr(solution, name) for solution in self])

    @property
    def alphas(self) -> np.ndarray:
        """Regularisation strengths, (alphas,)."""
        return self._column("alpha")

    @property
    def coefs(self) -> np.ndarray:
        """All coefficients, (alphas, d, c)."""
        return self._column("coef")

    @property
    def intercepts(self) -> np.ndarray:
        """Intercepts, (alphas, c)."""
        return self._column("intercept")

    @property
    def relative_gaps(self) -> np.ndarray:
        """Relative duality gap of each point."""
        return self._column("relative_gap")

    @property
    def active_groups(self) -> np.ndarray:
        """Number of groups that are not zero at each point."""
        return self._column("n_active_groups")

    @property
    def seconds(self) -> np.ndarray:
        """Seconds that each point took."""
        return self._column("seconds")

    def __repr__(self) -> str:
        if not self:
            return "GroupPath(empty)"
        return (
            f"GroupPath({len(self)} alphas from {self.alphas[0]:.3g} to {self.alphas[-1]:.3g}, "
            f"{self.active_groups[-1]} groups at the end, largest relative gap "
            f"{self.relative_gaps.max():.1e}, {self.seconds.sum():.2f} s)"
        )


@dataclass(frozen=True, kw_only=True)
class BlockCoordinateDescent:
    """Block coordinate descent for group elastic nets.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol times the objective.
    max_iter : int, default=100_000
        Sweeps for each alpha.
    time_limit : float, optional
        Seconds for each alpha.
    form : {"auto", "covariance", "naive"}
        What the quadratic programmes keep up to date; by default covariance for up to as many
        features as examples.
    verbose : int, default=0
        1 shows a progress bar over a path.
    """

    tol: float = 1e-4
    max_iter: int = 100_000
    time_limit: float | None = None
    form: str = "auto"
    verbose: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.tol, (int, float)) and 0 <= self.tol < np.inf):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}.")
        if not isinstance(self.max_iter, (int, np.integer)) or self.max_iter < 1:
            raise ValueError(f"max_iter must be a positive integer, got {self.max_iter!r}.")
        if self.time_limit is not None and not self.time_limit > 0:
            raise ValueError(f"time_limit must be positive or None, got {self.time_limit!r}.")
        if self.form not in ("auto", "covariance", "naive"):
            raise ValueError(f"form must be 'auto', 'covariance' or 'naive', got {self.form!r}.")

    def solve(
        self,
        problem: GroupElasticNetProblem,
        alpha: float,
        *,
        warm_start: GroupSolution | np.ndarray | None = None,
    ) -> GroupSolution:
        """Solve for one alpha.

        Parameters
        ----------
        problem : GroupElasticNetProblem
        alpha : float
            Positive.
        warm_start : GroupSolution or array of shape (d, c), optional

        Raises
        ------
        ValueError
            If alpha is not positive and finite, or the warm start does not fit.
        """
        coef = getattr(warm_start, "coef", warm_start)
        return _Descent(self, problem, coef).solve(_alphas([alpha])[0])

    def path(
        self,
        problem: GroupElasticNetProblem,
        alphas: Sequence[float] | np.ndarray | None = None,
        *,
        n_alphas: int = 100,
        eps: float = 1e-3,
        callback: Callable[[GroupSolution], Any] | None = None,
    ) -> GroupPath:
        """Solve for each alpha, from the largest down, each warm-started at the one before.

        Parameters
        ----------
        problem : GroupElasticNetProblem
        alphas : sequence of float, optional
            In any order; by default ``n_alphas`` from alpha_max down to eps * alpha_max.
        n_alphas : int, default=100
        eps : float, default=1e-3
        callback : callable, optional
            Called with each solution; a true return ends the path there.

        Raises
        ------
        ValueError
            If alphas are empty or not positive, or there is no alpha_max (l1_ratio 0, targets that
            need no penalised feature) and none are given.
        """
        descent = _Descent(self, problem, None)
        if alphas is None:
            largest = descent.alpha_max()
            if not 0 < largest < np.inf:
                raise ValueError(f"alpha_max is {largest}: say which alphas.")
            alphas = alpha_grid(largest, n_alphas, eps)
        solutions: list[GroupSolution] = []
        ordered = np.sort(_alphas(alphas))[::-1]
        for alpha in tqdm(ordered, disable=not self.verbose, desc="alphas", leave=False):
            solutions.append(descent.solve(float(alpha)))
            if callback is not None and callback(solutions[-1]):
                break
        return GroupPath(solutions)


def group_alpha_max(problem: GroupElasticNetProblem) -> float:
    """The smallest alpha at which all penalised coefficients are 0; infinite for l1_ratio = 0."""
    return _Descent(BlockCoordinateDescent(), problem, None).alpha_max()


def _alphas(alphas: Any) -> np.ndarray:
    ordered = np.asarray(alphas, dtype=float).ravel()
    if len(ordered) == 0:
        raise ValueError("alphas is empty.")
    if not (np.isfinite(ordered) & (ordered > 0)).all():
        raise ValueError(f"alpha must be positive and finite, got {alphas}.")
    return ordered


class _Descent:
    """Where the descent for one problem stands, from one alpha to the next."""

    def __init__(
        self, settings: BlockCoordinateDescent, problem: GroupElasticNetProblem, coef: Any
    ):
        self.settings = settings
        self.problem = problem
        n, d = problem.columns.shape
        self.coef = (
            np.zeros((d, problem.n_outputs)) if coef is None else problem._coefficients(coef)
        )
        self.coef = self.coef.copy()
        self.quadratic = isinstance(problem.loss.loss, SquaredLoss)
        blocks = len(problem.block_weights)
        self.free = np.arange(len(problem.penalised), blocks)
        self.last_alpha: float | None = None
        self.lengths: np.ndarray | None = None
        whole = self.quadratic and d <= min(MOST_GRAM_FEATURES, n) and settings.form != "naive"
        if whole:
            self.working = np.arange(blocks)
        else:
            used = problem.penalties(1.0).lengths(self.coef[problem.order]) > 0
            used[self.free] = True
            self.working = np.flatnonzero(used)
        self.model: _Model | None = None
        self._evaluate()

    def _evaluate(self) -> None:
        """Predictions, intercept and residual at the coefficients."""
        problem = self.problem
        self.Z = problem.columns.forward(self.coef)
        self.b = problem.intercept(self.Z)
        self.F = problem.predictions(self.Z, self.b)
        self.R = problem.loss.residual(self.F)

    def alpha_max(self) -> float:
        """From the solution without any penalised feature."""
        problem = self.problem
        if problem.l1_ratio == 0:
            return np.inf
        if len(self.free):
            self._solve(HUGE)
        theta = problem._orthogonal(self.R)
        C = problem.columns.adjoint(theta)[problem.order] / len(self.Z)
        self.lengths = problem.penalties(1.0).lengths(C)
        penalised = problem.block_weights > 0
        ratios = self.lengths[penalised] / problem.block_weights[penalised]
        self.last_alpha = float(ratios.max(initial=0.0)) / problem.l1_ratio
        return self.last_alpha

    def solve(self, alpha: float) -> GroupSolution:
        """Solve for this alpha from where the last one ended."""
        start = time.perf_counter()
        problem = self.problem
        self._add(self._strong(alpha))
        objective, gap, sweeps, verdict = self._solve(alpha)
        self.last_alpha = alpha
        features = np.flatnonzero(self.coef.any(axis=1))
        active = problem.penalties(alpha).lengths(self.coef[problem.order]) > 0
        return GroupSolution(
            features=features,
            values=self.coef[features],
            shape=self.coef.shape,
            intercept=self.b.astype(np.float64),
            alpha=alpha,
            objective=objective,
            duality_gap=gap,
            n_active_groups=int(active.sum()),
            n_iter=sweeps,
            seconds=time.perf_counter() - start,
            status=verdict,
        )

    def _strong(self, alpha: float) -> np.ndarray:
        """Blocks that the sequential strong rule keeps; all where nothing is ever 0."""
        problem = self.problem
        if problem.l1_ratio == 0:
            return np.arange(len(problem.block_weights))
        if self.lengths is None or self.last_alpha is None:
            return np.zeros(0, dtype=int)
        bound = problem.l1_ratio * problem.block_weights * (2 * alpha - self.last_alpha)
        return np.flatnonzero(self.lengths >= bound)

    def _add(self, blocks: np.ndarray) -> np.ndarray:
        """Take blocks into the working set; the unpenalised one stays last. Return the new ones."""
        new = np.setdiff1d(blocks, self.working)
        if len(new):
            kept = np.setdiff1d(self.working, self.free)
            self.working = np.concatenate([kept, np.setdiff1d(new, self.free), self.free])
            self.model = None
        return new

    def _solve(self, alpha: float) -> tuple[float, float, int, str]:
        """Descend to the tolerance; return objective, gap, sweeps and why it ended."""
        problem, settings = self.problem, self.settings
        start, sweeps = time.perf_counter(), 0
        penalties = problem.penalties(alpha)
        target = np.inf
        while True:
            if self.quadratic and self.model is not None and self.model.whole:
                objective, gap, lengths = self.model.certify(penalties)
            else:
                objective = self._objective(penalties)
                gap, lengths = problem.certify(self.coef, self.Z, self.F, self.R, alpha)
            if not np.isfinite(objective):
                raise FloatingPointError("The objective is not finite: scale X, Y or the offset.")
            self.lengths = lengths
            enough = settings.tol * objective if objective > 0 else settings.tol
            verdict = None
            if gap <= enough:
                verdict = status.CONVERGED
            elif sweeps >= settings.max_iter:
                verdict = status.ITERATION_LIMIT
            elif settings.time_limit and time.perf_counter() - start > settings.time_limit:
                verdict = status.TIME_LIMIT
            if verdict is not None:
                if self.quadratic and self.model is not None and self.model.whole:
                    self.coef = self.model.coefficients(self.coef)
                    self._evaluate()
                return objective, gap, sweeps, verdict
            over = lengths > penalties.norm * (1 + 1e-10)
            violators = np.setdiff1d(np.flatnonzero(over), self.working)
            most = max(10, len(self.working))
            if len(violators) > most:
                excess = lengths[violators] / penalties.norm[violators]
                violators = violators[np.argsort(-excess)[:most]]
            self._add(violators)
            if self.model is None or not self.quadratic:
                h = row_weights(problem.loss, self.R)
                self.model = _Model(problem, self.working, h, self.coef, self.R, settings.form)
            if self.quadratic:
                # Groups outside the working set shrink the dual point too: ask for more each time.
                target = min(0.5 * target, 0.5 * enough)
            else:
                target = INNER_SHARE * max(gap, enough)
            local = penalties.of(self.working)
            sweeps += self.model.descent.minimise(local, target, settings.max_iter - sweeps)
            if self.quadratic:
                if not self.model.whole:
                    self.coef = self.model.coefficients(self.coef)
                    self._evaluate()
            else:
                self._line_search(penalties, objective)

    def _line_search(self, penalties: Penalties, objective: float) -> None:
        """Go to the model's minimiser, or back towards here until the objective falls."""
        before = self.coef
        assert self.model is not None
        proposed = self.model.coefficients(before)
        t = 1.0
        for _ in range(40):
            self.coef = proposed if t == 1 else before + t * (proposed - before)
            self._evaluate()
            if self._objective(penalties) <= objective * (1 + 1e-14):
                return
            t /= 2
        self.coef = before
        self._evaluate()

    def _objective(self, penalties: Penalties) -> float:
        return self.problem.loss.value(self.F) + penalties.value(self.coef[self.problem.order])


class _Model:
    """A quadratic model of the loss on a working set of blocks, rotated, and its descent.

    1/(2n) sum_i h_i ||u_i - a_i (B - B_0)||^2 with working residuals u = R / h at B_0, and columns
    of A centred with weights h if there is an intercept, which is minimised over in closed form.
    """

    def __init__(
        self,
        problem: GroupElasticNetProblem,
        working: np.ndarray,
        h: np.ndarray,
        coef: np.ndarray,
        R: np.ndarray,
        form: str,
    ):
        self.problem = problem
        every = Penalties(problem.starts, problem.block_weights, problem.block_weights)
        self.places = every.features(working)
        self.features = problem.order[self.places]
        self.starts = every.of(working).starts
        self.blocks = len(problem.block_weights)
        self.whole = len(working) == self.blocks
        self.working = working
        n, m = len(h), len(self.features)
        if form == "auto":
            form = "covariance" if m <= min(n, MOST_COVARIANCE_FEATURES) else "naive"
        h = np.maximum(h, 1e-10 * h.max())
        R = R.astype(np.float64)
        self.descent: BlockDescent
        if form == "covariance":
            H, q = self._gram(h, R)
            self.rotations = self._rotations(H)
            self._rotate_gram(H)
            B = self._rotate(coef[self.features])
            P = self._rotate(q)
            q = P + H @ B
            squares = float(np.sum(R * R / h[:, None])) / n
            squares += float(np.vdot(B, q)) + float(np.vdot(B, P))
            self.descent = CovarianceDescent(H, q, B, squares, P)
        else:
            root = np.sqrt(h)
            A = problem.columns.take(self.features)
            if problem.fit_intercept:
                A = A - np.average(A, axis=0, weights=h)
            A *= root[:, None]
            AT = np.ascontiguousarray(A.T)
            del A
            self.rotations = []
            for a, e in self._ranges():
                Q = np.linalg.eigh(AT[a:e] @ AT[a:e].T)[1] if e - a > 1 else np.ones((1, 1))
                if e - a > 1:
                    AT[a:e] = Q.T @ AT[a:e]
                self.rotations.append(Q)
            B = self._rotate(coef[self.features])
            eigenvalues = np.einsum("mn,mn->m", AT, AT) / n
            self.descent = NaiveDescent(AT, R / root[:, None], B, eigenvalues)

    def certify(self, penalties: Penalties) -> tuple[float, float, np.ndarray]:
        """Objective, duality gap and lengths ||C_g|| of all blocks, from the model alone."""
        local = penalties.of(self.working)
        descent = self.descent
        lengths = np.zeros(self.blocks)
        lengths[self.working] = local.lengths(descent.gradient())
        return descent.fit() + local.value(descent.B), max(descent.gap(local), 0.0), lengths

    def coefficients(self, coef: np.ndarray) -> np.ndarray:
        """coef with the model's in their places, rotated back."""
        out = coef.copy()
        B = np.empty_like(self.descent.B)
        for Q, (a, e) in zip(self.rotations, self._ranges(), strict=True):
            B[a:e] = Q @ self.descent.B[a:e]
        out[self.features] = B
        return out

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True))

    def _gram(self, h: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A^T diag(h) A / n, centred, and A^T R / n, from blocks of rows."""
        problem = self.problem
        n, m = len(h), len(self.features)
        H, q, mean = np.zeros((m, m)), np.zeros((m, R.shape[1])), np.zeros(m)
        for rows in row_blocks(n, m, np.float64):
            A = problem.columns.take(self.features, rows)
            q += A.T @ R[rows]
            weighted = A * np.sqrt(h[rows])[:, None]
            H += weighted.T @ weighted
            mean += h[rows] @ A
        H /= n
        q /= n
        if problem.fit_intercept:
            H -= np.outer(mean, mean / (n * h.sum()))
        return H, q

    def _rotations(self, H: np.ndarray) -> list[np.ndarray]:
        one = np.ones((1, 1))
        return [np.linalg.eigh(H[a:e, a:e])[1] if e - a > 1 else one for a, e in self._ranges()]

    def _rotate_gram(self, H: np.ndarray) -> None:
        for Q, (a, e) in zip(self.rotations, self._ranges(), strict=True):
            if e - a > 1:
                H[a:e] = Q.T @ H[a:e]
        for Q, (a, e) in zip(self.rotations, self._ranges(), strict=True):
            if e - a > 1:
                H[:, a:e] = H[:, a:e] @ Q
                H[a:e, a:e] = np.diag(np.maximum(np.diagonal(H[a:e, a:e]), 0))

    def _rotate(self, B: np.ndarray) -> np.ndarray:
        out = B.astype(np.float64)
        for Q, (a, e) in zip(self.rotations, self._ranges(), strict=True):
            if e - a > 1:
                out[a:e] = Q.T @ out[a:e]
        return out
