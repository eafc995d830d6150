"""Gated ReLU programmes written as group elastic nets of the gated features.

    gate       a group for each gate, with all outputs
    feature    a group for each feature of X, with all gates and outputs
    neuron     a group for each gate, each output a programme of its own
    l1         a group for each gated feature, each output a programme of its own
    ridge      groups of weight, but with l1_ratio = 0

Outputs part where the loss is a sum over them, which only the multinomial one is not. Sums of
singular values are no sums over groups, and without any penalty there is no dual point.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.penalties import (
    FeaturePenalty,
    GatePenalty,
    L1Penalty,
    NeuronPenalty,
    Penalty,
)
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem


def has_group_form(problem: ConvexProblem) -> bool:
    """Whether a programme is one of groups: of gated ReLU, with a penalty and loss for it."""
    if not isinstance(problem, GatedReLUProblem):
        return False
    penalty = _penalty(problem)
    if isinstance(penalty, (NeuronPenalty, L1Penalty)):
        return problem.n_outputs == 1 or not problem.loss.is_coupled
    return isinstance(penalty, (GatePenalty, FeaturePenalty))


class GroupForm:
    """A gated ReLU programme as group elastic nets, whose objectives add up to its own.

    Parameters
    ----------
    problem : ConvexProblem

    Attributes
    ----------
    outputs : list of slice
        The outputs of each part: all, or one.
    parts : list of GroupElasticNetProblem

    Raises
    ------
    ValueError
        If the programme has no such form.
    """

    def __init__(self, problem: ConvexProblem):
        if not has_group_form(problem):
            raise ValueError(
                "BlockCoordinateDescent solves gated ReLU programmes with penalties of groups "
                "(neuron, gate, feature, l1, ridge; of several classes not neuron and l1), got "
                f"{problem!r}."
            )
        penalty, A = _penalty(problem), problem.operator
        groups: Any = A.d
        if isinstance(penalty, FeaturePenalty):
            groups = np.tile(np.arange(A.d), A.p)
        elif isinstance(penalty, L1Penalty):
            groups = 1
        self.outputs = [slice(0, problem.n_outputs)]
        if isinstance(penalty, (NeuronPenalty, L1Penalty)):
            self.outputs = [slice(k, k + 1) for k in range(problem.n_outputs)]
        self.parts = [
            GroupElasticNetProblem(
                A,
                problem.Y[:, columns],
                groups,
                l1_ratio=problem.regularizer.l1_ratio,
                loss=problem.loss.loss,
                fit_intercept=problem.fit_intercept,
                sample_weight=problem.loss.weights,
            )
            for columns in self.outputs
        ]


def _penalty(problem: ConvexProblem) -> Penalty:
    """The penalty; that of gates for a pure ridge, which knows no groups."""
    return GatePenalty() if problem.regularizer.l1_ratio == 0 else problem.regularizer.penalty
