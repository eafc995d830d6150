"""Sample weights and class weights: repetition, leaving out, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.class_weight import compute_class_weight

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor
from cvxdistill.solvers import sample_gates

BOTH = pytest.mark.parametrize("estimator", [ConvexNNRegressor, ConvexNNClassifier])
KINDS = [
    (estimator, {"activation": activation, "loss": loss}, target)
    for estimator, loss, target in (
        (ConvexNNRegressor, "squared", "Y"),
        (ConvexNNRegressor, "huber", "Y"),
        (ConvexNNClassifier, "squared", "three"),
        (ConvexNNClassifier, "log_loss", "three"),
        (ConvexNNClassifier, "log_loss", "labels"),
    )
    for activation in ("gated_relu", "relu")
]
EVERY_KIND = pytest.mark.parametrize(
    ("estimator", "kind", "target"),
    KINDS,
    ids=["-".join((e.__name__, *kind.values(), target)) for e, kind, target in KINDS],
)


@pytest.fixture
def quick():
    return {"n_gates": 8, "alpha": 0.03, "random_state": 0}


def output(model, X):
    """What the model predicts, as numbers."""
    return model.predict(X) if isinstance(model, ConvexNNRegressor) else model.decision_function(X)


def assert_same_optimum(one, other, X):
    """For fits to tol = 1e-6, whose outputs the gap lets differ in the second or third digit."""
    assert one.objective_ == pytest.approx(other.objective_, rel=2e-6)
    np.testing.assert_allclose(output(one, X), output(other, X), atol=2e-2)


@EVERY_KIND
def test_a_weight_is_a_number_of_repetitions(data, quick, estimator, kind, target):
    X, y = data.X, getattr(data, target)
    weights = np.random.default_rng(1).integers(0, 4, 80)
    settings = {**quick, **kind, "tol": 1e-6}
    weighted = estimator(**settings).fit(X, y, weights)
    repeated = estimator(**settings).fit(X.repeat(weights, axis=0), y.repeat(weights, axis=0))
    assert_same_optimum(weighted, repeated, X)
    unweighted = estimator(**settings).fit(X, y)
    assert np.abs(output(weighted, X) - output(unweighted, X)).max() > 5e-2


@EVERY_KIND
def test_what_weighs_nothing_is_left_out(data, quick, estimator, kind, target):
    X, y = data.X, getattr(data, target)
    weights = np.where(np.arange(80) % 3 == 0, 0.0, 2.5)
    weights[1:4] = 1.25
    kept = weights > 0
    settings = {**quick, **kind}
    weighted = estimator(**settings).fit(X, y, weights)
    fewer = estimator(**settings).fit(X[kept], y[kept], weights[kept])
    for name in ("coef_", "gates_", "intercept_", "objective_", "n_iter_"):
        np.testing.assert_array_equal(getattr(weighted, name), getattr(fewer, name))


def test_patterns_are_told_apart_on_rows_of_positive_weight_only(quick):
    X = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 1.0]])
    G = np.array([[1.0, 2.0], [1.0, 0.5]])  # told apart by the last row only
    quick = {**quick, "gates": G}
    y = np.arange(4.0)
    assert ConvexNNRegressor(**quick).fit(X, y).gates_.shape == (2, 2)
    assert ConvexNNRegressor(**quick).fit(X, y, [1, 1, 1, 0]).gates_.shape == (2, 1)


@EVERY_KIND
def test_only_the_ratios_of_weights_matter(data, quick, estimator, kind, target):
    y = getattr(data, target)
    weights = np.random.default_rng(1).uniform(1, 4, 80)
    settings = {**quick, **kind, "tol": 1e-6}

    def fit(sample_weight):
        return estimator(**settings).fit(data.X, y, sample_weight)

    assert_same_optimum(fit(weights), fit(1000 * weights), data.X)
    assert_same_optimum(fit(np.full(80, 3.0)), fit(None), data.X)


def test_weighted_ridge_regression_is_that_of_scikit_learn(data, quick):
    weights = np.random.default_rng(1).uniform(0, 2, 80)
    model = ConvexNNRegressor(penalty="ridge", tol=1e-10, **quick).fit(data.X, data.Y, weights)
    gated = np.hstack([(data.X @ g >= 0)[:, None] * data.X for g in model.gates_.T])
    ridge = Ridge(alpha=weights.sum() * quick["alpha"]).fit(gated, data.Y, weights)
    np.testing.assert_allclose(model.predict(data.X), ridge.predict(gated), atol=1e-7)


def test_float32_data_take_float64_weights(data, quick):
    weights = np.random.default_rng(1).uniform(0, 2, 80)
    model = ConvexNNRegressor(**quick).fit(data.X.astype(np.float32), data.y, weights)
    twin = ConvexNNRegressor(**quick).fit(data.X, data.y, weights)
    assert model.coef_.dtype == np.float32
    assert model.objective_ == pytest.approx(twin.objective_, rel=1e-3)


# Class weights


@pytest.mark.parametrize("loss", ["squared", "log_loss"])
def test_class_weights_multiply_the_sample_weights(data, quick, loss):
    X, y = data.X, data.three
    weights = np.random.default_rng(1).uniform(0.1, 3, 80)
    settings = {**quick, "loss": loss}
    by_class = ConvexNNClassifier(class_weight={0: 2, 1: 1, 2: 0.5}, **settings)
    twin = ConvexNNClassifier(**settings).fit(X, y, weights * np.array([2, 1, 0.5])[y])
    np.testing.assert_array_equal(by_class.fit(X, y, weights).coef_, twin.coef_)
    by_class.fit(X, y)
    twin.fit(X, y, np.array([2, 1, 0.5])[y])
    np.testing.assert_array_equal(by_class.coef_, twin.coef_)


@pytest.mark.parametrize("target", ["labels", "three"])
def test_balanced_classes_are_those_of_scikit_learn(data, quick, target):
    X, y = data.X, getattr(data, target)
    classes = np.unique(y)
    factors = compute_class_weight("balanced", classes=classes, y=y)
    balanced = ConvexNNClassifier(class_weight="balanced", **quick).fit(X, y)
    by_name = dict(zip(classes.tolist(), factors.tolist(), strict=True))
    twin = ConvexNNClassifier(class_weight=by_name, **quick).fit(X, y)
    np.testing.assert_allclose(balanced.coef_, twin.coef_, atol=1e-6)


@pytest.mark.parametrize("target", ["labels", "three"])
def test_balanced_log_loss_is_balanced_logistic_regression(data, target):
    X, y = data.X, getattr(data, target)
    model = ConvexNNClassifier(
        0.02,
        loss="log_loss",
        penalty="ridge",
        gates=np.zeros((4, 1)),
        class_weight="balanced",
        tol=1e-12,
    ).fit(X, y)
    twin = LogisticRegression(
        C=1 / (0.02 * 80), class_weight="balanced", tol=1e-10, max_iter=10_000, solver="newton-cg"
    ).fit(X, y)
    np.testing.assert_allclose(model.coef_[0].T, twin.coef_, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X), twin.predict_proba(X), atol=1e-6)


def test_balanced_weights_count_repetitions(data, quick):
    X, y = data.X, data.three
    weights = np.random.default_rng(1).integers(0, 4, 80)
    settings = {**quick, "loss": "log_loss", "class_weight": "balanced", "tol": 1e-8}
    weighted = ConvexNNClassifier(**settings).fit(X, y, weights)
    repeated = ConvexNNClassifier(**settings).fit(X.repeat(weights, axis=0), y.repeat(weights))
    assert weighted.objective_ == pytest.approx(repeated.objective_, rel=2e-8)
    np.testing.assert_allclose(weighted.predict_proba(X), repeated.predict_proba(X), atol=1e-3)


@pytest.mark.parametrize("loss", ["squared", "log_loss"])
def test_a_class_without_weight_is_no_class(data, quick, loss):
    X, y = data.X, data.three
    kept = y != 1
    settings = {**quick, "loss": loss}
    fewer = ConvexNNClassifier(**settings).fit(X[kept], y[kept])
    by_sample = ConvexNNClassifier(**settings).fit(X, y, kept.astype(float))
    by_class = ConvexNNClassifier(class_weight={0: 1, 1: 0, 2: 1}, **settings).fit(X, y)
    for model in (by_sample, by_class):
        assert model.classes_.tolist() == [0, 2]
        np.testing.assert_array_equal(model.coef_, fewer.coef_)


# What is refused


def one_bad(value):
    weights = np.ones(80)
    weights[7] = value
    return weights


WEIGHTS = {
    "negative": (one_bad(-0.5), "sample_weight must not be negative, got -0.5"),
    "NaN": (one_bad(np.nan), "Input sample_weight contains NaN"),
    "infinite": (one_bad(np.inf), "Input sample_weight contains infinity"),
    "all zero": (np.zeros(80), "sample_weight must be positive|must contain at least one non-zero"),
    "too few": (np.ones(79), r"sample_weight.shape == \(79,\), expected \(80,\)"),
    "a table": (np.ones((80, 2)), "[Ss]ample.weight.* must be 1D array"),
    "text": (np.full(80, "heavy"), "could not convert string to float"),
}


@BOTH
@pytest.mark.parametrize("case", WEIGHTS)
def test_impossible_sample_weights_are_refused(data, quick, estimator, case):
    weights, message = WEIGHTS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        estimator(**quick).fit(data.X, data.three, weights)


CLASS_WEIGHTS = {
    "unknown name": ("even", "class_weight must be a dict, 'balanced' or None, got 'even'"),
    "a list": ([1, 2, 1], r"class_weight must be a dict, 'balanced' or None, got \[1, 2, 1\]"),
    "negative": ({0: -1}, "class_weight must hold finite numbers >= 0, got -1 for class 0"),
    "NaN": ({0: np.nan}, "class_weight must hold finite numbers >= 0, got nan for class 0"),
    "text": ({1: "two"}, "class_weight must hold finite numbers >= 0, got 'two' for class 1"),
    "another class": ({0: 1, 7: 1}, r"classes, \[1, 2\], are not in class_weight"),
    "one class left": ({0: 0, 1: 0}, r"2 classes of positive weight, got 1 .*: \[2\]"),
    "no class left": ({0: 0, 1: 0, 2: 0}, r"2 classes of positive weight, got 0"),
}


@pytest.mark.parametrize("case", CLASS_WEIGHTS)
def test_impossible_class_weights_are_refused(data, quick, case):
    class_weight, message = CLASS_WEIGHTS[case]
    with pytest.raises(ValueError, match=message):
        ConvexNNClassifier(class_weight=class_weight, **quick).fit(data.X, data.three)


def test_gates_that_do_not_look_at_the_data_do_not_look_at_the_weights(data, quick):
    weights = np.random.default_rng(1).uniform(0.1, 3, 80)
    model = ConvexNNRegressor(**quick).fit(data.X, data.y, weights)
    np.testing.assert_array_equal(model.gates_, sample_gates(4, 8, random_state=0))
