"""Estimators with gates="generated": gates searched for while the programme is solved."""

from __future__ import annotations

import numpy as np
import pytest

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor

ACTIVATIONS = pytest.mark.parametrize("activation", ["gated_relu", "relu"])


@pytest.fixture(scope="module")
def ring():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.standard_normal((60, 2)), np.ones(60)])
    return X, np.linalg.norm(X[:, :2], axis=1)


@ACTIVATIONS
def test_generated_gates_reach_a_lower_objective_than_as_many_sampled_ones(ring, activation):
    X, y = ring
    options = {"n_gates": 12, "alpha": 1e-3, "activation": activation, "random_state": 0}
    sampled = ConvexNNRegressor(**options).fit(X, y)
    generated = ConvexNNRegressor(gates="generated", **options).fit(X, y)
    assert generated.gates_.shape[1] <= 12
    assert generated.objective_ < sampled.objective_
    assert generated.duality_gap_ <= 1e-4 * generated.objective_


def test_generated_gates_serve_log_loss_and_weights(ring):
    X, y = ring
    labels, weights = y > np.median(y), np.linspace(0.5, 2, len(y))
    model = ConvexNNClassifier(
        gates="generated", loss="log_loss", n_gates=15, alpha=1e-3, random_state=0
    ).fit(X, labels, weights)
    sampled = ConvexNNClassifier(loss="log_loss", n_gates=15, alpha=1e-3, random_state=0)
    assert model.objective_ < sampled.fit(X, labels, weights).objective_
    assert model.score(X, labels) > 0.9


def test_the_seed_decides_generated_gates(ring):
    X, y = ring
    fits = [
        ConvexNNRegressor(gates="generated", n_gates=8, random_state=3).fit(X, y) for _ in range(2)
    ]
    np.testing.assert_array_equal(fits[0].gates_, fits[1].gates_)


def test_a_penalty_that_joins_all_gates_is_refused(ring):
    with pytest.raises(ValueError, match="feature"):
        ConvexNNRegressor(gates="generated", penalty="feature").fit(*ring)
