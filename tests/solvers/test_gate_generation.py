"""Gates from violated dual constraints: exact circles, violators, the optimum over all gates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    ReLUProblem,
    activation_patterns,
    enumerate_gates,
    evaluate_gates,
    generate_gates,
    sample_gates,
    violating_gates,
)
from cvxdistill.solvers.admm import ADMM
from cvxdistill.solvers.gate_search import ReLUObjective, climb
from cvxdistill.solvers.great_circles import best_gated_angles, best_relu_angles

PENALTIES = ("neuron", "gate", "nuclear", "l1")


def data(n=25, d=3, c=1, seed=0):
    """Inputs and noisy targets of a small ReLU network."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    Y = np.maximum(X @ rng.standard_normal((d, 4)), 0) @ rng.standard_normal((4, c))
    return X, Y + 0.3 * rng.standard_normal((n, c))


def dual_value(C, penalty):
    """R°(C) of one gate, by its definition."""
    if penalty == "neuron":
        return max(np.linalg.norm(column) for column in C.T)
    if penalty == "gate":
        return np.linalg.norm(C, "fro")
    return np.linalg.norm(C, 2) if penalty == "nuclear" else np.abs(C).max()


def all_values(X, R, penalty):
    """R°(C_g) / n of every pattern there is."""
    D = evaluate_gates(X, enumerate_gates(X))
    return np.array(
        [dual_value(X.T @ (D[:, [j]] * R), penalty) / len(X) for j in range(D.shape[1])]
    )


def cells_of_circle(s, q):
    """An angle inside each cell that the sign changes of s cos t + q sin t cut from the circle."""
    crossings = np.sort(np.r_[np.arctan2(s, -q), np.arctan2(s, -q) + np.pi] % (2 * np.pi))
    return (crossings + np.r_[crossings[1:], crossings[0] + 2 * np.pi]) / 2


def exact_optimum(X, Y, alpha, activation="gated_relu"):
    """Optimum with squared loss and penalty "neuron" over all patterns, by Clarabel."""
    cp = pytest.importorskip("cvxpy")
    D = evaluate_gates(X, enumerate_gates(X))
    A = np.hstack([D[:, [j]] * X for j in range(D.shape[1])])
    objective, constraints = 0, []
    for k in range(Y.shape[1]):
        V = cp.Variable((D.shape[1], X.shape[1]))
        weights, sides = V, [V]
        if activation == "relu":
            U = cp.Variable(V.shape)
            weights, sides = V - U, [V, U]
            constraints += [cp.multiply(2.0 * D - 1, X @ side.T) >= 0 for side in sides]
        objective += cp.sum_squares(A @ cp.vec(weights, order="C") - Y[:, k]) / (2 * len(X))
        objective += alpha * sum(cp.sum(cp.norm(side, axis=1)) for side in sides)
    return cp.Problem(cp.Minimize(objective), constraints).solve(solver="CLARABEL")


def alpha_for(X, Y, ratio=0.02, **options):
    D, _ = activation_patterns(X, sample_gates(X.shape[1], 50, random_state=0))
    return ratio * GatedReLUProblem(X, Y, D, **options).alpha_max()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 4), st.integers(1, 3))
def test_the_best_gate_of_a_circle_is_that_of_the_best_of_all_its_cells(seed, n, d, c):
    rng = np.random.default_rng(seed)
    X, R = rng.standard_normal((n, d)), rng.standard_normal((n, c))
    g, h = rng.standard_normal((2, d))
    s, q = X @ g, X @ h

    def norm(t):
        return np.linalg.norm(X.T @ ((s * np.cos(t) + q * np.sin(t) >= 0)[:, None] * R))

    C = X.T @ ((s >= 0)[:, None] * R)
    t = best_gated_angles(X[None], R[None], C[None], s[None], q[None])[0]
    best = max(norm(angle) for angle in cells_of_circle(s, q))
    assert norm(t) == pytest.approx(best, rel=1e-8)
    assert t != 0 or norm(0) == pytest.approx(best, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_the_best_neuron_of_a_circle_beats_a_fine_grid(seed, n):
    rng = np.random.default_rng(seed)
    r, s, q = rng.standard_normal((3, n))

    def value(t):
        return np.abs(np.maximum(np.outer(np.cos(t), s) + np.outer(np.sin(t), q), 0) @ r)

    t = best_relu_angles(r[None], s[None], q[None])
    assert value(t)[0] >= value(np.linspace(0, 2 * np.pi, 5000)).max() * (1 - 1e-9)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_worst_of_all_gates_is_found(penalty):
    for seed in range(3):
        X, R = data(c=2, seed=seed)
        values = all_values(X, R, penalty)
        _, found = violating_gates(X, R, 0.9 * values.max(), penalty=penalty, random_state=0)
        assert found[0] == pytest.approx(values.max(), rel=1e-10)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("bias", [False, True])
def test_violators_are_new_distinct_and_have_the_values_that_they_are_said_to_have(penalty, bias):
    X, R = data(n=40, d=4, c=3)
    known = sample_gates(4, 10, bias=bias, random_state=0)
    alpha = 0.3
    G, values = violating_gates(X, R, alpha, penalty=penalty, G=known, random_state=1)
    assert G.shape == (4 + bias, len(values)) and len(values) > 3
    assert (values > alpha).all() and (np.diff(values) <= 0).all()
    D = evaluate_gates(X, G)
    expected = [dual_value(X.T @ (D[:, [j]] * R), penalty) / len(X) for j in range(len(values))]
    np.testing.assert_allclose(values, expected, rtol=1e-10)
    both = np.hstack([evaluate_gates(X, known), D])
    assert len(np.unique(both, axis=1).T) == both.shape[1] and D.any(axis=0).all()


def test_no_neuron_of_a_fine_grid_violates_more_than_the_worst_found():
    for seed in range(3):
        X, R = data(n=30, d=2, c=2, seed=seed)
        t = np.linspace(0, 2 * np.pi, 20_000)
        grid = np.abs(np.maximum(X @ np.stack([np.cos(t), np.sin(t)]), 0).T @ R).max() / len(X)
        _, values = violating_gates(X, R, grid / 2, activation="relu", random_state=0)
        assert values[0] >= grid * (1 - 1e-4)


def test_scaled_inputs_scale_the_length_of_neurons():
    X, R = data(n=30, d=2)
    scale = np.array([0.2, 3.0])
    t = np.linspace(0, 2 * np.pi, 20_000)
    grid = np.stack([np.cos(t), np.sin(t)])
    values = np.abs(np.maximum(X @ grid, 0).T @ R)[:, 0] / len(X)
    values /= np.linalg.norm(grid * scale[:, None], axis=0)
    objective = ReLUObjective(X, R, scale)
    np.testing.assert_allclose(objective.values(grid), values)
    found = climb(objective, grid[:, ::2000], max_steps=20, rng=np.random.default_rng(0))
    assert objective.values(found).max() >= values.max() * (1 - 1e-6)


def test_gates_for_relu_networks_are_clear_of_all_rows():
    X, R = data(n=50, d=5)
    G, values = violating_gates(X, R, 0.05, activation="relu", random_state=0)
    distances = np.abs(X @ G) / np.outer(np.linalg.norm(X, axis=1), np.linalg.norm(G, axis=0))
    assert len(values) > 3 and distances.min() >= 1e-5
    expected = np.abs(R[:, 0] @ np.maximum(X @ G, 0)) / np.linalg.norm(G, axis=0) / len(X)
    np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_nothing_violates_a_large_enough_alpha():
    X, R = data(c=2)
    G, values = violating_gates(X, R, 1.001 * all_values(X, R, "gate").max(), penalty="gate")
    assert G.shape == (3, 0) and values.shape == (0,)


@pytest.mark.parametrize(
    ("activation", "n", "solver"),
    [("gated_relu", 20, RFISTA(tol=1e-6)), ("relu", 15, ADMM(tol=5e-6))],
    ids=["gated ReLU", "ReLU"],
)
def test_five_gates_grow_to_the_optimum_over_all_patterns(activation, n, solver):
    reached = 0
    for seed in range(10):
        X, Y = data(n=n, seed=seed)
        alpha = alpha_for(X, Y, 0.05)
        options = {"activation": activation, "solver": solver, "tol": 1e-4}
        result = generate_gates(X, Y, alpha=alpha, n_initial=5, random_state=seed, **options)
        optimum = exact_optimum(X, Y, alpha, activation)
        assert result.solution.objective >= optimum * (1 - 1e-6)
        reached += result.solution.objective <= optimum * (1 + 1e-4)
    assert reached >= 9


@pytest.mark.parametrize("penalty", PENALTIES)
def test_at_the_end_no_pattern_violates_its_constraint(penalty):
    X, Y = data(n=20, c=2, seed=3)
    alpha = alpha_for(X, Y, 0.05, penalty=penalty)
    result = generate_gates(
        X, Y, alpha=alpha, n_initial=5, penalty=penalty, solver=RFISTA(tol=1e-6), random_state=0
    )
    problem = GatedReLUProblem(X, Y, result.D, penalty=penalty)
    R = Y - problem.predict(result.solution.V)
    assert result.converged and result.violation <= 1e-3
    assert all_values(X, R, penalty).max() <= alpha * (1 + 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"fit_intercept": True, "loss": "huber"},
        {"l1_ratio": 0.7, "normalize": True},
        {"sample_weight": np.linspace(1, 3, 60), "penalty": "nuclear"},
    ],
    ids=["plain", "bias", "huber and intercept", "blend, normalised", "weighted nuclear"],
)
def test_rounds_lower_the_objective_within_the_budget(options):
    X, Y = data(n=60, d=5, c=2)
    result = generate_gates(
        X,
        Y,
        alpha=2e-3,
        n_gates=24,
        n_initial=6,
        gates_per_round=6,
        max_rounds=8,
        solver=RFISTA(tol=1e-5),
        random_state=0,
        **options,
    )
    objectives = [one.objective for one in result.rounds]
    assert np.all(np.diff(objectives) <= 1e-5 * objectives[0])
    assert objectives[-1] < 0.7 * objectives[0] and len(result.rounds) >= 4
    assert max(one.n_gates for one in result.rounds) <= 24 and result.G.shape[1] <= 24
    assert result.rounds[-1].n_active_gates == result.G.shape[1]
    bias = options.pop("bias", False)
    assert result.G.shape[0] == 5 + bias
    np.testing.assert_array_equal(result.D, evaluate_gates(X, result.G))
    problem = GatedReLUProblem(X, Y, result.D, **options)
    objective = problem.objective(result.solution.V, result.solution.intercept, 2e-3)
    assert objective == pytest.approx(result.solution.objective, rel=1e-10)


def test_generated_relu_networks_stay_in_their_cones_whatever_the_units_of_the_inputs():
    X, Y = data(n=40, d=4)
    X *= [0.1, 1, 5, 10]
    options = {"normalize": True, "fit_intercept": True}
    result = generate_gates(
        X, Y, alpha=0.01, activation="relu", solver=ADMM(tol=1e-4), random_state=0, **options
    )
    objectives = [one.objective for one in result.rounds]
    assert objectives[-1] < 0.8 * objectives[0] and len(result.rounds) > 2
    assert result.solution.V.shape == (2, result.G.shape[1], 4, 1)
    problem = ReLUProblem(X, Y, result.D, G=result.G, **options)
    objective = problem.objective(result.solution.V, result.solution.intercept, 0.01)
    assert objective == pytest.approx(result.solution.objective, rel=1e-8)
    assert problem.violation(problem.weights_from_user(result.solution.V)) < 1e-9


def test_generated_gates_are_worth_more_than_as_many_sampled_ones():
    X, Y = data(n=200, d=6, c=1)
    D, _ = activation_patterns(X, sample_gates(6, 30, random_state=0))
    problem = GatedReLUProblem(X, Y, D)
    alpha = 0.01 * problem.alpha_max()
    sampled = RFISTA(tol=1e-5).solve(problem, alpha).objective
    result = generate_gates(
        X, Y, alpha=alpha, n_gates=30, solver=RFISTA(tol=1e-5), max_rounds=20, random_state=0
    )
    assert result.G.shape[1] <= 30 and result.solution.objective < 0.8 * sampled


def test_the_gap_to_the_full_network_bounds_how_much_lower_its_optimum_is():
    X, Y = data(n=20, seed=1)
    alpha = alpha_for(X, Y)
    result = generate_gates(
        X, Y, alpha=alpha, n_initial=5, max_rounds=3, solver=RFISTA(tol=1e-8), random_state=0
    )
    optimum = exact_optimum(X, Y, alpha)
    assert result.status == "round limit"
    suboptimality = 1 - optimum / result.solution.objective
    assert 1e-3 < suboptimality <= result.full_gap


def test_the_gates_to_begin_with_are_kept_while_they_have_weights():
    X, Y = data(n=30)
    G = enumerate_gates(X)[:, ::100]
    result = generate_gates(X, Y, alpha=1e-3, G=G, n_gates=100, max_rounds=1, random_state=0)
    assert result.rounds[0].n_gates == G.shape[1]
    assert {g.tobytes() for g in result.G.T} <= {g.tobytes() for g in G.T}


def test_single_precision_stays_single_and_a_seed_repeats_itself():
    X, Y = data(n=60, d=4)
    settings = {"alpha": 1e-3, "n_gates": 20, "max_rounds": 4, "random_state": 3}
    first = generate_gates(X.astype(np.float32), Y, **settings)
    again = generate_gates(X.astype(np.float32), Y, **settings)
    assert first.G.dtype == first.solution.V.dtype == np.float32
    np.testing.assert_array_equal(first.G, again.G)
    assert first.solution.objective == again.solution.objective


def test_an_alpha_at_which_all_weights_are_zero_ends_at_once():
    X, Y = data()
    result = generate_gates(X, Y, alpha=1.01 * all_values(X, Y, "neuron").max(), random_state=0)
    assert result.converged and len(result.rounds) == 1 and not result.solution.V.any()
    assert "converged after 1 rounds" in result.message and "converged" in repr(result)


def test_what_cannot_be_searched_is_refused_at_the_door(rows_only):
    X, Y = data()
    for penalty, words in (
        ("feature", "all gates together"),
        ("ridge", "bound"),
        ("none", "bound"),
    ):
        with pytest.raises(ValueError, match=words):
            violating_gates(X, Y, 0.1, penalty=penalty)
        with pytest.raises(ValueError, match=words):
            generate_gates(X, Y, alpha=0.1, penalty=penalty, max_rounds=1)
    with pytest.raises(ValueError, match="penalty must be 'neuron' for activation='relu'"):
        violating_gates(X, Y, 0.1, penalty="gate", activation="relu")
    with pytest.raises(ValueError, match="bias must be False"):
        violating_gates(X, Y, 0.1, bias=True, activation="relu")
    with pytest.raises(ValueError, match="activation must be one of"):
        violating_gates(X, Y, 0.1, activation="tanh")
    with pytest.raises(TypeError, match="X must be a NumPy array"):
        violating_gates(rows_only(X), Y, 0.1)
    with pytest.raises(ValueError, match="R must hold finite numbers"):
        violating_gates(X, Y[1:], 0.1)
    with pytest.raises(ValueError, match="alpha must be positive"):
        violating_gates(X, Y, -1.0)
    with pytest.raises(TypeError, match="alpha must be a number"):
        generate_gates(X, Y, alpha="1")
    with pytest.raises(ValueError, match="n_starts must be a positive integer"):
        violating_gates(X, Y, 0.1, n_starts=0)
    with pytest.raises(ValueError, match="n_gates must be no smaller than"):
        generate_gates(X, Y, alpha=0.1, n_gates=4, n_initial=5)
    with pytest.raises(ValueError, match="tol must be"):
        generate_gates(X, Y, alpha=0.1, tol=-1)
