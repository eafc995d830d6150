"""Moving a residual on to the dual constraints, to first order, instead of shrinking it into them.

At the optimum R°(C_g) = alpha for every group g of weights that is not zero. With the polar
directions U_g, <U_g, C_g> = R°(C_g), their predictions T_g = A U_g, and H = n times the Hessian of
the loss where the residual is R, the move delta = H sum_g t_g T_g of the groups that are active or
violated takes the lengths w_g = R(W_g) of the weights to w_g - t_g along these directions, where

    t minimises 1/2 t^T (T^T H T / n) t - sum_g (alpha - R°(C_g)) t_g   subject to t_g <= w_g.

Where no bound holds R°(C_g) = alpha to first order, and delta is the shortest such move in the
metric of H^-1, which keeps the residual inside the domain of the loss's conjugate; groups that are
on their way out stop at zero instead of being held at alpha. What is left is of second order, as is
the error of the objective; scaling alone leaves a gap of first order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import LinAlgError, lapack, solve_triangular
from scipy.optimize import nnls

from cvxdistill.solvers.penalties import NuclearPenalty, Regularizer
from cvxdistill.solvers.relu_operator import ReLUOperator

if TYPE_CHECKING:
    from cvxdistill.solvers.problem import ConvexProblem

# Entries of the linear systems beyond which there is no correction: 0.5 GB.
MOST_GRAM_ENTRIES = 2**26


def residual_correction(
    problem: ConvexProblem, alpha: float, R: np.ndarray, C: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """The move delta (n, c) of the residual R, and the weights that it leads to.

    None where there is nothing to correct.

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
    found = _directions(problem.regularizer, alpha, C, W)
    if found is None:
        return None
    blocks, U, excess, lengths, chosen = found
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
    # Columns of these are systems of their own.
    if not per_output:
        systems = [np.sum(list(grams.values()), axis=0)]
    elif not coupled:
        systems = list(grams.values())
    else:
        c = C.shape[2]
        systems = [np.block([[grams[k, m] for m in range(c)] for k in range(c)])]
    due, bounds, on = (a.T.reshape(len(systems), -1).T for a in (excess, lengths, chosen))
    t = np.zeros_like(due)
    try:
        for k in range(len(systems)):
            mine = np.flatnonzero(on[:, k])
            if len(mine) == 0:
                continue
            system = _regularized(systems[k][np.ix_(mine, mine)] / problem.operator.n, R)
            t[mine, k] = solve_bounded(system, due[mine, k], bounds[mine, k])
    except (LinAlgError, RuntimeError):  # not positive definite but for rounding, or no end
        return None
    t = t.T.reshape(excess.T.shape).T
    move = problem.zeros()
    np.add.at(move, blocks, U * _columns_of(t, U))
    delta = _apply(H, problem.forward(move))
    if pulls is not None:
        shift = pulls @ delta.sum(axis=0, dtype=np.float64)
        delta -= _apply(H, np.broadcast_to(shift.astype(R.dtype), R.shape))
    if np.isinf(lengths).any():
        return delta, W
    moved = problem.zeros()
    moved[blocks] = U * _columns_of(np.where(chosen, lengths - t, 0), U)
    return delta, moved


def solve_bounded(G: np.ndarray, e: np.ndarray, w: np.ndarray) -> np.ndarray:
    """argmin of 1/2 t^T G t - e^T t subject to t <= w, for positive definite G of shape (m, m).

    G^-1 e where that is within the bounds; non-negative least squares in w - t and a Cholesky
    factor of G otherwise.

    Raises
    ------
    LinAlgError
        If G is not positive definite.
    RuntimeError
        If non-negative least squares do not end.
    """
    # LAPACK itself: SciPy's checks would take longer than small systems, of which there are many.
    L, t, failed = lapack.dposv(G, e, lower=1)
    if failed:
        raise LinAlgError("The system is not positive definite.")
    if (t <= w).all():
        return t
    L = np.tril(L)
    rest, _ = nnls(L.T, solve_triangular(L, G @ w - e, lower=True), maxiter=10 * len(e) + 100)
    return w - rest


def _columns_of(t: np.ndarray, U: np.ndarray) -> np.ndarray:
    """Factors t (m,) or (m, c) in a shape and type that multiply U (m, d, c)."""
    return t.reshape(len(U), 1, -1).astype(U.dtype)


def _directions(
    regularizer: Regularizer, alpha: float, C: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """What active or violated groups bound: directions U_m, and how far <U_m, C> is from its due.

    Returns
    -------
    blocks : ndarray of int, shape (m,)
        The block of each direction.
    U : ndarray of shape (m, d, c)
    excess : ndarray of shape (m,), or (m, c) for groups that are outputs of blocks
    lengths : ndarray of the same shape
        R(W_g); infinite for directions that are not of a group each.
    chosen : ndarray of bool, of the same shape
        Which groups are active or violated; the others may share a block with one.
    """
    if regularizer.l1_ratio == 1 and isinstance(regularizer.penalty, NuclearPenalty):
        return _singular_directions(alpha, C, W)
    polar = regularizer.polar(C)
    if polar is None:
        return None
    norms, U = polar
    axes = 1 if norms.ndim == 2 else (1, 2)
    lengths = np.sqrt(np.sum(W * W, axis=axes, dtype=np.float64))
    wanted = (norms > alpha) | (lengths > 0)
    blocks = np.flatnonzero(wanted.any(axis=1) if norms.ndim == 2 else wanted)
    excess = (alpha - norms[blocks]).astype(np.float64)
    return blocks, U[blocks], excess, lengths[blocks], wanted[blocks]


def _singular_directions(
    alpha: float, C: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    m = len(blocks)
    unbounded, all_of_them = np.full(m, np.inf), np.ones(m, dtype=bool)
    return np.array(blocks, dtype=int), stacked, np.array(excess), unbounded, all_of_them


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
    weighted = not diagonal or not (H == 1).all()
    pairs = [(k, m) for k in range(c) for m in range(c) if k == m or not diagonal]

    def work(row_blocks: list[slice]) -> tuple[np.ndarray, np.ndarray]:
        grams, totals = np.zeros((len(pairs), m, m)), np.zeros((c, c, m))
        for rows in row_blocks:
            T = np.ascontiguousarray(A.contributions(U, blocks, rows).transpose(2, 0, 1))
            for index, (k, other) in enumerate(pairs):
                HT = T[other]
                if weighted:
                    HT = (H[rows, k] if diagonal else H[rows, k, other])[:, None] * HT
                grams[index] += T[k].T @ HT
                if pulls is not None:
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


def _regularized(gram: np.ndarray, like: np.ndarray) -> np.ndarray:
    """A positive semidefinite matrix, with a ridge of the order of what rounding leaves."""
    ridge = np.finfo(like.dtype).eps ** 0.75 * np.trace(gram) / max(len(gram), 1)
    return gram + max(ridge, 1e-300) * np.eye(len(gram))
