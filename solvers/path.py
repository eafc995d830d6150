"""A path of solutions over decreasing alphas, each warm-started at those before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.solution import Solution
from cvxdistill.solvers.solver import Callback, Solver

S = TypeVar("S")


class SolutionPath(tuple[S, ...]):
    """Solutions in order of decreasing alpha, with their figures as arrays."""

    def _column(self, name: str) -> np.ndarray:
        return np.array([getattr(solution, name) for solution in self])

    @property
    def alphas(self) -> np.ndarray:
        """Regularisation strengths, (alphas,)."""
        return self._column("alpha")

    @property
    def relative_gaps(self) -> np.ndarray:
        """Relative duality gap of each point."""
        return self._column("relative_gap")

    @property
    def seconds(self) -> np.ndarray:
        """Seconds that each point took."""
        return self._column("seconds")

    def __repr__(self) -> str:
        if not self:
            return f"{type(self).__name__}(empty)"
        return (
            f"{type(self).__name__}({len(self)} alphas from {self.alphas[0]:.3g} to "
            f"{self.alphas[-1]:.3g}, largest relative gap {self.relative_gaps.max():.1e}, "
            f"{self.seconds.sum():.2f} s)"
        )


class Path(SolutionPath[Solution]):
    """A path of the convex programme of a network."""

    @property
    def active_gates(self) -> np.ndarray:
        """Number of gates with V[j] != 0 at each point."""
        return self._column("n_active_gates")


def decreasing_alphas(alphas: Any) -> np.ndarray:
    """Alphas from the largest down, (alphas,).

    Raises
    ------
    ValueError
        If there are none, or one is not positive and finite.
    """
    ordered = np.sort(np.asarray(alphas, dtype=float).ravel())[::-1]
    if len(ordered) == 0:
        raise ValueError("alphas is empty.")
    if not (np.isfinite(ordered) & (ordered > 0)).all():
        raise ValueError(f"alphas must be positive and finite, got {ordered}.")
    return ordered


def alpha_grid(alpha_max: float, n_alphas: int = 50, eps: float = 1e-2) -> np.ndarray:
    """``n_alphas`` values, geometric from alpha_max down to eps * alpha_max."""
    if n_alphas < 1 or not 0 < eps <= 1:
        raise ValueError(f"Need n_alphas >= 1 and 0 < eps <= 1, got {n_alphas} and {eps}.")
    return alpha_max * np.geomspace(1, eps, n_alphas)


def solve_path(
    solver: Solver,
    problem: GatedReLUProblem,
    alphas: Sequence[float] | np.ndarray | None = None,
    *,
    n_alphas: int = 50,
    eps: float = 1e-2,
    callback: Callback | None = None,
) -> Path:
    """Solve for each alpha, from the largest down, starting from the solutions before.

    Where two alphas are at most a factor of 1.5 apart, a solve starts on the line through the last
    two solutions, in log alpha.

    Parameters
    ----------
    solver : Solver
    problem : GatedReLUProblem
    alphas : sequence of float, optional
        In any order; by default ``n_alphas`` from alpha_max to eps * alpha_max.
    n_alphas : int, default=50
    eps : float, default=1e-2
    callback : callable, optional
        Passed to each solve; a true return ends the path after that point.

    Returns
    -------
    Path
        One ``Solution`` for each alpha, each with its own seconds, sparsity and gap.

    Raises
    ------
    ValueError
        If alphas are empty or not positive, or alpha_max is 0 or infinite and no alphas are given.
    """
    if alphas is None:
        alpha_max = problem.alpha_max()
        if alpha_max == 0:
            raise ValueError("alpha_max is 0: the targets are constant, so every V is zero.")
        alphas = alpha_grid(alpha_max, n_alphas, eps)
    solutions: list[Solution] = []
    solve = solver.successive(problem)
    for alpha in decreasing_alphas(alphas):
        solutions.append(solve(float(alpha), callback))
        if solutions[-1].status == "stopped by callback":
            break
    return Path(solutions)
