"""Scikit-learn estimators: convex gated ReLU networks, fitted to a certified duality gap."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from cvxdistill.estimator_base import FLOATS, ConvexNN, dense


class ConvexNNRegressor(RegressorMixin, MultiOutputMixin, ConvexNN):
    """Regression with a convex gated ReLU network, solved to certified optimality.

    Minimises over V and b

        1/(2n) ||Z - Y||_F^2 + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere. Solved by R-FISTA; a
    pure ridge with at most 2000 gated features p * d directly, by ``RidgeNewton``. Sparse X is
    accepted and made dense. float32 stays float32.

    Parameters
    ----------
    alpha : float, default=1e-3
        Strength of the penalty. The loss is averaged over examples, so a good value does not
        grow with their number, but it does with the scale of X and y: scale both. At a very small
        fraction of the smallest alpha with no active gate the solver needs many iterations.
    l1_ratio : float in [0, 1], default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2.
    n_gates : int, default=100
        Number of gates to sample. Gates with equal or empty patterns on the training data are
        dropped. Ignored when ``gates`` is an array.
    penalty : {"neuron", "gate", "ridge"}, default="neuron"
        R: "neuron" is the sum over gates and outputs of ||V[j][:, k]||_2, "gate" the sum over
        gates of ||V[j]||_F, "ridge" 1/2 ||V||_F^2 (whatever ``l1_ratio`` says).
    gates : {"gaussian", "gaussian-bias"} or array of shape (d, p) or (d + 1, p)
        How to sample the gates, by default "gaussian"; or the gates themselves, one a column,
        with biases in the last row if there is one row more than there are features.
    fit_intercept : bool, default=True
        Whether there is an unpenalised offset b.
    normalize : bool, default=False
        Penalise the weights of columns of X scaled to unit Euclidean norm. This is a different
        problem, not a speed-up; ``coef_`` is in the units of X all the same.
    tol : float, default=1e-4
        Relative tolerance: stop when the duality gap is at most ``tol`` times the objective.
    max_iter : int, default=10000
        Most iterations. A stop short of ``tol`` is a ``ConvergenceWarning``.
    warm_start : bool, default=False
        Start at ``coef_`` of the last fit, with its ``gates_``, if the shapes agree and none of
        ``gates``, ``n_gates`` and ``random_state`` has changed.
    random_state : int, RandomState or None, default=None
        Seed of the gates; an int gives those of ``sample_gates(..., random_state=seed)``.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    coef_ : ndarray of shape (p, d, c)
        V, the weights of each gate that was kept.
    gates_ : ndarray of shape (d, p) or (d + 1, p)
        The gates that were kept.
    intercept_ : ndarray of shape (c,)
        b.
    objective_ : float
        L(Z, Y) + alpha * sum_j R(V[j]).
    duality_gap_ : float
        Absolute: ``objective_`` exceeds the optimum of the convex programme by at most this.
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

    def fit(self, X: Any, y: Any) -> ConvexNNRegressor:
        """Fit the network.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,) or (n, c)
            Targets.

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
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=FLOATS, multi_output=True, y_numeric=True
        )
        self._fit_targets(dense(X), y[:, None] if y.ndim == 1 else y)
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


class ConvexNNClassifier(ClassifierMixin, ConvexNN):
    """Classification with a convex gated ReLU network, solved to certified optimality.

    Minimises over V and b

        1/(2n) ||Z - Y||_F^2 + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere. With two classes Y is
    one column, -1 for the first and +1 for the second, and the threshold is 0; with more, Y is
    one-hot and the largest output wins. Solved by R-FISTA; a pure ridge with at most
    2000 gated features p * d directly, by ``RidgeNewton``. Sparse X is accepted
    and made dense. float32 stays float32.

    Parameters
    ----------
    alpha : float, default=1e-3
        Strength of the penalty. The loss is averaged over examples, so a good value does not
        grow with their number, but it does with the scale of X and y: scale both. At a very small
        fraction of the smallest alpha with no active gate the solver needs many iterations.
    l1_ratio : float in [0, 1], default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2.
    n_gates : int, default=100
        Number of gates to sample. Gates with equal or empty patterns on the training data are
        dropped. Ignored when ``gates`` is an array.
    penalty : {"neuron", "gate", "ridge"}, default="neuron"
        R: "neuron" is the sum over gates and outputs of ||V[j][:, k]||_2, "gate" the sum over
        gates of ||V[j]||_F, "ridge" 1/2 ||V||_F^2 (whatever ``l1_ratio`` says).
    gates : {"gaussian", "gaussian-bias"} or array of shape (d, p) or (d + 1, p)
        How to sample the gates, by default "gaussian"; or the gates themselves, one a column,
        with biases in the last row if there is one row more than there are features.
    fit_intercept : bool, default=True
        Whether there is an unpenalised offset b.
    normalize : bool, default=False
        Penalise the weights of columns of X scaled to unit Euclidean norm. This is a different
        problem, not a speed-up; ``coef_`` is in the units of X all the same.
    tol : float, default=1e-4
        Relative tolerance: stop when the duality gap is at most ``tol`` times the objective.
    max_iter : int, default=10000
        Most iterations. A stop short of ``tol`` is a ``ConvergenceWarning``.
    warm_start : bool, default=False
        Start at ``coef_`` of the last fit, with its ``gates_``, if the shapes agree and none of
        ``gates``, ``n_gates`` and ``random_state`` has changed.
    random_state : int, RandomState or None, default=None
        Seed of the gates; an int gives those of ``sample_gates(..., random_state=seed)``.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    coef_ : ndarray of shape (p, d, c)
        V, the weights of each gate that was kept.
    gates_ : ndarray of shape (d, p) or (d + 1, p)
        The gates that were kept.
    intercept_ : ndarray of shape (c,)
        b.
    objective_ : float
        L(Z, Y) + alpha * sum_j R(V[j]).
    duality_gap_ : float
        Absolute: ``objective_`` exceeds the optimum of the convex programme by at most this.
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

    def fit(self, X: Any, y: Any) -> ConvexNNClassifier:
        """Fit the network.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,)
            Labels: numbers or strings, at least two different ones.

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
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least 2 classes, got 1 class: {self.classes_[0]!r}.")
        if len(self.classes_) == 2:
            Y = np.where(labels == 1, 1.0, -1.0)[:, None]
        else:
            Y = np.eye(len(self.classes_))[labels]
        self._fit_targets(dense(X), Y.astype(X.dtype, copy=False))
        return self

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
