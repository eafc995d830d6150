"""The convex gated ReLU programme: data, loss and penalty in one object that solvers take.

minimise over V, b   L(Z, Y) + alpha * sum_j R(V[j]),    Z = sum_j diag(D[:, j]) X V[j] + 1 b^T
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxdistill.solvers.gated_operator import GatedOperator, as_weights, empty_weights
from cvxdistill.solvers.losses import Loss, find_loss
from cvxdistill.solvers.penalties import Penalty, find_regularizer
from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks


class GatedReLUProblem:
    """C-GReLU for given data and activation patterns; ``alpha`` is left to the solver.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Inputs, one row an example; float32 or float64. The solution has the same type.
    Y : array of shape (n,) or (n, c)
        Targets.
    D : ndarray of bool, shape (n, p)
        Activation patterns, from ``activation_patterns``.
    penalty : {"neuron", "gate", "ridge"} or Penalty, default="neuron"
        R: the sum of column norms, the Frobenius norm, or 1/2 its square.
    l1_ratio : float, default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2; "ridge" is rho = 0.
    loss : {"squared"} or Loss, default="squared"
        1/(2n) ||Z - Y||_F^2.
    fit_intercept : bool, default=False
        Whether there is an unpenalised b.
    normalize : bool, default=False
        Penalise the weights of the columns of X scaled to unit Euclidean norm. This is a
        *different problem*, not a speed-up; weights are returned in the units of X all the same.

    Raises
    ------
    ValueError, TypeError
        If shapes, types or values do not fit; the message names the argument.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022, equation 3; Varshney and Pilanci 2024, theorem 2.
    """

    def __init__(
        self,
        X: RowSource,
        Y: Any,
        D: np.ndarray,
        *,
        penalty: str | Penalty = "neuron",
        l1_ratio: float = 1.0,
        loss: str | Loss = "squared",
        fit_intercept: bool = False,
        normalize: bool = False,
    ):
        X = check_rows(X)
        self.loss = find_loss(loss)
        self.regularizer = find_regularizer(penalty, l1_ratio)
        self.fit_intercept = bool(fit_intercept)
        self.scale = _column_norms(X) if normalize else None
        self.operator = GatedOperator(X, D, scale=self.scale)
        self.Y = _check_targets(Y, self.operator.n, self.operator.dtype)

    def __repr__(self) -> str:
        A = self.operator
        return (
            f"GatedReLUProblem(n={A.n}, d={A.d}, p={A.p}, c={self.n_outputs}, "
            f"regularizer={self.regularizer}, loss={self.loss}, "
            f"fit_intercept={self.fit_intercept})"
        )

    @property
    def n_outputs(self) -> int:
        """Number c of targets."""
        return self.Y.shape[1]

    @property
    def dtype(self) -> np.dtype:
        """Type of the data and of the weights."""
        return self.operator.dtype

    def zeros(self) -> np.ndarray:
        """Weights V = 0 of shape (p, d, c)."""
        V = empty_weights(self.operator.p, self.operator.d, self.n_outputs, self.dtype)
        V[...] = 0
        return V

    def weights_from_user(self, V: Any) -> np.ndarray:
        """Copy weights in the units of X into the solver's units and memory order."""
        V = as_weights(_check_weights(V, self), self.dtype)
        return V if self.scale is None else V * self.scale[:, None]

    def weights_to_user(self, V: np.ndarray) -> np.ndarray:
        """Weights in the units of X."""
        return V if self.scale is None else V / self.scale[:, None]

    def intercept(self, Z: np.ndarray) -> np.ndarray:
        """Best intercept b (c,) for the predictions Z without one; zero if none is fitted."""
        if self.fit_intercept:
            return self.loss.best_intercept(Z, self.Y)
        return np.zeros(self.n_outputs, dtype=self.dtype)

    def predict(self, V: Any, intercept: Any = 0.0) -> np.ndarray:
        """Z = sum_j diag(D[:, j]) X V[j] + 1 b^T on the problem's own rows, of shape (n, c)."""
        return self.operator.forward(self.weights_from_user(V)) + np.asarray(intercept, self.dtype)

    def objective(self, V: Any, intercept: Any, alpha: float) -> float:
        """L(Z, Y) + alpha * sum_j R(V[j]) at weights in the units of X."""
        penalty = self.regularizer.value(self.weights_from_user(V))
        return self.loss.value(self.predict(V, intercept), self.Y) + alpha * penalty

    def alpha_max(self) -> float:
        """Smallest alpha at which V = 0 is optimal: max_j R°(C_j at V = 0) / rho.

        Raises
        ------
        ValueError
            For a pure ridge, where no finite alpha makes V = 0 optimal.
        """
        if self.regularizer.l1_ratio == 0:
            raise ValueError("alpha_max is infinite for a pure ridge penalty; give alpha yourself.")
        Z = np.zeros_like(self.Y)
        C = self.operator.adjoint(self.loss.residual(Z + self.intercept(Z), self.Y))
        norm = self.regularizer.penalty.dual_norm(C) / self.operator.n
        return norm / self.regularizer.l1_ratio


def residual_and_adjoint(problem: GatedReLUProblem, Z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """R = -n grad L(Z + b) (n, c) and C = A^T R / n (p, d, c), with b the best intercept."""
    R = problem.loss.residual(Z + problem.intercept(Z), problem.Y)
    C = problem.operator.adjoint(R)
    C /= problem.operator.n
    return R, C


def _check_targets(Y: Any, n: int, dtype: np.dtype) -> np.ndarray:
    Y = np.asarray(Y)
    if Y.ndim == 1:
        Y = Y[:, None]
    if Y.ndim != 2 or Y.shape[1] == 0:
        raise ValueError(f"Y must have shape (n,) or (n, c) with c >= 1, got {Y.shape}.")
    if len(Y) != n:
        raise ValueError(f"Y must have as many rows as X, got {len(Y)} and {n}.")
    if Y.dtype.kind not in "fiub":
        raise TypeError(f"Y must hold real numbers, got dtype {Y.dtype}.")
    Y = np.ascontiguousarray(Y, dtype=dtype)
    if not np.isfinite(Y).all():
        raise ValueError("Y contains NaN or infinity.")
    return Y


def _check_weights(V: Any, problem: GatedReLUProblem) -> np.ndarray:
    V = np.asarray(V)
    shape = (problem.operator.p, problem.operator.d, problem.n_outputs)
    if V.shape != shape:
        raise ValueError(f"Weights must have shape (p, d, c) = {shape}, got {V.shape}.")
    if not np.isfinite(V).all():
        raise ValueError("Weights contain NaN or infinity.")
    return V


def _column_norms(X: RowSource) -> np.ndarray:
    """Euclidean norms of the columns of X; 1 for a column of zeros."""
    n, d = X.shape
    squares = np.zeros(d)
    for rows in row_blocks(n, d, X.dtype):
        squares += np.einsum("nd,nd->d", X[rows], X[rows], dtype=np.float64)
    return np.where(squares > 0, np.sqrt(squares), 1.0).astype(X.dtype)
