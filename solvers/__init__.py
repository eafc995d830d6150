"""Convex solvers for gated ReLU networks, in NumPy and Numba; no torch, no scikit-learn."""

from cvxdistill.solvers.certificate import DualCertificate, duality_gap
from cvxdistill.solvers.fista import RFISTA
from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.gates import activation_patterns, evaluate_gates, sample_gates
from cvxdistill.solvers.network import (
    Neurons,
    leading_neurons,
    neurons_from_weights,
    refit_second_layer,
    weights_from_neurons,
)
from cvxdistill.solvers.path import Path, alpha_grid, solve_path
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.ridge import RidgeNewton, gram_matrix
from cvxdistill.solvers.rows import RowSource, RowSubset
from cvxdistill.solvers.solution import Solution, Trace

__all__ = [
    "RFISTA",
    "DualCertificate",
    "GatedOperator",
    "GatedReLUProblem",
    "Neurons",
    "Path",
    "RidgeNewton",
    "RowSource",
    "RowSubset",
    "Solution",
    "Trace",
    "activation_patterns",
    "alpha_grid",
    "duality_gap",
    "evaluate_gates",
    "gram_matrix",
    "leading_neurons",
    "neurons_from_weights",
    "refit_second_layer",
    "sample_gates",
    "solve_path",
    "weights_from_neurons",
]
