"""What gated ReLU estimators predict and fit, with the squared loss; seeds and warm starts."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor
from cvxdistill.solvers import neurons_from_weights, sample_gates

BOTH = pytest.mark.parametrize("estimator", [ConvexNNRegressor, ConvexNNClassifier])


# What is predicted


def predict_by_hand(model, X):
    """sum_j D_j X V_j + b, written out."""
    d = X.shape[1]
    scores = X @ model.gates_[:d] + (model.gates_[d] if len(model.gates_) > d else 0)
    gated = [(scores[:, [j]] >= 0) * (X @ V) for j, V in enumerate(model.coef_)]
    return sum(gated) + model.intercept_


@pytest.mark.parametrize("gates", ["gaussian", "gaussian-bias"])
@pytest.mark.parametrize("penalty", ["neuron", "gate", "ridge"])
def test_predictions_are_those_of_the_formula(data, quick, gates, penalty):
    X, _, Y, _, three = data
    X_new = np.random.default_rng(1).standard_normal((30, 4))
    model = ConvexNNRegressor(gates=gates, penalty=penalty, **quick).fit(X, Y)
    np.testing.assert_allclose(model.predict(X_new), predict_by_hand(model, X_new), atol=1e-12)
    model = ConvexNNClassifier(gates=gates, penalty=penalty, **quick).fit(X, three)
    Z = predict_by_hand(model, X_new)
    np.testing.assert_allclose(model.decision_function(X_new), Z, atol=1e-12)
    np.testing.assert_array_equal(model.predict(X_new), model.classes_[Z.argmax(axis=1)])


def test_two_classes_are_one_column_of_signs_and_threshold_0(data, quick):
    X, _, _, labels, _ = data
    model = ConvexNNClassifier(**quick).fit(X, labels)
    twin = ConvexNNRegressor(**quick).fit(X, np.where(labels == "low", 1.0, -1.0))
    assert model.classes_.tolist() == ["high", "low"] and model.coef_.shape[2] == 1
    decision = model.decision_function(X)
    np.testing.assert_array_equal(decision, twin.predict(X))
    np.testing.assert_array_equal(model.predict(X), np.where(decision > 0, "low", "high"))


def test_more_classes_are_one_hot(data, quick):
    X, _, _, _, three = data
    model = ConvexNNClassifier(**quick).fit(X, three)
    twin = ConvexNNRegressor(**quick).fit(X, np.eye(3)[three])
    np.testing.assert_array_equal(model.coef_, twin.coef_)


def test_flat_targets_give_flat_predictions_and_columns_give_columns(data, quick):
    X, y, Y, _, _ = data
    assert ConvexNNRegressor(**quick).fit(X, y).predict(X).shape == (80,)
    assert ConvexNNRegressor(**quick).fit(X, y[:, None]).predict(X).shape == (80, 1)
    assert ConvexNNRegressor(**quick).fit(X, Y).predict(X).shape == (80, 2)


def test_an_overwhelming_penalty_leaves_the_mean(data, quick):
    X, _, Y, _, _ = data
    model = ConvexNNRegressor(**{**quick, "alpha": 1e3}).fit(X, Y)
    assert not model.coef_.any() and model.n_neurons_ == 0
    np.testing.assert_allclose(model.predict(X), np.tile(Y.mean(axis=0), (80, 1)))


def test_without_intercept_there_is_none(data, quick):
    X, y, _, _, _ = data
    model = ConvexNNRegressor(fit_intercept=False, **quick).fit(X, y)
    assert model.intercept_.tolist() == [0] and model.predict(np.zeros((1, 4))) == [0]


def test_it_learns_what_a_linear_model_cannot():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 2))
    y = np.sign(X[:, 0] * X[:, 1])
    model = ConvexNNClassifier(random_state=0, n_gates=50).fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) > 0.9


# What is fitted


def test_fitted_attributes_have_the_documented_shapes(data, quick):
    X, _, Y, _, _ = data
    model = ConvexNNRegressor(gates="gaussian-bias", **quick).fit(X, Y)
    p = model.gates_.shape[1]
    assert model.gates_.shape == (5, p) and 1 <= p <= 12
    assert model.coef_.shape == (p, 4, 2) and model.intercept_.shape == (2,)
    assert model.n_features_in_ == 4 and not hasattr(model, "feature_names_in_")
    assert 0 <= model.duality_gap_ <= model.tol * model.objective_
    assert model.n_iter_ >= 1
    assert model.n_neurons_ == len(neurons_from_weights(model.coef_, "neuron")) > 0


@pytest.mark.parametrize("penalty", ["neuron", "gate"])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize("fit_intercept", [False, True])
def test_objective_equals_that_of_cvxpy_and_the_gap_is_an_upper_bound(
    data, penalty, l1_ratio, fit_intercept
):
    cp = pytest.importorskip("cvxpy")
    X, _, Y, _, _ = data
    alpha = 0.05
    settings = {"penalty": penalty, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    settings |= {"alpha": alpha, "n_gates": 8, "random_state": 0}
    model = ConvexNNRegressor(tol=1e-8, **settings).fit(X, Y)
    loose = ConvexNNRegressor(tol=1e-2, **settings).fit(X, Y)
    weights = [cp.Variable((4, 2)) for _ in model.gates_.T]
    b = cp.Variable((1, 2)) if fit_intercept else np.zeros((1, 2))
    Z = np.ones((80, 1)) @ b
    for g, V in zip(model.gates_.T, weights, strict=True):
        Z = Z + ((X @ g >= 0)[:, None] * X) @ V
    axis = {"axis": 0} if penalty == "neuron" else {}
    norm = sum(cp.sum(cp.norm(V, 2 if axis else "fro", **axis)) for V in weights)
    ridge = sum(cp.sum_squares(V) for V in weights) / 2
    penalties = alpha * (l1_ratio * norm + (1 - l1_ratio) * ridge)
    program = cp.Problem(cp.Minimize(cp.sum_squares(Z - Y) / 160 + penalties))
    program.solve(solver=cp.CLARABEL)
    assert model.objective_ == pytest.approx(program.value, rel=1e-6)
    assert loose.duality_gap_ >= loose.objective_ - program.value - 1e-7 * program.value > 0


def test_patterns_are_deduplicated_at_fit(data, quick):
    X, y, _, _, _ = data
    G = sample_gates(4, 5, random_state=0)
    repeated = np.hstack([G, 2 * G, G[:, :2]])
    model = ConvexNNRegressor(gates=repeated, **quick).fit(X, y)
    np.testing.assert_array_equal(model.gates_, G)


def test_gates_of_an_int_seed_are_those_of_the_sampler(data, quick):
    X, y, _, _, _ = data
    model = ConvexNNRegressor(**quick).fit(X, y)
    np.testing.assert_array_equal(model.gates_, sample_gates(4, 12, random_state=0))


def test_ridge_is_exact(data, quick):
    from sklearn.linear_model import Ridge

    X, y, _, _, _ = data
    model = ConvexNNRegressor(penalty="ridge", tol=1e-10, **quick).fit(X, y)
    gated = np.hstack([(X @ model.gates_[:, [j]] >= 0) * X for j in range(len(model.coef_))])
    ridge = Ridge(alpha=80 * quick["alpha"]).fit(gated, y)
    np.testing.assert_allclose(model.predict(X), ridge.predict(gated), atol=1e-8)


def test_a_ridge_is_solved_directly_or_iteratively_to_the_same_objective(data, quick):
    direct = ConvexNNRegressor(penalty="ridge", tol=1e-8, **quick).fit(data.X, data.y)
    settings = {"penalty": "ridge", "tol": 1e-8, "solver": "rfista", **quick}
    iterative = ConvexNNRegressor(**settings).fit(data.X, data.y)
    assert iterative.n_iter_ > direct.n_iter_ and direct.n_iter_ <= 2
    assert iterative.objective_ == pytest.approx(direct.objective_, rel=1e-7)


def test_float32_converges_however_far_the_targets_lie_from_0(data, quick):
    X, _, Y, _, _ = data
    near = ConvexNNRegressor(**quick).fit(X.astype(np.float32), Y)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        far = ConvexNNRegressor(**quick).fit(X.astype(np.float32), Y + 1e5)
    assert far.objective_ == pytest.approx(near.objective_, rel=1e-3)
    np.testing.assert_allclose(far.intercept_, near.intercept_ + 1e5, rtol=1e-6)


def test_normalize_does_not_know_the_units_of_x(data, quick):
    X, y, _, _, _ = data
    units = np.array([1.0, 1000.0, 0.01, 1.0])
    G = sample_gates(4, 12, random_state=0)
    settings = {**quick, "normalize": True, "tol": 1e-8}
    one = ConvexNNRegressor(gates=G, **settings).fit(X, y)
    two = ConvexNNRegressor(gates=G / units[:, None], **settings).fit(X * units, y)
    assert one.objective_ == pytest.approx(two.objective_, rel=1e-7)
    np.testing.assert_allclose(two.predict(X * units), one.predict(X), atol=1e-3)


@BOTH
def test_a_stop_short_of_the_tolerance_warns_and_names_the_gap(data, quick, estimator):
    X, _, _, _, three = data
    model = estimator(max_iter=2, **quick)
    with pytest.warns(ConvergenceWarning) as caught:
        model.fit(X, three)
    message = str(caught[0].message)
    assert f"absolute gap {model.duality_gap_:.3g}" in message
    assert f"relative duality gap {model.duality_gap_ / model.objective_:.1e}" in message
    assert "iteration limit" in message and caught[0].filename == __file__
    # Outputs are solved one after the other.
    assert model.n_iter_ == 2 * (3 if estimator is ConvexNNClassifier else 1)


def test_convergence_does_not_warn(data, quick):
    X, y, _, _, _ = data
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConvexNNRegressor(**quick).fit(X, y)


def test_verbose_shows_a_bar_and_silence_is_silent(data, quick, capsys):
    X, y, _, _, _ = data
    ConvexNNRegressor(**quick).fit(X, y)
    assert capsys.readouterr() == ("", "")
    ConvexNNRegressor(verbose=1, **quick).fit(X, y)
    assert "SemismoothNewton" in capsys.readouterr().err


# Seeds and warm starts


def test_the_seed_decides_everything(data):
    X, y, _, _, _ = data

    def fit(seed):
        return ConvexNNRegressor(alpha=1e-2, n_gates=12, random_state=seed).fit(X, y)

    np.testing.assert_array_equal(fit(1).coef_, fit(1).coef_)
    assert not np.array_equal(fit(1).gates_, fit(2).gates_)
    assert not np.array_equal(fit(None).gates_, fit(None).gates_)
    one, two = (fit(np.random.RandomState(5)) for _ in range(2))
    np.testing.assert_array_equal(one.coef_, two.coef_)


@pytest.mark.parametrize("random_state", [None, 0])
def test_a_warm_start_keeps_the_gates_and_saves_iterations(data, random_state):
    X, y, _, _, _ = data
    settings = {"n_gates": 12, "warm_start": True, "tol": 1e-6, "random_state": random_state}
    model = ConvexNNRegressor(alpha=1e-2, **settings).fit(X, y)
    gates, n_iter = model.gates_, model.n_iter_
    model.fit(X, y)
    assert model.n_iter_ < n_iter
    np.testing.assert_array_equal(model.gates_, gates)
    model.set_params(alpha=5e-3).fit(X, y)
    cold = ConvexNNRegressor(alpha=5e-3, tol=1e-6, gates=gates).fit(X, y)
    assert model.objective_ == pytest.approx(cold.objective_, rel=2e-6)


def test_a_warm_start_keeps_gates_that_were_given(data, quick):
    X, y, _, _, _ = data
    G = sample_gates(4, 12, random_state=3)
    model = ConvexNNRegressor(gates=G, warm_start=True, **quick).fit(X, y)
    n_iter = model.n_iter_
    assert model.set_params(gates=G.copy()).fit(X, y).n_iter_ < n_iter
    assert model.set_params(gates=-G).fit(X, y).n_iter_ > 0
    np.testing.assert_array_equal(model.gates_, -G)


@pytest.mark.parametrize(
    "change", [{"n_gates": 7}, {"random_state": 1}, {"gates": "gaussian-bias"}]
)
def test_a_warm_start_does_not_survive_other_gates(data, quick, change):
    X, y, _, _, _ = data
    model = ConvexNNRegressor(warm_start=True, **quick).fit(X, y)
    model.set_params(**change).fit(X, y)
    fresh = ConvexNNRegressor(**{**quick, **change}).fit(X, y)
    np.testing.assert_array_equal(model.gates_, fresh.gates_)
    np.testing.assert_array_equal(model.coef_, fresh.coef_)


def test_a_warm_start_does_not_survive_other_shapes(data, quick):
    X, y, Y, _, _ = data
    model = ConvexNNRegressor(warm_start=True, **quick).fit(X, y)
    assert model.fit(X, Y).coef_.shape[2] == 2
    assert model.fit(X[:, :3], Y).gates_.shape[0] == 3


def test_without_warm_start_a_second_fit_is_the_first(data, quick):
    X, y, _, _, _ = data
    model = ConvexNNRegressor(**quick).fit(X, y)
    coef = model.coef_
    np.testing.assert_array_equal(model.fit(X, y).coef_, coef)
