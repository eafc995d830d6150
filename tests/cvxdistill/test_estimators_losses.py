"""Log loss and its probabilities, Huber's loss, and every penalty, with the estimators."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber
from sklearn.linear_model import LogisticRegression

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor

ALWAYS_ON = np.zeros((4, 1))
PENALTIES = ["neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"]


def gated_features(model, X):
    """[D_1 X, ..., D_p X]."""
    return np.hstack([(X @ g >= 0)[:, None] * X for g in model.gates_.T])


# Log loss


@pytest.mark.parametrize("fit_intercept", [True, False])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("target", ["labels", "three"])
def test_one_gate_that_is_always_on_is_logistic_regression(data, target, weighted, fit_intercept):
    X, y = data.X, getattr(data, target)
    weights = np.random.default_rng(1).uniform(0.1, 3, 80) if weighted else None
    alpha = 0.02
    model = ConvexNNClassifier(
        alpha,
        loss="log_loss",
        penalty="ridge",
        gates=ALWAYS_ON,
        fit_intercept=fit_intercept,
        tol=1e-12,
    ).fit(X, y, weights)
    C = 1 / (alpha * (80 if weights is None else weights.sum()))
    settings = {"C": C, "fit_intercept": fit_intercept, "tol": 1e-10, "max_iter": 10_000}
    twin = LogisticRegression(solver="newton-cg", **settings).fit(X, y, weights)
    np.testing.assert_array_equal(model.classes_, twin.classes_)
    np.testing.assert_allclose(model.coef_[0].T, twin.coef_, atol=1e-5)
    np.testing.assert_allclose(model.decision_function(X), twin.decision_function(X), atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), twin.predict_proba(X), atol=1e-6)
    np.testing.assert_allclose(model.predict_log_proba(X), twin.predict_log_proba(X), atol=1e-5)
    np.testing.assert_array_equal(model.predict(X), twin.predict(X))


@pytest.mark.parametrize("target", ["labels", "three"])
def test_gated_features_with_a_ridge_are_those_of_logistic_regression(data, quick, target):
    X, y = data.X, getattr(data, target)
    model = ConvexNNClassifier(loss="log_loss", penalty="ridge", tol=1e-10, **quick).fit(X, y)
    twin = LogisticRegression(C=1 / (80 * quick["alpha"]), tol=1e-10, max_iter=10_000)
    features = gated_features(model, X)
    proba = twin.fit(features, y).predict_proba(features)
    np.testing.assert_allclose(model.predict_proba(X), proba, atol=1e-5)


@pytest.mark.parametrize("target", ["labels", "three"])
@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
def test_probabilities_are_probabilities_of_the_predicted_classes(data, quick, activation, target):
    X_new = 10 * np.random.default_rng(1).standard_normal((30, 4))
    y = getattr(data, target)
    model = ConvexNNClassifier(loss="log_loss", activation=activation, **quick).fit(data.X, y)
    P = model.predict_proba(X_new)
    assert P.shape == (30, len(np.unique(y))) and P.min() >= 0
    np.testing.assert_allclose(P.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(model.classes_[P.argmax(axis=1)], model.predict(X_new))
    np.testing.assert_allclose(np.exp(model.predict_log_proba(X_new)), P, rtol=1e-9)


@pytest.mark.parametrize("target", ["labels", "three"])
def test_log_probabilities_stay_finite_where_probabilities_vanish(data, quick, target):
    y = getattr(data, target)
    model = ConvexNNClassifier(loss="log_loss", **quick).fit(data.X, y)
    far = 1e6 * data.X[:5]
    assert (model.predict_proba(far) == 0).any()
    assert np.isfinite(model.predict_log_proba(far)).all()
    assert model.predict_log_proba(far).min() < -1e4


def test_the_offset_of_the_log_odds_is_the_intercept(data, quick):
    y = data.labels
    model = ConvexNNClassifier(loss="log_loss", **{**quick, "alpha": 1e3}).fit(data.X, y)
    assert not model.coef_.any()
    share = (y == "low").mean()
    np.testing.assert_allclose(model.predict_proba(data.X[:1]), [[1 - share, share]])
    three = ConvexNNClassifier(loss="log_loss", **{**quick, "alpha": 1e3}).fit(data.X, data.three)
    shares = np.bincount(data.three) / 80
    np.testing.assert_allclose(three.predict_proba(data.X[:1]), [shares])


@pytest.mark.parametrize("method", ["predict_proba", "predict_log_proba"])
def test_the_squared_loss_has_no_probabilities(data, quick, method):
    model = ConvexNNClassifier(**quick).fit(data.X, data.three)
    assert not hasattr(model, method)
    with pytest.raises(AttributeError, match=method) as error:
        getattr(model, method)
    assert str(error.value.__cause__) == "Probabilities need loss='log_loss', got 'squared'."
    assert hasattr(ConvexNNClassifier(loss="log_loss"), method)


@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
def test_log_loss_without_penalty_is_refused_before_the_data_are_looked_at(activation):
    model = ConvexNNClassifier(loss="log_loss", penalty="none", activation=activation)
    with pytest.raises(ValueError, match=r"loss='log_loss' needs a penalty: .* no minimiser"):
        model.fit(None, None)


# Huber's loss


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_one_gate_that_is_always_on_is_linear_regression_with_hubers_loss(data, fit_intercept):
    X, y = data.X, data.y.copy()
    y[:8] += 30
    settings = {"loss": "huber", "penalty": "ridge", "gates": ALWAYS_ON, "tol": 1e-12}
    model = ConvexNNRegressor(0.02, fit_intercept=fit_intercept, **settings).fit(X, y)

    def objective(w):
        b = w[4] if fit_intercept else 0.0
        return huber(1.35, y - X @ w[:4] - b).mean() + 0.01 * w[:4] @ w[:4]

    twin = minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-9})
    assert model.objective_ == pytest.approx(twin.fun, rel=1e-9)
    np.testing.assert_allclose(model.coef_[0, :, 0], twin.x[:4], atol=1e-5)
    np.testing.assert_allclose(model.intercept_, [twin.x[4] * fit_intercept], atol=1e-5)


@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
def test_hubers_loss_is_robust_to_outliers(quick, activation):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 4))
    truth = np.abs(X[:, 0]) + X[:, 1]
    y = truth + 0.1 * rng.standard_normal(200)
    y[:10] += 100
    settings = {"activation": activation, **quick}
    errors = [
        np.abs(ConvexNNRegressor(loss=loss, **settings).fit(X, y).predict(X) - truth)[10:].mean()
        for loss in ("huber", "squared")
    ]
    assert errors[0] < 0.4 and errors[1] > 10 * errors[0]


def test_small_errors_are_squared_by_hubers_loss_too(data, quick):
    y = 0.1 * data.y
    squared, robust = (
        ConvexNNRegressor(loss=loss, tol=1e-10, **quick).fit(data.X, y)
        for loss in ("squared", "huber")
    )
    assert robust.objective_ == pytest.approx(squared.objective_, rel=1e-9)
    np.testing.assert_allclose(robust.predict(data.X), squared.predict(data.X), atol=1e-6)


def test_several_outputs_of_hubers_loss_are_fitted_each_for_itself(data, quick):
    settings = {"loss": "huber", "tol": 1e-10, **quick}
    both = ConvexNNRegressor(**settings).fit(data.X, data.Y)
    each = [ConvexNNRegressor(**settings).fit(data.X, y).predict(data.X) for y in data.Y.T]
    np.testing.assert_allclose(both.predict(data.X), np.stack(each, axis=1), atol=1e-4)


# Losses and penalties together


@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
@pytest.mark.parametrize("loss", ["squared", "huber", "logistic", "multinomial"])
def test_the_objective_is_the_least_that_cvxpy_finds(data, quick, activation, loss):
    cp = pytest.importorskip("cvxpy")
    X = data.X
    settings = {**quick, "activation": activation, "tol": 1e-6, "n_gates": 6}
    if loss in ("squared", "huber"):
        model, y = ConvexNNRegressor(loss=loss, **settings), data.Y
    else:
        model = ConvexNNClassifier(loss="log_loss", **settings)
        y = data.labels if loss == "logistic" else data.three
    model.fit(X, y)
    p, c = model.gates_.shape[1], len(model.intercept_)
    b = cp.Variable((1, c))
    Z = np.ones((80, 1)) @ b
    weights, constraints = [], []
    for g in model.gates_.T:
        on = (X @ g >= 0)[:, None]
        V = cp.Variable((4, c))
        weights.append(V)
        Z = Z + (on * X) @ V
        if activation == "relu":
            U = cp.Variable((4, c))
            weights.append(U)
            Z = Z - (on * X) @ U
            constraints += [((2 * on - 1) * X) @ W >= 0 for W in (V, U)]
    if loss == "squared":
        fit = cp.sum_squares(Z - y) / 160
    elif loss == "huber":
        fit = cp.sum(cp.huber(Z - y, 1.35)) / 160
    elif loss == "logistic":
        fit = cp.sum(cp.logistic(cp.multiply(np.where(y == "low", -1, 1)[:, None], Z))) / 80
    else:
        fit = (cp.sum(cp.log_sum_exp(Z, axis=1)) - cp.sum(cp.multiply(np.eye(3)[y], Z))) / 80
    norms = sum(cp.sum(cp.norm(V, 2, axis=0)) for V in weights)
    program = cp.Problem(cp.Minimize(fit + quick["alpha"] * norms), constraints)
    program.solve(solver=cp.CLARABEL)
    assert len(weights) == p * (1 + (activation == "relu"))
    assert model.objective_ == pytest.approx(program.value, rel=3e-6)
    assert model.duality_gap_ >= model.objective_ - program.value * (1 + 1e-7)


def norm_by_hand(penalty, V):
    """R of weights (blocks, d, c)."""
    if penalty == "neuron":
        return np.linalg.norm(V, axis=1).sum()
    if penalty == "gate":
        return np.linalg.norm(V, axis=(1, 2)).sum()
    if penalty == "nuclear":
        return sum(np.linalg.norm(v, "nuc") for v in V)
    if penalty == "feature":
        return np.linalg.norm(V, axis=(0, 2)).sum()
    if penalty == "l1":
        return np.abs(V).sum()
    return {"ridge": 0.5 * (V**2).sum(), "none": 0.0}[penalty]


@pytest.mark.parametrize("l1_ratio", [1.0, 0.6])
@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_penalty_is_in_the_objective(data, quick, penalty, activation, l1_ratio):
    settings = {"penalty": penalty, "activation": activation, "l1_ratio": l1_ratio, **quick}
    model = ConvexNNRegressor(tol=1e-3, **settings).fit(data.X, data.Y)
    V = model.coef_.reshape(-1, 4, 2)
    norm = norm_by_hand(penalty, V)
    if penalty not in ("ridge", "none"):
        norm = l1_ratio * norm + (1 - l1_ratio) * 0.5 * (V**2).sum()
    fit = ((model.predict(data.X) - data.Y) ** 2).sum() / 160
    assert model.objective_ == pytest.approx(fit + quick["alpha"] * norm, rel=1e-9)
    assert model.n_neurons_ > 0
    if penalty != "none":
        assert model.duality_gap_ <= model.tol * model.objective_


def test_without_a_penalty_it_is_least_squares_and_the_kkt_residual_says_so(data, quick):
    model = ConvexNNRegressor(penalty="none", tol=1e-9, **quick).fit(data.X, data.y)
    assert model.duality_gap_ == np.inf and 0 <= model.kkt_residual_ <= 1e-9
    A = np.hstack([gated_features(model, data.X), np.ones((80, 1))])
    best = A @ np.linalg.lstsq(A, data.y)[0]
    np.testing.assert_allclose(model.predict(data.X), best, atol=1e-5)
    other = ConvexNNRegressor(penalty="none", tol=1e-9, **{**quick, "alpha": 1.0})
    np.testing.assert_array_equal(other.fit(data.X, data.y).coef_, model.coef_)


def test_a_stop_short_of_the_tolerance_without_penalty_names_the_kkt_residual(data, quick):
    model = ConvexNNRegressor(penalty="none", max_iter=3, **quick)
    with pytest.warns(UserWarning, match=r"KKT residual [\d.e-]+\. Scale X and y"):
        model.fit(data.X, data.y)
    assert model.kkt_residual_ > model.tol


def test_features_drop_out_for_all_gates_at_once_with_the_feature_penalty(data, quick):
    settings = {"penalty": "feature", **{**quick, "alpha": 0.1}}
    model = ConvexNNRegressor(**settings).fit(data.X, data.Y)
    used = model.coef_.any(axis=(0, 2))
    assert not used.all() and used[:3].all()


@pytest.mark.parametrize("loss", ["squared", "log_loss"])
def test_the_classes_may_have_any_order_and_type(data, quick, loss):
    names = np.array(["c", "a", "b"])[data.three]
    model = ConvexNNClassifier(loss=loss, **quick).fit(data.X, names)
    assert model.classes_.tolist() == ["a", "b", "c"]
    twin = ConvexNNClassifier(loss=loss, **quick).fit(data.X, np.array([2, 0, 1])[data.three])
    np.testing.assert_array_equal(model.coef_, twin.coef_)
    assert (model.predict(data.X) == names).mean() > 0.8
    two = ConvexNNClassifier(loss=loss, **quick).fit(data.X, data.y > 2.5)
    assert two.classes_.tolist() == [False, True] and two.predict(data.X).dtype == bool


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("alpha", [1e-3, 1e-1])
def test_intercepts_of_more_classes_have_mean_0(data, quick, alpha, dtype):
    X = data.X.astype(dtype)
    model = ConvexNNClassifier(loss="log_loss", **{**quick, "alpha": alpha}).fit(X, data.three)
    scale = np.abs(model.intercept_).max()
    assert abs(model.intercept_.mean()) <= 10 * np.finfo(dtype).eps * max(scale, 1)
