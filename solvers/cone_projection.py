"""Projections onto the cones {w : S_j X w >= 0} by an active set on the rows that matter.

The mathematics is ``cvxdistill.solvers.cones``'s; here are the rows: scored block by block, the
most violated ones gathered, and the small non-negative least squares problem on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numba
import numpy as np

from cvxdistill.solvers.rows import RowSource, row_blocks
from cvxdistill.solvers.threads import one_blas_thread, run_in_threads

# Violations are relative to the length of a row and of the weight. A projection is accepted at
# the first, and its subproblems are solved to the second; a projection shorter than
# NEGLIGIBLE ||w|| is rounding and becomes 0.
TOLERANCE, INNER_TOLERANCE, NEGLIGIBLE = 1e-12, 2e-13, 1e-12
MOST_ROUNDS = 200


def unit_rows(A: np.ndarray) -> np.ndarray:
    """Rows in float64, each scaled to length 1 unless it is zero."""
    A = np.asarray(A, dtype=np.float64)
    size = np.abs(A).max(axis=1, keepdims=True)
    A = A / np.where(size > 0, size, 1)
    norms = np.linalg.norm(A, axis=1, keepdims=True)
    return A / np.where(norms > 0, norms, 1)


def signed_scores(
    X: RowSource, D: np.ndarray, flat: np.ndarray, gates: np.ndarray, *, lifted: bool = False
) -> Iterator[tuple[slice, np.ndarray]]:
    """s_i x_i.w / ||x_i|| of the weights (m, d) for one block of rows after the other, (m, rows).

    With ``lifted`` the weights are (m, d + 1) and their last entries are added.
    """
    d = X.shape[1]
    for rows in row_blocks(X.shape[0], max(len(flat), d), np.float64):
        unit = unit_rows(X[rows])
        T = flat[:, :d] @ unit.T
        signs = D[rows].T
        for k, j in enumerate(gates):
            np.negative(T[k], out=T[k], where=~signs[j])
        if lifted:
            T += flat[:, d:] * unit.any(axis=1)
        yield rows, T


def lowest_rows(
    scores: Iterator[tuple[slice, np.ndarray]], bounds: np.ndarray, most: int
) -> list[np.ndarray]:
    """For each of m weights the rows of lowest score below its bound (m,), ``most`` at most.

    Scores come as (rows, (m, rows)), one block of rows after the other.
    """
    found: list[list[np.ndarray]] = [[] for _ in bounds]
    values: list[list[np.ndarray]] = [[] for _ in bounds]
    for rows, T in scores:
        for k in np.flatnonzero(T.min(axis=1) < bounds):
            low = np.flatnonzero(T[k] < bounds[k])
            if len(low) > most:
                low = low[np.argpartition(T[k, low], most)[:most]]
            found[k].append(low + rows.start)
            values[k].append(T[k, low])
    lowest = []
    for parts, of_parts in zip(found, values, strict=True):
        place = np.concatenate([np.empty(0, dtype=np.intp), *parts])
        if len(place) > most:
            place = place[np.argpartition(np.concatenate(of_parts), most)[:most]]
        lowest.append(place)
    return lowest


def gather_rows(X: RowSource, indices: np.ndarray) -> np.ndarray:
    """The rows of X at these increasing indices."""
    if isinstance(X, np.ndarray):
        return X[indices]
    parts = []
    for rows in row_blocks(X.shape[0], X.shape[1], np.float64):
        here = indices[np.searchsorted(indices, rows.start) : np.searchsorted(indices, rows.stop)]
        parts.append(X[rows][here - rows.start])
    return np.concatenate(parts)


def project(
    X: RowSource,
    D: np.ndarray,
    flat: np.ndarray,
    gates: np.ndarray,
    *,
    lifted: bool = False,
    hint: np.ndarray | None = None,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Project weights (m, d) onto the cones of their gates; active rows and their multipliers.

    The multipliers are those of rows of length 1. Each round solves the problem on the rows found
    so far and adds those that its solution violates most. Rows that are not active are forgotten
    when there are too many: the projection gets shorter from round to round, so that none comes
    back for ever. ``hint`` (m, d) are points whose lowest scores say which rows come first.
    """
    m, width = flat.shape
    most = 2 * width + 20
    lengths = np.linalg.norm(flat, axis=1)
    w = unit_rows(flat)
    v = w.copy()
    working = [np.empty(0, dtype=np.intp) for _ in range(m)]
    active, multipliers = list(working), [np.empty(0) for _ in range(m)]

    def solve(needed: np.ndarray, unit: np.ndarray, columns: list[slice]) -> None:
        for k in (column.start for column in columns):
            A = unit[np.searchsorted(needed, working[k])]
            A[~D[working[k], gates[k]], : X.shape[1]] *= -1
            v[k], place, multipliers[k] = _project_on_rows(
                w[k], A, multipliers[k], INNER_TOLERANCE, NEGLIGIBLE
            )
            active[k] = working[k][place]

    pending = np.flatnonzero(lengths > 0)
    touched = np.zeros(m, dtype=bool)
    for number in range(MOST_ROUNDS):
        if number == 0 and hint is not None:
            point, bounds = hint[pending], np.full(len(pending), np.inf)
        else:
            point = v[pending]
            bounds = -TOLERANCE * np.linalg.norm(point, axis=1)
        scores = signed_scores(X, D, point, gates[pending], lifted=lifted)
        worst = lowest_rows(scores, bounds, most)
        todo = [k for k, rows in enumerate(worst) if len(rows)]
        if not todo:
            break
        for k in todo:
            column = pending[k]
            kept = working if len(working[column]) <= 4 * most else active
            others = np.setdiff1d(np.union1d(kept[column], worst[k]), active[column])
            working[column] = np.concatenate([active[column], others])
        pending = pending[todo]
        touched[pending] = True
        needed = np.unique(np.concatenate([working[k] for k in pending]))
        unit = unit_rows(gather_rows(X, needed))
        if lifted:
            # A row of zeros stays one, and constrains nothing.
            unit = np.hstack([unit, unit.any(axis=1, keepdims=True)]) / np.sqrt(2)
        with one_blas_thread():
            run_in_threads(partial(solve, needed, unit), [slice(k, k + 1) for k in pending])
        pending = pending[v[pending].any(axis=1)]
    v[touched] *= lengths[touched, None]
    v[~touched] = flat[~touched]
    return v, active, [values * size for values, size in zip(multipliers, lengths, strict=True)]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _project_on_rows(w, A, start, tolerance, negligible):  # type: ignore[no-untyped-def]
    """Project w onto {v : A v >= 0} for rows of length 1; v, the active rows, their multipliers.

    Starts with the first rows of A active and the multipliers ``start``.
    """
    d = A.shape[1]
    Q, R, active = np.empty((d, d)), np.zeros((d, d)), np.empty(d, dtype=np.int64)
    multipliers = np.zeros(d)
    k = 0
    for i in range(min(len(start), d)):
        append_row(Q, R, k, A[i])
        active[k], multipliers[k] = i, start[i]
        k += 1
    v, k, _ = active_set(w, A, Q, R, active, multipliers, k, tolerance, negligible)
    return v, active[:k].copy(), multipliers[:k].copy()


@numba.njit(cache=True, nogil=True, error_model="numpy")
def active_set(w, A, Q, R, active, multipliers, k, tolerance, negligible):  # type: ignore[no-untyped-def]
    """Lawson and Hanson's method from k active rows; v, the number of active rows, of changes.

    v = w - Q^T Q w, with the rows of Q orthonormal and R^T Q = A[active]. Q and R (d, d), active
    and multipliers (d,) are changed in place.
    """
    m, d = A.shape
    refused = np.zeros(m, dtype=np.bool_)
    v, changes = w.copy(), 0
    for _ in range(10 * (m + d)):
        while k:
            z = _solve_triangular(R, k, -(Q[:k] @ w))
            step, leaving = 1.0, -1
            for i in range(k):
                if z[i] <= 0:
                    share = 0.0
                    if multipliers[i] > 0:
                        share = multipliers[i] / (multipliers[i] - z[i])
                    if share < step or leaving < 0:
                        step, leaving = share, i
            if leaving < 0:
                multipliers[:k] = z
                break
            multipliers[:k] += step * (z - multipliers[:k])
            if leaving == k - 1 and step == 0.0:
                # The newcomer's multiplier is positive but for rounding: it is no help now.
                refused[active[leaving]] = True
            _remove_row(Q, R, k, leaving)
            for i in range(leaving, k - 1):
                active[i], multipliers[i] = active[i + 1], multipliers[i + 1]
            k -= 1
            changes += 1
        v = w - (Q[:k] @ w) @ Q[:k]
        v -= (Q[:k] @ v) @ Q[:k]
        length = np.sqrt(v @ v)
        if k == d or length <= negligible:
            v[:] = 0
            break
        scores = A @ v
        entering, lowest = -1, -tolerance * length
        for i in range(m):
            if scores[i] < lowest and not refused[i]:
                entering, lowest = i, scores[i]
        if entering < 0:
            break
        append_row(Q, R, k, A[entering])
        active[k], multipliers[k] = entering, 0.0
        k += 1
        changes += 1
    return v, k, changes


@numba.njit(cache=True, nogil=True, error_model="numpy")
def append_row(Q, R, k, a):  # type: ignore[no-untyped-def]
    """Gram-Schmidt, twice, for one more row of Q and column of R."""
    c = Q[:k] @ a
    r = a - c @ Q[:k]
    again = Q[:k] @ r
    r -= again @ Q[:k]
    R[:k, k] = c + again
    R[k, k] = np.sqrt(r @ r)
    Q[k] = r / R[k, k]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _remove_row(Q, R, k, j):  # type: ignore[no-untyped-def]
    """Take out column j of R; rotate what is then below the diagonal away."""
    for i in range(j, k - 1):
        R[: i + 2, i] = R[: i + 2, i + 1]
    for i in range(j, k - 1):
        size = np.hypot(R[i, i], R[i + 1, i])
        cosine, sine = R[i, i] / size, R[i + 1, i] / size
        for column in range(i, k - 1):
            upper, lower = R[i, column], R[i + 1, column]
            R[i, column] = cosine * upper + sine * lower
            R[i + 1, column] = cosine * lower - sine * upper
        for column in range(Q.shape[1]):
            upper, lower = Q[i, column], Q[i + 1, column]
            Q[i, column] = cosine * upper + sine * lower
            Q[i + 1, column] = cosine * lower - sine * upper
    R[:k, k - 1] = 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _solve_triangular(R, k, y):  # type: ignore[no-untyped-def]
    """Solve R[:k, :k] z = y from below."""
    z = y.copy()
    for i in range(k - 1, -1, -1):
        for j in range(i + 1, k):
            z[i] -= R[i, j] * z[j]
        z[i] /= R[i, i]
    return z
