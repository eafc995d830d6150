"""Every activation pattern: one gate in each region of the hyperplane arrangement of the data.

The n hyperplanes {u : x_i . u = 0} cut the space of gates into open cones. All gates of one cone
have the same pattern, so a programme with one gate in each cone is the exact one, not a sample of
it. Their number grows like n^(r-1), r the rank of X: this is for toy data and for checks.
"""

from __future__ import annotations

from math import comb

import numpy as np
from scipy.linalg import null_space
from scipy.optimize import nnls

from cvxdistill.solvers.rows import RowSource, check_rows

# Unit normals nearer than this are one hyperplane; singular values below it are no dimension.
TOLERANCE = 1e-9


def pattern_count(n: int, rank: int) -> int:
    """Number of regions into which n hyperplanes in general position cut R^rank.

    2 sum_{k=0}^{rank-1} C(n-1, k), among them the region where every example is off if there is
    one; an upper bound for hyperplanes in any other position.

    Parameters
    ----------
    n : int
        Number of hyperplanes through the origin, at least 1.
    rank : int
        Dimension r of the space, at least 1.

    Returns
    -------
    int

    Raises
    ------
    ValueError
        If a number is not a positive integer.

    References
    ----------
    Cover 1965, theorem 1; Pilanci and Ergen 2020, section 2.
    """
    for name, size in (("n", n), ("rank", rank)):
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}.")
    return 2 * sum(comb(int(n) - 1, k) for k in range(min(int(rank), int(n))))


def enumerate_gates(X: RowSource, *, max_patterns: int = 20_000) -> np.ndarray:
    """One gate inside each region of the arrangement {u : x_i . u = 0}, whatever its position.

    A new hyperplane H cuts exactly those regions that contain a region of the arrangement which
    the earlier hyperplanes make inside H, a space of one dimension less (deletion and
    restriction). Within its region each gate has the largest margin min_i |x_i . g| / ||x_i||.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Rows of zeros are left out; rows that are multiples of each other are one hyperplane.
    max_patterns : int, default=20_000
        Refuse an arrangement that may have more regions than this.

    Returns
    -------
    ndarray of float64, shape (d, P)
        Gates of unit length in the row space of X, each followed P / 2 columns later by its
        negative. No margin is zero, so that ``activation_patterns`` finds P patterns, and drops
        that of no example if it is among them.

    Raises
    ------
    ValueError, TypeError
        If X is not a finite matrix of numbers or has only rows of zeros, if ``max_patterns`` is
        not a positive integer, or if ``pattern_count`` of the distinct hyperplanes exceeds it.

    Notes
    -----
    Gates on a hyperplane itself (x_i . u = 0, which counts as on) are left out: for ReLU networks
    they add nothing, because each lies in the closure of a region. Regions that are thinner than
    about 1e-9 are not told from empty ones. Take the patterns in float64: in float32 thin regions
    merge.

    References
    ----------
    Zaslavsky 1975 (deletion and restriction); Lawson and Hanson 1974, chapter 23 (the margins);
    Pilanci and Ergen 2020 (the exact programme).
    """
    if (
        not isinstance(max_patterns, (int, np.integer))
        or isinstance(max_patterns, bool)
        or max_patterns < 1
    ):
        raise ValueError(f"max_patterns must be a positive integer, got {max_patterns!r}.")
    X = check_rows(X)
    rows = np.asarray(X[0 : X.shape[0]], dtype=np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("X contains NaN or infinity.")
    rows = rows[rows.any(axis=1)]
    if len(rows) == 0:
        raise ValueError("X must have a row that is not zero, got only rows of zeros.")
    rows = np.unique(_unit_rows(rows), axis=0)
    # A linear map of the gates keeps the arrangement: let no column or direction be a small one.
    columns = np.abs(rows).max(axis=0)
    columns[columns == 0] = 1
    left, scale, right = np.linalg.svd(_unit_rows(rows / columns), full_matrices=False)
    rank = int((scale > TOLERANCE * scale[0]).sum())
    normals = _unit_rows(left[:, :rank])
    kept = _distinct_hyperplanes(normals)
    bound = pattern_count(len(kept), rank)
    if bound > max_patterns:
        raise ValueError(
            f"{len(kept)} distinct hyperplanes in {rank} dimensions have up to {bound} patterns, "
            f"more than max_patterns={max_patterns}: sample gates instead, or raise it."
        )
    normals = normals[kept]
    points = _interior_points(normals)
    points = points[:, normals[0] @ points > 0]
    points = (right[:rank].T / scale[:rank]) @ points / columns[:, None]
    basis = np.linalg.svd(rows, full_matrices=False)[2][:rank].T
    gates = basis @ _widest_margins(_unit_rows(rows[kept] @ basis), basis.T @ points)
    return np.hstack([gates, -gates])


def _interior_points(normals: np.ndarray) -> np.ndarray:
    """A unit vector inside each region of the hyperplanes with these normals (m, r), as columns.

    Without a hyperplane the whole space is the one region, and its point is zero.
    """
    m, r = normals.shape
    if m == 0:
        return np.zeros((r, 1))
    if r == 1:
        return np.array([[1.0, -1.0]])
    if r == 2:
        return _between_lines(normals)
    normals = normals[_distinct_hyperplanes(normals)]
    points = np.column_stack([normals[0], -normals[0]])
    for i in range(1, len(normals)):
        earlier, normal = normals[:i], normals[i]
        basis = null_space(normal[None])
        on_it = basis @ _interior_points(_unit_rows(earlier @ basis))
        cut = _shared_columns(earlier @ points > 0, earlier @ on_it > 0)
        with np.errstate(divide="ignore"):
            reach = np.abs(earlier @ on_it) / np.abs(earlier @ normal)[:, None]
        step = np.minimum(reach.min(axis=0) / 2, 1.0) * normal[:, None]
        points = np.hstack([points[:, ~cut], on_it + step, on_it - step])
        points /= np.linalg.norm(points, axis=0)
    return points


def _between_lines(normals: np.ndarray) -> np.ndarray:
    """``_interior_points`` of lines in the plane: the bisectors of neighbouring lines."""
    angles = np.sort(np.arctan2(normals[:, 0], -normals[:, 1]) % np.pi)
    gaps = np.diff(angles, append=angles[0] + np.pi)
    bisectors = (angles + gaps / 2)[gaps > TOLERANCE]
    points = np.stack([np.cos(bisectors), np.sin(bisectors)])
    return np.hstack([points, -points])


def _widest_margins(normals: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Move each column of ``points`` (r, N) to the largest margin within its region; unit length.

    With M = diag(sign(normals g)) normals, the direction of largest margin is that of the point of
    the convex hull of M's rows nearest to 0, which is M^T u for the u >= 0 that minimises
    ||M^T u||^2 + (1^T u - 1)^2.
    """
    points = points / np.linalg.norm(points, axis=0)
    target = np.append(np.zeros(normals.shape[1]), 1.0)
    for point in points.T:
        M = np.where(normals @ point > 0, 1, -1)[:, None] * normals
        try:
            u, _ = nnls(np.vstack([M.T, np.ones(len(M))]), target)
        except RuntimeError:  # its iteration limit; the point is inside the region all the same
            continue
        candidate = M.T @ u
        candidate /= np.linalg.norm(candidate) or 1.0
        if (M @ candidate).min() > (M @ point).min():
            point[:] = candidate
    return points


def _unit_rows(A: np.ndarray) -> np.ndarray:
    """The rows of A, none of them zero, scaled to unit length."""
    A = A / np.abs(A).max(axis=1, keepdims=True)
    return A / np.linalg.norm(A, axis=1, keepdims=True)


def _distinct_hyperplanes(normals: np.ndarray) -> np.ndarray:
    """Indices of unit normals (m, r) that are no multiples of an earlier one kept."""
    m, r = normals.shape
    # Neighbours, up to their sign, have neighbouring products with any one unit vector.
    direction = np.random.default_rng(0).standard_normal(r)
    products = np.abs(normals @ (direction / np.linalg.norm(direction)))
    order = np.argsort(products, kind="stable")
    distinct = np.ones(m, dtype=bool)
    for run in np.split(order, np.flatnonzero(np.diff(products[order]) > r * TOLERANCE) + 1):
        kept = run[:1]
        for i in run[1:]:
            others = normals[kept]
            distance = np.minimum(np.abs(others - normals[i]), np.abs(others + normals[i]))
            if (distance.max(axis=1) < TOLERANCE).any():
                distinct[i] = False
            else:
                kept = np.append(kept, i)
    return np.flatnonzero(distinct)


def _shared_columns(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    """Which columns of the bool matrix A (m, N) are columns of B (m, K)."""
    packed = np.packbits(np.hstack([B, A]), axis=0)
    _, kind = np.unique(packed, axis=1, return_inverse=True)
    kind = kind.ravel()
    return np.isin(kind[B.shape[1] :], kind[: B.shape[1]])
