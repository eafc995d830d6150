"""The squared loss of n examples as that of as many rows as there are gated features: QR without Q.

With the features A and targets U of ``cvxdistill.solvers.scaled_gates``, centred and scaled by the
examples' weights, and m = p d,

    1/(2n) ||U - A V||^2 = 1/2 ||T - F V||^2 + 1/2 ||t||^2,
    F^T F = A^T A / n,     F^T T = A^T U / n,     t^2 = ||U||^2 / n - ||T||^2 for each output,

F (m, m) upper triangular. The last row t, where all features are 0, makes it a programme of m + 1
rows with the same objective, gradients and dual points, whose products with F and F^T cost 2 m^2 c
operations, however many examples there are. A^T A is added up by the gates' patterns
(``cvxdistill.solvers.gated_gram``); its Cholesky factor loses half of the digits where features are
nearly dependent, so what is found is certified, and if need be finished, on the examples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeGuard

import numpy as np
from scipy import linalg

from cvxdistill.solvers.average_loss import AverageLoss
from cvxdistill.solvers.gated_operator import (
    OVERHEAD,
    SMALLEST_PARALLEL_WORK,
    GatedOperator,
    as_weights,
    products_work,
)
from cvxdistill.solvers.losses import SquaredLoss
from cvxdistill.solvers.normal_equations import normal_equations
from cvxdistill.solvers.penalties import Regularizer
from cvxdistill.solvers.principal_metric import has_principal_metric
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem
from cvxdistill.solvers.threads import n_threads, run_in_threads

# Of the factor, which has 1 GB then.
MOST_FEATURES = 11_000
# Rows and columns of F that are multiplied at once, without most of the zeros.
SMALLEST_BLOCK, LARGEST_BLOCK = 64, 512
# Iterations of R-FISTA that a programme takes, about, and what the gates' patterns are worth: how
# many products of two entries of A are added up for the price of one in a matrix product.
USUAL_ITERATIONS, SUMMED_AT_ONCE = 100, 2
# Shares of the diagonal that are added to it until A^T A has a factor in spite of rounding.
RIDGES = (1e-12, 1e-10)


class TriangularOperator(GatedOperator):
    """V -> F V for weights V (p, d, c), with a last row of zeros, and its adjoint.

    Parameters
    ----------
    F : ndarray of shape (p d, p d)
        Upper triangular, zeros below, in the order of Fortran.
    p : int
    """

    def __init__(self, F: np.ndarray, p: int):
        self.F, self.p, self.d = F, p, len(F) // p
        self.n, self.dtype = len(F) + 1, F.dtype
        self.scale = None
        m = len(F)
        size = min(max(m // 8, SMALLEST_BLOCK), LARGEST_BLOCK)
        blocks = [slice(a, min(a + size, m)) for a in range(0, m, size)]
        # Each thread has as many long ones as short ones.
        self._blocks = [block for k in range(n_threads()) for block in blocks[k :: n_threads()]]

    def __repr__(self) -> str:
        return f"TriangularOperator(d={self.d}, p={self.p}, dtype={self.dtype})"

    def forward(self, V: np.ndarray) -> np.ndarray:
        """F V, of shape (m + 1, c)."""
        flat, Z = V.reshape(self.n - 1, -1), np.empty((self.n, V.shape[2]), dtype=self.dtype)
        Z[-1] = 0

        def work(blocks: list[slice]) -> None:
            for rows in blocks:
                a = rows.start
                np.matmul(self.F[rows, a:], flat[a:], out=Z[rows])

        self._for_blocks(work, V.shape[2])
        return Z

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """F^T R, of shape (p, d, c)."""
        R = np.ascontiguousarray(R, dtype=self.dtype)
        C = np.empty_like(R[:-1])

        def work(blocks: list[slice]) -> None:
            for columns in blocks:
                e = columns.stop
                np.matmul(self.F[:e, columns].T, R[:e], out=C[columns])

        self._for_blocks(work, R.shape[1])
        return as_weights(C.reshape(self.p, self.d, -1), self.dtype)

    def _for_blocks(self, work: Callable[[list[slice]], None], c: int) -> None:
        """Call ``work`` on runs of blocks, one run a thread; solvers hold BLAS to one each."""
        if len(self.F) ** 2 * c < SMALLEST_PARALLEL_WORK:
            work(self._blocks)
        else:
            run_in_threads(work, self._blocks)

    def contributions(self, W: np.ndarray, gates: np.ndarray, rows: slice) -> np.ndarray:
        """What each gate adds to a block of rows, (rows, gates, c), for its W of (gates, d, c)."""
        F = self.F[rows].reshape(-1, self.p, self.d)[:, gates]
        T = np.zeros((rows.stop - rows.start, len(gates), W.shape[2]), dtype=self.dtype)
        T[: len(F)] = (F.transpose(1, 0, 2) @ W).transpose(1, 0, 2)
        return T


class TriangularProblem(GatedReLUProblem):
    """A programme of as many rows as gated features, and one; its weights are in solvers' units.

    Parameters
    ----------
    regularizer : Regularizer
    F : ndarray of shape (p d, p d)
    Y : ndarray of shape (p d + 1, c)
    p : int
    axes : tuple of ndarray, optional
        ``principal_axes`` of the examples.
    """

    operator: TriangularOperator

    def __init__(
        self,
        regularizer: Regularizer,
        F: np.ndarray,
        Y: np.ndarray,
        p: int,
        axes: tuple[np.ndarray, np.ndarray] | None,
    ):
        self.regularizer, self.fit_intercept, self.scale = regularizer, False, None
        self.Y, self.loss = Y, AverageLoss(SquaredLoss(), Y)
        self.operator = TriangularOperator(F, p)
        self._axes = axes

    @property
    def principal_axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Those of the examples."""
        assert self._axes is not None
        return self._axes

    @cached_property
    def in_single(self) -> GatedReLUProblem:
        """The programme in float32."""
        A = self.operator
        F, Y = (a.astype(np.float32) for a in (A.F, self.Y))
        return TriangularProblem(self.regularizer, F, Y, A.p, self._axes)


def triangular_form(problem: GatedReLUProblem) -> TriangularProblem | None:
    """The programme in this form, from sums in float64; None if they overflow or have no factor.

    Parameters
    ----------
    problem : GatedReLUProblem
        With squared loss.

    Raises
    ------
    ValueError
        If rows of X are not finite.
    """
    A = problem.operator
    m = A.p * A.d
    Y, h = problem.Y.astype(np.float64), problem.loss.weights
    if problem.fit_intercept:
        Y -= np.average(Y, axis=0, weights=h)
    H, Q = normal_equations(A, Y, center=problem.fit_intercept, weights=h)
    F = _cholesky(H) if np.isfinite(H).all() else None
    if F is None:
        return None
    T = np.zeros((m + 1, problem.n_outputs))
    T[:-1] = linalg.solve_triangular(F, Q, trans=1)
    rest = np.average(Y * Y, axis=0, weights=h) - np.einsum("mc,mc->c", T, T)
    T[-1] = np.sqrt(np.maximum(rest, 0))
    # Losses are means over rows, of which there are now m + 1.
    root = np.sqrt(m + 1)
    F *= root
    T *= root
    axes = problem.principal_axes if has_principal_metric(problem) else None
    F, T = (a.astype(problem.dtype, copy=False) for a in (F, T))
    return TriangularProblem(problem.regularizer, F, T, A.p, axes)


def _cholesky(H: np.ndarray) -> np.ndarray | None:
    """F with F^T F = H, but for a diagonal of the order of rounding; None if that is too small.

    It takes the place of H in memory, which is written over.
    """
    F = H.T
    diagonal = np.where(np.diagonal(H) > 0, np.diagonal(H), 1.0)
    for ridge in RIDGES:
        np.fill_diagonal(F, (1 + ridge) * diagonal)
        F, failed = linalg.lapack.dpotrf(F, overwrite_a=1, clean=0)
        if not failed:
            for k in range(len(F)):
                F[k + 1 :, k] = 0
            return F
        for k in range(len(F)):
            F[:k, k] = F[k, :k]
    return None


def triangular_form_pays(problem: ConvexProblem) -> TypeGuard[GatedReLUProblem]:
    """Whether the sums are made within some iterations, which cost far less then."""
    if not (
        isinstance(problem, GatedReLUProblem)
        and isinstance(problem.loss.loss, SquaredLoss)
        and problem.regularizer.bounds_the_dual
    ):
        return False
    A, c = problem.operator, problem.n_outputs
    m = A.p * A.d
    if m > MOST_FEATURES:
        return False
    by_rows, by_features = products_work(A.n, A.d, A.p, c), triangular_work(m, c)
    sums = A.n * m**2 / SUMMED_AT_ONCE + m**3 / 3
    return 2 * by_features <= by_rows and sums <= USUAL_ITERATIONS * (by_rows - by_features)


def triangular_work(m: int, c: int) -> float:
    """Operations of a product with F and one with F^T, the interpreter among them.

    Products with triangles reach half of a large matrix product's rate.
    """
    return 4 * m**2 * c + OVERHEAD
