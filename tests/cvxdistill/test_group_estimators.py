"""The group elastic net as scikit-learn estimators, beside scikit-learn's own."""

from __future__ import annotations

import doctest
import os
import sys
import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone, is_classifier, is_regressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import (
    ElasticNet,
    ElasticNetCV,
    LinearRegression,
    LogisticRegression,
    MultiTaskElasticNet,
    MultiTaskElasticNetCV,
    PoissonRegressor,
)
from sklearn.metrics import log_loss, mean_poisson_deviance, mean_squared_error
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from cvxdistill import (
    GroupElasticNet,
    GroupElasticNetCV,
    group_cross_validation,
    group_estimators,
)

LOSSES = ("squared", "huber", "poisson", "log_loss")
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES)
QUICK = {"n_alphas": 3, "eps": 0.5, "cv": 3}
TOL = {"squared": 1e-6, "huber": 1e-4, "poisson": 1e-4, "log_loss": 1e-4}
ONE = [GroupElasticNet(loss=loss, alpha=0.1, tol=TOL[loss]) for loss in LOSSES]
CV = [GroupElasticNetCV(loss=loss, tol=TOL[loss], **QUICK) for loss in LOSSES]
RNG = np.random.default_rng(0)
X = RNG.standard_normal((100, 8)) + 0.5
SIGNAL = X[:, :3] @ np.array([[1.0, -0.5], [0.5, 1.0], [-1.0, 0.0]]) + 2
TARGETS = {
    "squared": SIGNAL + RNG.standard_normal(SIGNAL.shape),
    "huber": SIGNAL + RNG.standard_t(2, SIGNAL.shape),
    "poisson": RNG.poisson(np.exp(0.4 * SIGNAL[:, 0])),
    "log_loss": np.array(["low", "middle", "top"])[
        np.digitize(SIGNAL[:, 0] + RNG.standard_normal(100), [1.5, 3])
    ],
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([*ONE, *CV])
def test_scikit_learns_check(estimator, check):
    if "array_api" in str(check) and os.environ.get("SCIPY_ARRAY_API") != "1":
        pytest.skip("needs SCIPY_ARRAY_API=1 in the environment before SciPy is imported")
    if "equivalence" in str(check):
        estimator.set_params(tol=1e-12)
    try:
        check(estimator)
    except pytest.skip.Exception as skipped:
        pytest.fail(f"skipped: {skipped}")


@pytest.mark.parametrize("module", [group_estimators, group_cross_validation])
def test_the_examples_in_the_docstrings_are_true(module):
    results = doctest.testmod(module)
    assert results.attempted >= 4 and results.failed == 0


@pytest.mark.parametrize("l1_ratio", [1.0, 0.4])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_squared_loss_is_scikit_learns_elastic_net(l1_ratio, fit_intercept):
    kind = {"alpha": 0.1, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept, "tol": 1e-12}
    for twin, y in ((ElasticNet, SIGNAL[:, 0]), (MultiTaskElasticNet, TARGETS["squared"])):
        ours, theirs = GroupElasticNet(**kind).fit(X, y), twin(**kind, max_iter=10**5).fit(X, y)
        assert ours.coef_.shape == theirs.coef_.shape
        np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
        np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-6)
        np.testing.assert_allclose(ours.predict(X), theirs.predict(X), atol=1e-6)
        assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


@pytest.mark.parametrize("classes", [2, 3])
def test_ridge_with_log_loss_is_scikit_learns_logistic_regression(classes):
    y = TARGETS["log_loss"] if classes == 3 else TARGETS["log_loss"] == "top"
    ours = GroupElasticNet(0.05, l1_ratio=0, loss="log_loss", tol=1e-12).fit(X, y)
    theirs = LogisticRegression(C=1 / (0.05 * len(X)), tol=1e-10, max_iter=10**4).fit(X, y)
    assert ours.coef_.shape == theirs.coef_.shape
    assert ours.intercept_.shape == theirs.intercept_.shape
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    for method in ("predict_proba", "predict_log_proba"):
        np.testing.assert_allclose(
            getattr(ours, method)(X), getattr(theirs, method)(X), atol=1e-5, rtol=1e-4
        )
    assert ours.decision_function(X).shape == theirs.decision_function(X).shape
    assert ours.score(X, y) == theirs.score(X, y)


def test_ridge_with_poisson_loss_is_scikit_learns_poisson_regression():
    y, weights = TARGETS["poisson"], RNG.uniform(0.5, 2, len(X))
    ours = GroupElasticNet(0.1, l1_ratio=0, loss="poisson", tol=1e-12).fit(X, y, weights)
    theirs = PoissonRegressor(alpha=0.1, tol=1e-10, max_iter=10**4).fit(X, y, weights)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours.predict(X), theirs.predict(X), rtol=1e-5)
    assert ours.score(X, y) == pytest.approx(theirs.score(X, y))


def test_cross_validation_is_scikit_learns_elastic_net_cv():
    y = TARGETS["squared"][:, 0]
    ours = GroupElasticNetCV(l1_ratio=0.7, eps=0.01, cv=5, tol=1e-11).fit(X, y)
    theirs = ElasticNetCV(l1_ratio=0.7, eps=0.01, cv=5, tol=1e-13, max_iter=10**5).fit(X, y)
    np.testing.assert_allclose(ours.alphas_, theirs.alphas_)
    np.testing.assert_allclose(ours.error_path_, theirs.mse_path_, rtol=1e-5)
    assert ours.alpha_ == pytest.approx(theirs.alpha_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)


def test_several_ratios_and_responses_are_scikit_learns_multi_task_elastic_net_cv():
    kind = {"l1_ratio": [0.3, 0.6, 1.0], "alphas": [0.3, 0.03, 0.1], "cv": KFold(4, shuffle=True)}
    kind["cv"].random_state = 0
    ours = GroupElasticNetCV(**kind, tol=1e-11).fit(X, TARGETS["squared"])
    theirs = MultiTaskElasticNetCV(**kind, tol=1e-11, max_iter=10**5).fit(X, TARGETS["squared"])
    assert ours.alphas_.shape == (3, 3) and ours.error_path_.shape == (3, 3, 4)
    np.testing.assert_allclose(ours.error_path_, theirs.mse_path_, rtol=1e-6)
    assert (ours.alpha_, ours.l1_ratio_) == (theirs.alpha_, theirs.l1_ratio_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, atol=1e-6)
    low = np.unravel_index(ours.mean_error_.argmin(), (3, 3))
    assert kind["l1_ratio"][low[0]] == ours.l1_ratio_


def huber(y, z):
    u = np.abs(y - z)
    return np.where(u <= 1.35, u**2 / 2, 1.35 * u - 1.35**2 / 2).mean()


@EVERY_LOSS
def test_errors_are_those_of_models_fitted_to_each_fold(loss):
    y, alphas = TARGETS[loss], [0.2, 0.05]
    kind = {"loss": loss, "groups": 2, "tol": 1e-10}
    splitter = StratifiedKFold(3) if loss == "log_loss" else KFold(3)
    ours = GroupElasticNetCV(alphas=alphas[::-1], cv=3, **kind).fit(X, y)
    assert ours.alphas_.tolist() == alphas
    for i, alpha in enumerate(alphas):
        for k, (train, test) in enumerate(splitter.split(X, y)):
            model = GroupElasticNet(alpha, **kind).fit(X[train], y[train])
            if loss == "log_loss":
                expected = log_loss(y[test], model.predict_proba(X[test]))
            else:
                metrics = {"squared": mean_squared_error, "poisson": mean_poisson_deviance}
                expected = metrics.get(loss, huber)(y[test], model.predict(X[test]))
            assert ours.error_path_[i, k] == pytest.approx(expected, rel=1e-4)
    refit = GroupElasticNet(ours.alpha_, **kind).fit(X, y)
    np.testing.assert_allclose(ours.coef_, refit.coef_, atol=1e-4)
    assert ours.objective_ == pytest.approx(refit.objective_, rel=1e-8)


@EVERY_LOSS
def test_sample_weights_are_repeated_rows_and_zero_leaves_out(loss):
    weights = np.arange(len(X)) % 3
    offset = 0.1 * X[:, :1] if loss == "poisson" else None
    y = TARGETS[loss]
    if loss in ("squared", "huber"):
        y, offset = y[:, :1], X[:, 7:]
    kind = {"loss": loss, "groups": 4, "tol": 1e-11}
    weighted = GroupElasticNet(0.05, **kind).fit(X, y, weights, offset)
    again = np.repeat(np.arange(len(X)), weights)
    repeated = GroupElasticNet(0.05, **kind).fit(
        X[again], y[again], offset=None if offset is None else offset[again]
    )
    plain = GroupElasticNet(0.05, **kind).fit(X, y, offset=offset)
    assert weighted.objective_ == pytest.approx(repeated.objective_, rel=1e-9)
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-4)
    assert np.abs(weighted.coef_ - plain.coef_).max() > 1e-3


def test_weighted_cross_validation_is_that_of_repeated_rows():
    weights, y = np.arange(len(X)) % 3, TARGETS["squared"]
    again = np.repeat(np.arange(len(X)), weights)
    folds = [(np.arange(100) % 4 != k, np.arange(100) % 4 == k) for k in range(4)]
    by_index = [tuple(np.flatnonzero(part) for part in fold) for fold in folds]
    kind = {"alphas": [0.3, 0.1, 0.03], "tol": 1e-11}
    weighted = GroupElasticNetCV(**kind, cv=by_index).fit(X, y, weights)
    by_index = [tuple(np.flatnonzero(part[again]) for part in fold) for fold in folds]
    repeated = GroupElasticNetCV(**kind, cv=by_index).fit(X[again], y[again])
    for name in ("error_path_", "mean_error_", "standard_error_"):
        np.testing.assert_allclose(getattr(weighted, name), getattr(repeated, name), rtol=1e-6)


def test_an_offset_for_squared_loss_is_taken_from_the_targets():
    y, offset = TARGETS["squared"], X[:, 3:5]
    for estimator in (GroupElasticNet(0.1), GroupElasticNetCV(n_alphas=5, eps=0.1)):
        with_offset = clone(estimator).fit(X, y, offset=offset)
        without = clone(estimator).fit(X, y - offset)
        np.testing.assert_allclose(with_offset.coef_, without.coef_, atol=1e-4)
        np.testing.assert_allclose(
            with_offset.predict(X, offset) - offset, without.predict(X), atol=1e-3
        )
        assert with_offset.score(X, y, offset=offset) > with_offset.score(X, y) + 0.05


def test_an_offset_for_poisson_loss_is_the_logarithm_of_the_exposure():
    exposure = RNG.uniform(0.5, 4, len(X))
    y = RNG.poisson(exposure * np.exp(0.3 * SIGNAL[:, 0]))
    ours = GroupElasticNet(0.1, l1_ratio=0, loss="poisson", tol=1e-12)
    ours.fit(X, y, offset=np.log(exposure))
    twin = PoissonRegressor(alpha=0.1 * len(X) / exposure.sum(), tol=1e-10, max_iter=10**4)
    twin.fit(X, y / exposure, exposure)
    np.testing.assert_allclose(ours.coef_, twin.coef_, atol=1e-6)
    np.testing.assert_allclose(
        ours.predict(X, np.log(exposure)), exposure * twin.predict(X), rtol=1e-5
    )


def test_offsets_of_a_classifier_move_its_probabilities():
    model = GroupElasticNet(0.05, loss="log_loss").fit(X, TARGETS["log_loss"])
    towards = np.tile([0.0, 0.0, 50.0], (len(X), 1))
    assert (model.predict(X, towards) == "top").all()
    np.testing.assert_allclose(model.predict_proba(X, towards)[:, 2], 1)
    two = GroupElasticNet(0.05, loss="log_loss").fit(X, SIGNAL[:, 0] > 2)
    assert not two.predict(X, np.full(len(X), -50.0)).any()
    # Perfect offsets leave nothing to be explained.
    known = 50 * np.eye(3)[np.searchsorted(model.classes_, TARGETS["log_loss"])]
    assert (
        not GroupElasticNet(0.05, loss="log_loss")
        .fit(X, TARGETS["log_loss"], None, known)
        .coef_.any()
    )


def test_groups_come_and_go_as_one_and_unpenalised_ones_stay():
    y, groups = TARGETS["squared"][:, 0], [[0, 3], [1, 2, 7], [4, 5, 6]]
    model = GroupElasticNet(0.3, groups=groups, tol=1e-10).fit(X, y)
    active = [bool(model.coef_[group].all()) for group in groups]
    assert active == [bool(model.coef_[group].any()) for group in groups]
    assert model.n_active_groups_ == sum(active) and 0 < sum(active) < 3
    assert [group.tolist() for group in model.groups_] == groups
    free = GroupElasticNet(1e3, groups=groups, group_weights=[1, 0, 1], tol=1e-12).fit(X, y)
    np.testing.assert_allclose(
        free.coef_[groups[1]], LinearRegression().fit(X[:, groups[1]], y).coef_, atol=1e-6
    )
    assert not free.coef_[[0, 3, 4, 5, 6]].any()


@EVERY_LOSS
def test_the_objective_is_within_its_gap_of_the_optimum(loss):
    rough, fine = (
        GroupElasticNet(0.05, groups=2, loss=loss, tol=tol).fit(X, TARGETS[loss])
        for tol in (1e-2, 1e-10)
    )
    assert rough.duality_gap_ <= 1e-2 * rough.objective_
    assert 0 <= rough.objective_ - fine.objective_ + 1e-12 <= rough.duality_gap_ + 1e-9


@EVERY_LOSS
def test_the_loss_decides_between_classifier_and_regressor(loss):
    for model in (GroupElasticNet(loss=loss), GroupElasticNetCV(loss=loss)):
        assert is_classifier(model) == (loss == "log_loss")
        assert is_regressor(model) == (loss != "log_loss")
        for method in ("predict_proba", "predict_log_proba", "decision_function"):
            assert hasattr(model, method) == (loss == "log_loss")


def test_the_mark_of_one_standard_error_is_the_largest_alpha_within_it():
    y = TARGETS["squared"][:, 0] + 3 * RNG.standard_normal(len(X))
    model = GroupElasticNetCV(n_alphas=30, eps=0.01, selection="one_se", tol=1e-8).fit(X, y)
    mean = model.error_path_.mean(axis=1)
    error = model.error_path_.std(axis=1, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(model.mean_error_, mean)
    np.testing.assert_allclose(model.standard_error_, error)
    low = mean.argmin()
    within = mean <= mean[low] + error[low]
    assert model.alpha_min_ == model.alphas_[low]
    assert model.alpha_ == model.alpha_one_se_ == model.alphas_[within].max() > model.alpha_min_
    twin = GroupElasticNet(model.alpha_one_se_, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(model.coef_, twin.coef_, atol=1e-4)
    least = GroupElasticNetCV(n_alphas=30, eps=0.01, tol=1e-8).fit(X, y)
    assert least.alpha_ == model.alpha_min_ and least.alpha_one_se_ == model.alpha_one_se_
    point = least.path_[low]
    np.testing.assert_allclose(point.coef[:, 0], least.coef_)
    np.testing.assert_allclose(X @ point.coef[:, 0] + point.intercept, least.predict(X))


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def marks(ax):
    """Places of the vertical lines, by label."""
    return {
        line.get_label(): line.get_xdata()[0]
        for line in ax.get_lines()
        if len(line.get_xdata()) == 2 and line.get_xdata()[0] == line.get_xdata()[1]
    }


@pytest.mark.parametrize("kind", [{}, {"groups": 2}, {"l1_ratio": [0.5, 1.0]}])
def test_plots_show_paths_errors_and_marks_where_they_are(pyplot, kind):
    model = GroupElasticNetCV(n_alphas=8, eps=0.01, **kind).fit(X, TARGETS["squared"][:, 0])
    expected = {"least error": model.alpha_min_, "one standard error": model.alpha_one_se_}
    ax = model.plot_path()
    assert marks(ax) == expected and ax.get_xscale() == "log"
    lines = np.stack([line.get_ydata() for line in ax.get_lines() if len(line.get_xdata()) == 8])
    at = int(np.flatnonzero(model.path_.alphas == model.alpha_)[0])
    values = model.coef_
    if "groups" in kind:
        values = np.linalg.norm(values.reshape(-1, 2), axis=1)
    np.testing.assert_allclose(lines[:, at], values)
    own = pyplot.subplots()[1]
    assert model.plot_cv(own) is own and marks(own) == expected
    points, _, (bars,) = own.containers[0]
    best = 0 if "l1_ratio" not in kind else kind["l1_ratio"].index(model.l1_ratio_)
    means, errors = (
        np.atleast_2d(array)[best] for array in (model.mean_error_, model.standard_error_)
    )
    np.testing.assert_allclose(points.get_ydata(), means)
    heights = np.array([np.ptp(segment[:, 1]) for segment in bars.get_segments()])
    np.testing.assert_allclose(heights, 2 * errors)
    assert "mean squared error" in own.get_ylabel()


def test_plots_of_several_responses_show_norms(pyplot):
    model = GroupElasticNetCV(n_alphas=4, eps=0.1).fit(X, TARGETS["squared"])
    lines = [line for line in model.plot_path().get_lines() if len(line.get_xdata()) == 4]
    ends = np.array([line.get_ydata()[-1] for line in lines])
    np.testing.assert_allclose(ends, np.linalg.norm(model.path_[-1].coef, axis=1))


def test_plots_say_what_to_install(monkeypatch):
    model = GroupElasticNetCV(n_alphas=3, eps=0.1).fit(X, TARGETS["squared"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for plot in (model.plot_path, model.plot_cv):
        with pytest.raises(ImportError, match=r'pip install "cvxdistill\[plot\]"'):
            plot()


def test_a_stop_short_of_the_tolerance_is_a_warning_with_the_gap():
    hurry = {"loss": "log_loss", "max_iter": 1, "tol": 1e-14}
    model = GroupElasticNet(1e-3, **hurry)
    said = r"iteration limit after \d+ sweeps.*absolute gap"
    with pytest.warns(ConvergenceWarning, match=said) as w:
        model.fit(X, TARGETS["log_loss"])
    assert len(w) == 1 and w[0].filename == __file__
    assert f"(absolute gap {model.duality_gap_:.3g})" in str(w[0].message)
    many = GroupElasticNetCV(n_alphas=4, eps=1e-2, cv=3, **hurry)
    with pytest.warns(ConvergenceWarning, match=r"in \d+ of 16 solves, the worst: ") as w:
        many.fit(X, TARGETS["log_loss"])
    assert len(w) == 1 and w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GroupElasticNetCV(n_alphas=4).fit(X, TARGETS["squared"])


def test_progress_is_shown_when_asked_for(capfd):
    GroupElasticNetCV(n_alphas=4, cv=3).fit(X, TARGETS["squared"])
    assert capfd.readouterr() == ("", "")
    GroupElasticNetCV(n_alphas=4, cv=3, verbose=1).fit(X, TARGETS["squared"])
    out, err = capfd.readouterr()
    assert out == "" and "alphas" in err and "/16" in err


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_type_of_the_data_is_kept(loss, dtype):
    y = TARGETS[loss]
    one = GroupElasticNet(0.1, loss=loss, time_limit=5)
    for model in (one, GroupElasticNetCV(loss=loss, **QUICK)):
        model.fit(X.astype(dtype), y)
        assert model.coef_.dtype == model.intercept_.dtype == dtype
        decide = "predict_proba" if loss == "log_loss" else "predict"
        assert getattr(model, decide)(X.astype(dtype)).dtype == dtype
        double = clone(model).fit(X, y)
        np.testing.assert_allclose(model.coef_, double.coef_, atol=0.02)


def test_targets_far_from_zero_keep_their_digits_in_float32():
    y = TARGETS["squared"][:, 0]
    near, far = (GroupElasticNet(0.1).fit(X.astype(np.float32), y + by) for by in (0, 1e6))
    np.testing.assert_allclose(near.coef_, far.coef_, atol=1e-5)
    assert far.intercept_ == pytest.approx(near.intercept_ + 1e6, rel=1e-6)


def test_a_warm_start_at_the_solution_has_nothing_to_do():
    model = GroupElasticNet(0.01, loss="log_loss", warm_start=True).fit(X, TARGETS["log_loss"])
    first, cold = model.coef_.copy(), model.n_iter_
    model.fit(X, TARGETS["log_loss"])
    assert model.n_iter_ == 1 < cold
    np.testing.assert_allclose(model.coef_, first)
    assert model.fit(X[:, :5], TARGETS["log_loss"]).coef_.shape == (3, 5)


def test_sparse_input_is_made_dense():
    thin = sparse.csr_array(X * (np.abs(X) > 0.5))
    for model in (GroupElasticNet(0.1), GroupElasticNetCV(n_alphas=3, eps=0.1)):
        ours = clone(model).fit(thin, TARGETS["squared"])
        twin = clone(model).fit(thin.toarray(), TARGETS["squared"])
        np.testing.assert_array_equal(ours.coef_, twin.coef_)
        np.testing.assert_allclose(ours.predict(thin), twin.predict(thin.toarray()))


def test_a_grid_search_over_alpha():
    grid = {"alpha": [1e-2, 10.0]}
    search = GridSearchCV(GroupElasticNet(loss="log_loss"), grid, cv=3, error_score="raise")
    search.fit(X, TARGETS["log_loss"])
    assert search.best_params_ == {"alpha": 1e-2}
    assert search.best_score_ > search.cv_results_["mean_test_score"][1] + 0.05


def test_settings_that_are_not_the_defaults_are_in_the_repr():
    assert repr(GroupElasticNet()) == "GroupElasticNet()"
    assert repr(GroupElasticNetCV(loss="huber", cv=3)) == "GroupElasticNetCV(cv=3, loss='huber')"


NOT_FOR_CV = {"alpha is 0", "alpha is text", "alpha is infinite"}
SETTINGS = {
    "alpha is 0": ({"alpha": 0}, "alpha must be positive and finite, got 0"),
    "alpha is text": ({"alpha": "auto"}, "alpha must be a number, got 'auto'"),
    "alpha is infinite": ({"alpha": np.inf}, "alpha must be positive and finite, got inf"),
    "l1_ratio above 1": ({"l1_ratio": 1.5}, r"l1_ratio must lie in \[0, 1\], got 1.5"),
    "l1_ratio is text": ({"l1_ratio": "half"}, "l1_ratio must be a number, got 'half'"),
    "unknown loss": ({"loss": "hinge"}, r"loss must be one of \['squared', .*\], got 'hinge'"),
    "loss is no name": ({"loss": None}, "loss must be one of .*, got None"),
    "tol is negative": ({"tol": -1}, "tol must be a finite number >= 0, got -1"),
    "no sweeps": ({"max_iter": 0}, "max_iter must be a positive integer, got 0"),
    "no time": ({"time_limit": 0}, "time_limit must be positive or None, got 0"),
    "unknown form": ({"form": "dual"}, "form must be .*, got 'dual'"),
    "groups do not divide": ({"groups": 3}, "groups=3 must be a positive size that divides"),
    "groups overlap": (
        {"groups": [[0, 1], range(1, 8)]},
        "groups must hold each of the 8 features",
    ),
    "groups are too few": ({"groups": np.zeros(5, int)}, "groups must be a size, 8 integer labels"),
    "weights are too few": ({"group_weights": [1, 2]}, r"group_weights must have shape \(8,\)"),
    "weights are negative": (
        {"group_weights": -np.ones(8)},
        "group_weights must be finite and not",
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_impossible_settings_are_refused_by_name(case):
    setting, message = SETTINGS[case]
    for estimator in (GroupElasticNet, GroupElasticNetCV):
        if estimator is GroupElasticNet or case not in NOT_FOR_CV:
            with pytest.raises((ValueError, TypeError), match=message):
                estimator(**setting).fit(X, TARGETS["squared"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"l1_ratio": []}, "l1_ratio must be a number or a sequence"),
        ({"l1_ratio": [0.5, 2]}, r"l1_ratio must lie in \[0, 1\], got 2"),
        ({"l1_ratio": 0}, "alphas must be given .* inf \\(infinite for l1_ratio=0"),
        ({"n_alphas": 0}, "n_alphas must be a positive integer, got 0"),
        ({"eps": 2}, r"eps must lie in \(0, 1\], got 2"),
        ({"alphas": [1, 0]}, "alphas must be positive and finite"),
        ({"alphas": []}, "alphas must be a sequence of numbers"),
        ({"alphas": 3}, "alphas must be a sequence of numbers, got 3"),
        ({"selection": "best"}, r"selection must be one of \['min', 'one_se'\], got 'best'"),
        ({"cv": [(np.arange(50), np.arange(50, 100))]}, "at least 2 folds, got 1"),
        ({"cv": 101}, "n_splits=101"),
    ],
)
def test_impossible_settings_of_cross_validation_are_refused_by_name(setting, message):
    with pytest.raises(ValueError, match=message):
        GroupElasticNetCV(**setting).fit(X, TARGETS["squared"])


@pytest.mark.parametrize("estimator", [GroupElasticNet, GroupElasticNetCV])
@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        ("poisson", {"y": -TARGETS["poisson"]}, "loss='poisson' needs y >= 0, got -"),
        ("poisson", {"y": np.zeros(100)}, "needs a number > 0"),
        ("poisson", {"y": TARGETS["squared"]}, "y should be a 1d array"),
        ("log_loss", {"y": np.zeros(100)}, r"at least 2 classes of positive weight, got 1 class"),
        ("log_loss", {"y": TARGETS["squared"][:, 0]}, "Unknown label type: continuous"),
        ("squared", {"y": TARGETS["squared"][:9]}, "inconsistent numbers of samples"),
        ("squared", {"X": np.full((100, 8), np.nan)}, "Input X contains NaN"),
        ("squared", {"offset": np.zeros(9)}, r"offset must have shape \(100, 2\), got \(9,\)"),
        ("squared", {"offset": np.full((100, 2), np.nan)}, "Input offset contains NaN"),
        ("squared", {"sample_weight": -np.ones(100)}, "sample_weight must not be negative"),
        ("squared", {"sample_weight": np.zeros(100)}, "at least one (example|non-zero)"),
    ],
)
def test_impossible_data_are_refused_by_name(estimator, loss, change, message):
    data = {"X": X, "y": TARGETS[loss]} | change
    with pytest.raises(ValueError, match=message):
        estimator(loss=loss).fit(**data)


def test_folds_without_examples_or_classes_are_refused_by_number():
    y, first = TARGETS["log_loss"], np.arange(100) < 50
    halves = [(np.flatnonzero(first), np.flatnonzero(~first))]
    halves += [part[::-1] for part in halves]
    for weights, message in ((first, "0 no .* > 0 to test on"), (~first, "0 no .* to train on")):
        with pytest.raises(ValueError, match=f"cv leaves fold {message}"):
            GroupElasticNetCV(cv=halves).fit(X, TARGETS["squared"], weights)
    rare = np.where(np.arange(100) == 3, "rare", y)
    with pytest.raises(ValueError, match=r"fold 1 no examples of \['rare'\] in y to train on"):
        GroupElasticNetCV(cv=halves, loss="log_loss").fit(X, rare)


def test_a_refused_fit_leaves_the_last_one():
    model = GroupElasticNet(0.1).fit(X, TARGETS["squared"])
    before = dict(vars(model))
    with pytest.raises(ValueError, match="offset"):
        model.fit(X[:, :5], TARGETS["squared"], offset=np.zeros(3))
    assert vars(model).keys() == before.keys() and model.coef_ is before["coef_"]
    assert model.n_features_in_ == 8
