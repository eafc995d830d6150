"""Feature columns of a linear model, stored or made from gates: products, and pieces of columns."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from cvxdistill.solvers.gated_gram import gated_gram
from cvxdistill.solvers.gated_operator import GatedOperator, as_weights
from cvxdistill.solvers.rows import row_blocks
from cvxdistill.solvers.threads import one_blas_thread


class Moments(NamedTuple):
    """Weighted sums over examples with columns A_new, beside columns A_past.

    Attributes
    ----------
    cross, own : ndarray of shape (past, new), (new, new)
        A_past^T diag(h) A_new and A_new^T diag(h) A_new.
    pull : ndarray of shape (new, c)
        A_new^T R.
    mean : ndarray of shape (new,)
        A_new^T h.
    """

    cross: np.ndarray
    own: np.ndarray
    pull: np.ndarray
    mean: np.ndarray


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

    def moments(self, past: np.ndarray, new: np.ndarray, h: np.ndarray, R: np.ndarray) -> Moments:
        """Sums with new features, beside past ones, for weights h (n,) and R (n, c)."""
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

    def moments(self, past: np.ndarray, new: np.ndarray, h: np.ndarray, R: np.ndarray) -> Moments:
        """Sums with new features."""
        return _moments_by_rows(self, past, new, h, R)


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

    def moments(self, past: np.ndarray, new: np.ndarray, h: np.ndarray, R: np.ndarray) -> Moments:
        """Sums with new features, by whole gates if that is what they are."""
        d, D = self.operator.d, self.operator.D
        features = np.concatenate([past, new])
        gates = features[::d] // d
        whole = (features == (gates[:, None] * d + np.arange(d)).ravel()[: len(features)]).all()
        if len(past) % d or len(new) % d or not whole:
            return _moments_by_rows(self, past, new, h, R)
        m, D = len(past), D[:, gates]
        H = gated_gram(self.inputs, D, h, m // d)
        added = D[:, m // d :]
        pull = np.zeros((len(new), R.shape[1] + 1))
        for rows in row_blocks(len(D), d, np.float64):
            V = np.column_stack([R[rows], h[rows]])
            pull += GatedOperator(self.inputs(rows), added[rows]).adjoint(V).reshape(pull.shape)
        return Moments(H[:m], H[m:], pull[:, :-1], pull[:, -1])

    def inputs(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows of X in float64, with its scale."""
        X = np.ascontiguousarray(self.operator.X[rows], dtype=np.float64)
        return X if self.operator.scale is None else X / self.operator.scale


def _moments_by_rows(
    columns: Columns, past: np.ndarray, new: np.ndarray, h: np.ndarray, R: np.ndarray
) -> Moments:
    """Sums over blocks of rows, which are all that is ever formed."""
    cross, own = np.zeros((len(past), len(new))), np.zeros((len(new), len(new)))
    pull, mean = np.zeros((len(new), R.shape[1])), np.zeros(len(new))
    root, weighted = np.sqrt(h), not (h == h[0]).all()
    for rows in row_blocks(len(R), len(past) + len(new), np.float64):
        A = columns.take(new, rows)
        pull += A.T @ R[rows]
        mean += h[rows] @ A
        if weighted:
            A *= root[rows, None]
        own += A.T @ A
        if len(past):
            if weighted:
                A *= root[rows, None]
            cross += columns.take(past, rows).T @ A
    if not weighted:
        own *= h[0]
        cross *= h[0]
    return Moments(cross, own, pull, mean)
