"""The cones K_j = {w : S_j X w >= 0}, S_j = 2 diag(D[:, j]) - I, of the convex ReLU programme.

How far weights are outside them, the projection onto them, directions inside them, and shifts
into them. Weights are in the units of X, of shape (p, d, c), or (2p, d, c) with the blocks of V
followed by those of U, which share the p patterns of D.
"""

from __future__ import annotations

import numpy as np

from cvxdistill.solvers.cone_projection import gather_rows, project, signed_scores, unit_rows
from cvxdistill.solvers.gated_operator import empty_weights, flat_weights
from cvxdistill.solvers.rows import RowSource, check_rows

# Cones of smaller margin have no interior for our purposes; gates of this margin are kept.
SMALLEST_MARGIN, CLEAR_MARGIN = 1e-9, 1e-5


def cone_violations(X: RowSource, D: np.ndarray, W: np.ndarray) -> np.ndarray:
    """How far each column w of W lies outside its cone: max_i [-s_i x_i.w]_+ / (||x_i|| ||w||).

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    W : ndarray of shape (p, d, c) or (2p, d, c)

    Returns
    -------
    ndarray of shape (blocks, c)
        Between 0 and 1; 0 for w = 0. Rows of zeros do not count.

    Raises
    ------
    ValueError, TypeError
        If shapes or types do not fit or values are not finite.
    """
    X, D = _check_patterns(X, D)
    W = _check_weights(W, X, D)
    flat = unit_rows(flat_weights(W).astype(np.float64))
    gates = np.repeat(np.arange(len(W)) % D.shape[1], W.shape[2])
    worst = np.zeros(len(flat))
    for _, T in signed_scores(X, D, flat, gates):
        np.maximum(worst, -T.min(axis=1), out=worst)
    return worst.reshape(len(W), W.shape[2]) + 0.0  # no negative zeros


def project_onto_cones(X: RowSource, D: np.ndarray, W: np.ndarray) -> np.ndarray:
    """The nearest weights whose columns all lie in their cones: those of ``cone_projection``."""
    X, D = _check_patterns(X, D)
    return _projected_columns(X, D, _check_weights(W, X, D))[0]


def cone_projection(X: RowSource, D: np.ndarray, W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean projection of each column w of W onto its cone, and its multipliers.

    argmin over v of 1/2 ||v - w||^2 subject to S_j X v >= 0  is  v = w + (S_j X)^T lambda  with
    lambda >= 0 and lambda (S_j X v) = 0: a non-negative least squares problem in lambda, solved
    by an active set on the rows that matter, which are added as the projection violates them.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    W : ndarray of shape (p, d, c) or (2p, d, c)
        Columns inside their cones are returned as they are.

    Returns
    -------
    W : ndarray of the same shape and dtype, memory ordered (blocks, c, d)
        Its violation (in float64) is at most about 1e-12.
    multipliers : ndarray of shape (n, blocks c)
        lambda, column (j c + k) for output k of block j.

    Raises
    ------
    ValueError, TypeError
        If shapes or types do not fit or values are not finite.

    References
    ----------
    Lawson and Hanson 1974, chapter 23 (non-negative least squares).
    """
    X, D = _check_patterns(X, D)
    out, active, multipliers = _projected_columns(X, D, _check_weights(W, X, D))
    dense = np.zeros((X.shape[0], len(active)))
    needed = np.unique(np.concatenate(active))
    norms = np.linalg.norm(gather_rows(X, needed).astype(np.float64), axis=1)
    for column, (rows, values) in enumerate(zip(active, multipliers, strict=True)):
        dense[rows, column] = values / norms[np.searchsorted(needed, rows)]
    return out, dense


def interior_directions(
    X: RowSource, D: np.ndarray, G: np.ndarray | None = None, *, best: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """A unit vector strictly inside each cone, and its margin.

    That of the gate where its margin min_i s_i x_i.g / (||x_i|| ||g||) is at least 1e-5, and
    otherwise the direction of largest margin, h / ||h|| with

        minimise 1/2 ||h||^2  subject to  s_i x_i.h / ||x_i|| >= 1   for all i,

    which is the projection of (0, -1) onto {(h, t) : s_i x_i.h / ||x_i|| + t >= 0}, up to length.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    G : ndarray of shape (d, p), optional
        Gates that have these patterns.
    best : bool, default=False
        Take the largest margin for every gate.

    Returns
    -------
    H : ndarray of shape (d, p)
        Columns of length 1, or of zeros where the cone has no interior.
    margins : ndarray of shape (p,)
        min_i s_i x_i.h / ||x_i|| over the rows that are not zero; 0 where the cone has no interior
        (a margin of less than 1e-9).

    Raises
    ------
    ValueError, TypeError
        If shapes or types do not fit or values are not finite.

    References
    ----------
    Lawson and Hanson 1974, chapter 23 (least distance programming).
    """
    X, D = _check_patterns(X, D)
    d, p = X.shape[1], D.shape[1]
    H = np.zeros((p, d))
    if G is not None:
        G = np.asarray(G)
        if G.shape != (d, p):
            raise ValueError(
                f"G must have shape {(d, p)}, one gate without bias for each column of D, "
                f"got {G.shape}."
            )
        if not np.isfinite(G).all():
            raise ValueError("G contains NaN or infinity.")
        H = unit_rows(np.ascontiguousarray(G.T, dtype=np.float64))
    margins = _margins(X, D, H, np.arange(p)) if G is not None else np.zeros(p)
    search = np.flatnonzero(best | (margins < CLEAR_MARGIN))
    if len(search) == 0:
        return np.ascontiguousarray(H.T), margins
    start = np.zeros((len(search), d + 1))
    start[:, d] = -1.0
    hint = np.hstack([H[search], np.zeros((len(search), 1))])
    found = project(X, D, start, search, lifted=True, hint=hint)[0]
    h = unit_rows(found[:, :d])
    h[(found[:, d] < 0) & ~h.any(axis=1), 0] = 1  # no row is against any direction
    widest = _margins(X, D, h, search)
    better = widest > np.maximum(margins[search], 0)
    H[search[better]], margins[search[better]] = h[better], widest[better]
    empty = margins < SMALLEST_MARGIN
    H[empty], margins[empty] = 0, 0
    return np.ascontiguousarray(H.T), margins


def shift_into_cones(
    X: RowSource, D: np.ndarray, V: np.ndarray, U: np.ndarray, H: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the smallest t h_j, t >= 0, to a column of V and to that of U that brings both into K_j.

    Their difference, and so what the pair predicts in the gated programme, stays what it is.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    V, U : ndarray of shape (p, d, c)
    H : ndarray of shape (d, p)
        A direction inside each cone, from ``interior_directions``.

    Returns
    -------
    V, U : ndarray of shape (p, d, c)
    t : ndarray of shape (p, c)

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, or a gate needs a shift and its column of H is
        not inside its cone.
    """
    X, D = _check_patterns(X, D)
    V, U = (_check_weights(A, X, D) for A in (V, U))
    p, d, c = V.shape
    H = np.asarray(H)
    if V.shape != U.shape or p != D.shape[1] or H.shape != (d, p):
        raise ValueError(
            f"V and U must have shape (p, d, c) and H (d, p), with (d, p) = {d, D.shape[1]}, got "
            f"{V.shape}, {U.shape} and {H.shape}."
        )
    gates = np.arange(p)
    pair = np.concatenate([flat_weights(V), flat_weights(U)]).astype(np.float64)
    t = np.zeros(2 * p * c)
    inside = np.ascontiguousarray(H.T, dtype=np.float64)
    for rows, T in signed_scores(X, D, pair, np.tile(np.repeat(gates, c), 2)):
        reach = next(signed_scores(X[rows], D[rows], inside, gates))[1]
        reach = np.tile(np.repeat(reach, c, axis=0), (2, 1))
        need = np.zeros_like(T)
        with np.errstate(divide="ignore"):
            np.divide(-T, np.maximum(reach, 0), out=need, where=T < 0)
        np.maximum(t, need.max(axis=1), out=t)
    t = t.reshape(2, p, c).max(axis=0)
    if not np.isfinite(t).all():
        j = int(np.flatnonzero(~np.isfinite(t).all(axis=1))[0])
        raise ValueError(
            f"Column {j} of H is not inside the cone of gate {j}: nothing to shift by."
        )
    shift = (H.T[:, :, None] * t[:, None, :]).astype(V.dtype)
    return V + shift, U + shift, t


def _projected_columns(
    X: RowSource, D: np.ndarray, W: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Projected weights; for each column its active rows and their multipliers, at length 1."""
    blocks, d, c = W.shape
    gates = np.repeat(np.arange(blocks) % D.shape[1], c)
    projected, active, multipliers = project(X, D, flat_weights(W).astype(np.float64), gates)
    out = empty_weights(blocks, d, c, W.dtype)
    out.transpose(0, 2, 1)[...] = projected.reshape(blocks, c, d)
    return out, active, multipliers


def _check_patterns(X: RowSource, D: np.ndarray) -> tuple[RowSource, np.ndarray]:
    X = check_rows(X)
    D = np.asarray(D)
    if D.dtype != np.bool_:
        raise TypeError(f"D must be boolean, got dtype {D.dtype}.")
    if D.ndim != 2 or D.shape[0] != X.shape[0] or D.shape[1] == 0:
        raise ValueError(f"D must have shape ({X.shape[0]}, p) with p >= 1, got {D.shape}.")
    return X, D


def _check_weights(W: np.ndarray, X: RowSource, D: np.ndarray) -> np.ndarray:
    W, p, d = np.asarray(W), D.shape[1], X.shape[1]
    if W.ndim != 3 or W.shape[0] not in (p, 2 * p) or W.shape[1] != d or W.shape[2] == 0:
        raise ValueError(
            f"Weights must have shape ({p}, {d}, c) or ({2 * p}, {d}, c) with c >= 1, "
            f"got {W.shape}."
        )
    if W.dtype.kind != "f":
        raise TypeError(f"Weights must be floating-point numbers, got dtype {W.dtype}.")
    if not np.isfinite(W).all():
        raise ValueError("Weights contain NaN or infinity.")
    return W


def _margins(X: RowSource, D: np.ndarray, flat: np.ndarray, gates: np.ndarray) -> np.ndarray:
    """The smallest score of each unit weight over the rows that are not zero; 0 for w = 0."""
    margins = np.full(len(flat), np.inf)
    for rows, T in signed_scores(X, D, flat, gates):
        some = np.asarray(X[rows]).any(axis=1)
        np.minimum(margins, T.min(axis=1, where=some, initial=np.inf), out=margins)
    # Without any row but zeros the cone is the whole space.
    margins[np.isinf(margins)] = 1
    return np.where(flat.any(axis=1), margins, 0)
