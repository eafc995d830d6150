"""The exact search of great circles of gates.

On the circle g cos t + h sin t, 0 <= t < 2 pi, row i has the score s_i cos t + q_i sin t, where s
are the scores of g and q those of h. It changes its sign twice, half a turn apart, so the n
crossings in [0, pi) cut the circle into 2n cells, in each of which the activation pattern is one
and the same. Passing the crossings in order, each function here is updated row by row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numba
import numpy as np

from cvxdistill.solvers.gated_operator import SMALLEST_PARALLEL_WORK
from cvxdistill.solvers.threads import run_in_threads

# A rise by a smaller factor is rounding.
SMALLEST_RISE = 1e-9


def best_gated_angles(
    X: np.ndarray, R: np.ndarray, C: np.ndarray, S: np.ndarray, Q: np.ndarray
) -> np.ndarray:
    """Angles of the gates that maximise ||X^T diag(D) R||_F on each of m circles.

    Parameters
    ----------
    X : ndarray of shape (m, n, d), or (1, n, d) for all circles
    R : ndarray of shape (m, n, c), or (1, n, c) for all circles
    C : ndarray of shape (m, d, c)
        X^T diag(D) R at t = 0.
    S, Q : ndarray of shape (m, n)
        Scores of g and h.

    Returns
    -------
    ndarray of shape (m,)
        The middle of the best cell, 0 if that is the cell of t = 0. Cells that are too narrow for
        rounding to hit are passed over.
    """
    if len(X) == 1 and R.shape[2] == 1:
        total = (R[:, :, 0] @ X[0])[:, :, None]
    else:
        total = np.matmul(X.transpose(0, 2, 1), R)
    overlap = inner_products(X, R, np.broadcast_to(total, C.shape))
    # In the memory order (m, c, d), as the update runs along rows of X.
    C = C.transpose(0, 2, 1).astype(np.float64, order="C")
    total = total.transpose(0, 2, 1).astype(np.float64, order="C")
    keys, order = _crossings(S, Q)
    narrowest = np.finfo(S.dtype).eps ** 0.75
    t = np.zeros(len(S))

    def work(circles: list[slice]) -> None:
        for part in circles:
            _best_gated_angles(X, R, C, total, overlap, S, keys, order, narrowest, part, t)

    _for_circles(work, len(S), S.shape[1] * C[0].size)
    return t


def best_relu_angles(r: np.ndarray, S: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """Angles that maximise |sum_i r_i relu(s_i cos t + q_i sin t)| on each of m circles.

    Parameters
    ----------
    r, S, Q : ndarray of shape (m, n)

    Returns
    -------
    ndarray of shape (m,)
        0 if nothing exceeds the value at t = 0.
    """
    keys, order = _crossings(S, Q)
    t = np.zeros(len(S))

    def work(circles: list[slice]) -> None:
        for part in circles:
            _best_relu_angles(r, S, Q, keys, order, part, t)

    _for_circles(work, len(S), S.shape[1])
    return t


def inner_products(X: np.ndarray, R: np.ndarray, C: np.ndarray) -> np.ndarray:
    """<C[m], x_i r_i^T> of each circle m and row i, (m, n), for arrays as above."""
    result = np.zeros((len(C), X.shape[1]), dtype=X.dtype)
    for k in range(C.shape[2]):
        c = C[:, :, k]
        products = c @ X[0].T if len(X) == 1 else np.einsum("mnd,md->mn", X, c)
        result += products * R[:, :, k]
    return result


def _crossings(S: np.ndarray, Q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """-cot t of the angle t in [0, pi) at which each row's score changes its sign, and their order.

    A row with score 0 at t = 0 crosses there if it is off just after, else nowhere before pi.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        keys = np.where(S == 0, np.where(Q < 0, -np.inf, np.inf), Q / S)
    return keys, np.argsort(keys, axis=1)


def _for_circles(work: Callable[[list[slice]], None], m: int, cost: int) -> None:
    """Call ``work`` on slices of range(m), side by side where ``cost`` for each is worth it."""
    if m * cost < SMALLEST_PARALLEL_WORK:
        work([slice(0, m)])
    else:
        run_in_threads(work, [slice(k, k + 1) for k in range(m)])


@numba.njit(cache=True, nogil=True)
def _best_gated_angles(  # type: ignore[no-untyped-def]
    X, R, C, total, overlap, S, keys, order, narrowest, circles, angles
):
    """Angle of the best cell of each circle, 0 if it is that of t = 0; overwrites C."""
    for m in range(circles.start, circles.stop):
        angles[m] = _best_gated_angle(
            X[min(m, len(X) - 1)],
            R[min(m, len(R) - 1)],
            C[m],
            total[min(m, len(total) - 1)],
            overlap[m],
            S[m],
            keys[m],
            order[m],
            narrowest,
        )


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _best_gated_angle(  # type: ignore[no-untyped-def]
    X, R, C, total, overlap, s, keys, order, narrowest
):
    """C belongs to t = 0. Half a turn on, all rows are the other way round: C is total - C."""
    n, d = X.shape
    c = R.shape[1]
    norm = np.sum(C**2)
    opposite = np.sum((total - C) ** 2)
    best = norm * (1 + SMALLEST_RISE)
    angle = 0.0
    before = -math.pi / 2
    for j in range(n + 1):
        key = keys[order[j]] if j < n else np.inf
        after = math.atan(key)
        if after - before > narrowest and max(norm, opposite) > best:
            angle = (math.pi + before + after) / 2
            if opposite > norm:
                angle += math.pi
            best = max(norm, opposite)
        if key == np.inf:
            break
        before = after
        i = order[j]
        sign = -1.0 if s[i] >= 0 else 1.0
        change = 0.0
        for k in range(c):
            r = sign * R[i, k]
            # ||C + r x||^2 - ||C||^2 = <2 C + r x, r x>, one row of C at a time.
            product = 0.0
            for a in range(d):
                product += (2 * C[k, a] + r * X[i, a]) * X[i, a]
            change += r * product
            for a in range(d):
                C[k, a] += r * X[i, a]
        norm += change
        # ||total - C||^2 = ||total||^2 - 2 <total, C> + ||C||^2
        opposite += change - 2 * sign * overlap[i]
    return angle


@numba.njit(cache=True, nogil=True)
def _best_relu_angles(r, S, Q, keys, order, circles, angles):  # type: ignore[no-untyped-def]
    """Angles that maximise |sum_i r_i relu(s_i cos t + q_i sin t)|, 0 if t = 0 does."""
    for m in range(circles.start, circles.stop):
        angles[m] = _best_relu_angle(r[m], S[m], Q[m], keys[m], order[m])


@numba.njit(cache=True, nogil=True)
def _best_relu_angle(r, s, q, keys, order):  # type: ignore[no-untyped-def]
    """In each cell the sum is a cos t + b sin t; half a turn on it has the other rows' a and b."""
    n = len(r)
    a, b, a_all, b_all = 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        a_all += r[i] * s[i]
        b_all += r[i] * q[i]
        if s[i] >= 0:
            a += r[i] * s[i]
            b += r[i] * q[i]
    best = abs(a) * (1 + SMALLEST_RISE)
    angle = 0.0
    before = 0.0
    for j in range(n + 1):
        key = keys[order[j]] if j < n else np.inf
        after = math.pi / 2 + math.atan(key)
        for half in range(2):
            a_here = a if half == 0 else a_all - a
            b_here = b if half == 0 else b_all - b
            if a_here * a_here + b_here * b_here <= best * best:
                continue
            peak = math.atan2(b_here, a_here)
            if peak < 0:
                peak += math.pi
            for t in (before, min(max(peak, before), after), after):
                value = abs(a_here * math.cos(t) + b_here * math.sin(t))
                if value > best:
                    best = value
                    angle = t + half * math.pi
        if key == np.inf:
            break
        i = order[j]
        sign = -1.0 if s[i] >= 0 else 1.0
        a += sign * r[i] * s[i]
        b += sign * r[i] * q[i]
        before = after
    return angle
