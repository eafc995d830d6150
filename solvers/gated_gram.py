"""The Gram matrix of gated features, A_j = diag(D[:, j]) X for a gate j.

Its block of gates j and k is a sum over the examples where both are on,

    A_j^T diag(h) A_k = sum_{i: D_ij D_ik} h_i x_i x_i^T,

which is symmetric. Examples are added up by the patterns of two groups of gates, as in
``cvxdistill.solvers.pattern_products``; from these sums follow those of all pairs of their gates.
With few inputs the triangle of each h_i x_i x_i^T is made once, for all groups; with many, examples
of one pattern are gathered and multiplied. With four gates in a group and half of the gates on that
is a thirty-sixth of the operations of a product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
from scipy.linalg import blas

from cvxdistill.solvers.rows import row_blocks

# Inputs and examples from which on examples of a pattern are multiplied.
MANY_INPUTS, MANY_EXAMPLES = 40, 500
# Examples from which on a group has one gate more, of sums of products and of gathered examples.
FIRST_SIZE, SUMMED, GATHERED = 2, (0, 3000), (3000, 12_000)
# Of examples that are gathered at once, and of the sums of all patterns.
MOST_BYTES = 64 * 2**20


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
    gather = d >= MANY_INPUTS and n >= MANY_EXAMPLES
    add, larger = (_add_gathered, GATHERED) if gather else (_add_products, SUMMED)
    most = max(MOST_BYTES // (8 * d), 1) if gather else None
    for rows in row_blocks(n, d * (d + 1) // 2, np.float64, most):
        size = FIRST_SIZE + sum(rows.stop - rows.start >= least for least in larger)
        while size > 1 and 4**size * 4 * d * (d + 1) > MOST_BYTES:
            size -= 1
        # No group has gates from both sides of ``first``.
        starts = np.array([*range(0, first, size), *range(first, gates, size), gates])
        codes = _pattern_codes(np.ascontiguousarray(D[rows]), starts)
        add(inputs(rows), h[rows], codes, starts, first, H)
    for k in range(first, gates):
        H[k, :, : k - first] = H[first:k, :, k - first].transpose(1, 0, 2)
    return H.reshape(gates * d, (gates - first) * d)


def _add_gathered(
    X: np.ndarray,
    h: np.ndarray,
    codes: np.ndarray,
    starts: np.ndarray,
    first: int,
    H: np.ndarray,
) -> None:
    """Add the blocks of gates j <= k, k >= first: examples of each pattern are multiplied."""
    d = X.shape[1]
    X = X * np.sqrt(h)[:, None]
    gathered = np.empty_like(X)
    square = np.empty((d, d), order="F")
    sums = np.empty((1 << 2 * np.max(np.diff(starts)), d * (d + 1) // 2))
    for g in np.flatnonzero(starts[:-1] >= first):
        for f in range(g + 1):
            order, ends = _by_pattern(codes, starts, g, f)
            rows = np.take(X, order, axis=0, out=gathered[: len(order)])
            sums[: len(ends) - 1] = 0
            for code in np.flatnonzero(np.diff(ends)):
                A = rows[ends[code] : ends[code + 1]]
                blas.dsyrk(1.0, A.T, beta=0.0, c=square, lower=1, overwrite_c=1)
                _pack(square.T, sums[code])
            _spread(sums, starts, g, f, first, H)


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
def _pattern(codes, starts, g, f, i):  # type: ignore[no-untyped-def]
    """The pattern of row i in two groups, of one if these are the same; 0 if one has no gate on."""
    t, u = codes[g, i], codes[f, i]
    if f == g:
        return np.int64(t)
    return t | np.int64(u) << (starts[g + 1] - starts[g]) if t and u else 0


@numba.njit(cache=True, nogil=True)
def _n_patterns(starts, g, f):  # type: ignore[no-untyped-def]
    """Of two groups of gates."""
    bits = starts[g + 1] - starts[g]
    return 1 << bits + (starts[f + 1] - starts[f] if f != g else 0)


@numba.njit(cache=True, nogil=True)
def _add_products(X, h, codes, starts, first, H):  # type: ignore[no-untyped-def]
    """Add the blocks of gates j <= k, k >= first, from the triangles of h_i x_i x_i^T."""
    products = _triangles(X, h)
    n, size = products.shape
    sums = np.empty((1 << 2 * np.max(np.diff(starts)), size))
    for g in range(len(starts) - 1):
        if starts[g] < first:
            continue
        for f in range(g + 1):
            sums[: _n_patterns(starts, g, f)] = 0
            for i in range(n):
                code = _pattern(codes, starts, g, f, i)
                if code:
                    for k in range(size):
                        sums[code, k] += products[i, k]
            _spread(sums, starts, g, f, first, H)


@numba.njit(cache=True, nogil=True)
def _by_pattern(codes, starts, g, f):  # type: ignore[no-untyped-def]
    """Rows with gates on in both groups, in the order of their patterns, and where these begin."""
    n, patterns = codes.shape[1], _n_patterns(starts, g, f)
    ends = np.zeros(patterns + 1, np.int64)
    for i in range(n):
        code = _pattern(codes, starts, g, f, i)
        if code:
            ends[code + 1] += 1
    ends = np.cumsum(ends)
    order, place = np.empty(ends[-1], np.int64), ends.copy()
    for i in range(n):
        code = _pattern(codes, starts, g, f, i)
        if code:
            order[place[code]] = i
            place[code] += 1
    return order, ends


@numba.njit(cache=True, nogil=True)
def _pack(square, triangle):  # type: ignore[no-untyped-def]
    """The rows of a square from the diagonal on."""
    d, place = len(square), 0
    for a in range(d):
        for b in range(a, d):
            triangle[place + b - a] = square[a, b]
        place += d - a


@numba.njit(cache=True, nogil=True)
def _spread(sums, starts, g, f, first, H):  # type: ignore[no-untyped-def]
    """Add to the blocks of all pairs of gates of two groups, from the sums of their patterns."""
    size, patterns = sums.shape[1], _n_patterns(starts, g, f)
    own, others = starts[g + 1] - starts[g], starts[f + 1] - starts[f]
    # Of all patterns that contain one.
    bit = 1
    while bit < patterns:
        for t in range(patterns):
            if not t & bit:
                for k in range(size):
                    sums[t, k] += sums[t | bit, k]
        bit *= 2
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
