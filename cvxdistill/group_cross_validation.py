"""Scikit-learn estimator of the group elastic net that chooses alpha by cross-validation."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.model_selection import check_cv
from sklearn.utils.validation import _num_samples, check_is_fitted
from tqdm import tqdm

from cvxdistill.estimator_base import all_or_nothing
from cvxdistill.group_estimator_base import Examples, GroupLinearModel, check_l1_ratio, check_number
from cvxdistill.solvers import (
    GroupElasticNetProblem,
    GroupPath,
    GroupSolution,
    alpha_grid,
    group_alpha_max,
)
from cvxdistill.solvers.path import decreasing_alphas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SELECTIONS = ("min", "one_se")
# What is reported of a loss, and its name.
ERROR_NAMES = {
    "squared": "mean squared error",
    "huber": "mean Huber loss",
    "poisson": "mean Poisson deviance",
    "log_loss": "mean log loss",
}


class GroupElasticNetCV(GroupLinearModel):
    """The group elastic net with alpha, and l1_ratio if asked, chosen by cross-validation.

    Each fold is held out once; a path of models from the largest alpha down, each started at the
    one before, is fitted to the others. The mean of the folds' errors, weighted by their examples,
    decides; the model is then fitted to all examples. See ``GroupElasticNet`` for the objective.

    Parameters
    ----------
    l1_ratio : float in [0, 1] or sequence of them, default=1.0
        rho: 1 is the group lasso, 0 ridge regression; of several the one with the least error.
    alphas : sequence of float, optional
        By default ``n_alphas`` from the smallest alpha at which all penalised coefficients are 0
        down to ``eps`` times it; for l1_ratio=0 there is none and they must be given.
    n_alphas : int, default=100
    eps : float, default=1e-3
    cv : int, splitter or iterable of (train, test), optional
        5 folds by default, stratified for log loss.
    selection : {"min", "one_se"}, default="min"
        alpha with the least mean error, or the largest within one standard error of it.
    groups, group_weights, loss, fit_intercept, form, tol
        As in ``GroupElasticNet``.
    max_iter : int, default=100000
        Most sweeps for each alpha.
    time_limit : float, optional
        Most seconds for each alpha.
    verbose : int, default=0
        1 shows a progress bar over all alphas of all folds.

    Attributes
    ----------
    alpha_, l1_ratio_ : float
        As chosen.
    alpha_min_, alpha_one_se_ : float
        Of the least mean error, and the largest within one standard error of that error; at
        ``l1_ratio_``.
    alphas_ : ndarray of shape (n_alphas,) or (n_l1_ratios, n_alphas)
        Decreasing; the latter for a sequence of l1_ratio, here and below.
    error_path_ : ndarray of shape (n_alphas, n_folds) or (n_l1_ratios, n_alphas, n_folds)
        Error of each held-out fold: mean squared error, mean Huber loss, mean Poisson deviance or
        mean log loss.
    mean_error_, standard_error_ : ndarray of shape (n_alphas,) or (n_l1_ratios, n_alphas)
        Over folds.
    path_ : GroupPath
        Models of all examples at each alpha, at ``l1_ratio_``.
    coef_, intercept_, classes_, groups_, n_active_groups_, objective_, duality_gap_, n_iter_
        As in ``GroupElasticNet``, at ``alpha_``.
    n_features_in_ : int
        Number d of features.
    feature_names_in_ : ndarray of shape (d,)
        Names of the columns, where X had names that are all strings.

    References
    ----------
    Friedman, Hastie and Tibshirani 2010 (paths, and the rule of one standard error).

    Examples
    --------
    >>> import numpy as np
    >>> from cvxdistill import GroupElasticNetCV
    >>> rng = np.random.default_rng(5)
    >>> X = rng.standard_normal((100, 6))
    >>> y = X[:, 0] - 2 * X[:, 1] + rng.standard_normal(100)
    >>> model = GroupElasticNetCV(groups=2, selection="one_se").fit(X, y)
    >>> np.flatnonzero(model.coef_).tolist()
    [0, 1]
    """

    def __init__(
        self,
        *,
        l1_ratio: Any = 1.0,
        alphas: Any = None,
        n_alphas: int = 100,
        eps: float = 1e-3,
        cv: Any = None,
        selection: str = "min",
        groups: Any = None,
        group_weights: Any = None,
        loss: str = "squared",
        fit_intercept: bool = True,
        form: str = "auto",
        tol: float = 1e-4,
        max_iter: int = 100_000,
        time_limit: float | None = None,
        verbose: int = 0,
    ):
        self.l1_ratio = l1_ratio
        self.alphas = alphas
        self.n_alphas = n_alphas
        self.eps = eps
        self.cv = cv
        self.selection = selection
        self.groups = groups
        self.group_weights = group_weights
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.form = form
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.verbose = verbose

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None
    ) -> GroupElasticNetCV:
        """Choose alpha and fit the model.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,) or (n, c)
            Targets: one column for Poisson's loss, and labels for log loss.
        sample_weight : array of shape (n,), optional
            Weights of the examples in fits and errors, not negative; only their ratios matter.
            Those of weight 0 are left out.
        offset : array of shape (n,) or (n, c), optional
            O, added to the linear predictor.

        Returns
        -------
        GroupElasticNetCV
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            If a parameter, X or y is not what it should be; the message names it.
        """
        self._check_parameters()
        with all_or_nothing(self):
            examples = self._examples(X, y, sample_weight, offset)
            folds = self._folds(X, y, examples)
            ratios = np.atleast_1d(self.l1_ratio).tolist()
            problems = [self._problem(examples, ratio) for ratio in ratios]
            alphas = np.array([self._grid(problem) for problem in problems])
            errors = np.empty((*alphas.shape, len(folds)))
            short: list[GroupSolution] = []
            total = alphas.size * len(folds) + alphas.shape[1]
            with tqdm(total=total, disable=not self.verbose, desc="alphas", leave=False) as bar:
                for k, (train, test) in enumerate(folds):
                    for i, ratio in enumerate(ratios):
                        path = self._path(self._problem(train, ratio), alphas[i], bar)
                        errors[i, :, k] = list(_errors(path, test, self.loss))
                        short += [point for point in path if not point.converged]
                means, standard_errors = _mean_and_error(errors, [test for _, test in folds])
                best = int(means.min(axis=1).argmin())
                low, one_se = _marks(means[best], standard_errors[best])
                chosen = low if self.selection == "min" else one_se
                path = self._path(problems[best], alphas[best], bar)
                self.path_ = GroupPath(examples.uncentred(point) for point in path)
            short += [point for point in self.path_ if not point.converged]
            self._warn(short, total)
            one = np.ndim(self.l1_ratio) == 0
            self.alphas_, self.error_path_, self.mean_error_, self.standard_error_ = (
                array[0] if one else array for array in (alphas, errors, means, standard_errors)
            )
            self.l1_ratio_ = float(ratios[best])
            self.alpha_min_ = float(alphas[best, low])
            self.alpha_one_se_ = float(alphas[best, one_se])
            self.alpha_ = float(alphas[best, chosen])
            self._keep(self.path_[chosen], problems[best], examples)
        return self

    def plot_path(self, ax: Axes | None = None) -> Axes:
        """Draw coefficients against alpha, with ``alpha_min_`` and ``alpha_one_se_``.

        For groups of several features, or several responses, the norm of each group's coefficients.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default on a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        ax = self._axes(ax)
        coefs = self.path_.coefs
        if coefs.shape[2] == 1 and all(len(group) == 1 for group in self.groups_):
            lines, label = coefs[:, np.concatenate(self.groups_), 0], "coefficient"
        else:
            norms = [np.linalg.norm(coefs[:, group], axis=(1, 2)) for group in self.groups_]
            lines, label = np.stack(norms, axis=1), "norm of the group's coefficients"
        ax.plot(self.path_.alphas, lines, linewidth=1)
        ax.set_ylabel(label)
        return self._mark(ax)

    def plot_cv(self, ax: Axes | None = None) -> Axes:
        """Draw mean errors and their standard errors, with ``alpha_min_`` and ``alpha_one_se_``.

        At ``l1_ratio_``, if there were several.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Where to draw; by default on a new figure.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        ax = self._axes(ax)
        means, standard_errors = self.mean_error_, self.standard_error_
        if means.ndim == 2:
            best = np.asarray(self.l1_ratio).tolist().index(self.l1_ratio_)
            means, standard_errors = means[best], standard_errors[best]
        ax.errorbar(
            self.path_.alphas, means, standard_errors, fmt=".", color="C3", ecolor="0.7", capsize=2
        )
        ax.set_ylabel(f"{ERROR_NAMES[self.loss]} of held-out examples")
        return self._mark(ax)

    def _axes(self, ax: Axes | None) -> Axes:
        check_is_fitted(self)
        if ax is not None:
            return ax
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError(
                'Plots need matplotlib, which is not installed: pip install "cvxdistill[plot]"'
            ) from error
        return pyplot.subplots()[1]

    def _mark(self, ax: Axes) -> Axes:
        ax.axvline(self.alpha_min_, color="0.3", linestyle="--", label="least error")
        ax.axvline(self.alpha_one_se_, color="0.3", linestyle=":", label="one standard error")
        ax.set_xscale("log")
        ax.set_xlabel("alpha")
        ax.legend()
        return ax

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if np.ndim(self.l1_ratio) > 1 or np.size(self.l1_ratio) == 0:
            raise ValueError(
                f"l1_ratio must be a number or a sequence of them, got {self.l1_ratio!r}."
            )
        for ratio in [self.l1_ratio] if np.ndim(self.l1_ratio) == 0 else self.l1_ratio:
            check_l1_ratio(ratio)
        if not isinstance(self.n_alphas, Integral) or self.n_alphas < 1:
            raise ValueError(f"n_alphas must be a positive integer, got {self.n_alphas!r}.")
        check_number("eps", self.eps)
        if not 0 < self.eps <= 1:
            raise ValueError(f"eps must lie in (0, 1], got {self.eps!r}.")
        if self.selection not in SELECTIONS:
            raise ValueError(
                f"selection must be one of {list(SELECTIONS)}, got {self.selection!r}."
            )
        if self.alphas is not None:
            alphas = np.asarray(self.alphas)
            if alphas.dtype.kind not in "fiu" or alphas.ndim != 1 or len(alphas) == 0:
                raise ValueError(f"alphas must be a sequence of numbers, got {self.alphas!r}.")
            decreasing_alphas(alphas)

    def _grid(self, problem: GroupElasticNetProblem) -> np.ndarray:
        """Decreasing alphas."""
        if self.alphas is not None:
            return decreasing_alphas(self.alphas)
        largest = group_alpha_max(problem)
        if not 0 < largest < np.inf:
            raise ValueError(
                "alphas must be given where the smallest alpha without penalised features is "
                f"{largest} (infinite for l1_ratio=0, 0 for targets that need no feature)."
            )
        return alpha_grid(largest, int(self.n_alphas), float(self.eps))

    def _path(self, problem: GroupElasticNetProblem, alphas: np.ndarray, bar: tqdm) -> GroupPath:
        def advance(_: GroupSolution) -> None:
            bar.update()

        return self._solver().path(problem, alphas, callback=advance)

    def _folds(self, X: Any, y: Any, examples: Examples) -> list[tuple[Examples, Examples]]:
        """Examples to train on and to test on, for each fold."""
        classify = self.loss == "log_loss"
        cv = check_cv(self.cv, y, classifier=classify)
        place = np.full(_num_samples(X), -1)
        place[examples.rows] = np.arange(len(examples.rows))
        folds = []
        for k, split in enumerate(cv.split(X, y)):
            places = [place[rows] for rows in split]
            train, test = (examples.take(rows[rows >= 0]) for rows in places)
            for part, name in ((train, "train"), (test, "test")):
                if len(part.Y) == 0:
                    raise ValueError(f"cv leaves fold {k} no examples of weight > 0 to {name} on.")
            if classify:
                one = train.Y.shape[1] == 1
                seen = np.hstack([train.Y < 0, train.Y > 0] if one else [train.Y > 0]).any(axis=0)
                if not seen.all():
                    missing = self.classes_[~seen].tolist()
                    raise ValueError(
                        f"cv leaves fold {k} no examples of {missing} in y to train on: have fewer "
                        "folds, or leave such classes out."
                    )
            folds.append((train, test))
        if len(folds) < 2:
            raise ValueError(f"cv must give at least 2 folds, got {len(folds)}.")
        return folds


def _errors(path: GroupPath, test: Examples, loss: str) -> Iterator[float]:
    """Mean error of held-out examples (and their responses) at each point of a path."""
    factor = 2 if loss in ("squared", "poisson") else 1
    responses = test.Y.shape[1] if loss in ("squared", "huber") else 1
    for point in path:
        F = test.X[:, point.features] @ point.values.astype(test.X.dtype)
        F += point.intercept.astype(F.dtype)
        if test.offset is not None:
            F += test.offset
        values = test.loss.value(F, test.Y).astype(np.float64)
        yield factor / responses * float(np.average(values, weights=test.weights))


def _mean_and_error(errors: np.ndarray, tests: list[Examples]) -> tuple[np.ndarray, np.ndarray]:
    """Mean over folds, the last axis, weighted by their examples, and its standard error."""
    shares = np.array(
        [len(test.Y) if test.weights is None else test.weights.sum() for test in tests]
    )
    shares = shares / shares.sum()
    means = errors @ shares
    variances = (errors - means[..., None]) ** 2 @ shares
    return means, np.sqrt(variances / (len(tests) - 1))


def _marks(means: np.ndarray, standard_errors: np.ndarray) -> tuple[int, int]:
    """Places of the least mean, and of the first that is within its standard error."""
    low = int(means.argmin())
    return low, int(np.flatnonzero(means <= means[low] + standard_errors[low])[0])
