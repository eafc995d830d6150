"""Feature columns of a linear model, stored or made from gates: products, and pieces of columns."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from cvxdistill.solvers.gated_operator import GatedOperator, as_weights
from cvxdistill.solvers.threads import one_blas_thread


class Columns(Protocol):
    """A matrix A (n, d) of features."""

    shape: tuple[int, int]
    dtype: Any

    def forward(self, B: np.ndarray) -> np.ndarray:
        """A B, (n, c), for B of shape (d, c)."""
        ...

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """A^T R in float64, (d, c), for R of shape (n, c)."""
        ...

    def take(self, features: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Columns of these features, in float64, on these rows."""
        ...


class DenseColumns:
    """An array."""

    def __init__(self, X: np.ndarray):
        self.X = X
        self.shape: tuple[int, int] = X.shape
        self.dtype = X.dtype

    def forward(self, B: np.ndarray) -> np.ndarray:
        """X B, from the features that are not zero."""
        used = np.flatnonzero(B.any(axis=1))
        if len(used) == 0:
            return np.zeros((self.shape[0], B.shape[1]), dtype=self.dtype)
        # Copying columns costs more than some zeros.
        if 2 * len(used) > len(B):
            return self.X @ B.astype(self.dtype)
        return self.X[:, used] @ B[used].astype(self.dtype)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """X^T R."""
        return (self.X.T @ R.astype(self.dtype, copy=False)).astype(np.float64, copy=False)

    def take(self, features: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Some columns."""
        return np.take(self.X[rows], features, axis=1).astype(np.float64, copy=False)


class GatedColumns:
    """The features diag(D[:, j]) X of a gated operator, gate after gate; never all at once."""

    def __init__(self, operator: GatedOperator):
        self.operator = operator
        self.shape = operator.n, operator.p * operator.d
        self.dtype = operator.dtype

    def forward(self, B: np.ndarray) -> np.ndarray:
        """sum_j diag(D[:, j]) X B_j."""
        A = self.operator
        V = as_weights(B.reshape(A.p, A.d, -1), A.dtype)
        with one_blas_thread():
            return A.forward(V)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """X^T diag(D[:, j]) R for all gates."""
        A = self.operator
        with one_blas_thread():
            C = A.adjoint(R.astype(A.dtype, copy=False))
        return C.reshape(A.p * A.d, -1).astype(np.float64, copy=False)

    def take(self, features: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
        """Some columns."""
        gates, inputs = np.divmod(features, self.operator.d)
        return self.inputs(rows)[:, inputs] * self.operator.D[rows][:, gates]

    def inputs(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of X in float64, with its scale."""
        X = np.ascontiguousarray(self.operator.X[rows], dtype=np.float64)
        return X if self.operator.scale is None else X / self.operator.scale
