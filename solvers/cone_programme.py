"""The smallest pair of weights in a cone with a given difference: a second-order cone programme.

    minimise over v   ||v|| + ||v - w||   subject to   B v >= r = max(0, B w),   B = S_j X,

so that v and u = v - w satisfy B v >= 0 and B u >= 0. A norm is smooth but at 0, and v = 0 or
u = 0 is feasible only where -w or w lies in the cone, which is seen beforehand; so a primal-dual
interior point method in d dimensions solves it. It sees few rows: those that bind are found as the
solutions violate them, and a shift into the cone makes each solution feasible for all rows.

References
----------
Mishkin, Sahiner and Pilanci 2022, section 3 (cone decompositions by second-order cone programmes);
Mehrotra 1992 (predictor and corrector); Boyd and Vandenberghe 2004, section 11.7 (line search).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
from scipy.linalg import lu_factor, lu_solve
from tqdm import tqdm

from cvxdistill.solvers.cone_projection import (
    gather_rows,
    lowest_rows,
    signed_scores,
    unit_rows,
)
from cvxdistill.solvers.rows import RowSource
from cvxdistill.solvers.threads import one_blas_thread, run_in_threads

MOST_ITERATIONS, MOST_ROUNDS = 100, 100
# Share of the way to the boundary that a step goes, and the least centring of a step: slacks that
# run ahead of the others spoil the Newton systems.
SHARE, LEAST_CENTRING = 0.99, 0.1
# Rows with lambda / s this many times the curvature of the lengths keep a multiplier in the system.
BINDING = 1e3


def smallest_pairs(
    X: RowSource,
    D: np.ndarray,
    flat: np.ndarray,
    gates: np.ndarray,
    H: np.ndarray,
    *,
    tol: float,
    verbose: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Solve the programme for the weights w in the rows of ``flat`` (m, d) and their gates (m,).

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    flat : ndarray of shape (m, d)
        Neither zero nor in their cones, nor their negatives.
    gates : ndarray of int, shape (m,)
    H : ndarray of shape (d, p)
        Directions inside the cones of these gates.
    tol : float
        Relative duality gap.
    verbose : int
        1 shows a progress bar.

    Returns
    -------
    v, u : ndarray of shape (m, d)
        Feasible for every row of X.
    gaps : ndarray of shape (m,)
        Certified: (||v|| + ||v - w||) / (a lower bound of the optimum) - 1.
    violations : ndarray of shape (m,)
        How far the pair was outside the cone before its shift, relative to each one's length.
    """
    m, d = flat.shape
    most = 2 * d + 20
    lengths = np.linalg.norm(flat, axis=1)
    w, h = flat / lengths[:, None], np.ascontiguousarray(H.T[gates], dtype=np.float64)
    # v and u change places with the sign of w. Solve for the side that may be the shorter one,
    # and even far shorter than w: as a difference it would lose its digits.
    initial = [_repair(X, D, np.zeros_like(w), sign * w, h, gates, most // 2) for sign in (1, -1)]
    sign = np.where(initial[0][1] <= initial[1][1], 1.0, -1.0)[:, None]
    w *= sign
    v, best = np.zeros_like(w), np.zeros_like(w)
    best_length, bounds, violations = np.full(m, np.inf), np.zeros(m), np.zeros(m)

    def solve(needed: np.ndarray, unit: np.ndarray, columns: list[slice]) -> None:
        for k in (column.start for column in columns):
            B = unit[np.searchsorted(needed, working[k])]
            B[~D[working[k], gates[k]]] *= -1
            v[k], bound = smallest_pair(B, w[k], h[k], tol=tol / 4)
            bounds[k] = max(bounds[k], bound)

    pending = np.arange(m)
    working = [np.union1d(*rows) for rows in zip(initial[0][0], initial[1][0])]
    with tqdm(total=m, disable=not verbose, desc="cone decomposition", leave=False) as bar:
        for _ in range(MOST_ROUNDS):
            needed = np.unique(np.concatenate([working[k] for k in pending]))
            unit = unit_rows(gather_rows(X, needed))
            with one_blas_thread():
                run_in_threads(partial(solve, needed, unit), [slice(k, k + 1) for k in pending])
            new, t = _repair(X, D, v[pending], w[pending], h[pending], gates[pending], most)
            shifted = v[pending] + t[:, None] * h[pending]
            length = np.linalg.norm(shifted, axis=1) + np.linalg.norm(shifted - w[pending], axis=1)
            better = length < best_length[pending]
            best[pending[better]], best_length[pending[better]] = shifted[better], length[better]
            todo = [
                k
                for k, column in enumerate(pending)
                if best_length[column] > (1 + tol) * bounds[column]
                and len(np.setdiff1d(new[k], working[column]))
            ]
            bar.update(len(pending) - len(todo))
            for k in todo:
                working[pending[k]] = np.union1d(working[pending[k]], new[k])
            pending = pending[todo]
            if len(pending) == 0:
                break
    for side in (v, v - w):
        for _, T in signed_scores(X, D, unit_rows(side), gates):
            np.maximum(violations, -T.min(axis=1), out=violations)
    pair = best * lengths[:, None], (best - w) * lengths[:, None]
    v, u = np.where(sign > 0, pair, pair[::-1])
    return v, u, best_length / bounds - 1, violations


def smallest_pair(
    B: np.ndarray, w: np.ndarray, h: np.ndarray, *, tol: float = 1e-9
) -> tuple[np.ndarray, float]:
    """Solve the programme for one w and all rows of B, by a primal-dual interior point method.

    With g = v / ||v|| + u / ||u||, s = B v - r > 0 and multipliers lambda > 0, a Newton step for

        g = B^T lambda,     lambda s = sigma mu

    solves (f'' + B^T diag(lambda / s) B) dv = right-hand side, with f'' = (I - v v^T/||v||^2)
    / ||v|| + (I - u u^T/||u||^2) / ||u||. Rows that bind, where lambda / s is huge, stay in the
    system as rows of their own instead, or their multipliers would lose their digits. For
    lambda >= 0 and y + y' = B^T lambda of lengths at most 1, r^T lambda - y'.w bounds the optimum
    from below.

    Parameters
    ----------
    B : ndarray of shape (m, d)
        Rows of length 1.
    w : ndarray of shape (d,)
        Of length 1. Neither w nor -w may lie in {v : B v >= 0}.
    h : ndarray of shape (d,)
        B h > 0.
    tol : float, default=1e-9
        Relative duality gap to stop at.

    Returns
    -------
    v : ndarray of shape (d,)
        Strictly feasible but for rounding.
    bound : float
        A lower bound of the optimum.
    """
    m, d = B.shape
    r = np.maximum(B @ w, 0)
    v = 2 * np.max(r / (B @ h)) * h
    s = B @ v - r
    multipliers = np.linalg.norm(v) / (m * s)
    best_bound = 0.0
    for _ in range(MOST_ITERATIONS):
        u = v - w
        size_v, size_u = np.linalg.norm(v), np.linalg.norm(u)
        y, y_u = v / size_v, u / size_u
        residual = y + y_u - B.T @ multipliers
        gap = s @ multipliers
        dual = y - residual / 2, y_u - residual / 2
        scale = max(1.0, *(float(np.linalg.norm(side)) for side in dual))
        best_bound = max(best_bound, float(r @ multipliers - dual[1] @ w) / scale)
        length = float(size_v + size_u)
        if length - best_bound <= tol * length:
            break
        curvature = np.eye(d) * (1 / size_v + 1 / size_u)
        curvature -= np.outer(y, y / size_v) + np.outer(y_u, y_u / size_u)
        binds = multipliers > BINDING * s * (1 / size_v + 1 / size_u)
        B_on, B_off, ratio = B[binds], B[~binds], multipliers / s
        system = np.block(
            [
                [curvature + (B_off.T * ratio[~binds]) @ B_off, B_on.T],
                [B_on, -np.diag(1 / ratio[binds])],
            ]
        )
        factor = lu_factor(system, check_finite=False)
        # Towards lambda s = 0 first; how far that goes says how much to centre.
        change = -multipliers * s
        for corrector in (False, True):
            right = B_off.T @ (change[~binds] / s[~binds]) - residual
            right = np.append(right, change[binds] / multipliers[binds])
            solved = lu_solve(factor, right, check_finite=False)
            dv = solved[:d]
            ds = B @ dv
            d_multipliers = (change - multipliers * ds) / s
            d_multipliers[binds] = -solved[d:]
            ds[binds] = (change[binds] - s[binds] * d_multipliers[binds]) / multipliers[binds]
            step = min(1.0, SHARE * _reach(s, ds), SHARE * _reach(multipliers, d_multipliers))
            if not corrector:
                centring = max((1 - step) ** 3, LEAST_CENTRING)
                change += centring * gap / m - ds * d_multipliers
        while step > 1e-12:
            new_v, new_s = v + step * dv, s + step * ds
            new_multipliers = multipliers + step * d_multipliers
            new_residual = _subgradient(new_v, w) - B.T @ new_multipliers
            allowed = (1 - 0.01 * step) * np.linalg.norm(residual)
            if np.linalg.norm(new_residual) <= max(allowed, new_s @ new_multipliers / length):
                break
            step /= 2
        else:
            break
        # Updated rather than computed from v, a small slack keeps its digits.
        v, s, multipliers = new_v, new_s, new_multipliers
    return v, best_bound


def _subgradient(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Gradient of ||v|| + ||v - w||."""
    return v / np.linalg.norm(v) + (v - w) / np.linalg.norm(v - w)


def _reach(a: np.ndarray, da: np.ndarray) -> float:
    """The largest x with a + x da >= 0."""
    falling = da < 0
    return float(np.min(-a[falling] / da[falling], initial=np.inf))


def _repair(
    X: RowSource,
    D: np.ndarray,
    v: np.ndarray,
    w: np.ndarray,
    h: np.ndarray,
    gates: np.ndarray,
    most: int,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows where B v < r most, for each of m weights, and the least t with B (v + t h) >= r."""
    m = len(v)
    t = np.zeros(m)

    def slacks() -> Iterator[tuple[slice, np.ndarray]]:
        for rows, T in signed_scores(X, D, np.concatenate([v, w, h]), np.tile(gates, 3)):
            slack = T[:m] - np.maximum(T[m : 2 * m], 0)
            need = np.zeros_like(slack)
            np.divide(-slack, T[2 * m :], out=need, where=slack < 0)
            np.maximum(t, need.max(axis=1), out=t)
            yield rows, slack

    return lowest_rows(slacks(), np.zeros(m), most), t
