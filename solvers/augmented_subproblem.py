"""Subproblems of the augmented Lagrangian method: loss, and quadratic penalty of the cones.

    F(W) = L(A W) + delta/2 sum_j || [Lambda_j / delta - T_j]_+ ||^2,     T_j = S_j N X W[j],

with S_j = 2 diag(D[:, j]) - I and N = diag(1 / ||x_i||), on a working set of blocks: the others
are zero. The products P = X W give both what the loss sees and T, so that F and its gradient take
one matrix product each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from cvxdistill.solvers.gated_operator import flat_weights
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.rows import row_blocks


class Subproblem:
    """F + alpha Omega as a composite function for R-FISTA, whose "predictions" are P = X W.

    Parameters
    ----------
    problem : ReLUProblem
    alpha : float
    blocks : ndarray of int, shape (m,)
        The working set, among the 2p blocks of V and U.
    row_scale : ndarray of shape (n,)
        The diagonal of N.
    delta : float
        Penalty strength.
    multipliers : ndarray of shape (n, m c)
        Lambda of these blocks.

    Attributes
    ----------
    curved : ndarray of shape (2,)
        Bregman distances of the loss and of the penalty, added up over all calls of ``bregman``.
    """

    def __init__(
        self,
        problem: ReLUProblem,
        alpha: float,
        blocks: np.ndarray,
        row_scale: np.ndarray,
        delta: float,
        multipliers: np.ndarray,
    ):
        self.problem = problem
        self.alpha = alpha
        self.blocks = blocks
        self.row_scale = row_scale
        self.delta = delta
        self.multipliers = multipliers
        self.curved = np.zeros(2)
        A, c = problem.operator, problem.n_outputs
        self._sides = np.repeat(np.where(blocks < A.p, 1, -1), c).astype(A.dtype)
        signs = np.where(A.D[:, blocks % A.p], row_scale[:, None], -row_scale[:, None])
        # S_j N for every column: positive where the gate is on, but for rows of zeros.
        self._signed = np.repeat(signs, c, axis=1)

    def prox(self, W: np.ndarray, s: float) -> np.ndarray:
        """Proximal operator of s alpha Omega."""
        return self.problem.regularizer.prox(W, s * self.alpha)

    def forward(self, W: np.ndarray) -> np.ndarray:
        """P = X W, of shape (n, m c), for W of shape (m, d, c)."""
        A = self.problem.operator
        flat = flat_weights(W)
        if A.scale is not None:
            flat = flat / A.scale
        P = np.empty((A.n, len(flat)), dtype=A.dtype)

        def work(blocks: list[slice]) -> None:
            for rows in blocks:
                np.dot(A.X[rows], flat.T, out=P[rows])

        A.gated.for_row_blocks(work, len(flat))
        return P

    def predictions(self, P: np.ndarray) -> np.ndarray:
        """Z = sum_j +-diag(D[:, j]) P_j, of shape (n, c)."""
        Z = np.zeros_like(self.problem.Y)
        self._by_rows(_add_gated, (P, self._signed, Z), self._sides)
        return Z

    def residual(self, P: np.ndarray) -> np.ndarray:
        """Minus the gradient of F in P, of shape (n, m c)."""
        return self._pull(P, self.problem.residual(self.predictions(P)))

    def adjoint(self, pull: np.ndarray) -> np.ndarray:
        """X^T pull, of shape (m, d, c)."""
        A = self.problem.operator

        def work(blocks: list[slice]) -> np.ndarray:
            total = np.zeros((pull.shape[1], A.d), dtype=A.dtype)
            for rows in blocks:
                total += pull[rows].T @ A.X[rows]
            return total

        total, *others = A.gated.for_row_blocks(work, pull.shape[1])
        for other in others:
            total += other
        if A.scale is not None:
            total /= A.scale
        return total.reshape(len(self.blocks), self.problem.n_outputs, A.d).transpose(0, 2, 1)

    def bregman(self, P_new: np.ndarray, P: np.ndarray) -> float:
        """Bregman distance of F from P to P_new."""
        parts = self.curvatures(P_new, P)
        self.curved += parts
        return float(parts.sum())

    def curvatures(self, P_new: np.ndarray, P: np.ndarray) -> np.ndarray:
        """Bregman distances of the loss and of the penalty from P to P_new."""
        arrays = P_new, P, self._signed, self.multipliers
        penalty = self._by_rows(_penalty_bregman, arrays, self.delta)
        loss = self.problem.bregman(self.predictions(P_new), self.predictions(P))
        return np.array([loss, penalty])

    def next_multipliers(self, P: np.ndarray) -> tuple[np.ndarray, float]:
        """[Lambda - delta T]_+ at the products P, and the sum of squares of its change."""
        new = np.empty_like(self.multipliers)
        arrays = P, self._signed, self.multipliers, new
        return new, self._by_rows(_next_multipliers, arrays, self.delta)

    def multipliers_share(self, P: np.ndarray) -> np.ndarray:
        """X^T N S_j [Lambda_j - delta T_j]_+ at the products P, of shape (m, d, c)."""
        return self.adjoint(self._pull(P, np.zeros_like(self.problem.Y)))

    def _pull(self, P: np.ndarray, R: np.ndarray) -> np.ndarray:
        """+-diag(D[:, j]) R / n + N S_j [Lambda_j - delta T_j]_+, of shape (n, m c)."""
        out = np.empty_like(P)
        arrays = P, R / np.asarray(len(R), R.dtype), self._signed, self.multipliers, out
        self._by_rows(_pull, arrays, self._sides, self.delta)
        return out

    def _by_rows(
        self, kernel: Callable[..., float], arrays: tuple[np.ndarray, ...], *constants: Any
    ) -> float:
        """Call a kernel on blocks of rows of the arrays; return the sum of what it returns."""

        def work(blocks: list[slice]) -> float:
            return sum(kernel(*(array[rows] for array in arrays), *constants) for rows in blocks)

        return sum(self.problem.operator.gated.for_row_blocks(work, self._signed.shape[1]))


def row_scale(problem: ReLUProblem) -> np.ndarray:
    """1 / ||x_i|| in the solver's units, of shape (n,); 0 for rows of zeros."""
    A = problem.operator
    norms = np.empty(A.n, dtype=A.dtype)
    for rows in row_blocks(A.n, A.d, A.dtype):
        X = A.X[rows] if A.scale is None else A.X[rows] / A.scale
        norms[rows] = np.sqrt(np.einsum("nd,nd->n", X, X))
    return np.divide(1, norms, out=np.zeros_like(norms), where=norms > 0)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _add_gated(P, signed, Z, sides):  # type: ignore[no-untyped-def]
    """Z[i, k] += sum_a sides[a c + k] P[i, a c + k] over the gates that are on."""
    n, c = Z.shape
    for i in range(n):
        if c == 1:
            total = Z[i, 0]
            for a in range(len(sides)):
                total += sides[a] * P[i, a] if signed[i, a] > 0 else 0
            Z[i, 0] = total
        else:
            for a in range(len(sides)):
                if signed[i, a] > 0:
                    Z[i, a % c] += sides[a] * P[i, a]
    return 0.0


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _pull(P, R, signed, multipliers, out, sides, delta):  # type: ignore[no-untyped-def]
    """out = +-D R + N S [Lambda - delta N S P]_+."""
    n, c = R.shape
    for i in range(n):
        for a in range(len(sides)):
            v = multipliers[i, a] - delta * signed[i, a] * P[i, a]
            out[i, a] = signed[i, a] * v if v > 0 else 0
        if c == 1:
            r = R[i, 0]
            for a in range(len(sides)):
                out[i, a] += sides[a] * r if signed[i, a] > 0 else 0
        else:
            for a in range(len(sides)):
                if signed[i, a] > 0:
                    out[i, a] += sides[a] * R[i, a % c]
    return 0.0


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _penalty_bregman(P_new, P, signed, multipliers, delta):  # type: ignore[no-untyped-def]
    """Bregman distance of delta/2 || [Lambda/delta - N S P]_+ ||^2, without cancellation."""
    n, width = P.shape
    total = 0.0
    for i in range(n):
        row = 0.0
        for a in range(width):
            v = multipliers[i, a] - delta * signed[i, a] * P[i, a]
            v_new = multipliers[i, a] - delta * signed[i, a] * P_new[i, a]
            kept, kept_new = max(v, 0), max(v_new, 0)
            row += (kept_new - kept) ** 2 - 2 * kept * (v_new - kept_new)
        total += row
    return total / (2 * delta)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _next_multipliers(P, signed, multipliers, new, delta):  # type: ignore[no-untyped-def]
    """new = [Lambda - delta N S P]_+; return the sum of squares of its change."""
    n, width = P.shape
    total = 0.0
    for i in range(n):
        row = 0.0
        for a in range(width):
            v = multipliers[i, a] - delta * signed[i, a] * P[i, a]
            new[i, a] = v if v > 0 else 0
            row += (new[i, a] - multipliers[i, a]) ** 2
        total += row
    return total
