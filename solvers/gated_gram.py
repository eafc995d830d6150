"""The Gram matrix of gated features, A_j = diag(D[:, j]) X for a gate j.

Its block of gates j and k is a sum over the examples where both are on,

    A_j^T diag(h) A_k = sum_{i: D_ij D_ik} h_i x_i x_i^T,

which is symmetric: where half of the gates are on, an eighth of the work of a product of matrices.
With few inputs it is not worth the trouble.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cvxdistill.solvers.rows import row_blocks

# Inputs from which on blocks are made one by one.
FEWEST_INPUTS = 32


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
    root = np.sqrt(h)
    if d < FEWEST_INPUTS:
        H = np.zeros((gates * d, (gates - first) * d))
        for rows in row_blocks(n, gates * d, np.float64):
            X = inputs(rows) * root[rows, None]
            A = (X[:, None, :] * D[rows, :, None]).reshape(len(X), gates * d)
            H += A.T @ A[:, first * d :]
        return H
    H = np.zeros((gates, d, gates - first, d))
    for rows in row_blocks(n, 4 * d, np.float64):
        X, masks = inputs(rows) * root[rows, None], np.ascontiguousarray(D[rows].T)
        for k in range(first, gates):
            on = np.flatnonzero(masks[k])
            mine = X[on]
            for j, both in enumerate(masks[: k + 1, on]):
                A = mine[both]
                H[j, :, k - first] += A.T @ A
    for k in range(first, gates):
        H[k, :, : k - first] = H[first:k, :, k - first].transpose(1, 0, 2)
    return H.reshape(gates * d, (gates - first) * d)
