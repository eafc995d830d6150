"""Newton's directions on the dual of gated ReLU: (I + kappa A M A^T)^-1 times a gradient.

With M_g = s_g I + (1 - s_g) w_g w_g^T of gates g, w_g of length 1, and c outputs,

    I + kappa A M A^T = N x I + kappa sum_g (1 - s_g) a_g a_g^T,
    N = I + kappa sum_g s_g A_g A_g^T,    a_g = A_g w_g  (n, c).

N, the same for all outputs, is factorised as a matrix of the examples, or of the features of these
gates,

    N^-1 = I - A F^-1 A^T,    F = A^T A + diag(1 / (kappa s)),

and the rest, one rank for each gate, comes in by Woodbury's identity; with one output it is in the
matrix itself, F = A^T A + M^-1 / kappa. Large matrices of one output are factorised in single
precision, and an iteration or a few of conjugate gradients mend what that leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numba
import numpy as np
from scipy import linalg

from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.penalties import GatePenalty
from cvxdistill.solvers.problem import GatedReLUProblem
from cvxdistill.solvers.scaled_gates import ScaledGates

# Newton's steps that will use a Gram matrix that is formed.
USES = 8
# Of conjugate gradients: iterations, the share of the residual that may be left, and how many times
# dearer a factorisation must be.
ITERATIONS, RESIDUAL_LEFT, DEARER = 10, 0.1, 2.0
# What the interpreter does during an iteration, in operations of a matrix product, and what masks
# are worth, in columns of X.
OVERHEAD, MASKING = 3e6, 8
# Operations from which on single precision saves more than mending it costs, and the share of the
# residual that mending may leave.
LARGE, MENDED = 3e8, 1e-3
# Of matrices of about 0.5 and 1 GB.
MOST_EXAMPLES, MOST_FEATURES = 8000, 11_000

Inverse = Callable[[np.ndarray], np.ndarray]


def newton_direction(
    A: ScaledGates, shares: np.ndarray, B: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray:
    """(I + kappa A M A^T)^-1 G.

    Parameters
    ----------
    A : ScaledGates
    shares : ndarray of shape (p,)
        s_g; gates with 0 have no part.
    B : ndarray of shape (p, c d)
        Along w_g.
    G : ndarray of shape (n, c)
    kappa : float

    Returns
    -------
    ndarray of shape (n, c)

    Raises
    ------
    FloatingPointError
        If the matrix is singular to working precision.
    """
    gates = np.flatnonzero(shares)
    if len(gates) == 0:
        return G
    s, W = shares[gates], _directions(B[gates])
    if G.shape[1] == 1:
        return _inverse(A, gates, s, W, kappa, np.float64)(G)
    several = _several_by_examples if _of_examples(A, gates) else _several_by_features
    return several(A, gates, s, W, G, kappa)


def mended_direction(
    A: ScaledGates, shares: np.ndarray, B: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray | None:
    """What ``newton_direction`` returns for one output, from a factor in single precision.

    None if that is too rough for conjugate gradients to mend.
    """
    gates = np.flatnonzero(shares)
    s, W = shares[gates], _directions(B[gates])
    try:
        single = _inverse(A, gates, s, W, kappa, np.float32)
    except FloatingPointError:
        return None
    return conjugate_gradients(A, shares, B, G, kappa, MENDED, single)


def is_large(A: ScaledGates, shares: np.ndarray, c: int) -> bool:
    """Whether single precision saves more than mending it costs; with one output."""
    gates = np.flatnonzero(shares)
    return c == 1 and min(examples_work(A.n, len(gates)), features_work(A, gates)) > LARGE


def is_dear(A: ScaledGates, shares: np.ndarray, c: int) -> bool:
    """Whether a factorisation costs far more than some iterations of conjugate gradients."""
    gates = np.flatnonzero(shares)
    work = products_work(A.n, A.d, len(gates), c)
    dearest = DEARER * ITERATIONS * work
    return bool(min(examples_work(A.n, len(gates)), features_work(A, gates)) > dearest)


def products_work(n: int, d: int, gates: int, c: int) -> float:
    """Operations of a product with A and one with A^T, masks and the interpreter among them."""
    return 4 * n * (d + MASKING) * gates * c + OVERHEAD


def conjugate_gradients(
    A: ScaledGates,
    shares: np.ndarray,
    B: np.ndarray,
    G: np.ndarray,
    kappa: float,
    residual_left: float = RESIDUAL_LEFT,
    inverse: Inverse = lambda R: R,
) -> np.ndarray | None:
    """What ``newton_direction`` returns, roughly; None if some iterations are not enough for it.

    Without the inverse of a matrix like theirs they are as long as kappa is small: in the first
    steps, whose gates may not be the last ones'.
    """
    gates = np.flatnonzero(shares)
    if len(gates) == 0:
        return G
    some = GatedOperator(A.operator.X, np.ascontiguousarray(A.operator.D[:, gates]))
    s, W = shares[gates, None], _directions(B[gates])

    def product(U: np.ndarray) -> np.ndarray:
        """(I + kappa A M A^T) U."""
        rows = U if A.root is None else U * A.root[:, None]
        C = some.adjoint(rows).transpose(0, 2, 1).reshape(len(gates), -1)
        C = s * C + (1 - s) * np.einsum("gk,gk->g", W, C)[:, None] * W
        V = C.reshape(len(gates), -1, A.d).transpose(0, 2, 1)
        return U + kappa * A.scaled(some.forward(V))

    found, residual = np.zeros_like(G), G
    direction = inverse(G)
    inner, enough = float(np.vdot(G, direction)), residual_left * np.linalg.norm(G)
    for _ in range(ITERATIONS):
        image = product(direction)
        curvature = float(np.vdot(direction, image))
        if not (inner > 0 and curvature > 0):  # The inverse is too rough.
            return None
        step = inner / curvature
        found = found + step * direction
        residual = residual - step * image
        if np.linalg.norm(residual) <= enough:
            return found
        ahead = inverse(residual)
        past, inner = inner, float(np.vdot(residual, ahead))
        direction = ahead + (inner / past) * direction
    return None


def _directions(W: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    return W / np.sqrt(np.einsum("gk,gk->g", W, W))[:, None]


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
    """Operations of a step of all outputs with so many gates, or all; infinite beyond memory."""
    A, c = problem.operator, problem.n_outputs
    G = A.p if gates is None else gates
    m = G * A.d
    shared = isinstance(problem.regularizer.penalty, GatePenalty)
    ranks = 2 * c * G if shared and c > 1 else 0
    by_features = m**3 / 3 + (2 + ranks) * m**2 if m <= MOST_FEATURES else np.inf
    work = min(examples_work(A.n, G) + ranks * A.n**2, by_features)
    return work if shared else c * work


def _of_examples(A: ScaledGates, gates: np.ndarray) -> bool:
    """Whether the matrix of the examples is the cheaper one."""
    return examples_work(A.n, len(gates)) <= features_work(A, gates)


def _inverse(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, kappa: float, dtype: Any
) -> Inverse:
    """(I + kappa A M A^T)^-1 with one output, from a factor of a type."""
    make = _by_examples if _of_examples(A, gates) else _by_features
    return make(A, gates, s, W, kappa, dtype)


def _by_examples(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, kappa: float, dtype: Any
) -> Inverse:
    """With one output, from a factor (n, n)."""
    N = A.outer(gates, kappa * s, dtype)
    roots = A.along(gates, W)[:, 0] * np.sqrt(kappa * (1 - s))
    syrk = linalg.blas.get_blas_funcs("syrk", (N,))
    N = syrk(1.0, roots.T, beta=1.0, c=N, trans=1, overwrite_c=1)
    N.flat[:: A.n + 1] += 1
    return partial(_orthogonal, A, _factorised(N))


def _several_by_examples(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray:
    n = len(G)
    N = A.outer(gates, kappa * s, np.float64)
    N.flat[:: n + 1] += 1
    solve = _factorised(N)
    along = A.along(gates, W)
    back = solve(along.reshape(n, -1)).reshape(along.shape)
    ranks = _ranks(np.einsum("ncg,nch->gh", along, back, optimize=True), kappa * (1 - s))

    def inverse(Q: np.ndarray) -> np.ndarray:
        out = solve(Q)
        return out - back @ ranks(np.einsum("ncg,nc->g", along, out, optimize=True))

    return _orthogonal(A, inverse, G)


def _orthogonal(A: ScaledGates, inverse: Inverse, G: np.ndarray) -> np.ndarray:
    """The solution for centred features from the inverse for others.

    What is orthogonal to the constant is inverse(G + constant mu^T) with such a mu.
    """
    out = inverse(G)
    if A.constant is None:
        return out
    shifts = np.stack([inverse(np.outer(A.constant, e)) for e in np.eye(G.shape[1])], axis=2)
    sums = np.einsum("n,nck->ck", A.constant, shifts)
    return out - shifts @ np.linalg.solve(sums, A.constant @ out)


def _by_features(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, kappa: float, dtype: Any
) -> Inverse:
    """With one output, from a factor of as many rows as the gates have features."""
    d, m = A.d, A.d * len(gates)
    F = _features_matrix(A, gates, s, kappa, dtype)
    _along(F, W.reshape(len(gates), d), (1 - 1 / s) / (kappa * A.n))
    solve = _factorised(F.T)

    def inverse(Q: np.ndarray) -> np.ndarray:
        V = np.zeros((A.p, d))
        V[gates] = solve(A.adjoint(Q, gates).reshape(m, 1)).reshape(len(gates), d)
        return Q - A.forward(V)

    return inverse


def _features_matrix(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, kappa: float, dtype: Any
) -> np.ndarray:
    """The lower triangle of F / n, but for the ranks.

    In units where A^T A is H = A^T A / n: kappa n for kappa, and sqrt(n) for A.
    """
    H, places = A.gram.of(gates)
    m = A.d * len(gates)
    F = np.empty((m, m), dtype)
    _fill(H, places, A.d, 1 / (kappa * A.n * s), F)
    return F


def _several_by_features(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray:
    n, c = G.shape
    d, m = A.d, A.d * len(gates)
    solve = _factorised(_features_matrix(A, gates, s, kappa, np.float64).T)
    H, places = A.gram.of(gates)
    W = W.reshape(len(gates), c, d).transpose(0, 2, 1)
    images = np.empty((m, c, len(gates)))
    _images(H, places, d, W, images)
    back = solve(images.reshape(m, -1)).reshape(images.shape)
    # What is along w_g, of N^-1 a_g.
    own = -back
    for g, w in enumerate(W):
        own[g * d : (g + 1) * d, :, g] += w
    ranks = _ranks(np.einsum("mcg,mch->gh", own, images, optimize=True), kappa * n * (1 - s))
    P = A.adjoint(G, gates).reshape(len(gates), c, d).transpose(0, 2, 1).reshape(m, c)
    e = solve(P) + own @ ranks(np.einsum("mcg,mc->g", own, P, optimize=True))
    V = np.zeros((A.p, c * d))
    V[gates] = e.reshape(len(gates), d, c).transpose(0, 2, 1).reshape(len(gates), -1)
    return G - A.forward(V)


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
    factor = linalg.cho_factor(M, check_finite=False)
    return lambda x: root * linalg.cho_solve(factor, root * x, check_finite=False)


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
