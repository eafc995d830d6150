from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns, sample_gates
from cvxdistill.solvers.relu_problem import ReLUProblem

ANY_LOSS = pytest.mark.parametrize("loss", ["squared", "huber", "logistic", "multinomial"])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"fit_intercept": True}, {"normalize": True}],
    ids=lambda o: "-".join(o) or "plain",
)


@pytest.fixture
def make_relu(make_problem):
    return lambda **options: make_problem(programme=ReLUProblem, **{"n": 30, **options})


def into_cones(problem, rng):
    """Weights in the cones, in the user's units: mixtures of directions of each gate's pattern."""
    X, D = problem.operator.X, problem.operator.D
    many = sample_gates(problem.operator.d, 20_000, random_state=0)
    patterns = (X @ many >= 0).T
    V = np.zeros(problem.weights_shape)
    for j, pattern in enumerate(D.T):
        inside = many[:, (patterns == pattern).all(axis=1)]
        if inside.shape[1]:
            V[:, j] = inside[:, :5] @ rng.random((2, min(5, inside.shape[1]), V.shape[3]))
    assert np.any(V, axis=(0, 2, 3)).sum() >= 3
    return V


@ANY_LOSS
@OPTIONS
def test_in_the_cones_the_objective_is_that_of_the_relu_network(make_relu, loss, options):
    problem = make_relu(loss=loss, **options)
    rng = np.random.default_rng(0)
    V, b = into_cones(problem, rng), rng.standard_normal(problem.n_outputs)
    X = problem.operator.X
    network = sum(
        np.maximum(X @ V[0, j], 0) - np.maximum(X @ V[1, j], 0) for j in range(V.shape[1])
    )
    np.testing.assert_allclose(problem.predict(V, b), network + b, atol=1e-11)
    W = problem.weights_from_user(V)
    np.testing.assert_allclose(problem.forward(W), network, atol=1e-11)
    assert problem.violation(W) == 0
    np.testing.assert_allclose(problem.weights_to_user(W), V, rtol=1e-14)
    units = 1 if problem.scale is None else problem.scale[:, None]
    penalty = np.linalg.norm(V * units, axis=2).sum()
    expected = problem.loss.value(network + b) + 0.1 * penalty
    assert problem.objective(V, b, 0.1) == pytest.approx(expected, rel=1e-12)


def test_out_of_the_cones_it_predicts_as_the_network_not_as_the_gates(make_relu):
    problem = make_relu()
    V = np.random.default_rng(0).standard_normal(problem.weights_shape)
    X = problem.operator.X
    network = sum(
        np.maximum(X @ V[0, j], 0) - np.maximum(X @ V[1, j], 0) for j in range(V.shape[1])
    )
    np.testing.assert_allclose(problem.predict(V), network, atol=1e-11)
    assert not np.allclose(problem.forward(problem.weights_from_user(V)), network)


@OPTIONS
def test_violation_is_the_largest_cosine_on_the_wrong_side_in_the_units_of_x(make_relu, options):
    problem = make_relu(**options)
    X, D = problem.operator.X, problem.operator.D
    V = np.random.default_rng(0).standard_normal(problem.weights_shape)
    worst = 0.0
    for side in V:
        for j, W in enumerate(side):
            cosines = X @ W / np.linalg.norm(X, axis=1)[:, None] / np.linalg.norm(W, axis=0)
            worst = max(worst, (-(2 * D[:, [j]] - 1) * cosines).max())
    assert problem.violation(problem.weights_from_user(V)) == pytest.approx(worst, rel=1e-10)


@OPTIONS
def test_feasible_weights_are_the_nearest_in_the_cones(make_relu, options):
    """Projection in the solver's units: w - P(w) is normal to the cone, and P(w) lies in it."""
    problem = make_relu(**options)
    W = problem.weights_from_user(np.random.default_rng(0).standard_normal(problem.weights_shape))
    P = problem.feasible(W)
    assert problem.violation(P) < 1e-10 < 0.1 < problem.violation(W)
    np.testing.assert_allclose(np.einsum("pdc,pdc->pc", W - P, P), 0, atol=1e-9)
    inside = problem.weights_from_user(into_cones(problem, np.random.default_rng(1)))
    assert (np.einsum("pdc,pdc->pc", W - P, inside) <= 1e-9).all()
    np.testing.assert_allclose(problem.feasible(inside), inside, atol=1e-12)


def test_feasible_weights_are_those_of_cvxpy(make_relu):
    cp = pytest.importorskip("cvxpy")
    problem = make_relu(c=1)
    X, D = problem.operator.X, problem.operator.D
    W = problem.weights_from_user(np.random.default_rng(0).standard_normal(problem.weights_shape))
    P = problem.feasible(W)
    for j in (0, len(W) - 1):
        w = cp.Variable(X.shape[1])
        signs = 2 * D[:, j % D.shape[1]] - 1
        distance = cp.norm(w - W[j, :, 0])
        cp.Problem(cp.Minimize(distance), [cp.multiply(signs, X @ w) >= 0]).solve(cp.CLARABEL)
        np.testing.assert_allclose(P[j, :, 0], w.value, atol=1e-4)


def test_alpha_max_is_that_of_the_gated_programme(make_relu, make_problem):
    for penalty in ("neuron", "nuclear", "feature", "l1"):
        relu = make_relu(penalty=penalty, fit_intercept=True)
        gated = make_problem(n=30, penalty=penalty, fit_intercept=True)
        factor = np.sqrt(2) if penalty == "feature" else 1  # V and U of a feature in one group
        assert relu.alpha_max() == pytest.approx(factor * gated.alpha_max(), rel=1e-12)
        W = relu.zeros()
        assert W.shape == (2 * relu.operator.p, 5, 2)


def test_above_alpha_max_zero_is_optimal(make_relu):
    problem = make_relu(fit_intercept=True)
    solution = RFISTA(tol=1e-9).solve(problem, 1.0001 * problem.alpha_max())
    assert solution.converged and not solution.V.any()


def test_the_relu_programme_is_the_gated_one_with_constraints(make_relu, make_problem):
    """Its optimum is no lower; and V - U of its solution is feasible for the gated programme."""
    relu, gated = make_relu(), make_problem(n=30)
    alpha = 0.1 * gated.alpha_max()
    constrained = RFISTA(tol=1e-7).solve(relu, alpha)
    free = RFISTA(tol=1e-7).solve(gated, alpha)
    assert constrained.converged and constrained.objective > free.objective
    assert gated.objective(constrained.V[0] - constrained.V[1], 0, alpha) <= constrained.objective


def test_gates_may_be_given_or_searched_for():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    D, G = activation_patterns(X, sample_gates(4, 6, random_state=0))
    objectives = [
        RFISTA(tol=1e-8).solve(ReLUProblem(X, Y, D, **options), 0.02).objective
        for options in ({}, {"G": G})
    ]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-9)


def test_a_gate_with_a_bias_has_no_cone():
    """All rows point the same way and a bias splits them: no weights without bias do."""
    X = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    D = np.array([[False], [True], [True]])
    with pytest.raises(ValueError, match=r"Gate 0 \(1 of 1\) has a cone without interior"):
        ReLUProblem(X, np.ones(3), D)


def test_x_is_not_copied_and_nothing_given_is_written_to():
    rng = np.random.default_rng(0)
    X, Y = np.asfortranarray(rng.standard_normal((30, 4))), rng.standard_normal((30, 2))
    D, _ = activation_patterns(X, sample_gates(4, 3, random_state=0))
    copies = X.copy(), Y.copy(), D.copy()
    problem = ReLUProblem(X, Y, D, fit_intercept=True, normalize=True)
    assert problem.operator.X is X
    RFISTA(tol=1e-3).solve(problem, 0.1)
    for given, copy in zip((X, Y, D), copies, strict=True):
        np.testing.assert_array_equal(given, copy)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_solution_has_the_type_of_the_data_and_the_shape_of_users(make_relu, dtype):
    problem = make_relu(dtype=dtype, fit_intercept=True)
    solution = RFISTA(tol=1e-4).solve(problem, 0.1 * problem.alpha_max())
    assert solution.converged
    assert solution.V.shape == problem.weights_shape == (2, problem.operator.p, 5, 2)
    assert solution.V.dtype == solution.intercept.dtype == dtype
    assert problem.predict(solution.V, solution.intercept).dtype == dtype
    assert solution.violation < (1e-5 if dtype == np.float32 else 1e-9)


def test_the_gated_problem_has_no_constraints():
    rng = np.random.default_rng(0)
    problem = GatedReLUProblem(rng.standard_normal((9, 3)), np.ones(9), np.ones((9, 2), bool))
    W = problem.zeros()
    assert problem.feasible(W) is W and problem.violation(W) == 0
    assert problem.with_multipliers(W) is W


@OPTIONS
@pytest.mark.parametrize("penalty", ["neuron", "gate"])
def test_multipliers_shorten_what_the_solvers_own_leave_too_long(make_relu, penalty, options):
    problem = make_relu(penalty=penalty, **options)
    rng = np.random.default_rng(0)
    inside = problem.weights_from_user(into_cones(problem, rng))
    C = rng.standard_normal(inside.shape)
    other = rng.standard_normal(inside.shape)
    M = 0.1 * (problem.feasible(other) - other)
    best = problem.feasible(C)
    axes = 1 if penalty == "neuron" else (1, 2)
    short = np.linalg.norm(C + M, axis=axes)
    alpha = float(np.median(short))
    result = problem.with_multipliers(C, M, alpha)
    left = np.broadcast_to((short <= alpha).reshape(len(C), 1, -1), C.shape)
    assert left.any() and not left.all()
    np.testing.assert_array_equal(result[left], (C + M)[left])
    np.testing.assert_allclose(result[~left], best[~left], atol=1e-12)
    # What was added is a combination of rows with multipliers >= 0: it pulls into the cones.
    assert (np.einsum("pdc,pdc->pc", result - C, inside) >= -1e-9).all()
    everything = problem.with_multipliers(C)
    np.testing.assert_allclose(everything, best, atol=1e-12)


def test_the_representation_names_the_programme(make_relu):
    assert repr(make_relu()).startswith("ReLUProblem(n=30, d=5, p=8, c=2, ")
