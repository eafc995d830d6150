"""What the estimators of group elastic nets share: data at the door, predictions, scores, tags.

The estimators are in ``cvxdistill.group_estimators`` and ``cvxdistill.group_cross_validation``; all
mathematics is in ``cvxdistill.solvers``.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
from scipy import sparse
from scipy.special import expit, log_softmax, softmax
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, d2_tweedie_score, r2_score
from sklearn.utils import ClassifierTags, RegressorTags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from cvxdistill.estimator_base import FLOATS, check_weights, dense
from cvxdistill.solvers import BlockCoordinateDescent, GroupElasticNetProblem, GroupSolution
from cvxdistill.solvers.losses import (
    HuberLoss,
    LogisticLoss,
    Loss,
    MultinomialLoss,
    PoissonLoss,
    SquaredLoss,
)

REGRESSION_LOSSES: dict[str, Loss] = {
    "squared": SquaredLoss(),
    "huber": HuberLoss(),
    "poisson": PoissonLoss(),
}
LOSSES = (*REGRESSION_LOSSES, "log_loss")


@dataclass(frozen=True)
class Examples:
    """Examples of positive weight, with targets as the loss takes them.

    Attributes
    ----------
    X : ndarray of shape (n, d)
    Y : ndarray of shape (n, c)
        Numbers less ``centre``, -1 and +1, or one-hot.
    weights : ndarray of shape (n,) or None
    offset : ndarray of shape (n, c) or None
    loss : Loss
    centre : ndarray of shape (c,)
        Belongs to the intercept: float32 keeps more digits without it.
    rows : ndarray of int, shape (n,)
        Their places among all examples that came.
    flat : bool
        Whether the one response came without an axis, so that ``coef_`` has none either.
    """

    X: np.ndarray
    Y: np.ndarray
    weights: np.ndarray | None
    offset: np.ndarray | None
    loss: Loss
    centre: np.ndarray
    rows: np.ndarray
    flat: bool

    def take(self, rows: np.ndarray) -> Examples:
        """Some of them."""
        return replace(
            self,
            X=self.X[rows],
            Y=self.Y[rows],
            weights=None if self.weights is None else self.weights[rows],
            offset=None if self.offset is None else self.offset[rows],
            rows=self.rows[rows],
        )

    def uncentred(self, solution: GroupSolution) -> GroupSolution:
        """A solution with the intercept of the targets as they came."""
        return replace(solution, intercept=solution.intercept + self.centre)


def _has_log_loss(estimator: GroupLinearModel) -> bool:
    if estimator.loss != "log_loss":
        raise AttributeError(f"Classes need loss='log_loss', got {estimator.loss!r}.")
    return True


class GroupLinearModel(BaseEstimator):
    """What the group elastic nets share: data at the door, predictions, scores, tags.

    A classifier for loss="log_loss", otherwise a regressor.
    """

    loss: str
    groups: Any
    group_weights: Any
    fit_intercept: bool
    form: str
    tol: float
    max_iter: int
    time_limit: float | None

    coef_: np.ndarray
    intercept_: Any

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.target_tags.required = True
        if self.loss == "log_loss":
            tags.estimator_type = "classifier"
            tags.classifier_tags = ClassifierTags()
        else:
            tags.estimator_type = "regressor"
            tags.regressor_tags = RegressorTags()
            tags.target_tags.multi_output = self.loss != "poisson"
            tags.target_tags.positive_only = self.loss == "poisson"
        return tags

    def predict(self, X: Any, offset: Any = None) -> np.ndarray:
        """Predict labels for log loss, exp(X B + 1 b^T + O) for Poisson's, else X B + 1 b^T + O.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
        offset : array of shape (n,) or (n, c), optional
            O, 0 by default, also where there was one in ``fit``.

        Returns
        -------
        ndarray of shape (n,) or (n, c)
            As y was in ``fit``.
        """
        F = self._outputs(X, offset)
        if self.loss == "log_loss":
            chosen = (F[:, 0] > 0).astype(int) if F.shape[1] == 1 else F.argmax(axis=1)
            return self.classes_[chosen]
        if self.loss == "poisson":
            F = np.exp(F)
        return F[:, 0] if self.coef_.ndim == 1 else F

    @available_if(_has_log_loss)
    def decision_function(self, X: Any, offset: Any = None) -> np.ndarray:
        """X B + 1 b^T + O; only with loss="log_loss".

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
        offset : array of shape (n,) or (n, n_classes), optional

        Returns
        -------
        ndarray of shape (n,) with two classes, (n, n_classes) with more
            Two classes: positive means ``classes_[1]``.
        """
        F = self._outputs(X, offset)
        return F[:, 0] if F.shape[1] == 1 else F

    @available_if(_has_log_loss)
    def predict_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """Probabilities of the classes; only with loss="log_loss".

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
        offset : array of shape (n,) or (n, n_classes), optional

        Returns
        -------
        ndarray of shape (n, n_classes)
            1 / (1 + exp(-f)) for the second of two classes, the softmax of f for more.
        """
        F = self._outputs(X, offset)
        return np.hstack([expit(-F), expit(F)]) if F.shape[1] == 1 else softmax(F, axis=1)

    @available_if(_has_log_loss)
    def predict_log_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """Logarithms of ``predict_proba``, exact however small; only with loss="log_loss".

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
        offset : array of shape (n,) or (n, n_classes), optional

        Returns
        -------
        ndarray of shape (n, n_classes)
        """
        F = self._outputs(X, offset)
        return log_softmax(np.hstack([np.zeros_like(F), F]) if F.shape[1] == 1 else F, axis=1)

    def score(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> float:
        """Accuracy for log loss; for Poisson's the share of deviance explained; otherwise R^2.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
        y : array of shape (n,) or (n, c)
        sample_weight : array of shape (n,), optional
        offset : array of shape (n,) or (n, c), optional

        Returns
        -------
        float
        """
        predicted = self.predict(X, offset)
        if self.loss == "log_loss":
            return float(accuracy_score(y, predicted, sample_weight=sample_weight))
        if self.loss == "poisson":
            return float(d2_tweedie_score(y, predicted, sample_weight=sample_weight, power=1))
        return float(r2_score(y, predicted, sample_weight=sample_weight))

    def _outputs(self, X: Any, offset: Any) -> np.ndarray:
        """X B + 1 b^T + O, (n, c)."""
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, accept_sparse="csr", dtype=FLOATS)
        F = X @ np.atleast_2d(self.coef_).T.astype(X.dtype)
        F += np.atleast_1d(self.intercept_).astype(X.dtype)
        return F if offset is None else F + _check_offset(offset, F)

    def _solver(self) -> BlockCoordinateDescent:
        return BlockCoordinateDescent(
            tol=self.tol, max_iter=self.max_iter, time_limit=self.time_limit, form=self.form
        )

    def _check_parameters(self) -> None:
        """Refuse impossible settings before any work."""
        if not (isinstance(self.loss, str) and self.loss in LOSSES):
            raise ValueError(f"loss must be one of {list(LOSSES)}, got {self.loss!r}.")
        self._solver()

    def _examples(self, X: Any, y: Any, sample_weight: Any, offset: Any) -> Examples:
        """Check data, leave out rows of weight 0, and set ``classes_`` for log loss."""
        if sparse.issparse(y):
            raise TypeError("y must be dense, got a sparse matrix; use y.toarray().")
        classify = self.loss == "log_loss"
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            dtype=FLOATS,
            multi_output=self.loss in ("squared", "huber"),
            y_numeric=not classify,
        )
        weights = check_weights(sample_weight, X)
        rows = np.arange(len(y)) if weights is None else np.flatnonzero(weights)
        if classify:
            Y, loss = self._classes(y, rows)
        else:
            Y, loss = y.reshape(len(y), -1), REGRESSION_LOSSES[self.loss]
        if self.loss == "poisson" and Y.min() < 0:
            raise ValueError(f"loss='poisson' needs y >= 0, got {Y.min():g}.")
        centre = np.zeros(Y.shape[1])
        if self.fit_intercept and self.loss in ("squared", "huber"):
            centre = np.average(Y.astype(np.float64), axis=0, weights=weights)
        every = Examples(
            X=dense(X),
            Y=(Y - centre).astype(X.dtype),
            weights=weights,
            offset=None if offset is None else _check_offset(offset, Y.astype(X.dtype)),
            loss=loss,
            centre=centre,
            rows=np.arange(len(y)),
            flat=y.ndim == 1 and not classify,
        )
        return every if len(rows) == len(y) else every.take(rows)

    def _classes(self, y: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, Loss]:
        """Targets for the classes of the rows of positive weight; those of others are not used."""
        check_classification_targets(y)
        self.classes_ = np.unique(y[rows])
        k = len(self.classes_)
        if k < 2:
            raise ValueError(
                f"y must hold at least 2 classes of positive weight, got {k} class(es): "
                f"{self.classes_.tolist()}."
            )
        if k == 2:
            return np.where(y == self.classes_[1], 1.0, -1.0)[:, None], LogisticLoss()
        return (y[:, None] == self.classes_).astype(np.float64), MultinomialLoss()

    def _problem(self, examples: Examples, l1_ratio: float) -> GroupElasticNetProblem:
        return GroupElasticNetProblem(
            examples.X,
            examples.Y,
            self.groups,
            group_weights=self.group_weights,
            l1_ratio=l1_ratio,
            loss=examples.loss,
            fit_intercept=self.fit_intercept,
            offset=examples.offset,
            sample_weight=examples.weights,
        )

    def _keep(
        self, solution: GroupSolution, problem: GroupElasticNetProblem, examples: Examples
    ) -> None:
        """Set the fitted attributes."""
        B = solution.coef.T.astype(examples.X.dtype)
        b = solution.intercept.astype(examples.X.dtype)
        self.coef_, self.intercept_ = (B[0], b[0]) if examples.flat else (B, b)
        self.groups_ = problem.members
        self.objective_ = solution.objective
        self.duality_gap_ = solution.duality_gap
        # To see that nothing is to be done takes a look at all groups too.
        self.n_iter_ = max(1, solution.n_iter)
        self.n_active_groups_ = solution.n_active_groups

    def _warn(self, short: Sequence[GroupSolution], solves: int) -> None:
        """Warn of solutions that stopped short of the tolerance, if there are any."""
        if not short:
            return
        worst = max(short, key=lambda solution: solution.relative_gap)
        many = f" in {len(short)} of {solves} solves, the worst" if solves > 1 else ""
        warnings.warn(
            f"{type(self).__name__} stopped short of tol={self.tol:g}{many}: {worst.message} "
            f"(absolute gap {worst.duality_gap:.3g}). Scale X and y, or raise alpha, tol, max_iter "
            "or time_limit.",
            ConvergenceWarning,
            stacklevel=3,
        )


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def check_l1_ratio(value: Any) -> None:
    """Refuse what is no number in [0, 1]."""
    check_number("l1_ratio", value)
    if not 0 <= value <= 1:
        raise ValueError(f"l1_ratio must lie in [0, 1], got {value!r}.")


def _check_offset(offset: Any, like: np.ndarray) -> np.ndarray:
    """Offset of the shape and type of outputs (n, c)."""
    added = check_array(offset, ensure_2d=False, dtype=FLOATS, input_name="offset")
    n, c = like.shape
    if added.shape != (n, c) and (c > 1 or added.shape != (n,)):
        raise ValueError(f"offset must have shape ({n}, {c}), got {added.shape}.")
    return added.reshape(n, c).astype(like.dtype, copy=False)
