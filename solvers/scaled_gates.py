"""Gated features centred and scaled by examples' weights: the loss is a plain mean of squares.

With weights h of mean 1, and H = diag(h), the squared loss with its best intercept is

    1/(2n) sum_i h_i ||y_i - z_i - b||^2 = 1/(2n) ||U - A V||^2,
    A_j = H^1/2 (diag(D[:, j]) X - 1 m_j^T),    U = H^1/2 (Y - 1 m^T)

with means m weighted by h; zero where there is no intercept.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from scipy import linalg

from cvxdistill.solvers.feature_columns import GatedColumns
from cvxdistill.solvers.gated_gram import gated_gram
from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.growing_matrix import GrowingMatrix
from cvxdistill.solvers.problem import GatedReLUProblem


class ScaledGates:
    """The features A of a programme of the squared loss, in float64.

    Weights are rows of (gates, c d), outputs first, as ``GatedOperator`` keeps them in memory.

    Parameters
    ----------
    problem : GatedReLUProblem
    """

    def __init__(self, problem: GatedReLUProblem):
        operator = problem.operator
        self.operator = GatedOperator(GatedColumns(operator).inputs(), operator.D)
        self.n, self.d, self.p = operator.n, operator.d, operator.p
        self.weights = problem.loss.weights
        self.root = None if self.weights is None else np.sqrt(self.weights)
        # Of length 1; what is centred is orthogonal to it.
        self.constant: np.ndarray | None = None
        if problem.fit_intercept:
            root = np.ones(self.n) if self.root is None else self.root
            self.constant = root / np.linalg.norm(root)
        self.targets = self.scaled(problem.Y.astype(np.float64))
        self.gram = GateGram(self)
        self._kept: np.ndarray | None = None

    def scaled(self, Z: np.ndarray) -> np.ndarray:
        """H^1/2 (Z - 1 m^T) for Z (n, k)."""
        return self.centred(Z if self.root is None else Z * self.root[:, None])

    def centred(self, U: np.ndarray) -> np.ndarray:
        """U (n, k) made orthogonal to the constant."""
        if self.constant is None:
            return U
        return U - np.outer(self.constant, self.constant @ U)

    def flat(self, V: np.ndarray) -> np.ndarray:
        """Weights (p, d, c) as (p, c d)."""
        return np.ascontiguousarray(V.transpose(0, 2, 1), dtype=np.float64).reshape(self.p, -1)

    def forward(self, V: np.ndarray) -> np.ndarray:
        """A V, (n, c), for V of shape (p, c d)."""
        W = V.reshape(self.p, -1, self.d).transpose(0, 2, 1)
        return self.scaled(self.operator.forward(W))

    def adjoint(self, U: np.ndarray) -> np.ndarray:
        """A^T U / n, (p, c d), for U (n, c) that is centred."""
        if self.root is not None:
            U = U * self.root[:, None]
        C = self.operator.adjoint(U).transpose(0, 2, 1).reshape(self.p, -1)
        C /= self.n
        return C

    @cached_property
    def mean_square(self) -> float:
        """Of an entry of the features, before they are centred."""
        lengths = np.einsum("nd,nd->n", self._rows, self._rows)
        return float(lengths @ self.operator.D.mean(axis=1)) / (self.n * self.d)

    def along(self, gates: np.ndarray, W: np.ndarray) -> np.ndarray:
        """A_g W_g of each gate, not centred, (n, c, gates), for W of shape (gates, c d)."""
        X = self._rows
        T = (X @ W.reshape(-1, self.d).T).reshape(self.n, len(gates), -1).transpose(0, 2, 1)
        return np.ascontiguousarray(T) * self.operator.D[:, None, gates]

    @cached_property
    def _rows(self) -> np.ndarray:
        """H^1/2 X."""
        X = self.operator.X[:]
        return X if self.root is None else X * self.root[:, None]

    def _inner_products(self, dtype: Any) -> np.ndarray:
        """Those of the rows, (n, n), in the order of Fortran; of one type at a time."""
        if self._kept is None or self._kept.dtype != dtype:
            rows = self._rows.astype(dtype, copy=False)
            self._kept = (rows @ rows.T).T
        return self._kept

    def outer(self, gates: np.ndarray, shares: np.ndarray, dtype: Any) -> np.ndarray:
        """sum_g shares_g A_g A_g^T, not centred, (n, n) of a type, in the order of Fortran.

        Only the upper triangle counts. The inner products of the examples times those of their
        patterns:

            sum_g s_g diag(D_g) X X^T diag(D_g) = (X X^T) * (D diag(s) D^T).
        """
        D = self.operator.D[:, gates] * np.sqrt(shares).astype(dtype)
        N: np.ndarray = linalg.blas.get_blas_funcs("syrk", (D,))(1.0, D.T, trans=1)
        N *= self._inner_products(dtype)
        return N


class GateGram:
    """A^T A / n of the gates that were asked for, which grows.

    Parameters
    ----------
    gates : ScaledGates
    """

    def __init__(self, gates: ScaledGates):
        self.gates = gates
        self.H = GrowingMatrix()
        self.places = np.full(gates.p, -1)
        self.order = np.zeros(0, dtype=int)

    @property
    def known(self) -> np.ndarray:
        """Whether each gate is in the matrix."""
        return self.places >= 0

    def of(self, gates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A matrix (m, m), not to be changed, and the places of some gates among its gates."""
        self._add(gates[self.places[gates] < 0])
        return self.H.values, self.places[gates]

    def _add(self, new: np.ndarray) -> None:
        if len(new) == 0:
            return
        A = self.gates
        past = len(self.order)
        self.order = np.concatenate([self.order, new])
        self.places[new] = np.arange(past, len(self.order))
        D = np.ascontiguousarray(A.operator.D[:, self.order])
        h = np.ones(A.n) if A.weights is None else A.weights
        H = gated_gram(A.operator.X.__getitem__, D, h, past)
        if A.constant is not None:
            means = GatedOperator(A.operator.X, D).adjoint(h[:, None])[:, :, 0].ravel()
            H -= np.outer(means, means[past * A.d :]) / A.n
        H /= A.n
        self.H.grow(H[: past * A.d], H[past * A.d :])
