from __future__ import annotations

import os
import pickle
import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor
from cvxdistill.solvers import neurons_from_weights, sample_gates

BOTH = pytest.mark.parametrize("estimator", [ConvexNNRegressor, ConvexNNClassifier])


@pytest.fixture(scope="module")
def data():
    """Inputs, one target, two targets, two classes, three classes."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 4))
    Y = np.stack([np.abs(X[:, 0]) + X[:, 1], np.maximum(X[:, 2], 0)], axis=1)
    Y = Y + 0.1 * rng.standard_normal(Y.shape) + 2.0
    three = np.digitize(Y[:, 0], [2.0, 3.0])
    return X, Y[:, 0], Y, np.where(Y[:, 0] > 2.5, "high", "low"), three


@pytest.fixture
def quick():
    return {"n_gates": 12, "alpha": 1e-2, "random_state": 0}


# Targets of size 100 on 11 examples make alpha = 1e-3 a millionth part of alpha_max.
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([ConvexNNRegressor(), ConvexNNClassifier()])
def test_scikit_learns_check(estimator, check):
    if "array_api" in str(check) and os.environ.get("SCIPY_ARRAY_API") != "1":
        pytest.skip("needs SCIPY_ARRAY_API=1 in the environment before SciPy is imported")
    try:
        check(estimator)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")


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


def test_a_large_ridge_is_solved_iteratively_to_the_same_objective(data, quick, monkeypatch):
    X, y, _, _, _ = data
    direct = ConvexNNRegressor(penalty="ridge", tol=1e-8, **quick).fit(X, y)
    monkeypatch.setattr("cvxdistill.estimator_base.MOST_DIRECT_FEATURES", 1)
    iterative = ConvexNNRegressor(penalty="ridge", tol=1e-8, **quick).fit(X, y)
    assert iterative.n_iter_ > direct.n_iter_
    assert iterative.objective_ == pytest.approx(direct.objective_, rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_data_is_kept(data, quick, dtype):
    X, _, Y, labels, _ = data
    model = ConvexNNRegressor(**quick).fit(X.astype(dtype), Y.astype(dtype))
    for A in (model.coef_, model.gates_, model.intercept_, model.predict(X.astype(dtype))):
        assert A.dtype == dtype
    classifier = ConvexNNClassifier(**quick).fit(X.astype(dtype), labels)
    assert classifier.decision_function(X.astype(dtype)).dtype == dtype


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
    assert model.n_iter_ == 2


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
    assert "RFISTA" in capsys.readouterr().err


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


# In scikit-learn's company


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


def test_cross_validation_of_the_regressor(data, quick):
    X, _, Y, _, _ = data
    assert cross_val_score(ConvexNNRegressor(**quick), X, Y, cv=4).mean() > 0.6


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


@BOTH
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csc_array, sparse.coo_matrix])
def test_sparse_input_is_made_dense(data, quick, estimator, kind):
    X, _, _, _, three = data
    X = X * (np.abs(X) > 0.5)
    thin, dense = (estimator(**quick).fit(A, three) for A in (kind(X), X))
    np.testing.assert_array_equal(thin.coef_, dense.coef_)
    np.testing.assert_array_equal(thin.predict(kind(X)), dense.predict(X))


@BOTH
def test_clone_copies_settings_only(quick, estimator):
    model = estimator(penalty="gate", gates=np.eye(4), l1_ratio=0.5, **quick)
    copy = clone(model)
    assert copy is not model and not hasattr(copy, "coef_")
    assert copy.get_params().keys() == model.get_params().keys()
    assert copy.penalty == "gate" and copy.l1_ratio == 0.5
    np.testing.assert_array_equal(copy.gates, np.eye(4))


@BOTH
def test_pickle_keeps_predictions(data, quick, estimator):
    X, _, _, _, three = data
    model = estimator(**quick).fit(X, three)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict(X), model.predict(X))


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
