"""Gates drawn from the data: hyperplanes between examples, or through them.

A random hyperplane often leaves nearly all examples on one side, or splits them where it does not
matter. These samplers look where the examples, and for pairs their targets, are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.linalg import qr

from cvxdistill.solvers.gate_margins import attainable_margin, nudge_gates
from cvxdistill.solvers.gates import check_count
from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks

# Numbers that are in memory at once: of more rows than fit a random part is used.
MOST_NUMBERS, FEWEST_ROWS = 2**24, 1024
# Directions in which rows of unit length reach less far than this are none: a gate along one would
# have all of them within its margin.
TOLERANCE = 1e-6
# How often pairs that make no gate are replaced.
ATTEMPTS = 50
# Random differences of targets for their median.
FEWEST_DIFFERENCES = 1000
SKETCHES = ("gaussian", "features")
SKETCH_SIZE = 32


def sample_quantile_gates(
    X: RowSource, n_gates: int, *, random_state: int | np.random.Generator | None = None
) -> np.ndarray:
    """Gaussian gates with biases that put their hyperplanes between the examples.

    g ~ N(0, I), and -b is the quantile of X g at u ~ U(0, 1): midway between the two neighbouring
    projections. So every share of the examples is as likely to be on as any other.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Where p or d are large, the quantiles are those of a random part of the rows.
    n_gates : int
        Number p of gates.
    random_state : int, Generator or None
        Seed; an int gives the directions of ``sample_gates(d, p, random_state=seed)``.

    Returns
    -------
    ndarray of shape (d + 1, p)
        One gate a column, the bias in the last row; of the type of X.

    Raises
    ------
    ValueError, TypeError
        If X is not a finite matrix of numbers or ``n_gates`` no positive integer.
    """
    X = check_rows(X)
    d = X.shape[1]
    p = check_count("n_gates", n_gates)
    rng = np.random.default_rng(random_state)
    G = rng.standard_normal((d, p))
    levels = rng.random(p)
    rows = _sample_rows(X, max(MOST_NUMBERS // max(d, p), FEWEST_ROWS), rng)
    projections = np.sort(rows @ G, axis=0)
    last = len(projections) - 1
    bias = np.empty(p)
    for j, s in enumerate(projections.T):
        below = s[int(levels[j] * last)]
        above = s[min(np.searchsorted(s, below, side="right"), last)]
        if above == below:  # nothing above: take the gap below, if there is one
            above = s[max(np.searchsorted(s, below, side="left") - 1, 0)]
        bias[j] = -(below + above) / 2
    return np.vstack([G, bias]).astype(X.dtype, copy=False)


def sample_pair_gates(
    X: RowSource,
    Y: Any,
    n_gates: int,
    *,
    bias: bool = False,
    margin: float | None = 1e-5,
    random_state: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Gates that part two examples x, x' with different targets, midway between them.

        g = x - x',    b = -g . (x + x') / 2        with a bias: the perpendicular bisector
        g = x / ||x|| - x' / ||x'||                 without: bisects the angle, x is on

    All pairs of different targets are equally likely. Labels are different when they are not
    equal, numbers when they are apart by the median of the differences that are not zero, or more:
    for two values and for one-hot rows that is any difference. With several outputs each gate
    takes the differences in one of them, chosen at random.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    Y : array of shape (n,) or (n, c)
        Integers, booleans or text in one column are labels; anything else are numbers.
    n_gates : int
        Number p of gates.
    bias : bool, default=False
    margin : float or None, default=1e-5
        Move the gates with ``nudge_gates`` to have this margin, as far as ``attainable_margin``
        allows; None leaves them as drawn.
    random_state : int, Generator or None

    Returns
    -------
    ndarray of shape (d, p), or (d + 1, p) with a last row of biases
        Of the type of X.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, values are not finite, all targets are equal, too few pairs part: x
        and x' are equal or, without a bias, parallel or zero; or as ``nudge_gates`` raises.
    """
    X = check_rows(X)
    p = check_count("n_gates", n_gates)
    rng = np.random.default_rng(random_state)
    values, least = _targets_and_least_differences(Y, X.shape[0], rng)
    gates: list[np.ndarray] = []
    n_found = 0
    for _ in range(ATTEMPTS):
        pairs = _different_pairs(values, least, p - n_found, rng)
        first, second = _take_rows(X, pairs.ravel()).reshape(2, -1, X.shape[1])
        found = _bisectors(first, second, bias, X.dtype)
        gates.append(found)
        n_found += len(found)
        if n_found == p:
            break
    else:
        raise ValueError(
            f"Found only {n_found} of {p} gates between rows of X with different targets: the "
            f"others were pairs of rows that are {'equal' if bias else 'parallel or zero'}."
        )
    return _nudged(X, np.vstack(gates).T, margin, rng)


def sample_wedge_gates(
    X: RowSource,
    n_gates: int,
    *,
    bias: bool = False,
    sketch: str | None = "gaussian",
    sketch_size: int | None = None,
    margin: float | None = 1e-5,
    random_state: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Gates through d - 1 random examples: the dual of their wedge product.

    Without a sketch g is the generalised cross product of d - 1 rows, which is orthogonal to all of
    them, up to its length and a random sign; with a bias the hyperplane contains d rows. Where the
    rows of X have only the rank r, these are r - 1 rows and g lies in their span. With a sketch S
    of shape (k, d), h is the cross product of k - 1 rows S x, and g = S^T h is orthogonal to these
    k - 1 rows x; each gate has its own sketch.

    Parameters
    ----------
    X : array or row source of shape (n, d)
        Where d is large, the gates share a random part of the rows.
    n_gates : int
        Number p of gates.
    bias : bool, default=False
    sketch : {"gaussian", "features"} or None, default="gaussian"
        Standard normal entries, or a random subset of the features.
    sketch_size : int or None
        k, by default 32; if it is not below d there is no sketch.
    margin : float or None, default=1e-5
        Move the gates with ``nudge_gates`` to have this margin, as far as ``attainable_margin``
        allows; None leaves them as drawn, with their rows on the hyperplane.
    random_state : int, Generator or None

    Returns
    -------
    ndarray of shape (d, p), or (d + 1, p) with a last row of biases
        Of the type of X.

    Raises
    ------
    ValueError, TypeError
        If X is not a finite matrix of numbers, an option is none of those above, or as
        ``nudge_gates`` raises.

    Notes
    -----
    In data with many equal entries, one-hot columns above all, the hyperplane through d - 1 rows
    contains most of the others too; a sketch prevents that.

    References
    ----------
    Pilanci 2023 (optimal neurons are wedge products of examples; sketches of them).
    """
    X = check_rows(X)
    d = X.shape[1]
    p = check_count("n_gates", n_gates)
    if sketch is not None and sketch not in SKETCHES:
        raise ValueError(f"sketch must be one of {list(SKETCHES)} or None, got {sketch!r}.")
    k = SKETCH_SIZE if sketch_size is None else check_count("sketch_size", sketch_size)
    rng = np.random.default_rng(random_state)
    # Some rows to go through, and as many again to tell the rank.
    size = 2 * ((min(k, d) if sketch else d) + 1)
    pool = _sample_rows(X, max(MOST_NUMBERS // d, size), rng)
    if not bias:
        pool = pool[pool.any(axis=1)]
        if len(pool) == 0:
            raise ValueError("X must have a row that is not zero, got only rows of zeros.")
    G = np.zeros((d + bool(bias), p))
    for j in range(p):
        rows = pool[rng.choice(len(pool), min(size, len(pool)), replace=False)]
        if sketch is None or k >= d:
            G[:, j] = _normal_through(_with_ones(rows, bias), rng)
        elif sketch == "features":
            features = rng.choice(d, k, replace=False)
            h = _normal_through(_with_ones(rows[:, features], bias), rng)
            G[features, j], G[d:, j] = h[:k], h[k:]
        else:
            S = rng.standard_normal((k, d))
            h = _normal_through(_with_ones(rows @ S.T, bias), rng)
            G[:d, j], G[d:, j] = S.T @ h[:k], h[k:]
    return _nudged(X, G, margin, rng)


def _nudged(
    X: RowSource, G: np.ndarray, margin: float | None, rng: np.random.Generator
) -> np.ndarray:
    G = np.ascontiguousarray(G, dtype=X.dtype)
    if margin is None:
        return G
    return nudge_gates(X, G, margin=attainable_margin(X.shape[0], len(G), margin), random_state=rng)


def _take_rows(X: RowSource, indices: np.ndarray) -> np.ndarray:
    """The rows with these numbers, in float64, in one pass over X."""
    if isinstance(X, np.ndarray):
        return X[indices].astype(np.float64)
    n, d = X.shape
    rows = np.empty((len(indices), d))
    for block in row_blocks(n, d, X.dtype):
        here = np.flatnonzero((indices >= block.start) & (indices < block.stop))
        if len(here):
            rows[here] = X[block][indices[here] - block.start]
    if not np.isfinite(rows).all():
        raise ValueError("X contains NaN or infinity.")
    return rows


def _sample_rows(X: RowSource, most: int, rng: np.random.Generator) -> np.ndarray:
    """All rows of X, or a random ``most`` of them, in float64."""
    n = X.shape[0]
    return _take_rows(X, np.arange(n) if n <= most else rng.choice(n, most, replace=False))


def _targets_and_least_differences(
    Y: Any, n: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Y as numbers of shape (n, c), and what is a difference in each column: inf if there is none.

    Labels become their ranks, and the least difference of two labels is 1.
    """
    Y = np.asarray(Y)
    if Y.ndim not in (1, 2) or len(Y) != n or Y.size == 0:
        raise ValueError(f"Y must have shape ({n},) or ({n}, c), got {Y.shape}.")
    if Y.size == n and Y.dtype.kind in "iubUSO":
        labels, ranks = np.unique(Y.astype(str) if Y.dtype.kind == "O" else Y, return_inverse=True)
        if len(labels) == 1:
            raise ValueError(f"Y must hold different targets, got {n} equal ones.")
        return ranks.reshape(n, 1).astype(np.float64), np.ones(1)
    if Y.dtype.kind not in "fiub":
        raise TypeError(f"Y must hold numbers, or labels in one column, got dtype {Y.dtype}.")
    values = Y.reshape(n, -1).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("Y contains NaN or infinity.")
    values -= values.min(axis=0)
    least = np.full(values.shape[1], np.inf)
    for k, column in enumerate(values.T):
        shuffled = rng.permuted(np.tile(column, (1 + FEWEST_DIFFERENCES // n, 1)), axis=1)
        differences = np.abs(column - shuffled)
        if not differences.any():
            differences = np.diff(np.unique(column))
        if differences.any():
            # A little less, because sums of numbers that are just so far apart are rounded.
            least[k] = np.median(differences[differences > 0]) * (1 - 1e-9)
    if np.isinf(least).all():
        raise ValueError(f"Y must hold different targets, got {n} equal ones.")
    return values, least


def _different_pairs(
    values: np.ndarray, least: np.ndarray, m: int, rng: np.random.Generator
) -> np.ndarray:
    """Row numbers (2, m) of pairs that differ in a random column by at least ``least``."""
    n = len(values)
    columns = rng.choice(np.flatnonzero(np.isfinite(least)), m)
    pairs = np.empty((2, m), dtype=int)
    for k in np.unique(columns):
        mine = np.flatnonzero(columns == k)
        order = np.argsort(values[:, k], kind="stable")
        v = values[order, k]
        below = np.searchsorted(v, v - least[k], side="right")
        above = n - np.searchsorted(v, v + least[k], side="left")
        count = below + above
        first = rng.choice(n, len(mine), p=count / count.sum())
        place = rng.integers(count[first])
        second = np.where(place < below[first], place, place + n - count[first])
        pairs[:, mine] = order[first], order[second]
    return pairs


def _bisectors(first: np.ndarray, second: np.ndarray, bias: bool, dtype: Any) -> np.ndarray:
    """Gates (m', d) or (m', d + 1) between the rows of two matrices (m, d), where they differ."""
    lengths = np.linalg.norm([first, second], axis=2)[:, :, None]
    if bias:
        G = first - second
        offset = -np.einsum("ij,ij->i", G, (first + second) / 2)
        parted = np.linalg.norm(G, axis=1) > 8 * np.finfo(dtype).eps * lengths.sum(axis=0)[:, 0]
        return np.hstack([G, offset[:, None]])[parted]
    first, second = np.stack([first, second]) / np.where(lengths > 0, lengths, 1)
    G = first - second
    return G[(lengths > 0).all(axis=0)[:, 0] & (np.linalg.norm(G, axis=1) > TOLERANCE)]


def _with_ones(rows: np.ndarray, bias: bool) -> np.ndarray:
    return np.hstack([rows, np.ones((len(rows), 1))]) if bias else rows


def _normal_through(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal of a hyperplane through the first r - 1 of the rows (m, k), in the span of all.

    r is the rank of all of them. Where the r - 1 rows are dependent, the normal has a random
    direction among those that there are.
    """
    # A linear map of the rows maps hyperplanes to hyperplanes: let no column be a small one.
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1
    rows = rows / scale
    lengths = np.linalg.norm(rows, axis=1)
    rows = rows[lengths > 0] / lengths[lengths > 0, None]
    span, rest = _range_and_complement(rows.T)
    if span.shape[1] == 0:  # zero rows lie on any hyperplane
        span = rest
    _, normals = _range_and_complement((rows[: span.shape[1] - 1] @ span).T)
    return span @ (normals @ rng.standard_normal(normals.shape[1])) / scale


def _range_and_complement(A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the range of A (k, m), with columns of unit length, and of the rest."""
    if A.shape[1] == 0:
        return np.empty((len(A), 0)), np.eye(len(A))
    Q, R, _ = qr(A, pivoting=True)
    rank = int((np.abs(np.diagonal(R)) > TOLERANCE).sum())
    return Q[:, :rank], Q[:, rank:]
