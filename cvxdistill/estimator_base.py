"""What the estimators share: their settings, the choice of gates and solver, the raw output.

The estimators themselves are in ``cvxdistill.estimators``; all mathematics is in
``cvxdistill.solvers``.
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
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


class ConvexNN(BaseEstimator):
    """What the regressor and the classifier share: settings, gates, fit and raw output."""

    coef_: np.ndarray
    gates_: np.ndarray

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
        c = Y.shape[1]
        # The intercept takes up any offset of Y, and float32 keeps more digits without one.
        offset = np.mean(Y, axis=0, dtype=np.float64) if self.fit_intercept else np.zeros(c)
        request = self._gates_asked_for()
        warm = self._fitted_weights(X.shape[1], c, request)
        G = self._candidate_gates(X) if warm is None else self.gates_
        D = evaluate_gates(X, G)
        keep = distinct_patterns(D)
        if len(keep) == 0:
            raise ValueError(f"None of the {G.shape[1]} gates is on for any of the {len(X)} rows.")
        problem = GatedReLUProblem(
            X,
            Y - offset,
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
                f"(absolute gap {solution.duality_gap:.3g}). Scale X and y, or raise alpha, "
                "tol or max_iter.",
                ConvergenceWarning,
                stacklevel=3,
            )
        self.gates_ = G[:, keep]
        self.coef_ = solution.V
        self.intercept_ = (solution.intercept + offset).astype(X.dtype)
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
        RFISTA(tol=float(self.tol))

    def _gates_asked_for(self) -> tuple:
        """The settings that decide the gates, to see whether a warm start may keep them."""
        if isinstance(self.gates, str):
            return self.gates, self.n_gates, self.random_state
        return (np.array(self.gates, copy=True),)

    def _fitted_weights(self, d: int, c: int, request: tuple) -> np.ndarray | None:
        """Return ``coef_`` of the last fit if a warm start may begin there."""
        if not (self.warm_start and hasattr(self, "coef_")):
            return None
        if self.coef_.shape[1:] != (d, c):
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
        tol, max_iter, verbose = float(self.tol), int(self.max_iter), int(self.verbose)
        if problem.regularizer.l1_ratio == 0 and A.p * A.d <= MOST_DIRECT_FEATURES:
            # Exact in one step; the others only refine what float32 loses.
            return RidgeNewton(tol=tol, max_iter=min(max_iter, 10), verbose=verbose)
        return RFISTA(tol=tol, max_iter=max_iter, verbose=verbose)

    def _decision(self, X: Any) -> np.ndarray:
        """Z = sum_j diag(D[:, j]) X coef_[j] + 1 intercept_^T, of shape (n, c)."""
        check_is_fitted(self)
        X = dense(validate_data(self, X, reset=False, accept_sparse="csr", dtype=FLOATS))
        active = np.flatnonzero(self.coef_.any(axis=(1, 2)))
        if len(active) == 0:
            return np.tile(self.intercept_, (len(X), 1)).astype(X.dtype, copy=False)
        D = evaluate_gates(X, self.gates_[:, active])
        V = self.coef_[active].astype(X.dtype, copy=False)
        return GatedOperator(X, D).forward(V) + self.intercept_.astype(X.dtype, copy=False)


def dense(X: Any) -> np.ndarray:
    """Return X, made dense if it is sparse."""
    return X if isinstance(X, np.ndarray) else X.toarray()


def _seed(random_state: Any) -> int:
    """Seed of the gates; like scikit-learn, None draws it from NumPy's global generator."""
    if isinstance(random_state, Integral) and not isinstance(random_state, bool):
        if random_state < 0:
            raise ValueError(f"random_state must not be negative, got {random_state}.")
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
