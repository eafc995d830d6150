"""Margins of gates: how far the examples are from a hyperplane, and gates moved to keep them off.

An example that lies on the hyperplane of a gate, or next to it, is on or off by rounding: the
pattern then depends on the type and the order of the sum. Gates made from examples lie on some.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numba
import numpy as np

from cvxdistill.solvers.gates import check_gates
from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks

ROUNDS = 60
# Every so many rounds a gate that still has tight rows takes a random step instead.
ROUNDS_A_STEP = 3
# Rows this many margins away are watched while a gate is pushed; tight ones go to TARGET margins,
# the others stay beyond KEPT, both give or take SLACK.
REACH, TARGET, KEPT, SLACK = 4.0, 2.0, 1.2, 0.1
# Rows within this many margins lie on the hyperplane as far as rounding can tell.
TIED = 0.01
SWEEPS = 200
# Tight rows that are pushed, not stepped away from, in however few dimensions.
MOST_PUSHED = 3
# A gate that was moved must clear the margin by more than the rounding of the next look at it.
SAFETY = 1 + 1e-6


def nudge_gates(
    X: RowSource,
    G: np.ndarray,
    *,
    margin: float = 1e-5,
    random_state: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Move gates as little as needed until no example lies on the hyperplane of any of them.

    Afterwards, for each row x of X that is not zero,

        |x . g| >= margin ||x|| ||g||,      or |x . g + b| >= margin ||(x, 1)|| ||(g, b)||

    with a bias. Each round pushes the rows that are nearer to 2 margin with the least-norm change
    of the gate that keeps its neighbours off too (Hildreth's method), rows on the hyperplane to
    the sides on which a random direction puts them. Where these rows are too many, or too close to
    each other, the gate takes a random step first.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    G : ndarray of shape (d, p) or (d + 1, p)
        Gates, the last row their biases if there is one more row than X has columns.
    margin : float, default=1e-5
        Sine of the smallest angle between examples and hyperplanes, in (0, 1). For very many
        examples take ``attainable_margin(n, d)``.
    random_state : int, Generator or None
        Seed of the sides and steps.

    Returns
    -------
    ndarray of the shape of G
        Gates of the same lengths. Those that have the margin already are the same numbers, and so
        is the zero gate, which is always on.

    Raises
    ------
    ValueError, TypeError
        If the arguments are not as above, or a gate cannot be moved to such a place: where n is
        large for d and the margin, there may be none.

    References
    ----------
    Hildreth 1957 (the least-norm change, row by row).
    """
    X = check_rows(X)
    G = check_gates(G, X.shape[1])
    if not isinstance(margin, (float, np.floating)) or not 0 < margin < 1:
        raise ValueError(f"margin must be a number in (0, 1), got {margin!r}.")
    rng = np.random.default_rng(random_state)
    G = G.copy()
    norms = _row_norms(X, bias=len(G) > X.shape[1])
    pending = np.flatnonzero(G.any(axis=0))
    steps = np.zeros(G.shape[1], dtype=int)
    for turn in range(ROUNDS):
        U, lengths = _unit_columns(G[:, pending])
        needed = margin if turn == 0 else margin * SAFETY
        n_tight, rows, scores = _rows_near(X, norms, U, needed, REACH * margin, len(G))
        left = np.flatnonzero(n_tight)
        if len(left) == 0:
            return G
        crowd = len(G) if turn == 0 else max(MOST_PUSHED, len(G) / 8)
        for k in left:
            j = pending[k]
            if n_tight[k] > crowd or turn % ROUNDS_A_STEP == ROUNDS_A_STEP - 1:
                length = _step_length(n_tight[k], len(G), margin) * 4.0 ** steps[j]
                U[:, k] += min(length, 1.0) * _random_direction(len(G), rng)
                steps[j] += 1
            else:
                _push(U[:, k], rows, scores[:, k], needed, margin, turn > 1, rng)
        pending, lengths, U = pending[left], lengths[left], U[:, left]
        G[:, pending] = U / np.linalg.norm(U, axis=0) * lengths
    raise ValueError(
        f"gate {pending[0]} cannot be moved to where all {X.shape[0]} rows of X are off its "
        f"hyperplane by margin={margin:g}: {n_tight[left[0]]} rows were nearer at the last try. "
        "Choose a smaller margin."
    )


def attainable_margin(n: int, d: int, margin: float = 1e-5) -> float:
    """``margin``, or sqrt(d) / (8 n) if that is less: what n examples leave room for.

    About 0.8 sqrt(d) n margin of n examples spread evenly over all directions lie within the margin
    of any hyperplane. Up to d / 10 of them a small move of the gate can clear.
    """
    return min(margin, math.sqrt(d) / (8 * n))


def _row_norms(X: RowSource, bias: bool) -> np.ndarray:
    """||x||, or ||(x, 1)|| with a bias, of every row."""
    n, d = X.shape
    norms = np.empty(n)
    for block in row_blocks(n, d, np.float64):
        rows = np.asarray(X[block], dtype=np.float64)
        largest = np.abs(rows).max(axis=1)
        if not np.isfinite(largest).all():
            raise ValueError("X contains NaN or infinity.")
        scaled = rows / np.where(largest > 0, largest, 1)[:, None]
        norms[block] = largest * np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    return np.hypot(norms, 1) if bias else norms


def _unit_columns(G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns, none of them zero, scaled to unit length in float64, and their lengths."""
    largest = np.abs(G).max(axis=0).astype(np.float64)
    U = G / largest
    lengths = np.linalg.norm(U, axis=0)
    return U / lengths, largest * lengths


def _unit_rows_and_scores(
    X: RowSource, norms: np.ndarray, U: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Blocks of rows that are not zero, their norms, and their scores x . u / ||x||."""
    d = X.shape[1]
    for block in row_blocks(X.shape[0], max(d, U.shape[1]), np.float64):
        rows, size = np.asarray(X[block], dtype=np.float64), norms[block]
        if not size.all():
            rows, size = rows[size > 0], size[size > 0]
        scores = rows @ U[:d]
        if len(U) > d:
            scores += U[d]
        scores /= size[:, None]
        yield rows, size, scores


def _rows_near(
    X: RowSource, norms: np.ndarray, U: np.ndarray, needed: float, reach: float, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is near the unit gates U (d, k): counts of tight rows, unit rows, their scores.

    Returns
    -------
    n_tight : ndarray of int, shape (k,)
        Rows with a score below ``needed``.
    rows : ndarray of shape (m, d)
        Rows with a score below ``reach`` at a gate that has tight rows, but not over ``most``.
    scores : ndarray of shape (m, k)
    """
    n_tight = np.zeros(U.shape[1], dtype=int)
    near_rows, near_scores = [np.empty((0, len(U)))], [np.empty((0, U.shape[1]))]
    for rows, size, scores in _unit_rows_and_scores(X, norms, U):
        distances = np.abs(scores)
        n_tight += (distances < needed).sum(axis=0)
        near = (distances[:, n_tight <= most] < reach).any(axis=1)
        kept = rows[near]
        if len(U) > kept.shape[1]:
            kept = np.hstack([kept, np.ones((len(kept), 1))])
        near_rows.append(kept / size[near, None])
        near_scores.append(scores[near])
    return n_tight, np.vstack(near_rows), np.vstack(near_scores)


def _random_direction(d: int, rng: np.random.Generator) -> np.ndarray:
    z = rng.standard_normal(d)
    return z / np.linalg.norm(z)


def _step_length(n_tight: int, d: int, margin: float) -> float:
    """Length of a random step after which about d / 8 of the rows at the hyperplane are left.

    A random unit vector has |x . u| < t with a probability of about 0.8 sqrt(d) t.
    """
    return 0.8 * math.sqrt(d) * 2 * margin * n_tight / (d / 8)


def _push(
    u: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    needed: float,
    margin: float,
    choose_sides: bool,
    rng: np.random.Generator,
) -> None:
    """Move the gate u by the least that puts its tight rows at TARGET margins, in place.

    Rows keep their sides, but those on the hyperplane, or all tight ones with ``choose_sides``, get
    the sides of a random direction, on which they can be all at once.
    """
    near = np.abs(scores) < REACH * margin
    rows, scores = rows[near], scores[near]
    tight = np.abs(scores) < needed
    sides = np.sign(scores)
    free = tight if choose_sides else np.abs(scores) < TIED * margin
    sides[free] = np.where(rows[free] @ _random_direction(len(u), rng) >= 0, 1, -1)
    targets = np.where(tight, TARGET, KEPT) * margin
    u[:] = _least_norm_change(sides[:, None] * rows, targets, u.copy(), SLACK * margin, SWEEPS)


@numba.njit(cache=True, nogil=True)
def _least_norm_change(rows, targets, u, slack, sweeps):  # type: ignore[no-untyped-def]
    """The u nearest to the given one with rows @ u >= targets; rows have unit length."""
    m, d = rows.shape
    multipliers = np.zeros(m)
    for _ in range(sweeps):
        worst = 0.0
        for i in range(m):
            score = 0.0
            for k in range(d):
                score += rows[i, k] * u[k]
            worst = max(worst, targets[i] - score)
            change = max(targets[i] - score, -multipliers[i])
            if change != 0:
                multipliers[i] += change
                for k in range(d):
                    u[k] += change * rows[i, k]
        if worst <= slack:
            break
    return u
