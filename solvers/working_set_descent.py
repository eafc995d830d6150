"""The group elastic net by block coordinate descent on a working set of groups.

At each alpha the working set are the groups of the last solution and those that the sequential
strong rule keeps,

    ||C_g|| >= rho w_g (2 alpha - alpha_last),    C = X^T R / n at the last solution,

or, where groups are dear because a Gram matrix grows with them, only those of the last solution. On
it a quadratic model of the loss is minimised by ``cvxdistill.solvers.block_descent``, again and
again for losses that are not quadratic (proximal Newton). Then all groups are looked at: those that
violate their condition ||C_g|| <= alpha rho w_g join, until the duality gap over all groups is
within the tolerance. Where alphas decrease slowly, each solve starts on the line through the last
two solutions.

References
----------
Tibshirani et al. 2012 (strong rules); Lee, Sun and Saunders 2014 (proximal Newton methods).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.active_newton import conjugate_gradients
from cvxdistill.solvers.extrapolation import LastTwo
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem, row_weights
from cvxdistill.solvers.group_penalties import Penalties, smooth_part
from cvxdistill.solvers.group_solution import GroupSolution
from cvxdistill.solvers.losses import HuberLoss, LogisticLoss, MultinomialLoss, SquaredLoss
from cvxdistill.solvers.parts import Watch
from cvxdistill.solvers.quadratic_model import QuadraticModel

if TYPE_CHECKING:
    from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent

# Features whose whole Gram matrix is formed at once, if there are half as many examples.
MOST_GRAM_FEATURES = 2000
# An alpha at which all penalised coefficients are 0.
HUGE = 1e150
# Share of the gap at which a quadratic model is left that will change: of another loss, or to grow.
INNER_SHARE = 0.1
# A quadratic model of another loss keeps its weights until these have changed by such a share.
STALE = 0.2
# Products with all columns that another look at all groups counts for.
LOOKS = 16
# Rounds without a smaller gap after which rounding is all that is left.
MOST_IDLE = 20
# Of Newton's steps for coupled losses: relative residual, and most conjugate gradient steps.
CG_TOLERANCE, CG_STEPS = 0.05, 30


class WorkingSetDescent:
    """Where the descent for one problem stands, from one alpha to the next."""

    def __init__(
        self, settings: BlockCoordinateDescent, problem: GroupElasticNetProblem, coef: Any
    ):
        self.settings = settings
        self.problem = problem
        n, d = problem.columns.shape
        self.coef = np.zeros((d, problem.n_outputs))
        if coef is not None:
            self.coef[...] = problem.coefficients(coef)
        self.quadratic = isinstance(problem.loss.loss, SquaredLoss)
        # Whether the weights of a quadratic model are a bound of the Hessian, not the Hessian.
        self.bounded = problem.loss.is_coupled or isinstance(problem.loss.loss, HuberLoss)
        blocks = len(problem.block_weights)
        self.free = np.arange(len(problem.penalised), blocks)
        self.last_alpha: float | None = None
        self.past = LastTwo()
        # Of the dual point at the coefficients, while that is up to date, and of the last one.
        self.dual: tuple[np.ndarray, np.ndarray] | None = None
        self.lengths: np.ndarray | None = None
        whole = self.quadratic and d <= min(MOST_GRAM_FEATURES, 2 * n) and settings.form != "naive"
        self.form = "covariance" if whole else settings.form
        if whole:
            self.working = np.concatenate([self.free, np.setdiff1d(np.arange(blocks), self.free)])
        else:
            used = problem.penalties(1.0).lengths(self.coef[problem.order]) > 0
            self.working = np.concatenate(
                [self.free, np.setdiff1d(np.flatnonzero(used), self.free)]
            )
        self.model: QuadraticModel | None = None
        self._evaluate()
        # Gaps below this are none: the loss is rounded to so much, and log losses start at 1 or so.
        self.rounding = float(np.finfo(self.F.dtype).eps * problem.loss.value(self.F))
        if isinstance(problem.loss.loss, (LogisticLoss, MultinomialLoss)):
            self.rounding = max(self.rounding, float(np.finfo(np.float64).eps))

    def _evaluate(self) -> None:
        """Predictions, intercept and residual at the coefficients."""
        problem = self.problem
        Z = problem.columns.forward(self.coef)
        self.b = problem.intercept(Z)
        self.F = problem.predictions(Z, self.b)
        self.R = problem.loss.residual(self.F)
        self.dual = None

    def _take_over(self, model: QuadraticModel) -> None:
        """The same from a model that is the loss itself; residuals only where they are needed."""
        problem = self.problem
        self.coef = model.coefficients(self.coef)
        R = model.residual()
        if R is None and not model.whole:
            self._evaluate()
            return
        self.b = np.zeros(problem.n_outputs)
        if problem.fit_intercept:
            Y = problem.loss.Y if problem.offset is None else problem.loss.Y - problem.offset
            self.b = np.average(Y, axis=0, weights=model.h) - model.mean_prediction()
        if R is not None:
            self.R = R.astype(self.R.dtype)
            self.F = (problem.loss.Y - R / model.h[:, None]).astype(self.F.dtype)
        self.dual = None

    def _certify(self, penalties: Penalties, alpha: float) -> tuple[float, float]:
        """Objective and duality gap at the coefficients; keeps the lengths ||C_g||."""
        problem = self.problem
        if self.dual is None:
            self.dual = problem.dual_point(self.F, self.R)
        theta, self.lengths = self.dual
        gap = problem.gap(self.coef, self.F, theta, self.lengths, alpha)
        return self._objective(penalties), gap

    def alpha_max(self) -> float:
        """From the solution without any penalised feature."""
        problem = self.problem
        if problem.l1_ratio == 0:
            return np.inf
        if len(self.free):
            self._solve(HUGE)
        self.dual = problem.dual_point(self.F, self.R)
        self.lengths = self.dual[1]
        penalised = problem.block_weights > 0
        ratios = self.lengths[penalised] / problem.block_weights[penalised]
        self.last_alpha = float(ratios.max(initial=0.0)) / problem.l1_ratio
        return self.last_alpha

    def solve(self, alpha: float, watch: Watch | None = None) -> GroupSolution:
        """Solve for this alpha from where the last one ended, until done or ``watch`` says so."""
        start = time.perf_counter()
        problem = self.problem
        self._add(self._strong(alpha))
        self._look_ahead(alpha)
        objective, gap, sweeps, verdict = self._solve(alpha, watch)
        self.last_alpha = alpha
        self.past.add(alpha, self.coef)
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

    def _look_ahead(self, alpha: float) -> None:
        """Go to the line through the last two solutions, if that is worth it."""
        ahead = self.past.ahead(alpha)
        if ahead is None:
            return
        (coef,) = ahead
        if self.quadratic and self.model is not None:
            self.model.go_to(coef)
            if not self._is_loss(self.model):
                self._take_over(self.model)
        else:
            self.coef = coef
            self._evaluate()

    def _strong(self, alpha: float) -> np.ndarray:
        """Blocks that the sequential strong rule keeps; all where nothing is ever 0."""
        problem = self.problem
        if problem.l1_ratio == 0:
            return np.arange(len(problem.block_weights))
        if self.lengths is None or self.last_alpha is None or self._gram_grows():
            return np.zeros(0, dtype=int)
        bound = problem.l1_ratio * problem.block_weights * (2 * alpha - self.last_alpha)
        return np.flatnonzero(self.lengths >= bound)

    def _gram_grows(self) -> bool:
        """Whether groups are dear, because the model's Gram matrix grows with them."""
        if not self.quadratic or self.form == "naive":
            return False
        return self.model is None or (self.model.form_is_covariance and not self.model.whole)

    def _batch(self, violators: np.ndarray) -> np.ndarray:
        """Of violators, the worst first, as many as join the working set at once.

        Where the Gram matrix grows, those that cost about as much as another look at all groups.
        """
        if not self._gram_grows() or len(violators) == 0:
            return violators[: max(10, len(self.working))]
        d, c = self.coef.shape
        past = 0 if self.model is None else len(self.model.features)
        sizes = np.diff(self.problem.starts)[violators]
        # past * most + most^2 / 2 = LOOKS d c, in operations for each example.
        most = np.sqrt(past**2 + 2 * LOOKS * d * c) - past
        return violators[: max(1, np.searchsorted(np.cumsum(sizes), most))]

    def _add(self, blocks: np.ndarray) -> None:
        """Take blocks into the working set, and into the model."""
        new = np.setdiff1d(blocks, self.working)
        if len(new):
            self.working = np.concatenate([self.working, new])
            if self.model is not None:
                self.model.extend(new, self.coef, self.R)

    def certify(self, alpha: float) -> tuple[float, float]:
        """Objective and duality gap where the descent stands."""
        return self._certify(self.problem.penalties(alpha), alpha)

    def coefficients(self) -> np.ndarray:
        """Coefficients (d, c) where the descent stands."""
        if self._is_loss(self.model):
            return self.model.coefficients(self.coef)
        return self.coef

    def _is_loss(self, model: QuadraticModel | None) -> TypeGuard[QuadraticModel]:
        """Whether a model is the loss itself over all blocks: then it alone is kept up to date."""
        return self.quadratic and model is not None and model.whole

    def _solve(self, alpha: float, watch: Watch | None = None) -> tuple[float, float, int, str]:
        """Descend to the tolerance; return objective, gap, sweeps and why it ended."""
        problem, settings = self.problem, self.settings
        start, sweeps = time.perf_counter(), 0
        penalties = problem.penalties(alpha)
        target, best, idle = np.inf, np.inf, 0
        while True:
            if self._is_loss(self.model):
                objective, gap, self.lengths = self.model.certify(penalties)
            else:
                objective, gap = self._certify(penalties, alpha)
            if not np.isfinite(objective):
                raise FloatingPointError("The objective is not finite: scale X, Y or the offset.")
            lengths = self.lengths
            assert lengths is not None
            enough = max(settings.tol * objective, self.rounding)
            if objective == 0:
                enough = settings.tol
            verdict = None
            idle = 0 if gap < 0.999 * best else idle + 1
            best = min(best, gap)
            stop = watch is not None and watch(objective, gap, sweeps)
            if gap <= enough:
                verdict = status.CONVERGED
            elif stop:
                verdict = status.STOPPED
            elif idle >= MOST_IDLE:
                verdict = status.NO_PROGRESS
            elif sweeps >= settings.max_iter:
                verdict = status.ITERATION_LIMIT
            elif settings.time_limit and time.perf_counter() - start > settings.time_limit:
                verdict = status.TIME_LIMIT
            if verdict is not None:
                if self._is_loss(self.model):
                    self._take_over(self.model)
                return objective, gap, sweeps, verdict
            over = lengths > penalties.norm * (1 + 1e-10)
            violators = np.setdiff1d(np.flatnonzero(over), self.working)
            excess = lengths[violators] / penalties.norm[violators]
            self._add(self._batch(violators[np.argsort(-excess)]))
            self.model = self._model()
            if self.quadratic and not (len(violators) and self._gram_grows()):
                # Groups outside the working set shrink the dual point too: ask for more each time.
                target = min(0.5 * target, 0.5 * enough)
            else:
                target = INNER_SHARE * max(gap, enough)
            local = self.model.penalties(penalties)
            sweeps += self.model.descent.minimise(local, target, settings.max_iter - sweeps)
            if self.quadratic:
                if not self._is_loss(self.model):
                    self._take_over(self.model)
            else:
                self._line_search(penalties, objective)
                if self.bounded:
                    self._newton_step(penalties)

    def _model(self) -> QuadraticModel:
        """The quadratic model here; with the weights of the last one, if these have not changed."""
        problem = self.problem
        if self.model is None or not self.quadratic:
            h = row_weights(problem.loss, self.F, self.R)
            if self.model is not None and np.abs(h - self.model.h).sum() < STALE * h.sum():
                self.model.move(self.coef, self.R)
            else:
                return QuadraticModel(problem, self.working, h, self.coef, self.R, self.form)
        return self.model

    def _newton_step(self, penalties: Penalties) -> None:
        """Newton's step with the Hessian itself, on the groups that are not zero.

        By conjugate gradients, with the model as preconditioner. Columns are centred as in the
        model, so that the intercept hardly matters to the rest.
        """
        problem, model = self.problem, self.model
        assert model is not None
        local = model.penalties(penalties)
        B = self.coef[model.features]
        active = np.flatnonzero((local.lengths(B) > 0) | (local.norm == 0))
        if len(active) == 0:
            return
        places, local = local.features(active), local.of(active)
        features, B = model.features[places], B[places]
        first, sizes = local.starts[:-1], np.diff(local.starts)
        A = problem.columns.take(features)
        if problem.fit_intercept:
            A -= model.mean[places] / model.h.sum()
        n, m = A.shape
        G, U, k = smooth_part(A.T @ self.R / n, B, local)
        # Single precision is enough for a direction.
        A = A.astype(np.float32)
        stiff = np.repeat(k + local.ridge, sizes)
        solve = model.preconditioner(places, stiff)
        scale, R = model.h.mean(), self.R.astype(A.dtype)

        # The last row is the intercept's.
        def product(V: np.ndarray) -> np.ndarray:
            out = np.empty_like(V)
            F = A @ V[:m].astype(A.dtype) + V[m].astype(A.dtype)
            HV = problem.loss.hessian_product(R, F).astype(A.dtype)
            inner = np.add.reduceat(np.einsum("mc,mc->m", U, V[:m]), first)
            out[:m] = A.T @ HV / n + stiff[:, None] * V[:m]
            out[:m] -= np.repeat(k * inner, sizes)[:, None] * U
            out[m] = HV.mean(axis=0) if problem.fit_intercept else V[m]
            return out

        def precondition(V: np.ndarray) -> np.ndarray:
            return np.vstack([solve(V[:m]), V[m] / scale])

        right = np.vstack([G, np.zeros(G.shape[1])])
        change, _ = conjugate_gradients(product, precondition, right, CG_TOLERANCE, CG_STEPS)
        change = change[:m]
        proposed = self.coef.copy()
        proposed[features] += change
        self._go_towards(proposed, penalties, self._objective(penalties))

    def _line_search(self, penalties: Penalties, objective: float) -> None:
        """Go to the model's minimiser, or back towards here until the objective falls."""
        assert self.model is not None
        self._go_towards(self.model.coefficients(self.coef), penalties, objective)

    def _go_towards(self, proposed: np.ndarray, penalties: Penalties, objective: float) -> None:
        """Go to other coefficients, or back from there until the objective is no larger."""
        before = self.coef
        slack = 4 * float(np.finfo(self.F.dtype).eps)
        t = 1.0
        for _ in range(40):
            self.coef = proposed if t == 1 else before + t * (proposed - before)
            self._evaluate()
            if self._objective(penalties) <= objective * (1 + slack):
                return
            t /= 2
        self.coef = before
        self._evaluate()

    def _objective(self, penalties: Penalties) -> float:
        return self.problem.loss.value(self.F) + penalties.value(self.coef[self.problem.order])
