"""Bad input is refused before any work, by a message that names the argument and what came."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import sparse

from cvxdistill.solvers import (
    RFISTA,
    GatedOperator,
    GatedReLUProblem,
    Neurons,
    RidgeNewton,
    activation_patterns,
    alpha_grid,
    duality_gap,
    evaluate_gates,
    leading_neurons,
    neurons_from_weights,
    sample_gates,
    solve_path,
    weights_from_neurons,
)
from cvxdistill.solvers.relu_problem import ReLUProblem

X = np.random.default_rng(0).standard_normal((8, 3))
Y = X[:, :2] + 1
G = sample_gates(3, 4, random_state=0)
D = np.ones((8, 2), bool)
PROBLEM = GatedReLUProblem(X, Y, D)
RIDGE = GatedReLUProblem(X, Y, D, penalty="ridge")
SIGNS = np.where(np.arange(8) % 2, 1.0, -1.0)
D_ONE = X @ G[:, :1] >= 0
RELU = ReLUProblem(X, Y, D_ONE)
# The first row of X comes twice, and the second gate is on for one of them alone.
NO_CONE = np.vstack([X, X[:1]]) @ G[:, :2] >= 0
NO_CONE[8, 1] = ~NO_CONE[0, 1]


def holed(A, value):
    A = A.copy()
    A[1, 1] = value
    return A


CASES = {
    # gates
    "no features": (lambda: sample_gates(0, 5), "n_features must be a positive integer, got 0"),
    "negative gates": (lambda: sample_gates(3, -1), "n_gates must be a positive integer, got -1"),
    "fractional gates": (lambda: sample_gates(3, 2.5), "n_gates must be a positive .* got 2.5"),
    "boolean gates": (lambda: sample_gates(3, True), "n_gates must be a positive .* got True"),
    "gates of the wrong length": (
        lambda: activation_patterns(X, G[:2]),
        r"gates must have shape \(3, p\), or \(4, p\) .* got \(2, 4\)",
    ),
    "no gate at all": (lambda: evaluate_gates(X, G[:, :0]), r"p >= 1, got \(3, 0\)"),
    "one gate as a vector": (lambda: evaluate_gates(X, G[:, 0]), r"got \(3,\)"),
    "NaN in the gates": (
        lambda: evaluate_gates(X, holed(G, np.nan)),
        "gates contain NaN or infinity",
    ),
    "gates of text": (
        lambda: evaluate_gates(X, np.full((3, 2), "g")),
        "gates must be numbers, got dtype <U1",
    ),
    "gates that are never on": (
        lambda: activation_patterns(np.ones((2, 3)), -np.ones((3, 4))),
        "None of the 4 gates is on for any of the 2 rows",
    ),
    # X
    "X is flat": (lambda: activation_patterns(X[0], G), r"X must have shape \(n, d\), got \(3,\)"),
    "X has three axes": (
        lambda: GatedReLUProblem(X[None], Y, D),
        r"X must have shape \(n, d\), got \(1, 8, 3\)",
    ),
    "X has no rows": (
        lambda: GatedReLUProblem(X[:0], Y[:0], D[:0]),
        r"at least one row and one column, got \(0, 3\)",
    ),
    "X has no columns": (
        lambda: GatedReLUProblem(X[:, :0], Y, D),
        r"at least one row and one column, got \(8, 0\)",
    ),
    "NaN in X": (lambda: GatedReLUProblem(holed(X, np.nan), Y, D), "X contains NaN or infinity"),
    "infinity in X": (lambda: evaluate_gates(holed(X, np.inf), G), "X contains NaN or infinity"),
    "X is complex": (
        lambda: GatedReLUProblem(X + 1j, Y, D),
        "X must hold real numbers, got dtype complex128",
    ),
    "X is text": (lambda: GatedOperator(np.full((8, 3), "x"), D), "X must hold real numbers"),
    "X is sparse": (
        lambda: GatedReLUProblem(sparse.csr_matrix(X), Y, D),
        "X must be a NumPy array or give arrays when sliced, got csr_matrix",
    ),
    # Y
    "Y has other rows": (
        lambda: GatedReLUProblem(X, Y[:7], D),
        "Y must have as many rows as X, got 7 and 8",
    ),
    "Y has three axes": (
        lambda: GatedReLUProblem(X, Y[None], D),
        r"Y must have shape \(n,\) or \(n, c\) .* got \(1, 8, 2\)",
    ),
    "Y has no columns": (lambda: GatedReLUProblem(X, Y[:, :0], D), r"got \(8, 0\)"),
    "NaN in Y": (lambda: GatedReLUProblem(X, holed(Y, np.nan), D), "Y contains NaN or infinity"),
    "Y is text": (
        lambda: GatedReLUProblem(X, np.full(8, "y"), D),
        "Y must hold real numbers, got dtype <U1",
    ),
    # D
    "D has other rows": (
        lambda: GatedReLUProblem(X, Y, D[:7]),
        r"D must have shape \(8, p\) .* got \(7, 2\)",
    ),
    "D is empty": (lambda: GatedOperator(X, D[:, :0]), r"p >= 1, .* got \(8, 0\)"),
    "D is not boolean": (
        lambda: GatedOperator(X, D.astype(float)),
        "D must be boolean, got dtype float64",
    ),
    # settings of the problem
    "unknown penalty": (
        lambda: GatedReLUProblem(X, Y, D, penalty="lasso"),
        r"penalty must be one of \['feature', 'gate', 'l1', 'neuron', .*\], got 'lasso'",
    ),
    "l1_ratio above 1": (
        lambda: GatedReLUProblem(X, Y, D, l1_ratio=1.5),
        r"l1_ratio must lie in \[0, 1\], got 1.5",
    ),
    "l1_ratio is NaN": (lambda: GatedReLUProblem(X, Y, D, l1_ratio=np.nan), "l1_ratio .* got nan"),
    "unknown loss": (
        lambda: GatedReLUProblem(X, Y, D, loss="hinge"),
        r"loss must be one of \['huber', 'logistic', 'multinomial', 'squared'\], got 'hinge'",
    ),
    "logistic loss of other targets": (
        lambda: GatedReLUProblem(X, Y, D, loss="logistic"),
        r"The logistic loss needs Y of one column that holds only -1 and \+1, got 2 column",
    ),
    "multinomial loss of other targets": (
        lambda: GatedReLUProblem(X, Y, D, loss="multinomial"),
        "The multinomial loss needs rows of Y that are probabilities",
    ),
    "log loss without a penalty": (
        lambda: GatedReLUProblem(X, SIGNS, D, loss="logistic", penalty="none"),
        "Log loss without a penalty has no minimiser .* choose a penalty",
    ),
    "l1_ratio of text": (
        lambda: GatedReLUProblem(X, Y, D, l1_ratio="half"),
        r"l1_ratio must be a number in \[0, 1\], got 'half'",
    ),
    "sample weights of other rows": (
        lambda: GatedReLUProblem(X, Y, D, sample_weight=np.ones(7)),
        r"sample_weight must have shape \(8,\), got \(7,\)",
    ),
    "a sample weight of 0": (
        lambda: GatedReLUProblem(X, Y, D, sample_weight=np.arange(8)),
        "sample_weight must be positive and finite; leave rows of weight zero out",
    ),
    # ReLU networks
    "a gate with a row on both sides": (
        lambda: ReLUProblem(np.vstack([X, X[:1]]), np.vstack([Y, Y[:1]]), NO_CONE),
        r"Gate 1 \(1 of 2\) has a cone without interior",
    ),
    "gates with biases": (
        lambda: ReLUProblem(X, Y, D[:, :1], G=np.ones((4, 1))),
        r"G must have shape \(3, 1\), one gate without bias .* got \(4, 1\)",
    ),
    "R-FISTA on a ReLU network with a penalty of matrices": (
        lambda: RFISTA().solve(ReLUProblem(X, Y, D_ONE, penalty="nuclear"), 0.1),
        "RFISTA solves ReLU programmes whose penalty is of lengths .*NuclearPenalty.* use "
        "AugmentedLagrangian or ADMM",
    ),
    "Newton on a ReLU network": (
        lambda: RidgeNewton().solve(RELU, 0.1),
        "RidgeNewton solves gated ReLU programmes, got ReLUProblem",
    ),
    "weights of a gated network for a ReLU network": (
        lambda: RELU.predict(np.zeros((1, 3, 2))),
        r"Weights must have shape \(2, p, d, c\) = \(2, 1, 3, 2\), got \(1, 3, 2\)",
    ),
    # solvers
    "alpha is 0": (lambda: RFISTA().solve(PROBLEM, 0.0), "alpha must be positive .* got 0.0"),
    "alpha is negative": (lambda: RFISTA().solve(PROBLEM, -1), "alpha must be positive .* got -1"),
    "alpha is infinite": (lambda: RFISTA().solve(PROBLEM, np.inf), "alpha .* finite, got inf"),
    "alpha is text": (lambda: RFISTA().solve(PROBLEM, "1"), "alpha must be a number, got '1'"),
    "alpha of a gap": (
        lambda: duality_gap(PROBLEM, PROBLEM.zeros(), 0),
        "alpha must be positive, got 0",
    ),
    "negative tol": (lambda: RFISTA(tol=-1e-3), "tol must be a finite number >= 0, got -0.001"),
    "tol is NaN": (lambda: RFISTA(tol=np.nan), "tol must be a finite number >= 0, got nan"),
    "no iterations": (lambda: RFISTA(max_iter=0), "max_iter must be a positive integer, got 0"),
    "fractional iterations": (lambda: RFISTA(max_iter=1.5), "max_iter must be .* got 1.5"),
    "never checking": (lambda: RFISTA(check_every=0), "check_every must be a positive .* got 0"),
    "no time": (lambda: RFISTA(time_limit=0), "time_limit must be positive or None, got 0"),
    "backtracking outwards": (lambda: RFISTA(backtrack=1.2), r"backtrack .* \(0, 1\), got 1.2"),
    "growing downwards": (lambda: RFISTA(growth=0.9), "growth must be at least 1, got 0.9"),
    "looseness below 1": (lambda: RFISTA(looseness=1), "looseness must exceed 1, got 1"),
    "warm start of another shape": (
        lambda: RFISTA().solve(PROBLEM, 0.1, warm_start=np.zeros((2, 3, 1))),
        r"Weights must have shape \(p, d, c\) = \(2, 3, 2\), got \(2, 3, 1\)",
    ),
    "warm start with NaN": (
        lambda: RFISTA().solve(PROBLEM, 0.1, warm_start=np.full((2, 3, 2), np.nan)),
        "Weights contain NaN or infinity",
    ),
    "Newton on another loss": (
        lambda: RidgeNewton().solve(GatedReLUProblem(X, Y, D, penalty="ridge", loss="huber"), 0.1),
        "RidgeNewton needs penalty='ridge' and the squared loss",
    ),
    "Newton on a norm": (
        lambda: RidgeNewton().solve(PROBLEM, 0.1),
        "RidgeNewton needs penalty='ridge' and the squared loss",
    ),
    # path
    "no alphas": (lambda: solve_path(RFISTA(), PROBLEM, []), "alphas is empty"),
    "an alpha of 0 on the path": (
        lambda: solve_path(RFISTA(), PROBLEM, [0.1, 0.0]),
        r"alphas must be positive and finite, got \[0.1 0. \]",
    ),
    "NaN on the path": (
        lambda: solve_path(RFISTA(), PROBLEM, [0.1, np.nan]),
        "alphas must be positive and finite, got .*nan",
    ),
    "alpha_max of a ridge": (
        lambda: solve_path(RFISTA(), RIDGE),
        "alpha_max is infinite for a pure ridge and without a penalty; give alpha yourself",
    ),
    "alpha_max without a penalty": (
        lambda: GatedReLUProblem(X, Y, D, penalty="none").alpha_max(),
        "alpha_max is infinite",
    ),
    "alpha_max of nothing": (
        lambda: solve_path(RFISTA(), GatedReLUProblem(X, 0 * Y, D)),
        "alpha_max is 0",
    ),
    "no points on the grid": (lambda: alpha_grid(1.0, 0), "Need n_alphas >= 1 .* got 0"),
    "eps above 1": (lambda: alpha_grid(1.0, 5, 2.0), "0 < eps <= 1, got 5 and 2.0"),
    # network
    "weights without outputs": (
        lambda: neurons_from_weights(X),
        r"V must have shape \(p, d, c\) .*, got \(8, 3\)",
    ),
    "network of an unknown penalty": (
        lambda: neurons_from_weights(np.ones((2, 3, 2)), "nuclear-ish"),
        "penalty must be .*'neuron'.*, got 'nuclear-ish'",
    ),
    "a unit without its gate": (
        lambda: weights_from_neurons(Neurons(np.eye(2), np.eye(2), np.array([0, 5])), 3),
        r"gate must lie in range\(3\), got \[0 5\]",
    ),
    "no leading neurons": (
        lambda: leading_neurons(PROBLEM.operator, np.ones((2, 3, 2)), 0),
        "n_neurons must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    call, message = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_newton_refuses_more_features_than_it_can_factor(monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.ridge.MOST_FEATURES", 5)
    with pytest.raises(ValueError, match="p \\* d = 6 rows, at most 5; use RFISTA"):
        RidgeNewton().solve(RIDGE, 0.1)


def test_an_alpha_is_refused_before_the_path_is_begun():
    begun = []
    with pytest.raises(ValueError, match="alphas must be positive"):
        solve_path(RFISTA(), PROBLEM, [0.1, 0.0], callback=begun.append)
    assert not begun


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("penalty", ["neuron", "ridge"])
def test_a_row_source_that_is_not_finite_is_refused_rather_than_certified(
    rows_only, value, penalty
):
    problem = GatedReLUProblem(rows_only(holed(X, value)), Y, D, penalty=penalty)
    with pytest.raises(ValueError, match="X must be finite"):
        RFISTA(max_iter=10).solve(problem, 0.1)


def test_a_gap_that_cannot_be_computed_is_not_zero(rows_only):
    problem = GatedReLUProblem(rows_only(holed(X, np.nan)), Y, D, penalty="ridge")
    assert not np.isfinite(duality_gap(problem, problem.zeros(), 0.1))
