"""What the estimators share: their settings, the choice of gates and solver, the raw output.

The estimators themselves are in ``cvxdistill.estimators``; all mathematics is in
``cvxdistill.solvers``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from cvxdistill.solvers import (
    GatedOperator,
    GatedReLUProblem,
    ReLUProblem,
    Solution,
    attainable_margin,
    choose_solver,
    draw_gates,
    evaluate_gates,
    generate_gates,
    neurons_from_weights,
    nudge_gates,
    relu_predictions,
)
from cvxdistill.solvers.gate_samplers import GATE_SAMPLERS
from cvxdistill.solvers.gates import check_gates, distinct_patterns
from cvxdistill.solvers.losses import Loss
from cvxdistill.solvers.penalties import find_regularizer
from cvxdistill.solvers.solver_choice import SOLVERS

ACTIVATIONS = ("gated_relu", "relu")
# gates="generated", and what its search begins with.
GENERATED, INITIAL_GATES = "generated", 10
FLOATS = (np.float64, np.float32)


class ConvexNN(BaseEstimator):
    """What the regressor and the classifier share: settings, gates, fit and raw output."""

    coef_: np.ndarray
    gates_: np.ndarray
    _losses: ClassVar[dict[str, Any]]

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
        fit_intercept: bool = True,
        normalize: bool = False,
        tol: float = 1e-4,
        max_iter: int = 10_000,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: int = 0,
    ):
        self.alpha = alpha
        self.activation = activation
        self.loss = loss
        self.penalty = penalty
        self.l1_ratio = l1_ratio
        self.gates = gates
        self.n_gates = n_gates
        self.solver = solver
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

    def _fit_targets(
        self, X: np.ndarray, Y: np.ndarray, loss: Loss, sample_weight: np.ndarray | None
    ) -> None:
        """Fit Y (n, c) with positive sample weights or None, and set the fitted attributes."""
        offset = np.zeros(Y.shape[1])
        if self.fit_intercept and self.loss != "log_loss":
            # The intercept takes up any offset of Y, and float32 keeps more digits without one.
            offset = np.average(Y.astype(np.float64), axis=0, weights=sample_weight)
        options: dict[str, Any] = {
            "penalty": self.penalty,
            "l1_ratio": self.l1_ratio,
            "loss": loss,
            "fit_intercept": self.fit_intercept,
            "normalize": self.normalize,
            "sample_weight": sample_weight,
        }
        request = self._gates_asked_for()
        warm = self._fitted_weights((X.shape[1], Y.shape[1]), request)
        if warm is None:
            G = self._candidate_gates(X, Y, offset, options)
        else:
            G = self.gates_.astype(X.dtype, copy=False)
        D = evaluate_gates(X, G)
        keep = distinct_patterns(D)
        if len(keep) == 0:
            raise ValueError(f"None of the {G.shape[1]} gates is on for any of the {len(X)} rows.")
        problem: GatedReLUProblem | ReLUProblem
        if self.activation == "relu":
            problem = ReLUProblem(X, Y - offset, D[:, keep], G=G[:, keep], **options)
        else:
            problem = GatedReLUProblem(X, Y - offset, D[:, keep], **options)
        start = None if warm is None else warm[..., keep, :, :]
        solver = choose_solver(
            problem,
            self.solver,
            tol=float(self.tol),
            max_iter=int(self.max_iter),
            verbose=int(self.verbose),
        )
        solution = solver.solve(problem, self.alpha, warm_start=start)
        if not solution.converged:
            self._warn(solution)
        self.gates_ = G[:, keep]
        self.coef_ = solution.V
        self.intercept_ = (solution.intercept + offset).astype(X.dtype)
        self.objective_ = solution.objective
        self.duality_gap_ = solution.duality_gap
        self.kkt_residual_ = solution.kkt_residual
        self.violation_ = solution.violation
        self.n_iter_ = solution.n_iter
        self.n_neurons_ = len(neurons_from_weights(self.coef_, self.penalty))
        self._gates_fitted_for = request

    def _warn(self, solution: Solution) -> None:
        certified = math.isfinite(solution.duality_gap)
        gap = f" (absolute gap {solution.duality_gap:.3g})" if certified else ""
        warnings.warn(
            f"{type(self).__name__} stopped short of tol={self.tol:g}: {solution.message}{gap}. "
            "Scale X and y, or raise alpha, tol or max_iter.",
            ConvergenceWarning,
            stacklevel=4,
        )

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
        for name in ("activation", "loss", "penalty", "solver"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"{name} must be a string, got {value!r}.")
        for name, known in (
            ("activation", ACTIVATIONS),
            ("loss", tuple(self._losses)),
            ("solver", ("auto", *SOLVERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {list(known)}, got {getattr(self, name)!r}."
                )
        if isinstance(self.gates, str) and self.gates != GENERATED:
            if self.gates not in GATE_SAMPLERS:
                raise ValueError(
                    f"gates must be one of {[*GATE_SAMPLERS, GENERATED]} or an array, got "
                    f"{self.gates!r}."
                )
            if self.activation == "relu" and self.gates.endswith("-bias"):
                raise ValueError(
                    f"gates={self.gates!r} have biases, which the weights of a ReLU network "
                    "cannot follow; add a constant column to X and use gates without bias."
                )
        find_regularizer(self.penalty, self.l1_ratio)
        if not (self.tol >= 0 and math.isfinite(self.tol)):
            raise ValueError(f"tol must be a finite number >= 0, got {self.tol!r}.")

    def _gates_asked_for(self) -> tuple:
        """The settings that decide the gates, to see whether a warm start may keep them."""
        if isinstance(self.gates, str):
            return self.activation, self.gates, self.n_gates, self.random_state
        return self.activation, np.array(self.gates, copy=True)

    def _fitted_weights(self, shape: tuple[int, int], request: tuple) -> np.ndarray | None:
        """Return ``coef_`` of the last fit if a warm start may begin there."""
        if not (self.warm_start and hasattr(self, "coef_")):
            return None
        if self.coef_.shape[-2:] != shape:
            return None
        same = len(request) == len(self._gates_fitted_for) and all(
            np.array_equal(a, b) for a, b in zip(request, self._gates_fitted_for, strict=True)
        )
        return self.coef_ if same else None

    def _candidate_gates(
        self, X: np.ndarray, Y: np.ndarray, offset: np.ndarray, options: dict[str, Any]
    ) -> np.ndarray:
        """Gates as given, sampled or generated, before their patterns are compared.

        Those of a ReLU network keep clear of the rows of X, so that their cones have an interior.
        """
        relu = self.activation == "relu"
        if not isinstance(self.gates, str):
            G = check_gates(self.gates, X.shape[1], X.dtype)
            if relu and len(G) > X.shape[1]:
                raise ValueError(
                    "gates with a row of biases do not suit activation='relu': the weights of a "
                    "ReLU network cannot follow them; add a constant column to X instead."
                )
            return G
        seed = _seed(self.random_state)
        if self.gates == GENERATED:
            return generate_gates(
                X,
                Y - offset,
                alpha=self.alpha,
                n_gates=int(self.n_gates),
                n_initial=min(INITIAL_GATES, int(self.n_gates)),
                activation=self.activation,
                random_state=seed,
                verbose=int(self.verbose),
                **options,
            ).G
        G = draw_gates(self.gates, X, Y, int(self.n_gates), random_state=seed)
        if not relu:
            return G
        return nudge_gates(X, G, margin=attainable_margin(*X.shape), random_state=seed)

    def _decision(self, X: Any) -> np.ndarray:
        """Output of the network, of shape (n, c): without gates for a ReLU network."""
        check_is_fitted(self)
        X = dense(validate_data(self, X, reset=False, accept_sparse="csr", dtype=FLOATS))
        V = self.coef_.astype(X.dtype, copy=False)
        intercept = self.intercept_.astype(X.dtype, copy=False)
        if V.ndim == 4:
            return relu_predictions(X, V) + intercept
        active = np.flatnonzero(V.any(axis=(1, 2)))
        if len(active) == 0:
            return np.tile(intercept, (len(X), 1))
        D = evaluate_gates(X, self.gates_[:, active])
        return GatedOperator(X, D).forward(V[active]) + intercept


def dense(X: Any) -> np.ndarray:
    """Return X, made dense if it is sparse."""
    return X if isinstance(X, np.ndarray) else X.toarray()


def check_weights(sample_weight: Any, X: np.ndarray) -> np.ndarray | None:
    """Sample weights in float64, whatever X is; None stays None."""
    if sample_weight is None:
        return None
    weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
    if (weights < 0).any():
        raise ValueError(f"sample_weight must not be negative, got {weights.min():g}.")
    if not weights.any():
        raise ValueError("sample_weight must be positive for at least one example, all are 0.")
    return weights


def rows_of_positive_weight(
    X: np.ndarray, y: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Leave out what has no weight: it has no say in the activation patterns and classes either."""
    if weights is None or weights.all():
        return X, y, weights
    return X[weights > 0], y[weights > 0], weights[weights > 0]


@contextmanager
def all_or_nothing(estimator: BaseEstimator) -> Iterator[None]:
    """Put back what the estimator held before if the fit is refused or interrupted."""
    before = vars(estimator).copy()
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


def _seed(random_state: Any) -> int:
    """Seed of the gates; like scikit-learn, None draws it from NumPy's global generator."""
    if isinstance(random_state, Integral) and not isinstance(random_state, bool):
        if random_state < 0:
            raise ValueError(f"random_state must not be negative, got {random_state}.")
        return int(random_state)
    return int(check_random_state(random_state).randint(np.iinfo(np.int32).max))
