"""Newton's directions on the dual of gated ReLU: (I + kappa A M A^T)^-1 times a gradient.

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
# Of matrices of about 0.5 and 1 GB.
MOST_EXAMPLES, MOST_FEATURES = 8000, 11_000


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
    s, W = shares[gates], B[gates]
    W /= np.sqrt(np.einsum("gk,gk->g", W, W))[:, None]
    if examples_work(A.n, len(gates)) <= features_work(A, gates):
        return _by_examples(A, gates, s, W, G, kappa)
    return _by_features(A, gates, s, W, G, kappa)


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
    A: ScaledGates, shares: np.ndarray, B: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray | None:
    """What ``newton_direction`` returns, roughly; None if some iterations are not enough for it.

    They are as long as kappa is small: in the first steps, whose gates may not be the last ones'.
    """
    gates = np.flatnonzero(shares)
    if len(gates) == 0:
        return G
    some = GatedOperator(A.operator.X, np.ascontiguousarray(A.operator.D[:, gates]))
    s, W = shares[gates, None], B[gates]
    W = W / np.sqrt(np.einsum("gk,gk->g", W, W))[:, None]

    def product(U: np.ndarray) -> np.ndarray:
        """(I + kappa A M A^T) U."""
        rows = U if A.root is None else U * A.root[:, None]
        C = some.adjoint(rows).transpose(0, 2, 1).reshape(len(gates), -1)
        C = s * C + (1 - s) * np.einsum("gk,gk->g", W, C)[:, None] * W
        V = C.reshape(len(gates), -1, A.d).transpose(0, 2, 1)
        return U + kappa * A.scaled(some.forward(V))

    found, residual = np.zeros_like(G), G
    direction, square = G, float(np.vdot(G, G))
    enough = RESIDUAL_LEFT**2 * square
    for _ in range(ITERATIONS):
        image = product(direction)
        step = square / float(np.vdot(direction, image))
        found = found + step * direction
        residual = residual - step * image
        past, square = square, float(np.vdot(residual, residual))
        if square <= enough:
            return found
        direction = residual + (square / past) * direction
    return None


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


def _by_examples(
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray:
    n, c = G.shape
    N = A.outer(gates, kappa * s)
    along = A.along(gates, W)
    if c == 1:
        roots = along[:, 0] * np.sqrt(kappa * (1 - s))
        N = linalg.blas.dsyrk(1.0, roots.T, beta=1.0, c=N, trans=1, overwrite_c=1)
    N.flat[:: n + 1] += 1
    if c == 1:
        return _orthogonal(A, _factorised(N), G)
    solve = _factorised(N)
    back = solve(along.reshape(n, -1)).reshape(along.shape)
    ranks = _ranks(np.einsum("ncg,nch->gh", along, back, optimize=True), kappa * (1 - s))

    def inverse(Q: np.ndarray) -> np.ndarray:
        out = solve(Q)
        return out - back @ ranks(np.einsum("ncg,nc->g", along, out, optimize=True))

    return _orthogonal(A, inverse, G)


def _orthogonal(
    A: ScaledGates, inverse: Callable[[np.ndarray], np.ndarray], G: np.ndarray
) -> np.ndarray:
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
    A: ScaledGates, gates: np.ndarray, s: np.ndarray, W: np.ndarray, G: np.ndarray, kappa: float
) -> np.ndarray:
    n, c = G.shape
    d, m = A.d, A.d * len(gates)
    # In units where A^T A is H = A^T A / n: kappa n for kappa, and sqrt(n) for A.
    H, places = A.gram.of(gates)
    F = np.empty((m, m))
    _fill(H, places, d, 1 / (kappa * n * s), F)
    W = W.reshape(len(gates), c, d).transpose(0, 2, 1)
    P = A.adjoint(G, gates).reshape(len(gates), c, d).transpose(0, 2, 1).reshape(m, c)
    if c == 1:
        _along(F, W[:, :, 0], (1 - 1 / s) / (kappa * n))
        e = _factorised(F.T)(P)
    else:
        solve = _factorised(F.T)
        images = np.empty((m, c, len(gates)))
        _images(H, places, d, W, images)
        back = solve(images.reshape(m, -1)).reshape(images.shape)
        # What is along w_g, of N^-1 a_g.
        own = -back
        for g, w in enumerate(W):
            own[g * d : (g + 1) * d, :, g] += w
        ranks = _ranks(np.einsum("mcg,mch->gh", own, images, optimize=True), kappa * n * (1 - s))
        e = solve(P) + own @ ranks(np.einsum("mcg,mc->g", own, P, optimize=True))
    V = np.zeros((A.p, c * d))
    V[gates] = e.reshape(len(gates), d, c).transpose(0, 2, 1).reshape(len(gates), -1)
    return G - A.forward(V)


def _factorised(M: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The inverse of a positive definite matrix as a function.

    M is in the order of Fortran, written over, and only its upper triangle counts.
    """
    factor, failed = linalg.lapack.dpotrf(M, overwrite_a=1, clean=0)
    if failed:
        raise FloatingPointError("Newton's matrix is singular: scale X or Y.")

    def solve(b: np.ndarray) -> np.ndarray:
        x: np.ndarray = linalg.lapack.dpotrs(factor, b)[0]
        return x

    return solve


def _ranks(C: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
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
