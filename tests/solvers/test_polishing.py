"""polish and polish_neurons on units and rows; students are in test_distillation_polishing.py."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cvxdistill
from cvxdistill.solvers import (
    BlockCoordinateDescent,
    GatedOperator,
    GroupElasticNetProblem,
    Neurons,
    RowSubset,
    evaluate_gates,
    group_alpha_max,
    hidden_features,
    polish_neurons,
    refit_second_layer,
)
from cvxdistill.solvers.random_order import random_order
from cvxdistill.solvers.second_layer import SecondLayerProgramme, sum_rows


def network(seed=0, n=300, d=6, c=3, p=4, m=12, used=5, noise=0.5, dtype=float):
    """Rows, targets made by the first ``used`` of m units, gates, and those units with gates."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    G = rng.standard_normal((d + 1, p))
    W1, gate = rng.standard_normal((d, m)), rng.integers(0, p, m)
    W2 = np.where(np.arange(m)[:, None] < used, 2.0, 0.0) * rng.standard_normal((m, c))
    H = (X @ W1) * evaluate_gates(X, G)[:, gate]
    Y = H @ W2 + 1.5 + noise * rng.standard_normal((n, c))
    X, Y, G, W1, W2 = (A.astype(dtype) for A in (X, Y, G, W1, W2))
    return X, Y, G, Neurons(W1, W2, gate)


def operator(X, G):
    return GatedOperator(X, evaluate_gates(X, G))


def fitted(X, Y, G, units):
    """The units with the second layer that least squares gives them."""
    return refit_second_layer(operator(X, G), units, Y, ridge=1e-8)


def error(X, Y, G, units, intercept):
    Z = hidden_features(operator(X, G), units) @ units.W2 + intercept
    return np.linalg.norm(Z - Y) / np.linalg.norm(Y)


def halves(seed=0, **options):
    """A network fitted to the first half of the rows, and both halves."""
    X, Y, G, units = network(seed, **options)
    n = len(X) // 2
    units, b = fitted(X[:n], Y[:n], G, units)
    return (X[:n], Y[:n]), (X[n:], Y[n:]), G, units, b


def polish(train, test, G, units, b, **options):
    return cvxdistill.polish(units, *train, gates=G, intercept=b, validation_data=test, **options)


def adaptive_weights(H, Y):
    """1 / ||s_h W2[h]|| of least squares, divided by the median."""
    A = np.hstack([H, np.ones((len(H), 1))])
    W2 = np.linalg.lstsq(A, Y, rcond=None)[0][:-1]
    w = 1 / (H.std(axis=0) * np.linalg.norm(W2, axis=1))
    return w / np.median(w)


def test_the_programme_is_the_group_elastic_net_on_scaled_features():
    X, Y, G, units = network()
    H = hidden_features(operator(X, G), units)
    B = H / H.std(axis=0)
    theta = np.vstack([units.W2, np.zeros((1, 3))])
    programme = SecondLayerProgramme(
        sum_rows(operator(X, G), units, theta, Y), theta, 0.8, 1e-10, np.float64
    )
    w = adaptive_weights(H, Y)
    np.testing.assert_allclose(programme.problem.group_weights, w, rtol=3e-2)
    w = programme.problem.group_weights
    direct = GroupElasticNetProblem(B, Y, l1_ratio=0.8, group_weights=w)
    assert programme.alpha_max() == pytest.approx(group_alpha_max(direct), rel=1e-9)
    for share in (0.5, 0.1, 0.01):
        alpha = share * programme.alpha_max()
        own = BlockCoordinateDescent(tol=1e-10).solve(direct, alpha)
        layer = programme.solve(alpha)[1][0]
        np.testing.assert_array_equal(layer.units, own.features)
        np.testing.assert_allclose(
            layer.W2 * H.std(axis=0)[layer.units, None], own.values, atol=1e-4
        )
        np.testing.assert_allclose(layer.intercept, own.intercept, atol=1e-4)
        objective = programme.problem.objective(programme.last, np.zeros(3), alpha)
        assert objective == pytest.approx(own.objective, rel=1e-8)


@pytest.mark.parametrize("l1_ratio", [1.0, 0.6])
def test_the_second_layer_is_cvxpys(l1_ratio):
    cp = pytest.importorskip("cvxpy")
    X, Y, G, units = network(1, n=60, m=7)
    theta = np.vstack([units.W2, np.zeros((1, 3))])
    programme = SecondLayerProgramme(
        sum_rows(operator(X, G), units, theta, Y), theta, l1_ratio, 1e-10, np.float64
    )
    alpha = 0.2 * programme.alpha_max()
    H = (X @ units.W1) * evaluate_gates(X, G)[:, units.gate]
    W2, b = cp.Variable((7, 3)), cp.Variable((1, 3))
    s = H.std(axis=0)
    w = programme.problem.group_weights
    penalty = cp.sum(
        [
            w[h] * l1_ratio * cp.norm(s[h] * W2[h])
            + w[h] * (1 - l1_ratio) / 2 * cp.sum_squares(s[h] * W2[h])
            for h in range(7)
        ]
    )
    loss = cp.sum_squares(H @ W2 + np.ones((60, 1)) @ b - Y) / 120
    oracle = cp.Problem(cp.Minimize(loss + alpha * penalty))
    oracle.solve(solver=cp.CLARABEL, tol_gap_rel=1e-11, tol_gap_abs=1e-11)
    layer = programme.solve(alpha)[1][0]
    got = np.zeros((7, 3))
    got[layer.units] = layer.W2
    np.testing.assert_allclose(got, W2.value, atol=2e-4)
    np.testing.assert_allclose(layer.intercept, b.value[0], atol=2e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_planted_network_with_redundant_neurons_is_recovered(dtype):
    train, test, G, units, b = halves(n=4000, m=20, used=5, noise=1.0, dtype=dtype)
    result = polish(train, test, G, units, b)
    np.testing.assert_array_equal(result.polishing.units, np.arange(5))
    left = result.network
    assert left.W1.dtype == left.W2.dtype == result.intercept.dtype == dtype
    np.testing.assert_array_equal(left.W1, units.W1[:, :5])
    assert error(*test, G, left, result.intercept) <= error(*test, G, units, b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_figures_are_those_of_the_networks(dtype):
    train, test, G, units, b = halves(m=20, dtype=dtype)
    result = polish(train, test, G, units, b)
    before, after, left = result.polishing.before, result.polishing.after, result.network
    tolerance = 1e-5 if dtype == np.float32 else 1e-10
    assert before.error == pytest.approx(error(*test, G, units, b), rel=tolerance)
    assert after.error == pytest.approx(error(*test, G, left, result.intercept), rel=tolerance)
    for point, kept in ((before, units), (after, left)):
        gates = len(np.unique(kept.gate))
        assert (point.n_neurons, point.n_gates) == (len(kept), gates)
        assert point.parameters == kept.W1.size + kept.W2.size + gates * len(G) + 3
    np.testing.assert_array_equal(result.polishing.gates, np.unique(left.gate))


def test_a_gate_goes_with_its_last_neuron():
    X, Y, G, units = network(n=4000, p=4, m=12, used=5, noise=1.0)
    gate = np.where(np.arange(12) < 5, np.arange(12) % 2, 2 + np.arange(12) % 2)
    H = (X @ units.W1) * evaluate_gates(X, G)[:, gate]
    Y = H @ units.W2 + np.random.default_rng(1).standard_normal(Y.shape)
    units, b = fitted(X[:2000], Y[:2000], G, Neurons(units.W1, units.W2, gate))
    result = polish((X[:2000], Y[:2000]), (X[2000:], Y[2000:]), G, units, b)
    np.testing.assert_array_equal(result.polishing.gates, [0, 1])
    assert result.polishing.before.n_gates == 4


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    noise=st.sampled_from([0.0, 0.1, 3.0]),
    dtype=st.sampled_from([np.float32, np.float64]),
    l1_ratio=st.sampled_from([1.0, 0.3]),
    slack=st.sampled_from([None, 0.9, 1.0, 1.5]),
)
def test_never_worse_by_the_users_own_criterion(seed, noise, dtype, l1_ratio, slack):
    train, test, G, units, b = halves(seed, n=80, noise=noise, dtype=dtype)
    before = error(*test, G, units, b)
    limit = before if slack is None else slack * before
    result = polish(
        train, test, G, units, b, l1_ratio=l1_ratio, max_error=None if slack is None else limit
    )
    after = error(*test, G, result.network, result.intercept)
    rounding = 1 + (1e-6 if dtype == np.float32 else 1e-10)
    if result.changed:
        assert after <= limit * rounding
        assert len(result.network) < len(units) or after <= before * rounding
    else:
        assert result.network is units


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), most=st.integers(1, 14))
def test_max_neurons_is_obeyed_with_the_best_error_tried(seed, most):
    train, test, G, units, b = halves(seed, n=80)
    result = polish(train, test, G, units, b, max_neurons=most)
    assert len(result.network) <= most
    tried = [p.error for p in result.polishing.path if p.n_neurons <= most]
    if len(units) <= most:
        tried.append(result.polishing.before.error)
    assert result.polishing.after.error == min(tried)


def test_the_path_comes_close_to_max_neurons():
    train, test, G, units, b = halves(m=40, used=40, n=1000, d=30)
    for most in (5, 17, 33):
        result = polish(train, test, G, units, b, max_neurons=most)
        assert most - 1 <= len(result.network) <= most


def test_nothing_better_gives_back_the_very_same_network():
    train, test, G, units, b = halves(m=5, used=5, noise=0.0)
    result = polish(train, test, G, units, b, max_error=0.0)
    assert result.network is units and not result.changed
    np.testing.assert_array_equal(result.intercept, b)
    assert result.polishing.after is result.polishing.before
    assert "no network tried met the criterion" in str(result)


def test_dead_constant_and_duplicate_units_are_dropped():
    X, Y, G, units = network(m=6, used=6, p=4)
    X = np.hstack([X, np.ones((len(X), 1))])
    G = np.hstack([np.vstack([G[:-1], np.zeros((1, 4)), G[-1:]]), np.zeros((8, 2))])
    G[-1, 4:] = [1, -1]  # always on, never on
    bias = np.zeros((7, 1))
    bias[-1] = 1
    W1 = np.vstack([units.W1, np.zeros((1, 6))])
    W1 = np.hstack([W1, -3 * W1[:, :2], bias, np.ones((7, 1)), np.zeros((7, 1))])
    gate = np.concatenate([units.gate, units.gate[:2], [4, 5, 0]])
    W2 = np.random.default_rng(0).standard_normal((11, 3))
    result = polish((X, Y), (X, Y), G, Neurons(W1, W2, gate), None, max_neurons=11)
    assert set(result.polishing.units) == set(range(6))
    assert result.polishing.after.error < result.polishing.before.error


def test_scaling_a_unit_changes_nothing():
    train, test, G, units, b = halves()
    s = np.geomspace(1e-3, 1e3, len(units))
    scaled = Neurons(units.W1 * s, units.W2 / s[:, None], units.gate)
    first = polish(train, test, G, units, b, max_neurons=5, tol=1e-8)
    second = polish(train, test, G, scaled, b, max_neurons=5, tol=1e-8)
    np.testing.assert_array_equal(first.polishing.units, second.polishing.units)
    assert first.polishing.after.error == pytest.approx(second.polishing.after.error, rel=1e-6)


def test_without_gates_the_units_are_relu():
    rng = np.random.default_rng(0)
    X, W1 = rng.standard_normal((2000, 4)), rng.standard_normal((4, 10))
    Y = np.maximum(X @ W1[:, :3], 0) @ rng.standard_normal((3, 2))
    Y += 0.3 * rng.standard_normal(Y.shape)
    units = Neurons(W1, np.ones((10, 2)), np.arange(10) + 7)
    result = cvxdistill.polish(units, X, Y, max_neurons=3)
    np.testing.assert_array_equal(result.polishing.units, [0, 1, 2])
    np.testing.assert_array_equal(result.network.gate, [7, 8, 9])
    Z = np.maximum(X @ result.network.W1, 0) @ result.network.W2 + result.intercept
    assert np.linalg.norm(Z - Y) < 0.5 * np.linalg.norm(Y)
    assert result.polishing.after.parameters == 3 * (4 + 2) + 2


def test_rows_are_held_out_by_the_random_state():
    X, Y, G, units = network()
    options = {"gates": G, "max_neurons": 4, "validation_fraction": 0.3}
    first, same, other = (
        cvxdistill.polish(units, X, Y, random_state=seed, **options) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.network.W2, same.network.W2)
    assert first.polishing.before.error != other.polishing.before.error
    order = random_order(np.random.default_rng(0), len(X))[:90]
    zero = np.zeros(3)
    expected = error(X[order], Y[order], G, units, zero)
    assert first.polishing.before.error == pytest.approx(expected, rel=1e-10)


def test_row_sources_give_the_same_network():
    X, Y, G, units = network()

    class Source:
        shape, dtype = X.shape, X.dtype

        def take(self, indices):
            return X[indices]

        def __getitem__(self, rows):
            return X[rows]

    direct = cvxdistill.polish(units, X, Y, gates=G, max_neurons=4)
    rows = RowSubset(Source(), np.arange(len(X)))
    streamed = cvxdistill.polish(units, Source(), Y, gates=G, max_neurons=4)
    np.testing.assert_array_equal(direct.network.W2, streamed.network.W2)
    half = np.arange(150)
    held = operator(X[150:], G), Y[150:]
    rows = RowSubset(Source(), half)
    one = polish_neurons(units, np.zeros(3), operator(X[:150], G), Y[:150], *held, max_neurons=4)
    two = polish_neurons(
        units, np.zeros(3), GatedOperator(rows, evaluate_gates(rows, G)), Y[:150], *held,
        max_neurons=4,
    )  # fmt: skip
    np.testing.assert_array_equal(one.neurons.W2, two.neurons.W2)


def test_memory_grows_by_no_more_than_twice_the_inputs():
    rng = np.random.default_rng(0)
    X, G = rng.standard_normal((20_000, 100)), rng.standard_normal((100, 8))
    units = Neurons(rng.standard_normal((100, 100)), np.eye(100, 50), rng.integers(0, 8, 100))
    Y = rng.standard_normal((20_000, 50))
    tracemalloc.start()
    try:
        cvxdistill.polish(units, X, Y, gates=G, max_neurons=20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * (X.nbytes + Y.nbytes)


def test_it_prints_the_path_and_gives_a_frame():
    train, test, G, units, b = halves(n=4000, m=20, noise=1.0)
    result = polish(train, test, G, units, b)
    text = str(result)
    assert text.startswith("20 -> 5 units, ") and "parameters, held-out error" in text
    assert text.count("\n* ") == 1
    frame = result.to_frame()
    assert len(frame) == 1 + len(result.polishing.path)
    (row,) = frame[frame["chosen"]].to_dict("records")
    assert row["n_neurons"] == 5 and row["error"] == result.polishing.after.error
    assert (np.diff(frame["alpha"].to_numpy()[1:]) <= 0).all()
    assert (frame["duality_gap"] <= 1e-3).all()


X, Y, GATES, UNITS = network()
BAD = {
    "network": ({"network": "units"}, TypeError, "network must be"),
    "unit shapes": (
        {"network": Neurons(UNITS.W1, UNITS.W2[1:], UNITS.gate)},
        ValueError,
        "W2 \\(m, c\\)",
    ),
    "unit nan": (
        {"network": Neurons(np.nan * UNITS.W1, UNITS.W2, UNITS.gate)},
        ValueError,
        "network.W1 contains NaN",
    ),
    "gate": ({"gates": GATES[:, :1]}, ValueError, "network.gate must lie in range"),
    "gates shape": ({"gates": GATES[:3]}, ValueError, "gates must have shape"),
    "intercept": ({"intercept": np.zeros(2)}, ValueError, "intercept must be finite"),
    "X columns": ({"X": X[:, 1:]}, ValueError, "X must have shape \\(n, 6\\)"),
    "X nan": ({"X": np.full_like(X, np.nan)}, ValueError, "X contains NaN"),
    "X strings": ({"X": X.astype(str)}, TypeError, "X must hold real numbers"),
    "Y rows": ({"Y": Y[1:]}, ValueError, "Y must have shape"),
    "Y nan": ({"Y": np.full_like(Y, np.inf)}, ValueError, "Y contains NaN or infinity"),
    "max_neurons": ({"max_neurons": 0}, ValueError, "max_neurons must be a positive integer"),
    "max_neurons bool": ({"max_neurons": True}, ValueError, "max_neurons must be"),
    "both": ({"max_neurons": 2, "max_error": 0.1}, ValueError, "give one of them"),
    "max_error": ({"max_error": -1.0}, ValueError, "max_error must be >= 0"),
    "max_error type": ({"max_error": "low"}, TypeError, "max_error must be a number"),
    "l1_ratio": ({"l1_ratio": 0.0}, ValueError, "l1_ratio must be in"),
    "fraction": ({"validation_fraction": 1.0}, ValueError, "validation_fraction must be in"),
    "tol": ({"tol": 0.0}, ValueError, "tol must be positive"),
    "validation_data": ({"validation_data": X}, TypeError, "validation_data must be a pair"),
    "validation rows": (
        {"validation_data": (X, Y[1:])},
        ValueError,
        "validation Y must have shape",
    ),
    "one row": ({"X": X[:1], "Y": Y[:1]}, ValueError, "at least 2 examples"),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_bad_input_is_refused_with_a_message(case):
    changes, kind, message = case
    arguments = {"network": UNITS, "X": X, "Y": Y, "gates": GATES, **changes}
    with pytest.raises(kind, match=message):
        cvxdistill.polish(**arguments)


def test_the_core_refuses_what_does_not_fit():
    A = operator(X, GATES)
    b = np.zeros(3)
    with pytest.raises(ValueError, match="do not fit"):
        polish_neurons(UNITS, b, A, Y[:, 1:], A, Y)
    with pytest.raises(ValueError, match="gate must lie in range"):
        polish_neurons(Neurons(UNITS.W1, UNITS.W2, UNITS.gate + 9), b, A, Y, A, Y)
    with pytest.raises(ValueError, match="l1_ratio must lie in"):
        polish_neurons(UNITS, b, A, Y, A, Y, l1_ratio=0)
    with pytest.raises(ValueError, match="without max_error"):
        polish_neurons(UNITS, b, A, Y, A, Y, max_neurons=3, max_error=0.1)
