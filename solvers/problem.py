"""The convex programmes: data, loss and penalty in one object that solvers take.

minimise over V, b   L(Z, Y) + alpha * sum_j R(V[j]),    Z = sum_j diag(D[:, j]) X V[j] + 1 b^T

``ConvexProblem`` is what the gated ReLU programme, here, shares with that of ReLU networks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.solvers.average_loss import AverageLoss
from cvxdistill.solvers.feature_columns import GatedColumns
from cvxdistill.solvers.gated_operator import GatedOperator, as_weights, empty_weights
from cvxdistill.solvers.losses import LogisticLoss, Loss, MultinomialLoss, find_loss
from cvxdistill.solvers.penalties import Penalty, find_regularizer
from cvxdistill.solvers.relu_operator import ReLUOperator
from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks

if TYPE_CHECKING:
    from cvxdistill.solvers.triangular_form import TriangularProblem


class ConvexProblem(ABC):
    """L(Z, Y) + alpha * Omega(W) with Z = A W + 1 b^T; ``alpha`` is left to the solver.

    Solvers work on weights W of shape (blocks, d, c) in their own units and see the smooth part
    through ``forward``, ``residual``, ``adjoint`` and ``bregman``, in which the best intercept
    is already minimised over, and the rest through ``regularizer``.
    """

    operator: GatedOperator | ReLUOperator

    def __init__(
        self,
        X: RowSource,
        Y: Any,
        *,
        penalty: str | Penalty,
        l1_ratio: float,
        loss: str | Loss,
        fit_intercept: bool,
        normalize: bool,
        sample_weight: Any,
    ):
        self.regularizer = find_regularizer(penalty, l1_ratio)
        example_loss = find_loss(loss)
        if not self.regularizer.bounds_the_dual and isinstance(
            example_loss, (LogisticLoss, MultinomialLoss)
        ):
            raise ValueError(
                "Log loss without a penalty has no minimiser where the gated features separate the "
                "classes, as they do with enough gates; choose a penalty."
            )
        self.fit_intercept = bool(fit_intercept)
        self.scale = _column_norms(X) if normalize else None
        self.Y = _check_targets(Y, X.shape[0], X.dtype)
        self.loss = AverageLoss(example_loss, self.Y, sample_weight, self.fit_intercept)

    def __repr__(self) -> str:
        A = self.operator
        return (
            f"{type(self).__name__}(n={A.n}, d={A.d}, p={A.p}, c={self.n_outputs}, "
            f"regularizer={self.regularizer}, loss={self.loss.loss}, "
            f"fit_intercept={self.fit_intercept})"
        )

    @property
    def n_outputs(self) -> int:
        """Number c of targets."""
        return self.Y.shape[1]

    @property
    def parts(self) -> list[slice]:
        """Outputs whose programmes are of their own: each one, or all where something couples them.

        The multinomial loss does, and penalties that are no sums over outputs.
        """
        if self.regularizer.by_output and not self.loss.is_coupled:
            return [slice(k, k + 1) for k in range(self.n_outputs)]
        return [slice(0, self.n_outputs)]

    @property
    def dtype(self) -> np.dtype:
        """Type of the data and of the weights."""
        return self.operator.dtype

    @property
    @abstractmethod
    def weights_shape(self) -> tuple[int, ...]:
        """Shape of the weights that users see."""

    def zeros(self) -> np.ndarray:
        """Weights W = 0 of shape (blocks, d, c)."""
        A = self.operator
        W = empty_weights(A.n_blocks, A.d, self.n_outputs, self.dtype)
        W[...] = 0
        return W

    def weights_from_user(self, V: Any) -> np.ndarray:
        """Copy weights in the units of X into the solver's units, shape and memory order."""
        V = _check_weights(V, self.weights_shape)
        V = V.reshape(self.operator.n_blocks, *V.shape[-2:])
        V = as_weights(V, self.dtype)
        return V if self.scale is None else V * self.scale[:, None]

    def weights_to_user(self, W: np.ndarray) -> np.ndarray:
        """Weights in the units of X and the shape that users see."""
        W = W if self.scale is None else W / self.scale[:, None]
        return W.reshape(self.weights_shape)

    def forward(self, W: np.ndarray) -> np.ndarray:
        """Predictions A W of shape (n, c), without intercept."""
        return self.operator.forward(W)

    def residual(self, Z: np.ndarray) -> np.ndarray:
        """-n grad L(Z + 1 b^T) with b the best intercept, of shape (n, c)."""
        return self.loss.residual(self._with_intercept(Z))

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """C = A^T R / n, of shape (blocks, d, c)."""
        C = self.operator.adjoint(R)
        C /= self.operator.n
        return C

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray) -> float:
        """Bregman distance of min over b of L(Z + 1 b^T) from Z to Z_new."""
        return self.loss.bregman(self._with_intercept(Z_new), self._with_intercept(Z))

    def intercept(self, Z: np.ndarray) -> np.ndarray:
        """Best intercept b (c,) for the predictions Z without one; zero if none is fitted."""
        if self.fit_intercept:
            return self.loss.best_intercept(Z)
        return np.zeros(self.n_outputs, dtype=self.dtype)

    def _with_intercept(self, Z: np.ndarray) -> np.ndarray:
        return Z + self.intercept(Z) if self.fit_intercept else Z

    def predict(self, V: Any, intercept: Any = 0.0) -> np.ndarray:
        """Predictions of weights in the units of X on the problem's own rows, of shape (n, c)."""
        return self.forward(self.weights_from_user(V)) + np.asarray(intercept, self.dtype)

    def objective(self, V: Any, intercept: Any, alpha: float) -> float:
        """L(Z, Y) + alpha * Omega(V) at weights in the units of X."""
        penalty = self.regularizer.value(self.weights_from_user(V))
        return self.loss.value(self.predict(V, intercept)) + alpha * penalty

    def feasible(self, W: np.ndarray) -> np.ndarray:
        """Weights nearest to W that meet the programme's constraints: W itself without any."""
        return W

    def with_multipliers(
        self, C: np.ndarray, M: np.ndarray | None = None, alpha: float = 0.0
    ) -> np.ndarray:
        """C = A^T R / n with the share of the constraints' multipliers: C itself without any."""
        return C

    def violation(self, W: np.ndarray) -> float:
        """Largest violation of the programme's constraints: 0 without any."""
        return 0.0

    def alpha_max(self) -> float:
        """Alpha at and above which V = 0 is optimal: max_j R°(C_j at V = 0) / rho.

        For ReLU networks that of the gated programme, which has the same optimum of 0 there.

        Raises
        ------
        ValueError
            For a pure ridge or no penalty, where no finite alpha makes V = 0 optimal.
        """
        if self.regularizer.l1_ratio == 0 or not self.regularizer.bounds_the_dual:
            raise ValueError(
                "alpha_max is infinite for a pure ridge and without a penalty; give alpha yourself."
            )
        C = self.adjoint(self.residual(np.zeros_like(self.Y)))
        return self.regularizer.penalty.dual_norm(C) / self.regularizer.l1_ratio


class GatedReLUProblem(ConvexProblem):
    """C-GReLU for given data and activation patterns.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Inputs, one row an example; float32 or float64. The solution has the same type.
    Y : array of shape (n,) or (n, c)
        Targets: any numbers for "squared" and "huber", one column of -1 and +1 for "logistic",
        one-hot rows for "multinomial".
    D : ndarray of bool, shape (n, p)
        Activation patterns, from ``activation_patterns``.
    penalty : {"neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"} or Penalty
        R, by default "neuron", the sum of column norms; or the sum of Frobenius norms of gates, of
        singular values, of the Frobenius norms of features across gates, of absolute values;
        1/2 the sum of squares; nothing.
    l1_ratio : float, default=1.0
        rho in rho R(V) + (1 - rho)/2 ||V||_F^2; "ridge" is rho = 0.
    loss : {"squared", "huber", "logistic", "multinomial"} or Loss, default="squared"
    fit_intercept : bool, default=False
        Whether there is an unpenalised b.
    normalize : bool, default=False
        Penalise the weights of the columns of X scaled to unit Euclidean norm. This is a
        *different problem*, not a speed-up; weights are returned in the units of X all the same.
    sample_weight : array of shape (n,), optional
        Positive weights w; the loss is sum_i w_i l_i / sum_i w_i.

    Raises
    ------
    ValueError, TypeError
        If shapes, types or values do not fit, or log loss has no penalty (it has no minimiser on
        separable data); the message names the argument.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022, equation 3; Varshney and Pilanci 2024, theorem 2.
    """

    operator: GatedOperator

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
        sample_weight: Any = None,
    ):
        X = check_rows(X)
        super().__init__(
            X,
            Y,
            penalty=penalty,
            l1_ratio=l1_ratio,
            loss=loss,
            fit_intercept=fit_intercept,
            normalize=normalize,
            sample_weight=sample_weight,
        )
        self.operator = GatedOperator(X, D, scale=self.scale)

    @property
    def weights_shape(self) -> tuple[int, int, int]:
        """(p, d, c)."""
        return self.operator.p, self.operator.d, self.n_outputs

    @cached_property
    def in_single(self) -> GatedReLUProblem:
        """The programme in float32, with a copy of X."""
        A, single = self.operator, copy.copy(self)
        single.Y = self.Y.astype(np.float32)
        single.scale = None if self.scale is None else self.scale.astype(np.float32)
        single.loss = AverageLoss(
            self.loss.loss, single.Y, self.loss.weights, fit_intercept=self.fit_intercept
        )
        single.operator = GatedOperator(A.X[:].astype(np.float32), A.D, scale=single.scale)
        return single

    @cached_property
    def triangular(self) -> TriangularProblem | None:
        """The programme of squared loss in the sums of its gated features, if these allow it."""
        from cvxdistill.solvers.triangular_form import triangular_form

        return triangular_form(self)

    @cached_property
    def principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues (d,) and eigenvectors (d, d) of X^T diag(h) X / n, h the loss's weights.

        A feature that is always 0 is an axis of its own.

        Raises
        ------
        ValueError
            If X is not finite.
        """
        A, columns, h = self.operator, GatedColumns(self.operator), self.loss.weights
        M = np.zeros((A.d, A.d))
        for rows in row_blocks(A.n, A.d, np.float64):
            X = columns.inputs(rows)
            M += X.T @ (X if h is None else X * h[rows, None])
        if not np.isfinite(M).all():
            # A row source is not scanned for these.
            raise ValueError("X must be finite: the products of its rows are not.")
        used = np.diagonal(M) > 0
        own, Q = np.zeros(A.d), np.eye(A.d)
        own[used], Q[np.ix_(used, used)] = np.linalg.eigh(M[np.ix_(used, used)] / A.n)
        return np.maximum(own, 0), Q


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


def _check_weights(V: Any, shape: tuple[int, ...]) -> np.ndarray:
    V = np.asarray(V)
    if V.shape != shape:
        names = "(p, d, c)" if len(shape) == 3 else "(2, p, d, c)"
        raise ValueError(f"Weights must have shape {names} = {shape}, got {V.shape}.")
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
