"""Solvers by name, and which one suits a problem.

What the rule for ReLU networks rests on is in ``bench/NOTES.rst``.
"""

from __future__ import annotations

from typing import Any

from cvxdistill.solvers.admm import ADMM
from cvxdistill.solvers.augmented_lagrangian import AugmentedLagrangian
from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent
from cvxdistill.solvers.difference_system import MOST_FACTORED
from cvxdistill.solvers.fista import RFISTA, iteration_work
from cvxdistill.solvers.gated_newton import step_work
from cvxdistill.solvers.group_form import has_group_form
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.ridge import RidgeNewton
from cvxdistill.solvers.semismooth_newton import SemismoothNewton, has_gate_lengths
from cvxdistill.solvers.solver import Solver

SOLVERS: dict[str, type[Solver]] = {
    "semismooth_newton": SemismoothNewton,
    "block_descent": BlockCoordinateDescent,
    "rfista": RFISTA,
    "ridge_newton": RidgeNewton,
    "augmented_lagrangian": AugmentedLagrangian,
    "admm": ADMM,
}

# Up to this many gated features p * d a pure ridge is solved faster directly than iteratively.
MOST_DIRECT_FEATURES = 2000
# And block descent's Gram matrix of one output is formed before R-FISTA's steps are many.
MOST_DESCENT_FEATURES = 3000
# Iterations of R-FISTA that one of Newton's steps may cost.
MOST_ITERATIONS = 500


def choose_solver(problem: ConvexProblem, name: str = "auto", **settings: Any) -> Solver:
    """The solver of that name with these settings, or the one that suits the problem.

    For gated ReLU "auto" takes Newton's method where a pure ridge of the squared loss has at most
    2000 gated features p * d; the semismooth one for the penalties "neuron" and "gate" of the
    squared loss, where one of its steps costs at most 500 of R-FISTA's iterations and its matrices
    fit into a GB (n <= 8000 or p * d <= 11,000); block coordinate descent where another penalty of
    groups or loss has one output and at most 3000; and R-FISTA otherwise. For ReLU networks it
    takes ADMM, which mostly needs fewer steps and knows every penalty; but R-FISTA, where the
    penalty is one of lengths, if both n and p * d are beyond 6000, where ADMM has to solve its
    systems iteratively.

    Parameters
    ----------
    problem : ConvexProblem
    name : {"auto", "semismooth_newton", "block_descent", "rfista", "ridge_newton", \
            "augmented_lagrangian", "admm"}
    **settings
        Of the solver, such as ``tol``, ``max_iter`` and ``verbose``.

    Raises
    ------
    ValueError
        If there is no such solver, or it is not one for this programme.
    """
    if name not in ("auto", *SOLVERS):
        raise ValueError(f"solver must be one of {['auto', *SOLVERS]}, got {name!r}.")
    A = problem.operator
    size = A.p * A.d
    if isinstance(problem, ReLUProblem):
        programme, suitable = "ReLU", ["augmented_lagrangian", "admm"]
        best = "admm"
        if problem.regularizer.of_lengths:
            suitable.insert(0, "rfista")
            best = "rfista" if min(A.n, size) > MOST_FACTORED else "admm"
    else:
        programme, suitable = "gated ReLU", ["rfista"]
        best = "rfista"
        if has_group_form(problem):
            suitable.insert(0, "block_descent")
            if problem.n_outputs == 1 and size <= MOST_DESCENT_FEATURES:
                best = "block_descent"
        if has_gate_lengths(problem):
            suitable.insert(0, "semismooth_newton")
            if step_work(problem) <= MOST_ITERATIONS * iteration_work(problem):
                best = "semismooth_newton"
        if _is_ridge(problem):
            suitable.append("ridge_newton")
            best = "ridge_newton" if size <= MOST_DIRECT_FEATURES else "rfista"
    if name == "auto":
        name = best
    if name not in suitable:
        raise ValueError(
            f"solver={name!r} does not solve the {programme} programme with this loss and penalty; "
            f"choose one of {['auto', *suitable]}."
        )
    return SOLVERS[name](**settings)


def _is_ridge(problem: ConvexProblem) -> bool:
    return problem.regularizer.l1_ratio == 0 and isinstance(problem.loss.loss, SquaredLoss)
