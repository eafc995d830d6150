"""The estimators in scikit-learn's company: its own checks, searches, pipelines, copies."""

from __future__ import annotations

import doctest
import os
import pickle

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor, estimators

BOTH = pytest.mark.parametrize("estimator", [ConvexNNRegressor, ConvexNNClassifier])
LOSSES = {ConvexNNRegressor: ("squared", "huber"), ConvexNNClassifier: ("squared", "log_loss")}
KINDS = [
    (estimator, {"activation": activation, "loss": loss})
    for estimator, losses in LOSSES.items()
    for activation in ("gated_relu", "relu")
    for loss in losses
]
EVERY_KIND = pytest.mark.parametrize(("estimator", "kind"), KINDS)
# The regressors' targets are as large as 100: a smaller alpha would take long.
SMALL = {
    ConvexNNRegressor: {"n_gates": 10, "alpha": 1.0},
    ConvexNNClassifier: {"n_gates": 10, "alpha": 0.03, "tol": 1e-3},
}


@parametrize_with_checks([estimator(**kind, **SMALL[estimator]) for estimator, kind in KINDS])
def test_scikit_learns_check(estimator, check):
    if "array_api" in str(check) and os.environ.get("SCIPY_ARRAY_API") != "1":
        pytest.skip("needs SCIPY_ARRAY_API=1 in the environment before SciPy is imported")
    try:
        check(estimator)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")


def test_the_examples_in_the_docstrings_are_true():
    results = doctest.testmod(estimators)
    assert results.attempted >= 8 and results.failed == 0


def test_in_a_pipeline_and_a_grid_search_over_alpha():
    X, y = load_iris(return_X_y=True)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), ConvexNNClassifier(n_gates=10, random_state=0)),
        {"convexnnclassifier__alpha": [1e-2, 10.0]},
        cv=3,
    ).fit(X, y)
    assert search.best_params_ == {"convexnnclassifier__alpha": 1e-2}
    assert search.best_score_ > 0.9
    assert search.cv_results_["mean_test_score"][1] < 0.5  # alpha = 10 leaves no neuron


def test_a_grid_search_over_activation_and_loss(data, quick):
    X, y = data.X, np.where(data.y > 2.5, "high", "low")
    grid = {"activation": ["gated_relu", "relu"], "loss": ["squared", "log_loss"]}
    search = GridSearchCV(ConvexNNClassifier(**quick), grid, cv=3, error_score="raise").fit(X, y)
    assert search.cv_results_["mean_test_score"].shape == (4,)
    assert search.cv_results_["mean_test_score"].min() > 0.7


@pytest.mark.parametrize("activation", ["gated_relu", "relu"])
def test_cross_validation_of_the_regressor(data, quick, activation):
    model = ConvexNNRegressor(activation=activation, **quick)
    assert cross_val_score(model, data.X, data.Y, cv=4).mean() > 0.4


def test_digits_are_told_apart():
    X, y = load_digits(return_X_y=True)
    model = ConvexNNClassifier(alpha=0.01, n_gates=20, tol=1e-2, random_state=0)
    assert model.fit(X[:600] / 16, y[:600]).score(X[600:1200] / 16, y[600:1200]) > 0.85


@BOTH
def test_pandas_frames_keep_their_names(data, quick, estimator):
    pd = pytest.importorskip("pandas")
    X, _, _, _, three = data
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = estimator(**quick).fit(frame, pd.Series(three))
    assert model.feature_names_in_.tolist() == list("abcd")
    np.testing.assert_array_equal(model.predict(frame), estimator(**quick).fit(X, three).predict(X))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("dcba")])


@EVERY_KIND
def test_sparse_input_is_made_dense(data, quick, estimator, kind):
    X = data.X * (np.abs(data.X) > 0.5)
    thin, dense = (estimator(**kind, **quick).fit(A, data.three) for A in (sparse.csr_array(X), X))
    np.testing.assert_array_equal(thin.coef_, dense.coef_)
    np.testing.assert_array_equal(thin.predict(sparse.csr_array(X)), dense.predict(X))


@BOTH
@pytest.mark.parametrize("container", [sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix])
def test_any_sparse_format_will_do(data, quick, estimator, container):
    thin, dense = (estimator(**quick).fit(A, data.three) for A in (container(data.X), data.X))
    np.testing.assert_array_equal(thin.coef_, dense.coef_)
    np.testing.assert_array_equal(thin.predict(container(data.X)), dense.predict(data.X))


@EVERY_KIND
def test_clone_copies_settings_only(quick, estimator, kind):
    model = estimator(penalty="gate", gates=np.eye(4), l1_ratio=0.5, **kind, **quick)
    copy = clone(model)
    assert copy is not model and not hasattr(copy, "coef_")
    assert copy.get_params().keys() == model.get_params().keys()
    assert copy.penalty == "gate" and copy.l1_ratio == 0.5
    assert copy.activation == kind["activation"] and copy.loss == kind["loss"]
    np.testing.assert_array_equal(copy.gates, np.eye(4))


def test_settings_that_are_not_the_defaults_are_in_the_repr():
    assert repr(ConvexNNRegressor()) == "ConvexNNRegressor()"
    model = ConvexNNClassifier(activation="relu", loss="log_loss", solver="admm", alpha=0.5)
    assert repr(model) == (
        "ConvexNNClassifier(activation='relu', alpha=0.5, loss='log_loss', solver='admm')"
    )


@EVERY_KIND
def test_pickle_keeps_predictions(data, quick, estimator, kind):
    model = estimator(**kind, **quick).fit(data.X, data.three)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(data.X), model.predict(data.X))
    if hasattr(model, "predict_proba"):
        np.testing.assert_array_equal(again.predict_proba(data.X), model.predict_proba(data.X))


@EVERY_KIND
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_data_is_kept(data, quick, estimator, kind, dtype):
    X = data.X.astype(dtype)
    model = estimator(**kind, **quick).fit(X, data.three)
    decide = "predict" if estimator is ConvexNNRegressor else "decision_function"
    for A in (model.coef_, model.gates_, model.intercept_, getattr(model, decide)(X)):
        assert A.dtype == dtype
    assert model.duality_gap_ <= model.tol * model.objective_


def test_inputs_are_not_written_to(data, quick):
    X, _, Y, _, _ = data
    copies = X.copy(), Y.copy()
    X.setflags(write=False)
    Y.setflags(write=False)
    try:
        ConvexNNRegressor(normalize=True, **quick).fit(X, Y).predict(X)
    finally:
        X.setflags(write=True)
        Y.setflags(write=True)
    np.testing.assert_array_equal(X, copies[0])
    np.testing.assert_array_equal(Y, copies[1])
