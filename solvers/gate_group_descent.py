"""Block coordinate descent for gated ReLU programmes: that of their parts, one after the other.

The parts are the group elastic nets of ``cvxdistill.solvers.group_form``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.group_form import GroupForm
from cvxdistill.solvers.parts import PartwiseSolve, Watch
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.working_set_descent import WorkingSetDescent

if TYPE_CHECKING:
    from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent


class DescentPart:
    """Where the descent for one group elastic net stands.

    Parameters
    ----------
    settings : BlockCoordinateDescent
    problem : GroupElasticNetProblem
    V : ndarray of shape (p, d, outputs)
        Where to start.
    """

    def __init__(
        self, settings: BlockCoordinateDescent, problem: GroupElasticNetProblem, V: np.ndarray
    ):
        self.problem = problem
        self.shape = V.shape
        self.descent = WorkingSetDescent(settings, problem, self._flat(V))

    def _flat(self, V: np.ndarray) -> np.ndarray:
        return V.reshape(-1, V.shape[2])

    def certify(self, alpha: float) -> tuple[float, float]:
        """Objective and duality gap."""
        return self.descent.certify(alpha)

    def advance(self, alpha: float, watch: Watch, time_limit: float | None) -> str:
        """Descend from here; return the status."""
        self.descent.settings = replace(self.descent.settings, time_limit=time_limit)
        return self.descent.solve(alpha, watch).status

    def weights(self) -> np.ndarray:
        """Weights (p, d, outputs)."""
        return self.descent.coefficients().reshape(self.shape)

    def gap_at(self, W: np.ndarray, alpha: float) -> float:
        """Duality gap at other weights, from their own residual."""
        return self.problem.duality_gap(self._flat(W), alpha)


def descent_by_parts(
    settings: BlockCoordinateDescent, problem: ConvexProblem, V: np.ndarray
) -> PartwiseSolve:
    """The descents for a gated ReLU programme, from weights V (p, d, c) in the solver's units.

    Raises
    ------
    ValueError
        If the programme is none of groups.
    """
    form = GroupForm(problem)
    parts = [
        DescentPart(settings, part, V[:, :, columns])
        for part, columns in zip(form.parts, form.outputs, strict=True)
    ]
    return PartwiseSolve(settings, problem, form.outputs, list(parts))
