"""The linear system of ADMM for ReLU networks.

    (beta H + mu I) X = B,    H = A^T diag(omega) A / n,    A (V, U) = A_0 (V - U)

with A_0 = [D_1 X, ..., D_p X], omega the sample weights with mean 1, columns of A_0 centred where
there is an intercept. Sums of the blocks of V and U see only mu; differences see
beta (G + mu / beta), G = 2 A_0^T diag(omega) A_0 / n, which all outputs share.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from cvxdistill.solvers.gated_operator import empty_weights
from cvxdistill.solvers.normal_equations import gram_matrix
from cvxdistill.solvers.nystrom import conjugate_gradients, nystrom_approximation
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.rows import row_blocks

# The larger side of a matrix to be factored: 0.3 GB, and as much for the factor.
MOST_FACTORED = 6000
NYSTROM_RANK = 100


class DifferenceSystem:
    """Solves (beta H + mu I) X = B for weights (2p, d, c), again and again.

    The matrix that is factored anew whenever mu / beta changes is that of the smaller side of
    A_0: G itself, or for fewer examples than features its n by n counterpart, the entrywise product
    2 diag(sqrt omega) (X X^T * D D^T) diag(sqrt omega) / n. Beyond 6000 rows preconditioned
    conjugate gradients take over.

    Parameters
    ----------
    problem : ReLUProblem
    side : {"auto", "examples", "features", "neither"}
        Which of n and p d has the matrix that is factored; "neither" is conjugate gradients.

    Attributes
    ----------
    mean_eigenvalue : float
        Of G, before any centring.
    """

    def __init__(self, problem: ReLUProblem, side: str = "auto"):
        self.gated = problem.operator.gated
        self.weights = problem.loss.weights
        self.centred = problem.fit_intercept
        self.dtype = problem.dtype
        n, size = self.gated.n, self.gated.p * self.gated.d
        if side == "auto":
            side = "neither" if min(n, size) > MOST_FACTORED else "features"
            if side == "features" and n < size:
                side = "examples"
        self.side = side
        self._shift: float | None = None
        if side == "neither":
            self._nystrom = nystrom_approximation(self._product, size, NYSTROM_RANK)
        elif side == "examples":
            self._matrix = self._kernel()
        else:
            gram = gram_matrix(self.gated, center=self.centred, weights=self.weights)
            self._matrix = 2 * gram
        self.mean_eigenvalue = self._trace() / size

    def __repr__(self) -> str:
        return f"DifferenceSystem({self.gated}, side={self.side!r})"

    def solve(
        self, B: np.ndarray, mu: float, accuracy: float = 1e-10, beta: float = 1.0
    ) -> np.ndarray:
        """X with (beta H + mu I) X = B, both of shape (2p, d, c).

        ``accuracy`` is the relative residual at which conjugate gradients stop.
        """
        p = self.gated.p
        total, difference = B[:p] + B[p:], B[:p] - B[p:]
        solved = self._solve_difference(difference.astype(np.float64), mu / beta, accuracy) / beta
        blocks, d, c = B.shape
        out = empty_weights(blocks, d, c, self.dtype)
        out[:p] = (total / mu + solved) / 2
        out[p:] = (total / mu - solved) / 2
        return out

    def squares(self, Z: np.ndarray) -> float:
        """Mean over examples, weighted by omega, of ||z_i||^2, for centred predictions Z (n, c)."""
        Q = self._root_weighted(self._without_means(Z.astype(np.float64)))
        return float(np.sum(Q * Q)) / len(Q)

    def _solve_difference(self, F: np.ndarray, shift: float, accuracy: float) -> np.ndarray:
        """(G + shift I)^-1 F for F (p, d, c)."""
        p, d, c = F.shape
        if self.side == "examples":
            q = self._inverse(self._forward(F), shift)
            return (F - 2 / self.gated.n * self._adjoint(q)) / shift
        flat = F.reshape(p * d, c)
        if self.side == "features":
            return self._inverse(flat, shift).reshape(p, d, c)
        solved = conjugate_gradients(
            lambda X: self._product(X) + shift * X,
            flat,
            lambda R: self._nystrom.precondition(R, shift),
            accuracy,
        )
        return solved.reshape(p, d, c)

    def _inverse(self, B: np.ndarray, shift: float) -> np.ndarray:
        """(matrix + shift I)^-1 B."""
        if shift != self._shift:
            shifted = self._matrix.copy()
            shifted[np.diag_indices_from(shifted)] += shift
            self._factor = cho_factor(shifted, lower=True, overwrite_a=True, check_finite=False)
            self._shift = shift
        return cho_solve(self._factor, B, check_finite=False)

    def _product(self, flat: np.ndarray) -> np.ndarray:
        """G times columns of length p d."""
        p, d = self.gated.p, self.gated.d
        F = empty_weights(p, d, flat.shape[1], self.dtype)
        F[...] = flat.reshape(p, d, -1)
        product = self._adjoint(self._forward(F)) * (2 / self.gated.n)
        return product.reshape(p * d, -1)

    def _forward(self, F: np.ndarray) -> np.ndarray:
        """diag(sqrt omega) A_0 F, A_0 centred."""
        Z = self.gated.forward(F.astype(self.dtype, copy=False)).astype(np.float64, copy=False)
        return self._root_weighted(self._without_means(Z))

    def _adjoint(self, Q: np.ndarray) -> np.ndarray:
        """A_0^T diag(sqrt omega) Q; with A_0 centred or not, for Q from ``_forward``."""
        Q = self._root_weighted(Q)
        return self.gated.adjoint(Q.astype(self.dtype, copy=False)).astype(np.float64, copy=False)

    def _without_means(self, Z: np.ndarray) -> np.ndarray:
        return Z - np.average(Z, axis=0, weights=self.weights) if self.centred else Z

    def _root_weighted(self, Z: np.ndarray) -> np.ndarray:
        return Z if self.weights is None else Z * np.sqrt(self.weights)[:, None]

    def _rows(self) -> np.ndarray:
        X = np.asarray(self.gated.X[:], dtype=np.float64)
        return X if self.gated.scale is None else X / self.gated.scale

    def _kernel(self) -> np.ndarray:
        """2 diag(sqrt omega) A_0 A_0^T diag(sqrt omega) / n: X X^T times D D^T, by entries."""
        X, D = self._rows(), self.gated.D.astype(np.float64)
        K = X @ X.T
        K *= D @ D.T
        K = self._root_weighted(self._without_means(K))
        K = self._root_weighted(self._without_means(K.T))
        return K * (2 / len(K))

    def _trace(self) -> float:
        """Trace of 2 A_0^T diag(omega) A_0 / n."""
        total = 0.0
        for rows in row_blocks(self.gated.n, self.gated.d, np.float64):
            X = np.asarray(self.gated.X[rows], dtype=np.float64)
            if self.gated.scale is not None:
                X = X / self.gated.scale
            on = self.gated.D[rows].sum(axis=1)
            weighted = on if self.weights is None else on * self.weights[rows]
            total += float(weighted @ np.einsum("nd,nd->n", X, X))
        return 2 * total / self.gated.n
