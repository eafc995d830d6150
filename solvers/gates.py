"""Gates and their activation patterns: which hyperplanes, and on which side each example lies.

A gate is a column g of ``G``. It is on for example x when ``x @ g >= 0`` (plus the bias in the
last row, where ``G`` has one row more than ``X`` has columns). The zero gate is always on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks


def check_count(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is a positive integer, or raise a ValueError."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return int(value)


def check_gates(G: Any, n_features: int, dtype: Any = None) -> np.ndarray:
    """Return ``G`` as an array of shape (d, p) or (d + 1, p), or say why it is not one."""
    G = np.asarray(G)
    if G.ndim != 2 or G.shape[0] not in (n_features, n_features + 1) or G.shape[1] == 0:
        raise ValueError(
            f"gates must have shape ({n_features}, p), or ({n_features + 1}, p) with a last row "
            f"of biases, and p >= 1, got {G.shape}."
        )
    if G.dtype.kind not in "fiu":
        raise TypeError(f"gates must be numbers, got dtype {G.dtype}.")
    if not np.isfinite(G).all():
        raise ValueError("gates contain NaN or infinity.")
    return G.astype(dtype or np.result_type(G.dtype, np.float32), copy=False)


def evaluate_gates(X: RowSource, G: np.ndarray) -> np.ndarray:
    """Activation patterns as they come: D[i, j] = 1 if X[i] @ G[:, j] (+ bias) >= 0.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    G : ndarray of shape (d, p) or (d + 1, p)

    Returns
    -------
    ndarray of bool, shape (n, p)
    """
    X = check_rows(X)
    n, d = X.shape
    G = check_gates(G, d, X.dtype)
    D = np.empty((n, G.shape[1]), dtype=bool)
    for rows in row_blocks(n, G.shape[1], X.dtype):
        scores = X[rows] @ G[:d]
        if len(G) > d:
            scores += G[d]
        np.greater_equal(scores, 0, out=D[rows])
    return D


def distinct_patterns(D: np.ndarray) -> np.ndarray:
    """Indices of the columns of ``D`` to keep: the first of each pattern, none that is all zero."""
    packed = np.packbits(D, axis=0)
    _, first = np.unique(packed, axis=1, return_index=True)
    return np.sort(first[D[:, first].any(axis=0)])


def activation_patterns(X: RowSource, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Activation patterns of ``X`` under ``G``, without duplicates and without all-zero patterns.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    G : ndarray of shape (d, p) or (d + 1, p)

    Returns
    -------
    D : ndarray of bool, shape (n, p')
        D[i, j] = 1 if X[i] @ G[:, j] (+ bias) >= 0, with p' <= p; the order of the gates is kept.
    G : ndarray of shape (d, p') or (d + 1, p')
        The gates that remain.

    Raises
    ------
    ValueError
        If shapes do not fit, values are not finite, or every pattern is all zero.
    """
    D = evaluate_gates(X, G)
    keep = distinct_patterns(D)
    if len(keep) == 0:
        raise ValueError(f"None of the {D.shape[1]} gates is on for any of the {len(D)} rows of X.")
    G = np.asarray(G)
    if len(keep) == G.shape[1]:
        return D, G
    return np.ascontiguousarray(D[:, keep]), G[:, keep]
