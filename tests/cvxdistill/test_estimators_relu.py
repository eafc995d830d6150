"""ReLU networks: cones, certificates, and the network of the weights, which is optimal itself."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import lsq_linear, minimize

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor
from cvxdistill.solvers import neurons_from_weights, sample_gates
from cvxdistill.solvers.arrangements import enumerate_gates

KINDS = [
    (ConvexNNRegressor, "squared", "Y"),
    (ConvexNNRegressor, "huber", "Y"),
    (ConvexNNClassifier, "squared", "three"),
    (ConvexNNClassifier, "log_loss", "three"),
    (ConvexNNClassifier, "log_loss", "labels"),
]
EVERY_KIND = pytest.mark.parametrize(
    ("estimator", "loss", "target"),
    KINDS,
    ids=[f"{e.__name__}-{loss}-{target}" for e, loss, target in KINDS],
)


@pytest.fixture
def relu(quick):
    return {"activation": "relu", **quick}


def output(model, X):
    """What the model predicts, as numbers, of shape (n, c)."""
    decide = model.predict if isinstance(model, ConvexNNRegressor) else model.decision_function
    return decide(X).reshape(len(X), -1)


def predict_by_hand(model, X):
    """sum_j relu(X V_j) - relu(X U_j) + b, written out."""
    V, U = model.coef_
    pairs = zip(V, U, strict=True)
    return sum(np.maximum(X @ v, 0) - np.maximum(X @ u, 0) for v, u in pairs) + model.intercept_


def violation_by_hand(model, X):
    """max_i [-s_i x_i . w]_+ / (||x_i|| ||w||) over all columns w, in float64."""
    X = X.astype(np.float64)
    worst = 0.0
    for W in model.coef_.astype(np.float64):
        for g, w in zip(model.gates_.T, W, strict=True):
            signs = np.where(X @ g >= 0, 1, -1)[:, None]
            lengths = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(w, axis=0)
            outside = np.maximum(-signs * (X @ w), 0)
            worst = max(worst, (outside / np.where(lengths > 0, lengths, 1)).max())
    return worst


@EVERY_KIND
def test_weights_come_in_pairs_and_predict_without_gates(data, relu, estimator, loss, target):
    model = estimator(loss=loss, **relu).fit(data.X, getattr(data, target))
    p, c = model.gates_.shape[1], len(model.intercept_)
    assert model.coef_.shape == (2, p, 4, c) and model.coef_[0].any() and model.coef_[1].any()
    model.gates_ = None
    X_new = np.random.default_rng(1).standard_normal((30, 4))
    np.testing.assert_allclose(output(model, X_new), predict_by_hand(model, X_new), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@EVERY_KIND
def test_weights_lie_in_the_cones_of_their_gates(data, relu, estimator, loss, target, dtype):
    X = data.X.astype(dtype)
    model = estimator(loss=loss, **relu).fit(X, getattr(data, target))
    allowed = 1e-6 if dtype == np.float64 else 1e-5
    assert violation_by_hand(model, X) <= allowed and 0 <= model.violation_ <= allowed


@EVERY_KIND
def test_the_gap_is_certified(data, relu, estimator, loss, target):
    y = getattr(data, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = estimator(loss=loss, **relu).fit(data.X, y)
    assert 0 <= model.duality_gap_ <= 1e-4 * model.objective_
    tight = estimator(loss=loss, tol=1e-7, **relu).fit(data.X, y)
    assert model.objective_ >= tight.objective_ - tight.duality_gap_
    assert model.objective_ - tight.objective_ <= model.duality_gap_
    assert tight.kkt_residual_ <= 1e-2


@pytest.mark.parametrize("solver", ["rfista", "augmented_lagrangian", "admm"])
def test_all_solvers_find_the_same_optimum(data, relu, solver):
    auto = ConvexNNRegressor(tol=1e-6, **relu).fit(data.X, data.Y)
    model = ConvexNNRegressor(tol=1e-6, solver=solver, **relu).fit(data.X, data.Y)
    assert model.objective_ == pytest.approx(auto.objective_, rel=2e-6)


def test_the_gated_relaxation_has_a_lower_optimum(data, relu):
    network = ConvexNNRegressor(tol=1e-6, **relu).fit(data.X, data.y)
    gated = ConvexNNRegressor(**{**relu, "activation": "gated_relu", "gates": network.gates_})
    gated.fit(data.X, data.y)
    assert gated.objective_ - gated.duality_gap_ <= network.objective_
    assert gated.objective_ < 0.99 * network.objective_


def test_an_overwhelming_penalty_leaves_the_mean(data, relu):
    model = ConvexNNRegressor(**{**relu, "alpha": 1e3}).fit(data.X, data.Y)
    assert not model.coef_.any() and model.n_neurons_ == 0
    np.testing.assert_allclose(model.predict(data.X), np.tile(data.Y.mean(axis=0), (80, 1)))


def test_without_intercept_there_is_none(data, relu):
    model = ConvexNNRegressor(fit_intercept=False, **relu).fit(data.X, data.y)
    assert model.intercept_.tolist() == [0] and model.predict(np.zeros((1, 4))) == [0]


def test_normalize_does_not_know_the_units_of_x(data, relu):
    units = np.array([1.0, 100.0, 0.1, 1.0])
    G = sample_gates(4, 12, random_state=0)
    settings = {**relu, "normalize": True, "tol": 1e-6}
    one = ConvexNNRegressor(gates=G, **settings).fit(data.X, data.y)
    two = ConvexNNRegressor(gates=G / units[:, None], **settings).fit(data.X * units, data.y)
    assert one.objective_ == pytest.approx(two.objective_, rel=2e-6)
    np.testing.assert_allclose(two.predict(data.X * units), one.predict(data.X), atol=1e-2)


# Gates


@pytest.mark.parametrize("gates", ["gaussian", "sparse", "pairs", "wedge"])
def test_sampled_gates_keep_clear_of_the_rows(data, relu, gates):
    model = ConvexNNRegressor(gates=gates, **relu).fit(data.X, data.y)
    scores = np.abs(data.X @ model.gates_) / np.linalg.norm(model.gates_, axis=0)
    assert (scores / np.linalg.norm(data.X, axis=1)[:, None]).min() >= 0.99e-5
    assert model.duality_gap_ <= model.tol * model.objective_


def test_gates_that_are_clear_already_are_those_of_the_sampler(data, relu):
    model = ConvexNNRegressor(**relu).fit(data.X, data.y)
    np.testing.assert_array_equal(model.gates_, sample_gates(4, 12, random_state=0))


# The network


@EVERY_KIND
def test_the_network_of_the_weights_predicts_the_same(data, relu, estimator, loss, target):
    model = estimator(loss=loss, **relu).fit(data.X, getattr(data, target))
    neurons = neurons_from_weights(model.coef_)
    assert model.n_neurons_ == len(neurons) > 0
    X_new = np.random.default_rng(1).standard_normal((30, 4))
    Z = np.maximum(X_new @ neurons.W1, 0) @ neurons.W2 + model.intercept_
    np.testing.assert_allclose(Z, output(model, X_new), atol=1e-12)
    assert (neurons.W2 > 0).any() and (neurons.W2 < 0).any()
    columns = np.linalg.norm(model.coef_, axis=2).sum()
    assert neurons.weight_decay() == pytest.approx(columns, rel=1e-12)


def torch_objective(model, X, y):
    """Loss + alpha/2 (||W1||^2 + ||W2||^2) of the network in torch; X W1; the leaves W1, W2, b."""
    torch = pytest.importorskip("torch")
    neurons = neurons_from_weights(model.coef_)
    leaves = [
        torch.tensor(A, dtype=torch.float64, requires_grad=True)
        for A in (neurons.W1, neurons.W2, model.intercept_)
    ]
    W1, W2, b = leaves
    S = torch.from_numpy(X) @ W1
    Z = torch.relu(S) @ W2 + b
    mean = {"reduction": "mean"}
    if isinstance(model, ConvexNNRegressor):
        Y = torch.from_numpy(y.reshape(len(X), -1))
        if model.loss == "squared":
            fit = ((Z - Y) ** 2).sum() / (2 * len(X))
        else:
            fit = torch.nn.functional.huber_loss(Z, Y, delta=1.35, reduction="sum") / len(X)
    elif len(model.classes_) == 2:
        target = torch.from_numpy((y == model.classes_[1]).astype(float))
        fit = torch.nn.functional.binary_cross_entropy_with_logits(Z[:, 0], target, **mean)
    else:
        fit = torch.nn.functional.cross_entropy(Z, torch.from_numpy(y), **mean)
    return fit + model.alpha / 2 * ((W1**2).sum() + (W2**2).sum()), S.detach().numpy(), leaves


@pytest.mark.parametrize("target", ["Y", "labels", "three"])
def test_the_objective_is_that_of_the_network_with_weight_decay(data, relu, target):
    y = getattr(data, target)
    if target == "Y":
        models = [ConvexNNRegressor(loss=loss, **relu) for loss in ("squared", "huber")]
    else:
        models = [ConvexNNClassifier(loss="log_loss", **relu)]
    for model in models:
        value, _, _ = torch_objective(model.fit(data.X, y), data.X, y)
        assert value.item() == pytest.approx(model.objective_, rel=1e-6)


@pytest.fixture(scope="module")
def toy():
    """Ten examples in three dimensions, with one gate in each region of their arrangement."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((10, 3))
    y = np.abs(X[:, 0]) - np.maximum(X[:, 1], 0) + 0.3 * rng.standard_normal(10)
    return X, y, enumerate_gates(X)


def smallest_subgradient(model, X, y):
    """Norm of the least element of Clarke's subdifferential in W1, W2 and b.

    Torch takes 0 for the derivative of the ReLU at 0, but any number in [0, 1] will do for each
    row that lies on the hyperplane of a unit.
    """
    value, S, leaves = torch_objective(model, X, y)
    value.backward()
    (dW1, dW2, db), (W1, W2, b) = (
        [leaf.grad.numpy() for leaf in leaves],
        [leaf.detach().numpy() for leaf in leaves],
    )
    Z = np.maximum(S, 0) @ W2 + b
    pull = Z - y.reshape(len(X), -1) if isinstance(model, ConvexNNRegressor) else None
    if pull is None:
        sign = np.where(y == model.classes_[1], 1.0, -1.0)[:, None]
        pull = -sign / (1 + np.exp(sign * Z))
    squares = (dW2**2).sum() + (db**2).sum()
    lengths = np.linalg.norm(X, axis=1)[:, None] * np.linalg.norm(W1, axis=0)
    for s, edge, v, gradient in zip(S.T, (np.abs(S) < 1e-7 * lengths).T, W2, dW1.T, strict=True):
        rows = X[edge] * (pull[edge] @ v)[:, None] / len(X)
        # Torch counted the rows that rounding put above 0.
        gradient = gradient - rows[s[edge] > 0].sum(axis=0)
        if edge.any():
            gradient = gradient + rows.T @ lsq_linear(rows.T, -gradient, (0, 1)).x
        squares += (gradient**2).sum()
    return squares**0.5


@pytest.mark.parametrize("loss", ["squared", "log_loss"])
def test_with_all_patterns_the_network_is_a_stationary_point(toy, loss):
    X, y, G = toy
    settings = {"activation": "relu", "gates": G, "alpha": 0.02, "tol": 1e-9}
    if loss == "squared":
        model = ConvexNNRegressor(**settings)
    else:
        model, y = ConvexNNClassifier(loss="log_loss", **settings), (y > 0.5).astype(int)
    model.fit(X, y)
    value, _, _ = torch_objective(model, X, y)
    assert value.item() == pytest.approx(model.objective_, rel=1e-6)
    assert model.n_neurons_ > 0
    assert smallest_subgradient(model, X, y) < 1e-4


def test_with_all_patterns_no_descent_finds_a_better_network(toy):
    X, y, G = toy
    alpha, m = 0.02, 12
    model = ConvexNNRegressor(alpha, activation="relu", gates=G, tol=1e-6).fit(X, y)

    def objective(flat):
        W1, W2, b = flat[: 3 * m].reshape(3, m), flat[3 * m : 4 * m], flat[-1]
        H = np.maximum(X @ W1, 0)
        r = H @ W2 + b - y
        dW1 = X.T @ (np.outer(r, W2) * (H > 0)) / 10 + alpha * W1
        dW2 = H.T @ r / 10 + alpha * W2
        value = r @ r / 20 + alpha / 2 * flat[:-1] @ flat[:-1]
        return value, np.concatenate([dW1.ravel(), dW2, [r.mean()]])

    rng = np.random.default_rng(0)
    found = [
        minimize(objective, rng.standard_normal(4 * m + 1), jac=True, method="L-BFGS-B").fun
        for _ in range(20)
    ]
    assert min(found) >= model.objective_ - model.duality_gap_
    assert min(found) <= 1.02 * model.objective_


# Warm starts


def test_a_warm_start_saves_iterations_and_keeps_the_gates(data, relu):
    settings = {**relu, "warm_start": True, "tol": 1e-5}
    model = ConvexNNRegressor(**settings).fit(data.X, data.y)
    gates, n_iter = model.gates_, model.n_iter_
    assert model.fit(data.X, data.y).n_iter_ < n_iter
    np.testing.assert_array_equal(model.gates_, gates)
    model.set_params(alpha=5e-3).fit(data.X, data.y)
    cold = ConvexNNRegressor(**{**relu, "alpha": 5e-3, "tol": 1e-5}).fit(data.X, data.y)
    assert model.objective_ == pytest.approx(cold.objective_, rel=2e-5)


def test_a_warm_start_does_not_survive_another_activation(data, quick):
    model = ConvexNNRegressor(warm_start=True, **quick).fit(data.X, data.y)
    model.set_params(activation="relu").fit(data.X, data.y)
    fresh = ConvexNNRegressor(activation="relu", **quick).fit(data.X, data.y)
    np.testing.assert_array_equal(model.coef_, fresh.coef_)
    model.set_params(activation="gated_relu").fit(data.X, data.y)
    assert model.coef_.ndim == 3


def test_a_warm_start_on_other_rows_starts_inside_the_new_cones(data, relu):
    model = ConvexNNRegressor(warm_start=True, **relu).fit(data.X[:60], data.y[:60])
    model.fit(data.X, data.y)
    assert model.violation_ <= 1e-6
    assert model.duality_gap_ <= model.tol * model.objective_
