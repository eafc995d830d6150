"""The linear system of ADMM for ReLU networks.

    (H + mu I) X = B,    H = beta A^T diag(omega) A / n,    A (V, U) = A_0 (V - U)

with A_0 = [D_1 X, ..., D_p X], omega the sample weights with mean 1, columns of A_0 centred where
there is an intercept. Sums of the blocks of V and U see only mu; differences see
K = 2 beta A_0^T diag(omega) A_0 / n + mu.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from cvxdistill.solvers.gated_operator import empty_weights
from cvxdistill.solvers.nystrom import conjugate_gradients, nystrom_approximation
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.ridge import gram_matrix

# Up to the first a side is decomposed once, and mu may change for nothing; up to the second it is
# factored for each mu. Beyond it conjugate gradients take over.
MOST_DECOMPOSED, MOST_FACTORED = 2000, 6000
NYSTROM_RANK = 100


class DifferenceSystem:
    """Solves (H + mu I) X = B for weights (2p, d, c), again and again.

    Parameters
    ----------
    problem : ReLUProblem
    side : {"auto", "examples", "features", "neither"}
        Which of n and p d has the matrix that is factored; "neither" is conjugate gradients.
    """

    def __init__(self, problem: ReLUProblem, side: str = "auto"):
        self.problem = problem
        self.gated = problem.operator.gated
        self.weights = problem.loss.weights
        self.curvature = 2 * problem.loss.smoothness
        n, size = self.gated.n, self.gated.p * self.gated.d
        if side == "auto":
            side = "neither" if min(n, size) > MOST_FACTORED else "features"
            if side == "features" and n < size:
                side = "examples"
        self.side = side
        self._mu: float | None = None
        if side == "neither":
            self._nystrom = nystrom_approximation(self._product, size, NYSTROM_RANK)
            self.mean_eigenvalue = self._trace() / size
            return
        self._gram = self._kernel() if side == "examples" else self._feature_gram()
        self.mean_eigenvalue = float(np.trace(self._gram)) / size
        self._spectrum = None
        if len(self._gram) <= MOST_DECOMPOSED:
            eigenvalues, Q = np.linalg.eigh(self._gram)
            self._spectrum = np.maximum(eigenvalues, 0), Q

    def __repr__(self) -> str:
        return f"DifferenceSystem({self.gated}, side={self.side!r})"

    def solve(self, B: np.ndarray, mu: float, accuracy: float = 1e-10) -> np.ndarray:
        """X with (H + mu I) X = B, both of shape (2p, d, c).

        ``accuracy`` is the relative residual at which conjugate gradients stop.
        """
        p = self.gated.p
        total, difference = B[:p] + B[p:], B[:p] - B[p:]
        solved = self._solve_difference(difference.astype(np.float64), mu, accuracy)
        blocks, d, c = B.shape
        out = empty_weights(blocks, d, c, self.problem.dtype)
        out[:p] = (total / mu + solved) / 2
        out[p:] = (total / mu - solved) / 2
        return out

    def _solve_difference(self, F: np.ndarray, mu: float, accuracy: float) -> np.ndarray:
        p, d, c = F.shape
        if self.side == "examples":
            q = self._inverse(self._forward(F), mu)
            return (F - self.curvature / self.gated.n * self._adjoint(q)) / mu
        flat = F.reshape(p * d, c)
        if self.side == "features":
            return self._inverse(flat, mu).reshape(p, d, c)
        solved = conjugate_gradients(
            lambda X: self._product(X) + mu * X,
            flat,
            lambda R: self._nystrom.precondition(R, mu),
            accuracy,
        )
        return solved.reshape(p, d, c)

    def _inverse(self, B: np.ndarray, mu: float) -> np.ndarray:
        """(gram + mu I)^-1 B."""
        if self._spectrum is not None:
            eigenvalues, Q = self._spectrum
            return Q @ ((Q.T @ B) / (eigenvalues + mu)[:, None])
        if mu != self._mu:
            shifted = self._gram.copy()
            shifted[np.diag_indices_from(shifted)] += mu
            self._factor = cho_factor(shifted, lower=True, overwrite_a=True, check_finite=False)
            self._mu = mu
        return cho_solve(self._factor, B, check_finite=False)

    def _product(self, flat: np.ndarray) -> np.ndarray:
        """2 beta A_0^T diag(omega) A_0 / n times columns of length p d."""
        p, d = self.gated.p, self.gated.d
        F = empty_weights(p, d, flat.shape[1], self.problem.dtype)
        F[...] = flat.reshape(p, d, -1)
        product = self._adjoint(self._forward(F)) * (self.curvature / self.gated.n)
        return product.reshape(p * d, -1).astype(np.float64)

    def _forward(self, F: np.ndarray) -> np.ndarray:
        """diag(sqrt omega) A_0 F, A_0 centred."""
        Z = self.gated.forward(F.astype(self.problem.dtype)).astype(np.float64)
        return self._root_weighted(self._centred(Z))

    def _adjoint(self, Q: np.ndarray) -> np.ndarray:
        """A_0^T diag(sqrt omega) Q, A_0 centred."""
        Q = self._root_weighted(Q)
        if self.problem.fit_intercept:
            share = np.ones(len(Q)) if self.weights is None else self.weights
            Q = Q - share[:, None] * Q.mean(axis=0)
        return self.gated.adjoint(Q.astype(self.problem.dtype)).astype(np.float64)

    def _centred(self, Z: np.ndarray) -> np.ndarray:
        if not self.problem.fit_intercept:
            return Z
        return Z - np.average(Z, axis=0, weights=self.weights)

    def _root_weighted(self, Z: np.ndarray) -> np.ndarray:
        return Z if self.weights is None else Z * np.sqrt(self.weights)[:, None]

    def _rows(self) -> np.ndarray:
        X = np.asarray(self.gated.X[:], dtype=np.float64)
        return X if self.gated.scale is None else X / self.gated.scale

    def _kernel(self) -> np.ndarray:
        """2 beta diag(sqrt omega) A_0 A_0^T diag(sqrt omega) / n: X X^T times D D^T, by entries."""
        X, D = self._rows(), self.gated.D.astype(np.float64)
        K = X @ X.T
        K *= D @ D.T
        K = self._root_weighted(self._centred(K))
        K = self._root_weighted(self._centred(K.T))
        return K * (self.curvature / len(K))

    def _feature_gram(self) -> np.ndarray:
        gram = gram_matrix(self.gated, center=self.problem.fit_intercept, weights=self.weights)
        return gram * self.curvature

    def _trace(self) -> float:
        """Trace of 2 beta A_0^T A_0 / n, without centring or weights: a scale is all it gives."""
        squares = np.einsum("nd,nd->n", self._rows(), self._rows())
        return self.curvature * float(squares @ self.gated.D.sum(axis=1)) / self.gated.n
