"""Newton's systems on the dual of gated ReLU, I + kappa A M A^T, and their inverses.

With M_g = s_g I + (1 - s_g) w_g w_g^T of gates g, w_g of length 1, and c outputs,

    I + kappa A M A^T = N x I + kappa sum_g (1 - s_g) a_g a_g^T,
    N = I + kappa sum_g s_g A_g A_g^T,    a_g = A_g w_g  (n, c).

N, the same for all outputs, is factorised as a matrix of the examples, or of the features of these
gates,

    N^-1 = I - A F^-1 A^T,    F = A^T A + diag(1 / (kappa s)),

and the rest, one rank for each gate, comes in by Woodbury's identity; with one output it is in the
matrix itself, F = A^T A + M^-1 / kappa.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba
import numpy as np
from scipy import linalg

from cvxdistill.solvers.gated_operator import GatedOperator, products_work
from cvxdistill.solvers.penalties import GatePenalty
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.scaled_gates import ScaledGates

# Newton's steps that will use a Gram matrix that is formed.
USES = 8
# What the interpreter does during a step of one system, in operations of a matrix product.
STEP_OVERHEAD = 2.5e7
# Of matrices of about 0.5 and 1 GB.
MOST_EXAMPLES, MOST_FEATURES = 8000, 11_000

Inverse = Callable[[np.ndarray], np.ndarray]


class NewtonSystem:
    """I + kappa A M A^T for matrices (n, c) that are centred where there is an intercept.

    Parameters
    ----------
    A : ScaledGates
    shares : ndarray of shape (p,)
        s_g; gates with 0 have no part.
    B : ndarray of shape (p, c d)
        Along w_g.
    kappa : float

    Attributes
    ----------
    gates : ndarray of int
        Those with a part.
    """

    def __init__(self, A: ScaledGates, shares: np.ndarray, B: np.ndarray, kappa: float):
        self.A, self.kappa = A, kappa
        self.c = B.shape[1] // A.d
        self.gates = np.flatnonzero(shares)
        self.s, W = shares[self.gates], B[self.gates]
        self.W = W / np.sqrt(np.einsum("gk,gk->g", W, W))[:, None]

    @property
    def of_examples(self) -> bool:
        """Whether the matrix of the examples is the cheaper one."""
        return examples_work(self.A.n, len(self.gates)) <= features_work(self.A, self.gates)

    @property
    def factor_work(self) -> float:
        """Operations of the cheaper matrix and its factorisation."""
        return min(examples_work(self.A.n, len(self.gates)), features_work(self.A, self.gates))

    @property
    def product_work(self) -> float:
        """Operations of a product with the system."""
        return products_work(self.A.n, self.A.d, len(self.gates), self.c)

    @cached_property
    def _features(self) -> GatedOperator:
        """Of its gates."""
        A = self.A.operator
        return GatedOperator(A.X, np.ascontiguousarray(A.D[:, self.gates]))

    def forward(self, V: np.ndarray) -> np.ndarray:
        """A V, (n, c), for V of shape (gates, c d)."""
        A = self.A
        return A.scaled(self._features.forward(V.reshape(len(V), -1, A.d).transpose(0, 2, 1)))

    def adjoint(self, U: np.ndarray) -> np.ndarray:
        """A^T U / n, (gates, c d)."""
        A = self.A
        C = self._features.adjoint(U if A.root is None else U * A.root[:, None])
        return C.transpose(0, 2, 1).reshape(len(self.gates), -1) / A.n

    def product(self, U: np.ndarray) -> np.ndarray:
        """(I + kappa A M A^T) U."""
        s, W, C = self.s[:, None], self.W, self.adjoint(U)
        MC = s * C + (1 - s) * np.einsum("gk,gk->g", W, C)[:, None] * W
        return U + self.kappa * self.A.n * self.forward(MC)

    def inverse(self, dtype: Any = np.float64) -> Inverse:
        """(I + kappa A M A^T)^-1 as a function, from a factor of a type.

        Raises
        ------
        FloatingPointError
            If a matrix is singular to its precision.
        """
        if self.c == 1:
            return _by_examples(self, dtype) if self.of_examples else _by_features(self, dtype)
        several = _several_by_examples if self.of_examples else _several_by_features
        return several(self, dtype)


def examples_work(n: int, gates: int) -> float:
    """Operations of the matrix of the examples and its factorisation; infinite beyond memory."""
    return 2 * n**2 * gates + n**3 / 3 if n <= MOST_EXAMPLES else np.inf


def features_work(A: ScaledGates, gates: np.ndarray) -> float:
    """Operations of the matrix of features, of what is not known of it, and of its factor."""
    known = A.gram.known
    new = A.d * (len(gates) - np.count_nonzero(known[gates]))
    m = A.d * len(gates)
    return m**3 / 3 + 2 * m**2 + A.n * new * (A.d * np.count_nonzero(known) + new) / USES


def step_work(problem: GatedReLUProblem, gates: int | None = None) -> float:
    """Operations of a step of all outputs with so many gates, or all; infinite beyond memory.

    Its products and what the interpreter does are among them.
    """
    A, c = problem.operator, problem.n_outputs
    G = A.p if gates is None else gates
    m = G * A.d
    shared = isinstance(problem.regularizer.penalty, GatePenalty)
    ranks = 2 * c * G if shared and c > 1 else 0
    by_features = m**3 / 3 + (2 + ranks) * m**2 if m <= MOST_FEATURES else np.inf
    work = min(examples_work(A.n, G) + ranks * A.n**2, by_features) + STEP_OVERHEAD
    if shared:
        return work + products_work(A.n, A.d, G, c)
    return c * (work + products_work(A.n, A.d, G, 1))


def _by_examples(system: NewtonSystem, dtype: Any) -> Inverse:
    """With one output, from a factor (n, n)."""
    A, s, kappa = system.A, system.s, system.kappa
    N = A.outer(system.gates, kappa * s, dtype)
    roots = A.along(system.gates, system.W)[:, 0] * np.sqrt(kappa * (1 - s))
    syrk = linalg.blas.get_blas_funcs("syrk", (N,))
    N = syrk(1.0, roots.T, beta=1.0, c=N, trans=1, overwrite_c=1)
    N.flat[:: A.n + 1] += 1
    return _orthogonal(A, _factorised(N), 1)


def _several_by_examples(system: NewtonSystem, dtype: Any) -> Inverse:
    A, s, kappa, n = system.A, system.s, system.kappa, system.A.n
    N = A.outer(system.gates, kappa * s, dtype)
    N.flat[:: n + 1] += 1
    solve = _factorised(N)
    along = A.along(system.gates, system.W)
    back = solve(along.reshape(n, -1)).reshape(along.shape)
    ranks = _ranks(np.einsum("ncg,nch->gh", along, back, optimize=True), kappa * (1 - s))

    def inverse(Q: np.ndarray) -> np.ndarray:
        out = solve(Q)
        return out - back @ ranks(np.einsum("ncg,nc->g", along, out, optimize=True))

    return _orthogonal(A, inverse, system.c)


def _orthogonal(A: ScaledGates, inverse: Inverse, c: int) -> Inverse:
    """The inverse for centred features from that for others.

    What is orthogonal to the constant is inverse(G + constant mu^T) with such a mu.
    """
    if A.constant is None:
        return inverse
    constant = A.constant
    shifts = np.stack([inverse(np.outer(constant, e)) for e in np.eye(c)], axis=2)
    sums = np.einsum("n,nck->ck", constant, shifts)

    def centred(G: np.ndarray) -> np.ndarray:
        out = inverse(G)
        return out - shifts @ np.linalg.solve(sums, constant @ out)

    return centred


def _by_features(system: NewtonSystem, dtype: Any) -> Inverse:
    """With one output, from a factor of as many rows as the gates have features."""
    A, s, gates = system.A, system.s, len(system.gates)
    F = _features_matrix(system, dtype)
    _along(F, system.W, (1 - 1 / s) / (system.kappa * A.n))
    solve = _factorised(F.T)

    def inverse(Q: np.ndarray) -> np.ndarray:
        return Q - system.forward(solve(system.adjoint(Q).reshape(-1, 1)).reshape(gates, A.d))

    return inverse


def _features_matrix(system: NewtonSystem, dtype: Any) -> np.ndarray:
    """The lower triangle of F / n, but for the ranks.

    In units where A^T A is H = A^T A / n: kappa n for kappa, and sqrt(n) for A.
    """
    A = system.A
    H, places = A.gram.of(system.gates)
    m = A.d * len(places)
    F = np.empty((m, m), dtype)
    _fill(H, places, A.d, 1 / (system.kappa * A.n * system.s), F)
    return F


def _several_by_features(system: NewtonSystem, dtype: Any) -> Inverse:
    A, c, s, gates = system.A, system.c, system.s, len(system.gates)
    d, m = A.d, A.d * gates
    solve = _factorised(_features_matrix(system, dtype).T)
    H, places = A.gram.of(system.gates)
    W = system.W.reshape(gates, c, d).transpose(0, 2, 1)
    images = np.empty((m, c, gates))
    _images(H, places, d, W, images)
    back = solve(images.reshape(m, -1)).reshape(images.shape)
    # What is along w_g, of N^-1 a_g.
    own = -back
    for g, w in enumerate(W):
        own[g * d : (g + 1) * d, :, g] += w
    inner = np.einsum("mcg,mch->gh", own, images, optimize=True)
    ranks = _ranks(inner, system.kappa * A.n * (1 - s))

    def inverse(Q: np.ndarray) -> np.ndarray:
        P = system.adjoint(Q).reshape(gates, c, d).transpose(0, 2, 1).reshape(m, c)
        e = solve(P) + own @ ranks(np.einsum("mcg,mc->g", own, P, optimize=True))
        return Q - system.forward(e.reshape(gates, d, c).transpose(0, 2, 1).reshape(gates, -1))

    return inverse


def _factorised(M: np.ndarray) -> Inverse:
    """The inverse of a positive definite matrix as a function, in its precision.

    M is in the order of Fortran, written over, and only its upper triangle counts.
    """
    kind = "s" if M.dtype == np.float32 else "d"
    potrf, potrs = (getattr(linalg.lapack, f"{kind}{name}") for name in ("potrf", "potrs"))
    factor, failed = potrf(M, overwrite_a=1, clean=0)
    if failed:
        raise FloatingPointError("Newton's matrix is singular: scale X or Y.")

    def solve(b: np.ndarray) -> np.ndarray:
        x: np.ndarray = potrs(factor, b.astype(factor.dtype, copy=False))[0]
        return x.astype(b.dtype, copy=False)

    return solve


def _ranks(C: np.ndarray, weights: np.ndarray) -> Inverse:
    """(diag(1 / weights) + C)^-1 as a function; weights may be 0."""
    root = np.sqrt(weights)
    M = C * root * root[:, None]
    M.flat[:: len(M) + 1] += 1
    solve = _factorised(M.T)
    return lambda x: root * solve(root * x)


@numba.njit(cache=True, nogil=True)
def _fill(H, places, d, diagonal, F):  # type: ignore[no-untyped-def]
    """The lower triangle of the piece of H of some gates, plus a diagonal, one number a gate."""
    for g in range(len(places)):
        for i in range(d):
            row, source = F[g * d + i], H[places[g] * d + i]
            for h in range(g + 1):
                x = places[h] * d
                for k in range(d):
                    row[h * d + k] = source[x + k]
            row[g * d + i] += diagonal[g]


@numba.njit(cache=True, nogil=True)
def _along(F, W, factors):  # type: ignore[no-untyped-def]
    """Add factor_g w_g w_g^T to the blocks on the diagonal."""
    d = W.shape[1]
    for g in range(len(factors)):
        for i in range(d):
            for k in range(d):
                F[g * d + i, g * d + k] += factors[g] * W[g, i] * W[g, k]


@numba.njit(cache=True, nogil=True)
def _images(H, places, d, W, out):  # type: ignore[no-untyped-def]
    """out[:, :, g] = H w_g on the features of these gates."""
    for f in range(len(places)):
        for i in range(d):
            source = H[places[f] * d + i]
            for g in range(len(places)):
                x = places[g] * d
                for o in range(W.shape[2]):
                    total = 0.0
                    for k in range(d):
                        total += source[x + k] * W[g, k, o]
                    out[f * d + i, o, g] = total
