"""The Gram matrix of gated features, A_j = diag(D[:, j]) X for a gate j.

Its block of gates j and k is a sum over the examples where both are on,

    A_j^T diag(h) A_k = sum_{i: D_ij D_ik} h_i x_i x_i^T,

which is symmetric. With few inputs the triangle of each h_i x_i x_i^T is made once, and added up by
the patterns of two groups of gates, as in ``cvxdistill.solvers.pattern_products``; from these sums
follow those of all pairs of their gates. With many, blocks are made one by one: where half of the
gates are on, an eighth of the work of a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from cvxdistill.solvers.rows import row_blocks

# Inputs from which on blocks are made one by one.
MANY_INPUTS = 40
# Gates of a group: with 2^(2 gates) sums it takes many examples at once for the larger one.
GATES, FEW_GATES, MANY_EXAMPLES = 4, 3, 3000


def gated_gram(
    inputs: Callable[[slice], np.ndarray], D: np.ndarray, h: np.ndarray, first: int = 0
) -> np.ndarray:
    """The columns of A^T diag(h) A that are those of the gates from ``first`` on.

    Parameters
    ----------
    inputs : callable
        Rows of X for a slice, in float64.
    D : ndarray of bool, shape (n, G)
    h : ndarray of shape (n,)
        Not negative.
    first : int, default=0

    Returns
    -------
    ndarray of shape (G d, (G - first) d)
    """
    n, gates = D.shape
    d = inputs(slice(0, 1)).shape[1]
    H = np.zeros((gates, d, gates - first, d))
    if d < MANY_INPUTS:
        blocks = list(row_blocks(n, d * (d + 1) // 2, np.float64))
        width = GATES if blocks[0].stop >= MANY_EXAMPLES else FEW_GATES
        # No group has gates from both sides of ``first``.
        starts = np.array([*range(0, first, width), *range(first, gates, width), gates])
        for rows in blocks:
            codes = _pattern_codes(np.ascontiguousarray(D[rows]), starts)
            _add_by_patterns(_triangles(inputs(rows), h[rows]), codes, starts, first, H)
    else:
        _add_by_pairs(inputs, D, h, first, H)
    for k in range(first, gates):
        H[k, :, : k - first] = H[first:k, :, k - first].transpose(1, 0, 2)
    return H.reshape(gates * d, (gates - first) * d)


def _add_by_pairs(
    inputs: Callable[[slice], np.ndarray], D: np.ndarray, h: np.ndarray, first: int, H: np.ndarray
) -> None:
    """Blocks of each pair of gates j <= k, k >= first."""
    n, gates = D.shape
    root = np.sqrt(h)
    for rows in row_blocks(n, 4 * H.shape[1], np.float64):
        X, masks = inputs(rows) * root[rows, None], np.ascontiguousarray(D[rows].T)
        for k in range(first, gates):
            on = np.flatnonzero(masks[k])
            mine = X[on]
            for j, both in enumerate(masks[: k + 1, on]):
                A = mine[both]
                H[j, :, k - first] += A.T @ A


@numba.njit(cache=True, nogil=True)
def _triangles(X, h):  # type: ignore[no-untyped-def]
    """Rows h_i x_ia x_ib for a <= b, (n, d (d + 1) / 2)."""
    n, d = X.shape
    out = np.empty((n, d * (d + 1) // 2))
    for i in range(n):
        place = 0
        for a in range(d):
            factor = h[i] * X[i, a]
            for b in range(a, d):
                out[i, place + b - a] = factor * X[i, b]
            place += d - a
    return out


@numba.njit(cache=True, nogil=True)
def _pattern_codes(D, starts):  # type: ignore[no-untyped-def]
    """The pattern of each group of gates on each row, (groups, n)."""
    codes = np.zeros((len(starts) - 1, len(D)), np.uint8)
    for g in range(len(starts) - 1):
        for i in range(len(D)):
            for j in range(starts[g], starts[g + 1]):
                codes[g, i] |= D[i, j] << (j - starts[g])
    return codes


@numba.njit(cache=True, nogil=True)
def _add_by_patterns(products, codes, starts, first, H):  # type: ignore[no-untyped-def]
    """Add the blocks of gates j <= k, k >= first, from sums by the patterns of two groups."""
    n, size = products.shape
    widest = np.max(np.diff(starts))
    sums = np.empty((1 << 2 * widest, size))
    for g in range(len(starts) - 1):
        if starts[g] < first:
            continue
        own = starts[g + 1] - starts[g]
        for f in range(g + 1):
            others = starts[f + 1] - starts[f]
            # Of one group with itself its own patterns are enough.
            bits = own if f == g else own + others
            sums[: 1 << bits] = 0
            for i in range(n):
                t, u = codes[g, i], codes[f, i]
                if t and u:
                    code = t if f == g else t | u << own
                    for k in range(size):
                        sums[code, k] += products[i, k]
            # Then of all patterns that contain one.
            for b in range(bits):
                for t in range(1 << bits):
                    if not t >> b & 1:
                        for k in range(size):
                            sums[t, k] += sums[t | 1 << b, k]
            for k in range(own):
                for j in range(others if f < g else k + 1):
                    code = 1 << k | (1 << j if f == g else 1 << (own + j))
                    _add_triangle(sums[code], H[starts[f] + j, :, starts[g] + k - first])


@numba.njit(cache=True, nogil=True)
def _add_triangle(triangle, block):  # type: ignore[no-untyped-def]
    """Add a symmetric matrix, given by its rows from the diagonal on."""
    d = len(block)
    place = 0
    for a in range(d):
        block[a, a] += triangle[place]
        for b in range(a + 1, d):
            block[a, b] += triangle[place + b - a]
            block[b, a] += triangle[place + b - a]
        place += d - a
