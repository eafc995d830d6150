"""What the estimators refuse, each with a message that names the argument and what came."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning, NotFittedError

from cvxdistill import ConvexNNClassifier, ConvexNNRegressor

BOTH = pytest.mark.parametrize("estimator", [ConvexNNRegressor, ConvexNNClassifier])
X = np.random.default_rng(0).standard_normal((80, 4))
Y = np.abs(X[:, :2])
THREE = np.digitize(X[:, 0], [-0.5, 0.5])
QUICK = {"n_gates": 12, "alpha": 1e-2, "random_state": 0}

SETTINGS = {
    "alpha is 0": ({"alpha": 0}, "alpha must be positive and finite, got 0"),
    "alpha is negative": ({"alpha": -1e-3}, "alpha must be positive and finite, got -0.001"),
    "alpha is infinite": ({"alpha": np.inf}, "alpha must be positive and finite, got inf"),
    "alpha is text": ({"alpha": "auto"}, "alpha must be a number, got 'auto'"),
    "alpha is missing": ({"alpha": None}, "alpha must be a number, got None"),
    "l1_ratio below 0": ({"l1_ratio": -0.1}, r"l1_ratio must lie in \[0, 1\], got -0.1"),
    "l1_ratio is text": ({"l1_ratio": "half"}, "l1_ratio must be a number, got 'half'"),
    "no gates": ({"n_gates": 0}, "n_gates must be at least 1, got 0"),
    "fractional gates": ({"n_gates": 1.5}, "n_gates must be an integer, got 1.5"),
    "unknown penalty": (
        {"penalty": "l0"},
        r"penalty must be one of \['feature', 'gate', 'l1', .* got 'l0'",
    ),
    "penalty is no name": ({"penalty": None}, "penalty must be a string, got None"),
    "unknown activation": (
        {"activation": "gelu"},
        r"activation must be one of \['gated_relu', 'relu'\], got 'gelu'",
    ),
    "activation is no name": ({"activation": None}, "activation must be a string, got None"),
    "unknown loss": ({"loss": "hinge"}, r"loss must be one of \['squared', .*\], got 'hinge'"),
    "loss is no name": ({"loss": 2}, "loss must be a string, got 2"),
    "unknown solver": (
        {"solver": "sgd"},
        r"solver must be one of \['auto', 'semismooth_newton', .*\], got 'sgd'",
    ),
    "solver is no name": ({"solver": None}, "solver must be a string, got None"),
    "a solver of ReLU networks": (
        {"solver": "admm"},
        "solver='admm' does not solve the gated ReLU programme",
    ),
    "a solver of gated networks": (
        {"solver": "ridge_newton", "penalty": "ridge", "activation": "relu"},
        "solver='ridge_newton' does not solve the ReLU programme",
    ),
    "a solver of penalties of lengths": (
        {"solver": "rfista", "penalty": "l1", "activation": "relu"},
        r"ReLU programme with this loss and penalty; .* \['auto', 'augmented_lagrangian', 'admm'\]",
    ),
    "a ridge's solver": (
        {"solver": "ridge_newton"},
        "solver='ridge_newton' does not solve the gated ReLU programme",
    ),
    "sampled biases": (
        {"gates": "quantile-bias", "activation": "relu"},
        "gates='quantile-bias' have biases, which the weights of a ReLU network cannot follow",
    ),
    "given biases": (
        {"gates": np.ones((5, 2)), "activation": "relu"},
        "gates with a row of biases do not suit activation='relu'",
    ),
    "a cone without interior": (
        {"gates": np.zeros((4, 1)), "activation": "relu"},
        "Gate 0 .* has a cone without interior",
    ),
    "unknown sampler": ({"gates": "cauchy"}, r"gates must be one of \['gaussian', .* got 'cauchy'"),
    "gates of another length": (
        {"gates": np.ones((3, 2))},
        r"gates must have shape \(4, p\), or \(5, p\) .* got \(3, 2\)",
    ),
    "NaN in the gates": ({"gates": np.full((4, 2), np.nan)}, "gates contain NaN or infinity"),
    "gates that are never on": (
        {"gates": np.array([[0.0]] * 4 + [[-1.0]])},
        "None of the 1 gates is on for any of the 80 rows",
    ),
    "negative tol": ({"tol": -1.0}, "tol must be a finite number >= 0, got -1.0"),
    "tol is text": ({"tol": "tight"}, "tol must be a number, got 'tight'"),
    "no iterations": ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
    "endless iterations": ({"max_iter": np.inf}, "max_iter must be an integer, got inf"),
    "fit_intercept is text": ({"fit_intercept": "no"}, "fit_intercept must be True or False"),
    "normalize is a number": ({"normalize": 1}, "normalize must be True or False, got 1"),
    "warm_start is missing": ({"warm_start": None}, "warm_start must be True or False, got None"),
    "negative seed": ({"random_state": -1}, "random_state must not be negative, got -1"),
    "seed is text": ({"random_state": "x"}, "'x' cannot be used to seed"),
    "verbose is text": ({"verbose": "loud"}, "verbose must be an integer >= 0, got 'loud'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_impossible_settings_are_refused(case):
    settings, message = SETTINGS[case]
    for estimator in (ConvexNNRegressor, ConvexNNClassifier):
        with pytest.raises((ValueError, TypeError), match=message):
            estimator(**settings).fit(X, THREE)


def spoilt(A, value):
    A = np.array(A, dtype=float)
    A.flat[3] = value
    return A


DATA = {
    "NaN in X": (lambda X, y: (spoilt(X, np.nan), y), "Input X contains NaN"),
    "infinity in X": (lambda X, y: (spoilt(X, np.inf), y), "Input X contains infinity"),
    "X is flat": (lambda X, y: (X[:, 0], y), "Expected 2D array, got 1D array"),
    "X has no rows": (lambda X, y: (X[:0], y[:0]), "0 sample"),
    "X has no columns": (lambda X, y: (X[:, :0], y), "0 feature"),
    "X is text": (lambda X, y: (np.full(X.shape, "x"), y), "could not convert string to float"),
    "X is complex": (lambda X, y: (X + 1j, y), "Complex data not supported"),
    "y is missing": (lambda X, y: (X, None), "requires y to be passed"),
    "y has other rows": (lambda X, y: (X, y[:-1]), r"inconsistent numbers of samples: \[80, 79\]"),
    "NaN in y": (lambda X, y: (X, spoilt(y, np.nan)), "contains NaN"),
}


@BOTH
@pytest.mark.parametrize("case", DATA)
def test_unusable_data_are_refused(case, estimator):
    spoil, message = DATA[case]
    with pytest.raises((ValueError, TypeError), match=message):
        estimator().fit(*spoil(X, THREE))


def test_sparse_targets_are_refused():
    with pytest.raises(TypeError, match="y must be dense, got a sparse matrix"):
        ConvexNNRegressor().fit(X, sparse.csr_matrix(Y))


def test_one_class_is_refused():
    with pytest.raises(ValueError, match=r"2 classes of positive weight, got 1 class.*: \[0.0\]"):
        ConvexNNClassifier().fit(X, np.zeros(80))


def test_each_estimator_has_its_own_losses():
    with pytest.raises(ValueError, match=r"loss must be one of \['squared', 'huber'\], got 'log_"):
        ConvexNNRegressor(loss="log_loss").fit(X, Y)
    with pytest.raises(
        ValueError, match=r"loss must be one of \['squared', 'log_loss'\], got 'hub"
    ):
        ConvexNNClassifier(loss="huber").fit(X, THREE)


def test_equal_targets_make_no_pairs():
    with pytest.raises(ValueError, match="different targets"):
        ConvexNNRegressor(gates="pairs").fit(X, np.ones(80))


def test_a_number_is_not_a_class():
    with pytest.raises(ValueError, match="Unknown label type"):
        ConvexNNClassifier().fit(X, Y[:, 0])


def test_several_labels_are_refused():
    with pytest.raises(ValueError, match="1d array"):
        ConvexNNClassifier().fit(X, np.ones((80, 2), int))


@BOTH
def test_predicting_needs_a_fit_and_the_same_columns(estimator):
    with pytest.raises(NotFittedError, match=f"This {estimator.__name__} instance is not fitted"):
        estimator().predict(X)
    with pytest.raises(ValueError, match=r"X has 3 features, but .* expecting 4 features"):
        estimator(**QUICK).fit(X, THREE).predict(X[:, :3])


REFUSED = {
    "a setting": ({"alpha": -1}, X[:, :2], THREE, ValueError),
    "gates of another length": ({"gates": np.ones((4, 2))}, X[:, :2], THREE, ValueError),
    "a solver of ReLU networks": ({"solver": "admm"}, X[:, :2], THREE % 2, ValueError),
    "not converged, where warnings are errors": (
        {"max_iter": 1},
        X[:, :2],
        THREE % 2,
        ConvergenceWarning,
    ),
}


@BOTH
@pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_fit_leaves_the_last_one_as_it_was(case, estimator):
    settings, X_new, y_new, error = REFUSED[case]
    model = estimator(**QUICK).fit(X, THREE)
    before = dict(vars(model))
    with pytest.raises(error):
        model.set_params(**settings).fit(X_new, y_new)
    model.set_params(**{name: before[name] for name in settings})
    assert vars(model) == before
    model.predict(X)


@BOTH
def test_a_first_fit_that_is_refused_fits_nothing(estimator):
    model = estimator(gates=np.ones((3, 2)))
    with pytest.raises(ValueError, match="gates must have shape"):
        model.fit(X, THREE)
    assert [name for name in vars(model) if name.endswith("_")] == []
    with pytest.raises(NotFittedError):
        model.predict(X)
