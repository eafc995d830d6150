"""Convex solvers for gated ReLU and ReLU networks: NumPy and Numba, no torch, no scikit-learn."""

from cvxdistill.solvers.admm import ADMM
from cvxdistill.solvers.arrangements import enumerate_gates, pattern_count
from cvxdistill.solvers.augmented_lagrangian import AugmentedLagrangian
from cvxdistill.solvers.centred_moments import CentredMoments
from cvxdistill.solvers.certificate import DualCertificate, duality_gap
from cvxdistill.solvers.cone_decomposition import ConeDecomposition, decompose
from cvxdistill.solvers.cones import (
    cone_violations,
    interior_directions,
    project_onto_cones,
)
from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent, group_alpha_max
from cvxdistill.solvers.data_gates import (
    sample_pair_gates,
    sample_quantile_gates,
    sample_wedge_gates,
)
from cvxdistill.solvers.fista import RFISTA
from cvxdistill.solvers.gate_generation import GateGeneration, generate_gates
from cvxdistill.solvers.gate_margins import attainable_margin, nudge_gates
from cvxdistill.solvers.gate_samplers import (
    draw_gates,
    sample_convolutional_gates,
    sample_gates,
    sample_sparse_gates,
)
from cvxdistill.solvers.gate_violations import violating_gates
from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.gated_statistics import GatedStatistics
from cvxdistill.solvers.gates import activation_patterns, evaluate_gates
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.group_solution import GroupPath, GroupSolution
from cvxdistill.solvers.hidden_statistics import HiddenStatistics
from cvxdistill.solvers.low_rank import LowRankNewton, LowRankPath, LowRankSolution
from cvxdistill.solvers.low_rank_problem import LowRankProblem
from cvxdistill.solvers.network import (
    Neurons,
    hidden_features,
    leading_neurons,
    neurons_from_weights,
    refit_second_layer,
    weights_from_neurons,
)
from cvxdistill.solvers.normal_equations import gram_matrix
from cvxdistill.solvers.path import Path, alpha_grid, solve_path
from cvxdistill.solvers.polishing import Polishing, PolishingPoint, polish_neurons
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.projected_linear import LinearFit, ProjectedRidge
from cvxdistill.solvers.relu_operator import relu_predictions
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.ridge import RidgeNewton
from cvxdistill.solvers.rows import RowSource, RowSubset
from cvxdistill.solvers.semismooth_newton import SemismoothNewton
from cvxdistill.solvers.solution import Solution, Trace
from cvxdistill.solvers.solver_choice import choose_solver
from cvxdistill.solvers.sparse_linear import SparseFit, SparseRidge

__all__ = [
    "ADMM",
    "RFISTA",
    "AugmentedLagrangian",
    "BlockCoordinateDescent",
    "CentredMoments",
    "ConeDecomposition",
    "DualCertificate",
    "GateGeneration",
    "GatedOperator",
    "GatedReLUProblem",
    "GatedStatistics",
    "GroupElasticNetProblem",
    "GroupPath",
    "GroupSolution",
    "HiddenStatistics",
    "LinearFit",
    "LowRankNewton",
    "LowRankPath",
    "LowRankProblem",
    "LowRankSolution",
    "Neurons",
    "Path",
    "Polishing",
    "PolishingPoint",
    "ProjectedRidge",
    "ReLUProblem",
    "RidgeNewton",
    "RowSource",
    "RowSubset",
    "SemismoothNewton",
    "Solution",
    "SparseFit",
    "SparseRidge",
    "Trace",
    "activation_patterns",
    "alpha_grid",
    "attainable_margin",
    "choose_solver",
    "cone_violations",
    "decompose",
    "draw_gates",
    "duality_gap",
    "enumerate_gates",
    "evaluate_gates",
    "generate_gates",
    "gram_matrix",
    "group_alpha_max",
    "hidden_features",
    "interior_directions",
    "leading_neurons",
    "neurons_from_weights",
    "nudge_gates",
    "pattern_count",
    "polish_neurons",
    "project_onto_cones",
    "refit_second_layer",
    "relu_predictions",
    "sample_convolutional_gates",
    "sample_gates",
    "sample_pair_gates",
    "sample_quantile_gates",
    "sample_sparse_gates",
    "sample_wedge_gates",
    "solve_path",
    "violating_gates",
    "weights_from_neurons",
]
