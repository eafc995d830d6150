"""Scikit-learn estimators: convex gated ReLU networks, fitted to a certified duality gap.

They sample or take the gates, pose the convex programme, hand it to a solver and keep what a user
of scikit-learn expects to find. All mathematics lives in ``cvxdistill.solvers``.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from cvxdistill.solvers import (
    RFISTA,
    GatedOperator,
    GatedReLUProblem,
    RidgeNewton,
    evaluate_gates,
    neurons_from_weights,
    sample_gates,
)
from cvxdistill.solvers.gates import check_gates, distinct_patterns
from cvxdistill.solvers.penalties import find_regularizer
from cvxdistill.solvers.solver import Solver

SAMPLERS = ("gaussian", "gaussian-bias")
FLOATS = (np.float64, np.float32)

# Up to this many gated features p * d a pure ridge is solved faster directly than iteratively.
MOST_DIRECT_FEATURES = 2000


class _ConvexNN(BaseEstimator):
    """What the regressor and the classifier share: gates, the fit of a target matrix, raw output."""

    def __init__(
        self,
        alpha: float = 1e-3,
        *,
        l1_ratio: float = 1.0,
        n_gates: int = 100,
        penalty: str = "neuron",
        gates: Any = "gaussian",
        fit_intercept: bool = True,
        normalize: bool = False,
        tol: float = 1e-4,
        max_iter: int = 10_000,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.n_gates = n_gates
        self.penalty = penalty
        self.gates = gates
        self.fit_intercept = fit_intercept
        self.normalize = normalize
        self.tol = tol
        self.max_iter = max_iter
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _fit_targets(self, X: np.ndarray, Y: np.ndarray) -> None:
        """Fit Y (n, c) and set the fitted attributes."""
        request = self._gates_asked_for()
        warm = self._fitted_weights(X, Y, request)
        G = self._candidate_gates(X) if warm is None else self.gates_
        D = evaluate_gates(X, G)
        keep = distinct_patterns(D)
        if len(keep) == 0:
            raise ValueError(f"None of the {G.shape[1]} gates is on for any of the {len(X)} rows.")
        problem = GatedReLUProblem(
            X,
            Y,
            D[:, keep],
            penalty=self.penalty,
            l1_ratio=self.l1_ratio,
            fit_intercept=self.fit_intercept,
            normalize=self.normalize,
        )
        start = None if warm is None else warm[keep]
        solver = self._choose_solver(problem)
        solution = solver.solve(problem, self.alpha, warm_start=start)
        if not solution.converged:
            warnings.warn(
                f"{type(self).__name__} stopped short of tol={self.tol:g}: {solution.message} "
                f"(absolute gap {solution.duality_gap:.3g}). Raise max_iter or tol, or scale the "
                "columns of X.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.gates_ = G[:, keep]
        self.coef_ = solution.V
        self.intercept_ = solution.intercept
        self.objective_ = solution.objective
        self.duality_gap_ = solution.duality_gap
        self.n_iter_ = solution.n_iter
        self.n_neurons_ = len(neurons_from_weights(self.coef_, self.penalty))
        self._gates_fitted_for = request

    def _check_parameters(self) -> None:
        """Refuse impossible settings before any work."""
        for name in ("alpha", "l1_ratio", "tol"):
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, got {value!r}.")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}.")
        for name in ("n_gates", "max_iter"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}.")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}.")
        for name in ("fit_intercept", "normalize", "warm_start"):
            value = getattr(self, name)
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {value!r}.")
        if not isinstance(self.verbose, (Integral, np.bool_)) or self.verbose < 0:
            raise ValueError(f"verbose must be an integer >= 0, got {self.verbose!r}.")
        if not isinstance(self.penalty, str):
            raise TypeError(f"penalty must be a string, got {self.penalty!r}.")
        if isinstance(self.gates, str) and self.gates not in SAMPLERS:
            raise ValueError(
                f"gates must be one of {list(SAMPLERS)} or an array, got {self.gates!r}."
            )
        find_regularizer(self.penalty, self.l1_ratio)
        RFISTA(tol=self.tol)

    def _gates_asked_for(self) -> tuple:
        """The settings that decide the gates, to see whether a warm start may keep them."""
        if isinstance(self.gates, str):
            return self.gates, self.n_gates, self.random_state
        return (np.array(self.gates, copy=True),)

    def _fitted_weights(self, X: np.ndarray, Y: np.ndarray, request: tuple) -> np.ndarray | None:
        """Return ``coef_`` of the last fit if a warm start may begin there."""
        if not (self.warm_start and hasattr(self, "coef_")):
            return None
        if self.coef_.shape[1:] != (X.shape[1], Y.shape[1]):
            return None
        same = len(request) == len(self._gates_fitted_for) and all(
            np.array_equal(a, b) for a, b in zip(request, self._gates_fitted_for, strict=True)
        )
        return self.coef_ if same else None

    def _candidate_gates(self, X: np.ndarray) -> np.ndarray:
        """Gates as given or sampled, before their patterns are compared."""
        d = X.shape[1]
        if not isinstance(self.gates, str):
            return check_gates(self.gates, d, X.dtype)
        return sample_gates(
            d,
            int(self.n_gates),
            bias=self.gates == "gaussian-bias",
            random_state=_seed(self.random_state),
            dtype=X.dtype,
        )

    def _choose_solver(self, problem: GatedReLUProblem) -> Solver:
        """Newton for a small pure ridge, R-FISTA otherwise."""
        A = problem.operator
        max_iter, verbose = int(self.max_iter), int(self.verbose)
        if problem.regularizer.l1_ratio == 0 and A.p * A.d <= MOST_DIRECT_FEATURES:
            # Exact in one step; the others only refine what float32 loses.
            return RidgeNewton(tol=self.tol, max_iter=min(max_iter, 10), verbose=verbose)
        return RFISTA(tol=self.tol, max_iter=max_iter, verbose=verbose)

    def _decision(self, X: Any) -> np.ndarray:
        """Z = sum_j diag(D[:, j]) X coef_[j] + 1 intercept_^T, of shape (n, c)."""
        check_is_fitted(self)
        X = _dense(validate_data(self, X, reset=False, accept_sparse="csr", dtype=FLOATS))
        active = np.flatnonzero(self.coef_.any(axis=(1, 2)))
        if len(active) == 0:
            return np.tile(self.intercept_, (len(X), 1)).astype(X.dtype, copy=False)
        D = evaluate_gates(X, self.gates_[:, active])
        V = self.coef_[active].astype(X.dtype, copy=False)
        return GatedOperator(X, D).forward(V) + self.intercept_.astype(X.dtype, copy=False)


_PARAMETERS = """alpha : float, default=1e-3
        Strength of the penalty. The loss is averaged over examples, so a good value does not
        grow with their number.
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
"""

_ATTRIBUTES = """coef_ : ndarray of shape (p, d, c)
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
        Names of the columns, where X had names that are all strings."""


class ConvexNNRegressor(RegressorMixin, MultiOutputMixin, _ConvexNN):
    __doc__ = f"""Regression with a convex gated ReLU network, solved to certified optimality.

    Minimises over V and b

        1/(2n) ||Z - Y||_F^2 + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere. Solved by R-FISTA; a
    pure ridge with at most {MOST_DIRECT_FEATURES} gated features p * d directly, by
    ``RidgeNewton``. Sparse X is accepted and made dense. float32 stays float32.

    Parameters
    ----------
    {_PARAMETERS}
    Attributes
    ----------
    {_ATTRIBUTES}

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
        self._fit_targets(_dense(X), y[:, None] if y.ndim == 1 else y)
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


class ConvexNNClassifier(ClassifierMixin, _ConvexNN):
    __doc__ = f"""Classification with a convex gated ReLU network, solved to certified optimality.

    Minimises over V and b

        1/(2n) ||Z - Y||_F^2 + alpha * sum_j R(V[j]),   Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

    with D[i, j] = 1 where X[i] @ gates_[:, j] (+ bias) >= 0 and 0 elsewhere. With two classes Y is
    one column, -1 for the first and +1 for the second, and the threshold is 0; with more, Y is
    one-hot and the largest output wins. Solved by R-FISTA; a pure ridge with at most
    {MOST_DIRECT_FEATURES} gated features p * d directly, by ``RidgeNewton``. Sparse X is accepted
    and made dense. float32 stays float32.

    Parameters
    ----------
    {_PARAMETERS}
    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted.
    {_ATTRIBUTES}

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
            raise ValueError(f"y must hold at least 2 classes, got only {self.classes_.tolist()}.")
        if len(self.classes_) == 2:
            Y = np.where(labels == 1, 1.0, -1.0)[:, None]
        else:
            Y = np.eye(len(self.classes_))[labels]
        self._fit_targets(_dense(X), Y.astype(X.dtype, copy=False))
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


def _dense(X: Any) -> np.ndarray:
    return X.toarray() if sparse.issparse(X) else X


def _seed(random_state: Any) -> int:
    """Seed of the gates; like scikit-learn, None draws it from NumPy's global generator."""
    if isinstance(random_state, Integral) and not isinstance(random_state, bool):
        if random_state < 0:
            raise ValueError(f"random_state must not be negative, got {random_state}.")
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
