"""Block coordinate descent for groups of features: its settings, one solve, a whole path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers.gate_group_descent import descent_by_parts
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.group_solution import GroupPath, GroupSolution
from cvxdistill.solvers.path import alpha_grid, decreasing_alphas
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, Solver, check_alpha
from cvxdistill.solvers.threads import one_blas_thread
from cvxdistill.solvers.working_set_descent import WorkingSetDescent


@dataclass(frozen=True, kw_only=True)
class BlockCoordinateDescent(Solver):
    """Block coordinate descent for group elastic nets, and gated ReLU programmes that are such.

    On a working set of groups, with exact minimisation of each group and steps of Newton's method
    on those that are not zero; see ``cvxdistill.solvers.working_set_descent``.

    Parameters
    ----------
    tol : float, default=1e-4
        Stop when the duality gap is at most tol times the objective.
    max_iter : int, default=100_000
        Sweeps for each alpha, and for each output where these are programmes of their own.
    time_limit : float, optional
        Seconds for each alpha.
    form : {"auto", "covariance", "naive"}
        What the quadratic programmes keep up to date; by default covariance for up to as many
        features as examples (a quarter, if there are more in all).
    verbose : int, default=0
        1 shows a progress bar.
    """

    max_iter: int = 100_000
    form: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("auto", "covariance", "naive"):
            raise ValueError(f"form must be 'auto', 'covariance' or 'naive', got {self.form!r}.")

    @overload
    def solve(
        self,
        problem: ConvexProblem,
        alpha: float,
        *,
        warm_start: Solution | np.ndarray | None = None,
        callback: Callback | None = None,
    ) -> Solution: ...

    @overload
    def solve(
        self,
        problem: GroupElasticNetProblem,
        alpha: float,
        *,
        warm_start: GroupSolution | np.ndarray | None = None,
    ) -> GroupSolution: ...

    def solve(
        self,
        problem: Any,
        alpha: float,
        *,
        warm_start: Any = None,
        callback: Callback | None = None,
    ) -> Any:
        """Solve for one alpha.

        Parameters
        ----------
        problem : GroupElasticNetProblem or GatedReLUProblem
            Of gated ReLU with the penalty "gate", "feature" or "ridge", or, unless the loss couples
            the outputs, "neuron" or "l1".
        alpha : float
            Positive.
        warm_start : solution or array, optional
            Start here instead of at zero: coefficients (d, c), or weights (p, d, c).
        callback : callable, optional
            For gated ReLU, called with a ``Progress`` each time that the gap is computed; a true
            return stops.

        Returns
        -------
        GroupSolution or Solution

        Raises
        ------
        ValueError
            If alpha is not positive and finite, the warm start does not fit, or the programme is
            none of these.
        """
        if not isinstance(problem, GroupElasticNetProblem):
            return super().solve(problem, alpha, warm_start=warm_start, callback=callback)
        coef = getattr(warm_start, "coef", warm_start)
        # Products are many and small, and those of BLAS's threads wait for each other.
        with one_blas_thread():
            return WorkingSetDescent(self, problem, coef).solve(decreasing_alphas([alpha])[0])

    def successive(self, problem: ConvexProblem) -> Callable[[float, Callback | None], Solution]:
        """A function of alpha and callback that solves from where its last call ended.

        It keeps what a call has computed of the features that were in use.
        """
        descent = descent_by_parts(self, problem, problem.zeros())

        def solve(alpha: float, callback: Callback | None) -> Solution:
            check_alpha(alpha)
            with one_blas_thread():
                return descent.solve(float(alpha), callback)

        return solve

    def _run(
        self, problem: ConvexProblem, alpha: float, V: np.ndarray, callback: Callback | None
    ) -> Solution:
        return descent_by_parts(self, problem, V).solve(alpha, callback)

    def path(
        self,
        problem: GroupElasticNetProblem,
        alphas: Sequence[float] | np.ndarray | None = None,
        *,
        n_alphas: int = 100,
        eps: float = 1e-3,
        callback: Callable[[GroupSolution], Any] | None = None,
    ) -> GroupPath:
        """Solve for each alpha, from the largest down, each warm-started at those before.

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
