from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    GatedOperator,
    Neurons,
    leading_neurons,
    neurons_from_weights,
    relu_predictions,
    weights_from_neurons,
)

PENALTIES = ["neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"]
ANY_PENALTY = pytest.mark.parametrize("penalty", PENALTIES)


def sparse_weights(seed=0, p=6, d=5, c=3, rank=2, dtype=float):
    """Weights of low rank, with empty gates and empty columns."""
    rng = np.random.default_rng(seed)
    V = rng.standard_normal((p, d, rank)) @ rng.standard_normal((p, rank, c))
    V[rng.random(p) < 0.4] = 0
    V[0] = 0
    V[-1, :, 0] = 0
    return V.astype(dtype)


def predict(neurons, X, D):
    """Each hidden unit is X w where its gate is on, then the second layer."""
    hidden = (X @ neurons.W1) * D[:, neurons.gate]
    return hidden @ neurons.W2


@ANY_PENALTY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_to_neurons_and_back(penalty, dtype):
    V = sparse_weights(dtype=dtype)
    neurons = neurons_from_weights(V, penalty)
    again = weights_from_neurons(neurons, len(V))
    assert neurons.W1.dtype == neurons.W2.dtype == again.dtype == dtype
    np.testing.assert_allclose(again, V, atol=1e-5 if dtype == np.float32 else 1e-13)


@ANY_PENALTY
def test_the_network_predicts_what_the_convex_weights_predict(penalty):
    V = sparse_weights()
    rng = np.random.default_rng(1)
    X, D = rng.standard_normal((20, 5)), rng.random((20, 6)) < 0.5
    neurons = neurons_from_weights(V, penalty)
    np.testing.assert_allclose(predict(neurons, X, D), GatedOperator(X, D).forward(V), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_neuron_penalty_equals_weight_decay_of_the_network(seed):
    V = sparse_weights(seed)
    decay = neurons_from_weights(V, "neuron").weight_decay()
    assert decay == pytest.approx(np.linalg.norm(V, axis=1).sum(), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_shared_gates_have_the_weight_decay_of_the_nuclear_norm(seed):
    V = sparse_weights(seed)
    decay = neurons_from_weights(V, "nuclear").weight_decay()
    assert decay == pytest.approx(sum(np.linalg.norm(v, "nuc") for v in V), rel=1e-9)


def test_neuron_units_are_the_columns_in_the_order_of_their_gates():
    V = np.zeros((2, 2, 2))
    V[0, :, 1] = [3, 4]
    V[1, :, 0] = [0, 9]
    neurons = neurons_from_weights(V)
    np.testing.assert_allclose(neurons.W1.T, [np.array([3, 4]) / np.sqrt(5), [0, 3]])
    np.testing.assert_allclose(neurons.W2, [[0, np.sqrt(5)], [3, 0]])
    np.testing.assert_array_equal(neurons.gate, [0, 1])
    assert len(neurons) == 2 and repr(neurons) == "Neurons(m=2, d=2, c=2, gates=2)"


def test_a_gate_has_as_many_units_as_its_weights_have_rank():
    V = sparse_weights(rank=2)
    counts = np.bincount(neurons_from_weights(V, "gate").gate, minlength=len(V))
    np.testing.assert_array_equal(counts, [np.linalg.matrix_rank(v) for v in V])


@ANY_PENALTY
def test_no_weights_are_no_neurons(penalty):
    neurons = neurons_from_weights(np.zeros((3, 4, 2)), penalty)
    assert len(neurons) == 0 and neurons.W1.shape == (4, 0) and neurons.W2.shape == (0, 2)
    assert neurons.weight_decay() == 0
    np.testing.assert_array_equal(weights_from_neurons(neurons, 3), np.zeros((3, 4, 2)))


def test_a_solved_problem_becomes_its_network(make_problem):
    problem = make_problem(c=3, fit_intercept=True)
    solution = RFISTA(tol=1e-6).solve(problem, 0.2 * problem.alpha_max())
    neurons = neurons_from_weights(solution.V)
    A = problem.operator
    Z = predict(neurons, A.X, A.D) + solution.intercept
    np.testing.assert_allclose(Z, problem.predict(solution.V, solution.intercept), atol=1e-12)
    loss = ((Z - problem.Y) ** 2).sum() / (2 * A.n)
    decayed = loss + solution.alpha * neurons.weight_decay()
    assert decayed == pytest.approx(solution.objective, rel=1e-10)
    assert len(neurons) == np.count_nonzero(np.linalg.norm(solution.V, axis=1))


def relu_weights(seed=0, p=6, d=5, c=3, dtype=float):
    """V and U with empty gates and empty columns; that they lie in cones does not matter here."""
    rng = np.random.default_rng(seed)
    V = rng.standard_normal((2, p, d, c)) * (rng.random((2, p, 1, c)) < 0.5)
    V[0, 0] = V[1, -1] = 0
    return V.astype(dtype)


@ANY_PENALTY
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_relu_network_predicts_what_the_convex_weights_predict_on_any_data(penalty, dtype):
    V = relu_weights(dtype=dtype)
    X = np.random.default_rng(1).standard_normal((20, 5)).astype(dtype)
    neurons = neurons_from_weights(V, penalty)
    assert neurons.W1.dtype == neurons.W2.dtype == dtype
    Z = np.maximum(X @ neurons.W1, 0) @ neurons.W2
    expected = sum(np.maximum(X @ v, 0) - np.maximum(X @ u, 0) for v, u in zip(*V, strict=True))
    error = 1e-12 if dtype == np.float64 else 1e-4
    np.testing.assert_allclose(Z, expected, atol=error)
    np.testing.assert_allclose(relu_predictions(X, V), expected, atol=error)


def test_a_relu_network_may_have_one_sign_only_or_nothing():
    X = np.random.default_rng(1).standard_normal((20, 5))
    V = relu_weights()
    for sign, side in ((1, 0), (-1, 1)):
        half = np.zeros_like(V)
        half[side] = V[side]
        expected = sign * np.maximum(X @ V[side], 0).sum(axis=0)
        np.testing.assert_allclose(relu_predictions(X, half), expected, atol=1e-12)
    np.testing.assert_array_equal(relu_predictions(X, np.zeros_like(V)), np.zeros((20, 3)))


def test_a_relu_network_has_a_unit_for_each_column_of_v_then_of_u():
    V = np.zeros((2, 3, 2, 2))
    V[0, 2, :, 1] = [3, 4]
    V[1, 0, :, 0] = [0, 9]
    neurons = neurons_from_weights(V)
    np.testing.assert_allclose(neurons.W1.T, [np.array([3, 4]) / np.sqrt(5), [0, 3]])
    np.testing.assert_allclose(neurons.W2, [[0, np.sqrt(5)], [-3, 0]])
    np.testing.assert_array_equal(neurons.gate, [2, 0])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20))
def test_neuron_penalty_equals_weight_decay_of_the_relu_network(seed):
    V = relu_weights(seed)
    neurons = neurons_from_weights(V)
    assert neurons.weight_decay() == pytest.approx(np.linalg.norm(V, axis=2).sum(), rel=1e-12)
    assert len(neurons) == np.count_nonzero(np.linalg.norm(V, axis=2))


def test_units_of_relu_networks_keep_to_the_cones_of_their_gates_whatever_the_penalty():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((6, 5))
    signs = np.sign(X @ rng.standard_normal((5, 4)))
    V = np.zeros((2, 4, 5, 3))
    for j, s in enumerate(signs.T):
        V[:, j] = np.linalg.pinv(s[:, None] * X) @ rng.exponential(size=(2, 6, 3))
        V[:, j] *= (s[:, None] * X @ V[:, j] >= -1e-12).all(axis=1)[:, None]
    assert V.any()
    for penalty in PENALTIES:
        neurons = neurons_from_weights(V, penalty)
        assert (signs[:, neurons.gate] * (X @ neurons.W1)).min() >= -1e-12


def test_no_weights_are_no_relu_network():
    neurons = neurons_from_weights(np.zeros((2, 3, 4, 2)))
    assert len(neurons) == 0 and neurons.W1.shape == (4, 0) and neurons.W2.shape == (0, 2)


@pytest.mark.parametrize("shape", [(4, 2), (3, 2, 4, 2), (1, 2, 3, 4, 2)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"V must have shape \(p, d, c\) or \(2, p, d, c\), got"):
        neurons_from_weights(np.ones(shape))


def test_an_unknown_penalty_is_refused():
    with pytest.raises(ValueError, match=r"penalty must be one of \['neuron', .* got 'l0'"):
        neurons_from_weights(np.ones((2, 4, 2)), "l0")


@pytest.fixture
def operator():
    rng = np.random.default_rng(2)
    return GatedOperator(rng.standard_normal((60, 5)), rng.random((60, 6)) < 0.5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_leading_neurons_of_one_gate_are_the_truncated_svd_of_its_output(rank):
    rng = np.random.default_rng(3)
    X, V = rng.standard_normal((40, 6)), rng.standard_normal((1, 6, 4))
    A = GatedOperator(X, np.ones((40, 1), bool))
    neurons = leading_neurons(A, V, rank)
    u, s, vt = np.linalg.svd(X @ V[0], full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(predict(neurons, X, A.D), expected, atol=1e-10)


def test_leading_neurons_are_those_with_the_largest_singular_values_of_all_gates(operator):
    V = sparse_weights(rank=3)
    every = []
    for j, v in enumerate(V):
        every += [(s, j) for s in np.linalg.svd(operator.D[:, [j]] * operator.X @ v)[1] if s > 1e-9]
    every.sort(reverse=True)
    neurons = leading_neurons(operator, V, 5)
    np.testing.assert_array_equal(neurons.gate, [j for _, j in every[:5]])
    outputs = (operator.X @ neurons.W1) * operator.D[:, neurons.gate]
    sizes = np.linalg.norm(outputs, axis=0) * np.linalg.norm(neurons.W2, axis=1)
    np.testing.assert_allclose(sizes, [s for s, _ in every[:5]])


def test_a_prefix_of_the_leading_neurons_answers_for_fewer(operator):
    V = sparse_weights(rank=3)
    many, few = leading_neurons(operator, V, 6), leading_neurons(operator, V, 3)
    np.testing.assert_allclose(many.W1[:, :3], few.W1, atol=1e-12)
    np.testing.assert_allclose(many.W2[:3], few.W2, atol=1e-12)
    np.testing.assert_array_equal(many.gate[:3], few.gate)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_all_leading_neurons_reproduce_the_output(dtype):
    rng = np.random.default_rng(2)
    A = GatedOperator(rng.standard_normal((60, 5)).astype(dtype), rng.random((60, 6)) < 0.5)
    V = sparse_weights(rank=2, dtype=dtype)
    neurons = leading_neurons(A, V, 1000)
    assert neurons.W1.dtype == neurons.W2.dtype == dtype
    assert len(neurons) == sum(np.linalg.matrix_rank(v) for v in V)
    expected = A.forward(V)
    error = 1e-10 if dtype == np.float64 else 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(predict(neurons, A.X, A.D), expected, atol=error)


def test_leading_neurons_of_nothing_are_none(operator):
    assert len(leading_neurons(operator, np.zeros((6, 5, 3)), 4)) == 0


def test_a_unit_may_share_its_gate():
    neurons = Neurons(np.eye(2), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([1, 1]))
    V = weights_from_neurons(neurons, 2)
    np.testing.assert_array_equal(V[1], [[1, 2], [3, 4]])
    assert not V[0].any()
