"""Projections on to the cones again and again, each from the rows that mattered the time before.

The proximal operator of alpha R plus the cones' indicator is the projection followed by the
shrinking of R, wherever R only depends on the lengths of columns or of groups of columns. So
proximal gradient methods can stay inside the cones, if projections are cheap: from one iteration
to the next hardly any active row changes.
"""

from __future__ import annotations

from functools import partial

import numba
import numpy as np

from cvxdistill.solvers.cone_projection import (
    INNER_TOLERANCE,
    NEGLIGIBLE,
    active_set,
    append_row,
    unit_rows,
)
from cvxdistill.solvers.gated_operator import SMALLEST_PARALLEL_WORK, empty_weights, flat_weights
from cvxdistill.solvers.rows import RowSource, row_blocks
from cvxdistill.solvers.threads import n_threads, one_blas_thread, run_in_threads

# Rows that one scan adds to a column's working set at most, and what it may hold beyond d.
ROWS_A_SCAN, SPARE_ROWS = 16, 64
MOST_SCANS = 1000
# Changes of the factors of a column's active rows after which they are made afresh.
MOST_CHANGES = 500


class ConeProjector:
    """The projection of weights (blocks, d, c) on to their cones, with a memory.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Kept in float64, with rows of length 1.
    D : ndarray of bool, shape (n, p)
    n_columns : int
        blocks * c.
    tolerance : float, default=1e-11
        Violation relative to the length of the column at which a row counts as met.
    """

    def __init__(self, X: RowSource, D: np.ndarray, n_columns: int, tolerance: float = 1e-11):
        self.unit = unit_rows(X[:])
        self.on = np.ascontiguousarray(D.T)
        d = self.unit.shape[1]
        self.tolerance = tolerance
        room = d + SPARE_ROWS
        self._working = np.zeros((n_columns, room), dtype=np.int64)
        self._held = np.zeros(n_columns, dtype=np.int64)
        self._active = np.zeros(n_columns, dtype=np.int64)
        self._multipliers = np.zeros((n_columns, d))
        self._factors = np.zeros((n_columns, 2, d, d))
        self._changes = np.zeros(n_columns, dtype=np.int64)

    def __call__(self, W: np.ndarray, wanted: np.ndarray | None = None) -> np.ndarray:
        """Project the columns of W (blocks, d, c); those not wanted (blocks, c) become 0."""
        blocks, d, c = W.shape
        flat = flat_weights(W).astype(np.float64, copy=False)
        gates = np.repeat(np.arange(blocks) % len(self.on), c)
        lengths = np.sqrt(np.einsum("md,md->m", flat, flat))
        chosen = lengths > 0 if wanted is None else wanted.ravel() & (lengths > 0)
        columns = np.flatnonzero(chosen)
        out = empty_weights(blocks, d, c, W.dtype)
        result = out.transpose(0, 2, 1).reshape(blocks * c, d)
        result[...] = 0
        if len(columns):
            directions = flat[columns] / lengths[columns, None]
            projected = np.empty_like(directions)
            size = len(columns) * self.unit.size
            parts = n_threads() if size >= SMALLEST_PARALLEL_WORK else 1
            places = np.array_split(np.arange(len(columns)), min(parts, len(columns)))
            work = partial(self._project, directions, projected, columns, gates)
            if len(places) == 1:
                work(places)
            else:
                with one_blas_thread():
                    run_in_threads(work, places)
            result[columns] = projected * lengths[columns, None]
        return out

    def _project(
        self,
        w: np.ndarray,
        v: np.ndarray,
        columns: np.ndarray,
        gates: np.ndarray,
        places: list[np.ndarray],
    ) -> None:
        """Project the columns at ``places`` of w, of length 1, into v."""
        for pending in places:
            gate = gates[columns]
            for _ in range(MOST_SCANS):
                _solve_columns(
                    w,
                    v,
                    pending,
                    columns,
                    gate,
                    self.unit,
                    self.on,
                    self._working,
                    self._held,
                    self._active,
                    self._multipliers,
                    self._factors,
                    self._changes,
                )
                violated = np.zeros(len(pending), dtype=np.bool_)
                self._add_violated(v[pending], columns[pending], gate[pending], violated)
                pending = pending[violated]
                if len(pending) == 0:
                    break

    def _add_violated(
        self, v: np.ndarray, columns: np.ndarray, gate: np.ndarray, violated: np.ndarray
    ) -> None:
        """Add the rows that v (m, d) violates most to the working sets, and mark such columns."""
        m = len(v)
        lowest = np.zeros((m, ROWS_A_SCAN))
        lowest[...] = -self.tolerance * np.sqrt(np.einsum("md,md->m", v, v))[:, None]
        rows_of = np.full((m, ROWS_A_SCAN), -1, dtype=np.int64)
        for rows in row_blocks(len(self.unit), max(m, self.unit.shape[1]), np.float64):
            scores = v @ self.unit[rows].T
            _keep_lowest(scores, self.on[:, rows], gate, rows.start, lowest, rows_of)
        _extend_working(rows_of, columns, violated, self._working, self._held, self._active)


@numba.njit(cache=True, nogil=True)
def _keep_lowest(scores, on, gate, start, lowest, rows_of):  # type: ignore[no-untyped-def]
    """Keep the lowest signed scores of each column, and their rows, largest of them first."""
    m, count = scores.shape
    most = lowest.shape[1]
    for k in range(m):
        for i in range(count):
            score = scores[k, i] if on[gate[k], i] else -scores[k, i]
            if score < lowest[k, 0]:
                place = 0
                while place + 1 < most and score < lowest[k, place + 1]:
                    lowest[k, place] = lowest[k, place + 1]
                    rows_of[k, place] = rows_of[k, place + 1]
                    place += 1
                lowest[k, place] = score
                rows_of[k, place] = start + i


@numba.njit(cache=True, nogil=True)
def _extend_working(rows_of, columns, violated, working, held, active):  # type: ignore[no-untyped-def]
    """Append rows to the working sets; what is not active makes room when there is none."""
    room = working.shape[1]
    for k in range(len(columns)):
        column = columns[k]
        new = 0
        for place in range(rows_of.shape[1]):
            if rows_of[k, place] >= 0:
                new += 1
        if new == 0:
            continue
        violated[k] = True
        if held[column] + new > room:
            held[column] = active[column]
        for place in range(rows_of.shape[1] - 1, -1, -1):
            row = rows_of[k, place]
            known = row < 0
            for i in range(held[column]):
                if working[column, i] == row:
                    known = True
            if not known and held[column] < room:
                working[column, held[column]] = row
                held[column] += 1


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _solve_columns(  # type: ignore[no-untyped-def]
    w, v, pending, columns, gate, unit, on, working, held, active, multipliers, factors, changes
):
    """Project on the rows held for each column, from where it stood; active rows come first."""
    d = unit.shape[1]
    places = np.empty(d, dtype=np.int64)
    for k in pending:
        column = columns[k]
        count, m = held[column], active[column]
        if count == 0:
            v[k] = w[k]
            continue
        A = np.empty((count, d))
        for i in range(count):
            row = working[column, i]
            sign = 1.0 if on[gate[k], row] else -1.0
            for j in range(d):
                A[i, j] = sign * unit[row, j]
        Q, R = factors[column, 0], factors[column, 1]
        if changes[column] > MOST_CHANGES:
            R[:] = 0
            for i in range(m):
                append_row(Q, R, i, A[i])
            changes[column] = 0
        for i in range(m):
            places[i] = i
        solution, m, new = active_set(
            w[k], A, Q, R, places, multipliers[column], m, INNER_TOLERANCE, NEGLIGIBLE
        )
        v[k] = solution
        changes[column] += new
        active[column] = m
        if new:
            rows = working[column, :count].copy()
            is_active = np.zeros(count, dtype=np.bool_)
            for i in range(m):
                working[column, i] = rows[places[i]]
                is_active[places[i]] = True
            last = m
            for i in range(count):
                if not is_active[i]:
                    working[column, last] = rows[i]
                    last += 1
