"""Block coordinate descent for group elastic nets: its settings, one solve, a whole path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.group_solution import GroupPath, GroupSolution
from cvxdistill.solvers.path import alpha_grid, decreasing_alphas
from cvxdistill.solvers.threads import one_blas_thread
from cvxdistill.solvers.working_set_descent import WorkingSetDescent


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
        features as examples (a quarter, if there are more in all).
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
        # Products are many and small, and those of BLAS's threads wait for each other.
        with one_blas_thread():
            return WorkingSetDescent(self, problem, coef).solve(decreasing_alphas([alpha])[0])

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
        with one_blas_thread():
            return GroupPath(self._path(problem, alphas, n_alphas, eps, callback))

    def _path(
        self,
        problem: GroupElasticNetProblem,
        alphas: Sequence[float] | np.ndarray | None,
        n_alphas: int,
        eps: float,
        callback: Callable[[GroupSolution], Any] | None,
    ) -> list[GroupSolution]:
        descent = WorkingSetDescent(self, problem, None)
        if alphas is None:
            largest = descent.alpha_max()
            if not 0 < largest < np.inf:
                raise ValueError(f"alpha_max is {largest}: say which alphas.")
            alphas = alpha_grid(largest, n_alphas, eps)
        solutions: list[GroupSolution] = []
        ordered = decreasing_alphas(alphas)
        for alpha in tqdm(ordered, disable=not self.verbose, desc="alphas", leave=False):
            solutions.append(descent.solve(float(alpha)))
            if callback is not None and callback(solutions[-1]):
                break
        return solutions


def group_alpha_max(problem: GroupElasticNetProblem) -> float:
    """The smallest alpha at which all penalised coefficients are 0; infinite for l1_ratio = 0."""
    with one_blas_thread():
        return WorkingSetDescent(BlockCoordinateDescent(), problem, None).alpha_max()
