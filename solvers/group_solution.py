"""Solutions of a group elastic net, and paths of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cvxdistill.solvers import solution as status
from cvxdistill.solvers.path import SolutionPath
from cvxdistill.solvers.solution import relative


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
        "converged", "iteration limit", "time limit" or "no progress", where rounding keeps the gap
        above the tolerance.
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


class GroupPath(SolutionPath[GroupSolution]):
    """A path of the group elastic net."""

    @property
    def coefs(self) -> np.ndarray:
        """All coefficients, (alphas, d, c)."""
        return self._column("coef")

    @property
    def intercepts(self) -> np.ndarray:
        """Intercepts, (alphas, c)."""
        return self._column("intercept")

    @property
    def active_groups(self) -> np.ndarray:
        """Number of groups that are not zero at each point."""
        return self._column("n_active_groups")
