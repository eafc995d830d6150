"""Scikit-learn estimators: convex gated ReLU and ReLU networks, fitted to a certified optimum."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, ClassVar

import numpy as np
from scipy import sparse
from scipy.special import expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from cvxdistill.estimator_base import (
    FLOATS,
    ConvexNN,
    all_or_nothing,
    check_weights,
    dense,
    rows_of_positive_weight,
)
from cvxdistill.solvers.losses import HuberLoss, LogisticLoss, Loss, MultinomialLoss, SquaredLoss


class ConvexNNRegressor(RegressorMixin, MultiOutputMixin, ConvexNN):
    """Regression with a convex gated ReLU or ReLU network, solved to certified optimality.

    Minimises over V and b

        L(Z, Y) + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere, and L the weighted
    mean of the losses of the examples. For ``activation="relu"`` V[j] - U[j] takes the place of
    V[j], with the penalty on both, every column of which lies in its gate's cone
    {w : (2 diag(D[:, j]) - I) X w >= 0}: then Z = sum_j relu(X V[j]) - relu(X U[j]) + 1 b^T.
    Sparse X is accepted and made dense. float32 stays float32.

    Parameters
    ----------
    alpha : float, default=1e-3
        Strength of the penalty. The loss is averaged over examples, so a good value does not
        grow with their number, but it does with the scale of X and y: scale both. At a very small
        fraction of the smallest alpha with no active gate the solver needs many iterations.
        Without a penalty it has no effect.
    activation : {"gated_relu", "relu"}, default="gated_relu"
        "relu" solves for pairs of weights V and U in the cones of their gates' activation
        patterns, so that the network needs no gates to predict.
    loss : {"squared", "huber"}, default="squared"
        1/2 ||z - y||^2; or Huber's, quadratic up to errors of 1.35, in units of y, then linear.
    penalty : {"neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"}
        R, by default "neuron": the sum over gates and outputs of ||V[j][:, k]||_2. "gate": the
        sum over gates of ||V[j]||_F. "nuclear": of singular values. "feature": the sum over
        features of the norm of all their weights, in V and U. "l1": of absolute values. "ridge":
        1/2 ||V||_F^2 (whatever ``l1_ratio`` says). "none": 0; then the KKT residual, and no
        duality gap, says how near the optimum is.
    l1_ratio : float in [0, 1], default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2.
    gates : str or array of shape (d, p) or (d + 1, p), default="gaussian"
        How to sample the gates: "gaussian", "gaussian-bias", "quantile-bias", "sparse", "pairs",
        "pairs-bias", "wedge" or "wedge-bias" (see ``draw_gates``); "generated", to search for
        those that lower the objective (see ``generate_gates``); or the gates themselves, one a
        column, with biases in the last row if there is one row more than there are features.
        "relu" takes gates without biases only, and moves sampled ones clear of the rows of X.
    n_gates : int, default=100
        Number of gates to sample, or to generate at most. Gates with equal or empty patterns on
        the rows of positive weight are dropped. Ignored when ``gates`` is an array.
    solver : str, default="auto"
        "auto", "semismooth_newton", "block_descent", "rfista", "ridge_newton",
        "augmented_lagrangian" or "admm": how to solve the programme; not every solver suits every
        one (see ``choose_solver``).
    fit_intercept : bool, default=True
        Whether there is an unpenalised offset b.
    normalize : bool, default=False
        Penalise the weights of columns of X scaled to unit Euclidean norm. This is a different
        problem, not a speed-up; ``coef_`` is in the units of X all the same.
    tol : float, default=1e-4
        Relative tolerance: stop when the duality gap is at most ``tol`` times the objective, or
        for penalty="none" when the KKT residual is at most ``tol``.
    max_iter : int, default=10000
        Most iterations. A stop short of ``tol`` is a ``ConvergenceWarning``.
    warm_start : bool, default=False
        Start at ``coef_`` of the last fit, with its ``gates_``, if the shapes agree and none of
        ``activation``, ``gates``, ``n_gates`` and ``random_state`` has changed.
    random_state : int, RandomState or None, default=None
        Seed of the gates; an int gives those of ``draw_gates`` with that seed.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    coef_ : ndarray of shape (p, d, c), for "relu" (2, p, d, c)
        V, the weights of each gate that was kept; for "relu" V, then U.
    gates_ : ndarray of shape (d, p) or (d + 1, p)
        The gates that were kept.
    intercept_ : ndarray of shape (c,)
        b.
    objective_ : float
        L(Z, Y) + alpha * sum_j R(V[j]), for "relu" with R(V[j]) + R(U[j]).
    duality_gap_ : float
        Absolute: ``objective_`` exceeds the optimum of the convex programme by at most this.
        Infinite for penalty="none".
    kkt_residual_ : float
        How far ``coef_`` is from the first-order conditions (see ``KKTResidual``).
    violation_ : float
        Largest relative violation of the cones by ``coef_``; 0 for gated ReLU.
    n_iter_ : int
        Iterations made.
    n_neurons_ : int
        Hidden units of the network that ``coef_`` stands for (see ``neurons_from_weights``).
    n_features_in_ : int
        Number d of features.
    feature_names_in_ : ndarray of shape (d,)
        Names of the columns, where X had names that are all strings.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022; Varshney and Pilanci 2024, theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> from cvxdistill import ConvexNNRegressor
    >>> X = np.linspace(-1, 1, 50).reshape(-1, 1)
    >>> model = ConvexNNRegressor(alpha=1e-4, random_state=0).fit(X, np.abs(X[:, 0]))
    >>> bool(model.score(X, np.abs(X[:, 0])) > 0.99)
    True
    """

    _losses: ClassVar[dict[str, Loss]] = {"squared": SquaredLoss(), "huber": HuberLoss()}

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexNNRegressor:
        """Fit the network.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,) or (n, c)
            Targets.
        sample_weight : array of shape (n,), optional
            Weights of the examples, not negative; only their ratios matter. Those of weight 0
            are left out.

        Returns
        -------
        ConvexNNRegressor
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            If a parameter, X or y is not what it should be; the message names it.
        """
        self._check_parameters()
        if sparse.issparse(y):
            raise TypeError("y must be dense, got a sparse matrix; use y.toarray().")
        with all_or_nothing(self):
            X, y = validate_data(
                self, X, y, accept_sparse="csr", dtype=FLOATS, multi_output=True, y_numeric=True
            )
            X, y, weights = rows_of_positive_weight(dense(X), y, check_weights(sample_weight, X))
            Y = y[:, None] if y.ndim == 1 else y
            self._fit_targets(X, Y, self._losses[self.loss], weights)
            self._flat_output = y.ndim == 1
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Predict the targets.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)

        Returns
        -------
        ndarray of shape (n,) or (n, c)
            As y was in ``fit``.
        """
        Z = self._decision(X)
        return Z[:, 0] if self._flat_output else Z


def _has_log_loss(estimator: ConvexNNClassifier) -> bool:
    if estimator.loss != "log_loss":
        raise AttributeError(f"Probabilities need loss='log_loss', got {estimator.loss!r}.")
    return True


class ConvexNNClassifier(ClassifierMixin, ConvexNN):
    """Classification with a convex gated ReLU or ReLU network, solved to certified optimality.

    Minimises over V and b

        L(Z, Y) + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere, and L the weighted
    mean of the losses of the examples. For ``activation="relu"`` V[j] - U[j] takes the place of
    V[j], with the penalty on both, every column of which lies in its gate's cone
    {w : (2 diag(D[:, j]) - I) X w >= 0}: then Z = sum_j relu(X V[j]) - relu(X U[j]) + 1 b^T.

    With two classes Y is one column, -1 for the first and +1 for the second, and the threshold is
    0; with more, Y is one-hot and the largest output wins. Sparse X is accepted and made dense.
    float32 stays float32.

    Parameters
    ----------
    alpha : float, default=1e-3
        Strength of the penalty. The loss is averaged over examples, so a good value does not
        grow with their number, but it does with the scale of X and y: scale both. At a very small
        fraction of the smallest alpha with no active gate the solver needs many iterations.
        Without a penalty it has no effect.
    activation : {"gated_relu", "relu"}, default="gated_relu"
        "relu" solves for pairs of weights V and U in the cones of their gates' activation
        patterns, so that the network needs no gates to predict.
    loss : {"squared", "log_loss"}, default="squared"
        "log_loss" is the logistic loss for two classes and the multinomial one for more; it
        gives ``predict_proba``.
    penalty : {"neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"}
        R, by default "neuron": the sum over gates and outputs of ||V[j][:, k]||_2. "gate": the
        sum over gates of ||V[j]||_F. "nuclear": of singular values. "feature": the sum over
        features of the norm of all their weights, in V and U. "l1": of absolute values. "ridge":
        1/2 ||V||_F^2 (whatever ``l1_ratio`` says). "none": 0; then the KKT residual, and no
        duality gap, says how near the optimum is. Refused with log loss: it has no minimiser then.
    l1_ratio : float in [0, 1], default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2.
    gates : str or array of shape (d, p) or (d + 1, p), default="gaussian"
        How to sample the gates: "gaussian", "gaussian-bias", "quantile-bias", "sparse", "pairs",
        "pairs-bias", "wedge" or "wedge-bias" (see ``draw_gates``); "generated", to search for
        those that lower the objective (see ``generate_gates``); or the gates themselves, one a
        column, with biases in the last row if there is one row more than there are features.
        "relu" takes gates without biases only, and moves sampled ones clear of the rows of X.
    n_gates : int, default=100
        Number of gates to sample, or to generate at most. Gates with equal or empty patterns on
        the rows of positive weight are dropped. Ignored when ``gates`` is an array.
    solver : str, default="auto"
        "auto", "semismooth_newton", "block_descent", "rfista", "ridge_newton",
        "augmented_lagrangian" or "admm": how to solve the programme; not every solver suits every
        one (see ``choose_solver``).
    class_weight : dict or "balanced", optional
        Weights of the classes, multiplied with the sample weights.
    fit_intercept : bool, default=True
        Whether there is an unpenalised offset b.
    normalize : bool, default=False
        Penalise the weights of columns of X scaled to unit Euclidean norm. This is a different
        problem, not a speed-up; ``coef_`` is in the units of X all the same.
    tol : float, default=1e-4
        Relative tolerance: stop when the duality gap is at most ``tol`` times the objective, or
        for penalty="none" when the KKT residual is at most ``tol``.
    max_iter : int, default=10000
        Most iterations. A stop short of ``tol`` is a ``ConvergenceWarning``.
    warm_start : bool, default=False
        Start at ``coef_`` of the last fit, with its ``gates_``, if the shapes agree and none of
        ``activation``, ``gates``, ``n_gates`` and ``random_state`` has changed.
    random_state : int, RandomState or None, default=None
        Seed of the gates; an int gives those of ``draw_gates`` with that seed.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    coef_ : ndarray of shape (p, d, c), for "relu" (2, p, d, c)
        V, the weights of each gate that was kept; for "relu" V, then U.
    gates_ : ndarray of shape (d, p) or (d + 1, p)
        The gates that were kept.
    intercept_ : ndarray of shape (c,)
        b.
    objective_ : float
        L(Z, Y) + alpha * sum_j R(V[j]), for "relu" with R(V[j]) + R(U[j]).
    duality_gap_ : float
        Absolute: ``objective_`` exceeds the optimum of the convex programme by at most this.
        Infinite for penalty="none".
    kkt_residual_ : float
        How far ``coef_`` is from the first-order conditions (see ``KKTResidual``).
    violation_ : float
        Largest relative violation of the cones by ``coef_``; 0 for gated ReLU.
    n_iter_ : int
        Iterations made.
    n_neurons_ : int
        Hidden units of the network that ``coef_`` stands for (see ``neurons_from_weights``).
    n_features_in_ : int
        Number d of features.
    feature_names_in_ : ndarray of shape (d,)
        Names of the columns, where X had names that are all strings.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022; Varshney and Pilanci 2024, theorem 2.

    Examples
    --------
    >>> import numpy as np
    >>> from cvxdistill import ConvexNNClassifier
    >>> X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    >>> y = np.array(["same", "different", "different", "same"])
    >>> ConvexNNClassifier(random_state=0).fit(X, y).predict(X).tolist()
    ['same', 'different', 'different', 'same']
    """

    _losses: ClassVar[dict[str, Loss | None]] = {"squared": SquaredLoss(), "log_loss": None}

    def __init__(
        self,
        alpha: float = 1e-3,
        *,
        activation: str = "gated_relu",
        loss: str = "squared",
        penalty: str = "neuron",
        l1_ratio: float = 1.0,
        gates: Any = "gaussian",
        n_gates: int = 100,
        solver: str = "auto",
        class_weight: Any = None,
        fit_intercept: bool = True,
        normalize: bool = False,
        tol: float = 1e-4,
        max_iter: int = 10_000,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ):
        super().__init__(
            alpha,
            activation=activation,
            loss=loss,
            penalty=penalty,
            l1_ratio=l1_ratio,
            gates=gates,
            n_gates=n_gates,
            solver=solver,
            fit_intercept=fit_intercept,
            normalize=normalize,
            tol=tol,
            max_iter=max_iter,
            warm_start=warm_start,
            random_state=random_state,
            verbose=verbose,
        )
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ConvexNNClassifier:
        """Fit the network.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,)
            Labels: numbers or strings, at least two different ones.
        sample_weight : array of shape (n,), optional
            Weights of the examples, not negative; only their ratios matter. Those of weight 0
            are left out.

        Returns
        -------
        ConvexNNClassifier
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            If a parameter, X or y is not what it should be; the message names it.
        """
        self._check_parameters()
        with all_or_nothing(self):
            X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS)
            check_classification_targets(y)
            weights = self._weigh_classes(y, check_weights(sample_weight, X))
            X, y, weights = rows_of_positive_weight(dense(X), y, weights)
            self.classes_, labels = np.unique(y, return_inverse=True)
            k = len(self.classes_)
            if k < 2:
                raise ValueError(
                    f"y must hold at least 2 classes of positive weight, got {k} class(es): "
                    f"{self.classes_.tolist()}."
                )
            Y = np.where(labels == 1, 1.0, -1.0)[:, None] if k == 2 else np.eye(k)[labels]
            loss = self._losses[self.loss] or (LogisticLoss() if k == 2 else MultinomialLoss())
            self._fit_targets(X, Y.astype(X.dtype, copy=False), loss, weights)
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        if self.loss == "log_loss" and self.penalty == "none":
            raise ValueError(
                "loss='log_loss' needs a penalty: without one it has no minimiser where the gated "
                "features separate the classes, as they do with enough gates."
            )
        if isinstance(self.class_weight, dict):
            for label, weight in self.class_weight.items():
                if not isinstance(weight, Real) or not 0 <= float(weight) < math.inf:
                    raise ValueError(
                        "class_weight must hold finite numbers >= 0, got "
                        f"{weight!r} for class {label!r}."
                    )
        elif self.class_weight is not None and self.class_weight != "balanced":
            raise ValueError(
                f"class_weight must be a dict, 'balanced' or None, got {self.class_weight!r}."
            )

    def _weigh_classes(self, y: np.ndarray, weights: np.ndarray | None) -> np.ndarray | None:
        """Sample weights times class weights; "balanced" gives each class the same total."""
        if self.class_weight is None:
            return weights
        if self.class_weight == "balanced":
            _, labels = np.unique(y, return_inverse=True)
            totals = np.bincount(labels, weights)
            shares = totals.sum() / np.count_nonzero(totals)
            factors = np.divide(shares, totals, out=np.zeros(len(totals)), where=totals > 0)[labels]
        else:
            factors = compute_sample_weight(self.class_weight, y)
        return factors if weights is None else factors * weights

    @available_if(_has_log_loss)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of the classes; only with loss="log_loss".

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)

        Returns
        -------
        ndarray of shape (n, n_classes)
            1 / (1 + exp(-z)) for the second of two classes, the softmax of z for more.
        """
        Z = self._decision(X)
        if len(self.classes_) == 2:
            return np.hstack([expit(-Z), expit(Z)])
        return softmax(Z, axis=1)

    @available_if(_has_log_loss)
    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Logarithms of ``predict_proba``, exact however small; only with loss="log_loss".

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)

        Returns
        -------
        ndarray of shape (n, n_classes)
        """
        Z = self._decision(X)
        return log_softmax(np.hstack([np.zeros_like(Z), Z]) if Z.shape[1] == 1 else Z, axis=1)

    def decision_function(self, X: Any) -> np.ndarray:
        """Outputs of the network.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)

        Returns
        -------
        ndarray of shape (n,) with two classes, (n, n_classes) with more
            Two classes: positive means ``classes_[1]``.
        """
        Z = self._decision(X)
        return Z[:, 0] if len(self.classes_) == 2 else Z

    def predict(self, X: Any) -> np.ndarray:
        """Predict the labels.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)

        Returns
        -------
        ndarray of shape (n,)
        """
        Z = self._decision(X)
        chosen = (Z[:, 0] > 0).astype(int) if len(self.classes_) == 2 else Z.argmax(axis=1)
        return self.classes_[chosen]
