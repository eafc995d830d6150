"""Moving a residual on to the dual constraints, to first order, instead of shrinking it into them.

At the optimum R°(C_g) = alpha for every group g of weights that is not zero. With the polar
directions U_g, <U_g, C_g> = R°(C_g), their predictions T_g = A U_g, and H = n times the Hessian of
the loss where the residual is R, the move delta = H sum_g t_g T_g of least length in the metric of
H^-1 that makes R°(C_g) = alpha to first order, for the groups that are active or violated, solves

    (T^T H T / n) t = alpha - R°(C).

What is left is of second order, as is the error of the objective; scaling alone leaves a gap of
first order. The metric keeps the residual inside the domain of the loss's conjugate, to first
order too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import LinAlgError, solve

from cvxdistill.solvers.penalties import NuclearPenalty, Regularizer
from cvxdistill.solvers.relu_operator import ReLUOperator

if TYPE_CHECKING:
    from cvxdistill.solvers.problem import ConvexProblem

# Entries of the linear systems beyond which there is no correction: 0.5 GB.
MOST_GRAM_ENTRIES = 2**26


def residual_correction(
    problem: ConvexProblem, alpha: float, R: np.ndarray, C: np.ndarray, W: np.ndarray
) -> np.ndarray | None:
    """The move delta (n, c) of the residual R; None where there is nothing to correct.

    That is for blended penalties, whose gap is of second order already, for penalties whose
    groups are not gates or their outputs, and where the systems would not fit in memory.

    Parameters
    ----------
    problem : ConvexProblem
    alpha : float
    R : ndarray of shape (n, c)
    C : ndarray of shape (blocks, d, c)
        A^T R / n; for ReLU networks with the multipliers' share added.
    W : ndarray of shape (blocks, d, c)
        Weights; what is not zero there counts as active.
    """
    directions = _directions(problem.regularizer, alpha, C, W)
    if directions is None:
        return None
    blocks, U, excess, chosen = directions
    per_output = excess.ndim == 2
    H = problem.loss.hessian(R)
    coupled = H.ndim == 3 or not per_output
    entries = (len(blocks) * C.shape[2]) ** 2 if H.ndim == 3 else C.shape[2] * len(blocks) ** 2
    if len(blocks) == 0 or entries > MOST_GRAM_ENTRIES:
        return None
    pulls = None
    if problem.fit_intercept:
        # Of the multinomial loss one singular value is 0 but for rounding.
        rounding = float(np.finfo(R.dtype).eps) ** 0.75
        pulls = np.linalg.pinv(_sum_of_rows(H), rcond=rounding, hermitian=True)
    grams = _contribution_grams(problem, U, blocks, H, pulls)
    t = np.zeros_like(excess)
    try:
        if not per_output:
            together = np.sum(list(grams.values()), axis=0)
            t[:] = _solve_regularized(together / problem.operator.n, excess, R)
        elif not coupled:
            for (k, _), gram in grams.items():
                on = np.flatnonzero(chosen[:, k])
                system = gram[np.ix_(on, on)] / problem.operator.n
                t[on, k] = _solve_regularized(system, excess[on, k], R)
        else:
            c = C.shape[2]
            whole = np.block([[grams[k, m] for m in range(c)] for k in range(c)])
            on = np.flatnonzero(chosen.T.ravel())
            flat = np.zeros(chosen.size)
            system = whole[np.ix_(on, on)] / problem.operator.n
            flat[on] = _solve_regularized(system, excess.T.ravel()[on], R)
            t = flat.reshape(c, -1).T
    except LinAlgError:
        return None
    move = problem.zeros()
    np.add.at(move, blocks, U * t.reshape(len(blocks), 1, -1).astype(U.dtype))
    delta = _apply(H, problem.forward(move))
    if pulls is not None:
        shift = pulls @ delta.sum(axis=0, dtype=np.float64)
        delta -= _apply(H, np.broadcast_to(shift.astype(R.dtype), R.shape))
    return delta


def _directions(
    regularizer: Regularizer, alpha: float, C: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """What active or violated groups bound: directions U_m, and how far <U_m, C> is from its due.

    Returns
    -------
    blocks : ndarray of int, shape (m,)
        The block of each direction.
    U : ndarray of shape (m, d, c)
    excess : ndarray of shape (m,), or (m, c) for groups that are outputs of blocks
    chosen : ndarray of bool, of the same shape
        Which groups are active or violated; the others may share a block with one.
    """
    if regularizer.l1_ratio == 1 and isinstance(regularizer.penalty, NuclearPenalty):
        return _singular_directions(alpha, C, W)
    polar = regularizer.polar(C)
    if polar is None:
        return None
    norms, U = polar
    per_output = norms.ndim == 2
    wanted = (norms > alpha) | W.any(axis=1 if per_output else (1, 2))
    blocks = np.flatnonzero(wanted.any(axis=1) if per_output else wanted)
    return blocks, U[blocks], (alpha - norms[blocks]).astype(np.float64), wanted[blocks]


def _singular_directions(
    alpha: float, C: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Directions that fix the leading singular values of each C_j, as many as W_j has rank.

    At the optimum these are all alpha. Singular values so close move like the eigenvalues of the
    symmetric part of A_r^T C_j B_r, all of which is made alpha I: u_a v_a^T for its diagonal and
    (u_a v_b^T + u_b v_a^T) / sqrt(2) beside it.
    """
    A, S, Bt = np.linalg.svd(C, full_matrices=False)
    sizes = np.linalg.svd(W, compute_uv=False)
    rounding = sizes.max(axis=1, keepdims=True) * np.finfo(W.dtype).eps ** 0.75
    ranks = np.maximum((alpha < S).sum(axis=1), (sizes > rounding).sum(axis=1))
    blocks, U, excess = [], [], []
    for j, rank in enumerate(ranks):
        for a in range(rank):
            for b in range(a, rank):
                pair = np.outer(A[j, :, a], Bt[j, b])
                other = np.outer(A[j, :, b], Bt[j, a])
                blocks.append(j)
                U.append(pair if a == b else (pair + other) * np.asarray(0.5**0.5, C.dtype))
                excess.append(alpha - float(S[j, a]) if a == b else 0.0)
    stacked = np.array(U, dtype=C.dtype).reshape(-1, *C.shape[1:])
    return np.array(blocks, dtype=int), stacked, np.array(excess), np.ones(len(U), dtype=bool)


def _apply(H: np.ndarray, T: np.ndarray) -> np.ndarray:
    """H T for T (n, c) and H diagonal (n, c) or (n, c, c)."""
    return H * T if H.ndim == 2 else np.einsum("nkl,nl->nk", H, T)


def _sum_of_rows(H: np.ndarray) -> np.ndarray:
    """1^T H 1 as a matrix (c, c)."""
    total = H.sum(axis=0, dtype=np.float64)
    return np.diag(total) if total.ndim == 1 else total


def _contribution_grams(
    problem: ConvexProblem,
    U: np.ndarray,
    blocks: np.ndarray,
    H: np.ndarray,
    pulls: np.ndarray | None,
) -> dict[tuple[int, int], np.ndarray]:
    """T_k^T H_kl T_l for outputs k and l, with T_k (n, m) what the blocks add to output k.

    Only pairs that H couples are there; with an intercept the part along constants is taken out.
    """
    A = problem.operator
    m, c = len(blocks), U.shape[2]
    diagonal = H.ndim == 2
    pairs = [(k, m) for k in range(c) for m in range(c) if k == m or not diagonal]

    def work(row_blocks: list[slice]) -> tuple[np.ndarray, np.ndarray]:
        grams, totals = np.zeros((len(pairs), m, m)), np.zeros((c, c, m))
        for rows in row_blocks:
            T = np.ascontiguousarray(A.contributions(U, blocks, rows).transpose(2, 0, 1))
            for index, (k, other) in enumerate(pairs):
                h = H[rows, k] if diagonal else H[rows, k, other]
                HT = h[:, None] * T[other]
                grams[index] += T[k].T @ HT
                totals[k, other] += HT.sum(axis=0, dtype=np.float64)
        return grams, totals

    gated = A.gated if isinstance(A, ReLUOperator) else A
    (grams, totals), *others = gated.for_row_blocks(work, m * c)
    for other_grams, other_totals in others:
        grams += other_grams
        totals += other_totals
    if pulls is not None:
        # totals[k, l] is 1^T H_kl T_l: what output l's contributions pull on constant k.
        for index, (k, other) in enumerate(pairs):
            grams[index] -= np.einsum("am,ab,bl->ml", totals[:, k], pulls, totals[:, other])
    return dict(zip(pairs, grams, strict=True))


def _solve_regularized(gram: np.ndarray, rhs: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Solve a positive semidefinite system, with a ridge of the order of what rounding leaves."""
    if len(gram) == 0:
        return rhs
    ridge = np.finfo(like.dtype).eps ** 0.75 * np.trace(gram) / len(gram)
    return solve(gram + max(ridge, 1e-300) * np.eye(len(gram)), rhs, assume_a="pos")
