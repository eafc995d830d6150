"""Newton's direction on the groups that are not zero, where a group elastic net is smooth.

With lengths l_g = ||B_g||, u_g = B_g / l_g and k_g = t_g / l_g the Hessian of

    1/2 <B, H B> - <q, B> + sum_g (t_g ||B_g|| + r_g / 2 ||B_g||^2)

is, on the vectorised B, H x I + diag(k + r) - sum_g k_g u_g u_g^T. With one output it is formed and
factorised. With more, only M = H + diag(k + r) is, and the rank-one terms, one for each group, are
put in by Woodbury's identity, for which

    <U_g, (M^-1 x I) U_h> = sum over i in g, j in h of (M^-1)_ij <u_i, u_j>.

Where there are more features than examples, H = A^T A / n, the system is reduced to one in the n
examples and the lengths of the groups, by eliminating what is orthogonal to u_g.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numba
import numpy as np
from scipy import linalg

from cvxdistill.solvers.conjugate_gradients import conjugate_gradients

# Added to the diagonal, relative to its mean; in single precision.
DAMPING, SINGLE_DAMPING = 1e-11, 1e-6
# Of conjugate gradients with such a factor of the same matrix: relative residual and most steps.
EXACT, REFINEMENTS = 1e-4, 4
# Of the line search: usually, and where the step is still 0.
BISECTIONS, MOST_BISECTIONS = 20, 60


def direction_from_gram(
    H: np.ndarray, G: np.ndarray, U: np.ndarray, k: np.ndarray, r: np.ndarray, starts: np.ndarray
) -> np.ndarray | None:
    """Solve for the direction, from H (m, m) and the negative gradient G (m, c).

    Parameters
    ----------
    H : ndarray of shape (m, m)
    G : ndarray of shape (m, c)
    U : ndarray of shape (m, c)
        u_g, anything where k is 0.
    k, r : ndarray of shape (groups,)
    starts : ndarray of shape (groups + 1,)

    Returns
    -------
    ndarray of shape (m, c), or None if the Hessian is singular to working precision.
    """
    sizes = np.diff(starts)
    diagonal = np.repeat(k + r, sizes)
    if G.shape[1] == 1:
        factor = HessianFactor.of(np.arange(len(H)), H, U[:, 0], k, diagonal, starts)
        if factor is None:
            return None
        product = partial(hessian_product, H.__matmul__, U[:, 0], k, diagonal, starts)
        return factor.refined(product, G)
    M = H.copy()
    M.flat[:: len(M) + 1] += diagonal + DAMPING * (np.trace(H) / len(H) + diagonal)
    factor, failed = linalg.lapack.dpotrf(M, lower=1, clean=0)
    if failed:
        return None
    Z = linalg.lapack.dpotrs(factor, G, lower=1)[0]
    normed = k > 0
    if not normed.any():
        return Z
    inverse, failed = linalg.lapack.dpotri(factor, lower=1)
    inverse = np.tril(inverse)
    inverse += np.tril(inverse, -1).T
    first = starts[:-1]
    inverse *= U @ U.T
    C = np.add.reduceat(np.add.reduceat(inverse, first, axis=0), first, axis=1)
    C = C[np.ix_(normed, normed)]
    pull = np.add.reduceat(np.einsum("mc,mc->m", U, Z), first)[normed]
    capacity = np.diag(1 / k[normed]) - C
    capacity.flat[:: len(capacity) + 1] += DAMPING / k[normed]
    y = np.zeros(len(k))
    _, y[normed], failed = linalg.lapack.dposv(capacity, pull, lower=1)
    if failed:
        return None
    return Z + linalg.lapack.dpotrs(factor, U * np.repeat(y, sizes)[:, None], lower=1)[0]


def hessian_product(
    product: Callable[[np.ndarray], np.ndarray],
    u: np.ndarray,
    k: np.ndarray,
    diagonal: np.ndarray,
    starts: np.ndarray,
    x: np.ndarray,
) -> np.ndarray:
    """(H + diag(diagonal) - sum_g k_g u_g u_g^T) x with one output, from the product with H."""
    inner = np.add.reduceat(u * x, starts[:-1])
    out: np.ndarray = product(x) + diagonal * x - u * np.repeat(k * inner, np.diff(starts))
    return out


class Cholesky:
    """The factor of a positive definite matrix (m, m).

    Parameters
    ----------
    factor : ndarray of shape (m, m)
        As LAPACK's potrf returns it, upper.
    potrs : callable
        LAPACK's, for its precision.
    """

    def __init__(self, factor: np.ndarray, potrs: Callable):
        self.factor = factor
        self.potrs = potrs

    @classmethod
    def of(cls, make: Callable[[Any, float], np.ndarray]) -> Cholesky | None:
        """In single precision, or in double where that fails; None if that does too.

        ``make`` returns the matrix of a type, damped by a share, in the order of Fortran: it is
        written over, and only its upper triangle counts.
        """
        for kind, dtype, share in (("s", np.float32, SINGLE_DAMPING), ("d", np.float64, DAMPING)):
            potrf, potrs = (getattr(linalg.lapack, f"{kind}{name}") for name in ("potrf", "potrs"))
            factor, failed = potrf(make(dtype, share), overwrite_a=1, clean=0)
            if not failed:
                return cls(factor, potrs)
        return None

    def solve(self, b: np.ndarray) -> np.ndarray:
        """The inverse times b, (m,) or (m, k), in float64."""
        x: np.ndarray = self.potrs(self.factor, b.astype(self.factor.dtype))[0]
        return x.astype(np.float64)


class HessianFactor:
    """The factor of a Hessian with one output, to precondition it or a later one.

    Parameters
    ----------
    features : ndarray of int, shape (m,)
        Increasing.
    cholesky : Cholesky
    """

    def __init__(self, features: np.ndarray, cholesky: Cholesky):
        self.features = features
        self.solve = cholesky.solve

    @classmethod
    def of(
        cls,
        features: np.ndarray,
        H: np.ndarray,
        u: np.ndarray,
        k: np.ndarray,
        diagonal: np.ndarray,
        starts: np.ndarray,
    ) -> HessianFactor | None:
        """Of H + diag(diagonal) - sum_g k_g u_g u_g^T."""

        def make(dtype: Any, share: float) -> np.ndarray:
            # As BLAS orders it, the transpose: the same.
            M: Any = H.astype(dtype).T
            M.flat[:: len(M) + 1] += diagonal + share * (np.trace(H) / len(H) + diagonal)
            _subtract_outer(M, u, k, starts)
            return M

        cholesky = Cholesky.of(make)
        return None if cholesky is None else cls(features, cholesky)

    def refined(self, product: Callable[[np.ndarray], np.ndarray], G: np.ndarray) -> np.ndarray:
        """The inverse of the same matrix in double precision, given by its product, times G."""
        x, _ = conjugate_gradients(product, self.solve, G[:, 0], EXACT, REFINEMENTS)
        return x[:, None]

    def restricted(
        self, features: np.ndarray, diagonal: np.ndarray
    ) -> Callable[[np.ndarray], np.ndarray]:
        """The inverse on other features, with 1/diagonal for those that are not here."""
        diagonal = diagonal + DAMPING * diagonal.mean()
        place = np.searchsorted(self.features, features)
        here = self.features[np.minimum(place, len(self.features) - 1)] == features
        place = place[here]

        def apply(x: np.ndarray) -> np.ndarray:
            everything = np.zeros(len(self.features))
            everything[place] = x[here]
            out = x / diagonal
            out[here] = self.solve(everything)[place]
            return out

        return apply


class ColumnsOfGroups(Protocol):
    """Columns A (n, m) of groups, as products."""

    def along(self, x: np.ndarray) -> np.ndarray:
        """A_g x_g of each group, (groups, n)."""
        ...

    def combine(self, x: np.ndarray) -> np.ndarray:
        """A x, (n,)."""
        ...

    def correlate(self, v: np.ndarray) -> np.ndarray:
        """A^T v, (m,)."""
        ...

    def outer(self, weights: np.ndarray, dtype: Any) -> np.ndarray:
        """sum_g weights_g A_g A_g^T, (n, n), of which the lower triangle counts."""
        ...


class DenseColumnsOfGroups:
    """Stored columns, as rows of AT (m, n), in groups of these sizes."""

    def __init__(self, AT: np.ndarray, sizes: np.ndarray):
        self.AT = AT
        self.starts = np.concatenate([[0], np.cumsum(sizes)])

    def along(self, x: np.ndarray) -> np.ndarray:
        """A_g x_g of each group, (groups, n)."""
        out = np.empty((len(self.starts) - 1, self.AT.shape[1]))
        for row, (a, e) in zip(out, pairwise(self.starts), strict=True):
            np.dot(x[a:e], self.AT[a:e], out=row)
        return out

    def combine(self, x: np.ndarray) -> np.ndarray:
        """A x, (n,)."""
        return x @ self.AT

    def correlate(self, v: np.ndarray) -> np.ndarray:
        """A^T v, (m,)."""
        return self.AT @ v

    def outer(self, weights: np.ndarray, dtype: Any) -> np.ndarray:
        """sum_g weights_g A_g A_g^T, (n, n), of which the lower triangle counts."""
        roots = np.repeat(np.sqrt(weights), np.diff(self.starts))[:, None]
        scaled = np.multiply(self.AT, roots, dtype=dtype, casting="same_kind")
        return scaled.T @ scaled


def direction_from_columns(
    columns: ColumnsOfGroups,
    free: np.ndarray,
    g: np.ndarray,
    u: np.ndarray,
    k: np.ndarray,
    r: np.ndarray,
    starts: np.ndarray,
) -> np.ndarray | None:
    """Solve for the direction with one output, from the columns: H = A^T A / n.

    Takes the columns of penalised groups (k + r > 0), those of the others as rows (f, n), the
    negative gradient g (m,), and what ``direction_from_gram`` takes.
    """
    n = free.shape[1]
    sizes, penalised = np.diff(starts), k + r > 0
    normed = np.repeat(penalised, sizes)
    stiff = np.repeat(k + r, sizes)[normed]
    u, inner = u[normed], np.concatenate([[0], np.cumsum(sizes[penalised])])
    first = inner[:-1]
    # The columns along u_g, and those that are not penalised.
    along = np.vstack([columns.along(u), free])
    k, ridge = k[penalised], r[penalised]
    cholesky = _examples_cholesky(columns, along[: len(k)], n * (k + ridge))
    if cholesky is None:
        return None
    along /= np.sqrt(n)
    pull = np.add.reduceat(u * g[normed], first) if len(first) else np.zeros(0)
    across = (g[normed] - u * np.repeat(pull, np.diff(inner))) / stiff
    e = columns.combine(across) / np.sqrt(n)
    solved = cholesky.solve(np.column_stack([along.T, e]))
    S = along @ solved[:, :-1]
    S.flat[:: len(S) + 1] += DAMPING * np.trace(S) / len(S)
    S[np.arange(len(k)), np.arange(len(k))] += ridge
    ask = np.concatenate([pull, g[~normed]]) - along @ solved[:, -1]
    _, y, failed = linalg.lapack.dposv(S, ask, lower=1)
    if failed:
        return None
    v = solved[:, -1] + solved[:, :-1] @ y
    back = columns.correlate(v) / np.sqrt(n)
    back -= u * np.repeat(along[: len(k)] @ v, np.diff(inner))
    delta = np.empty_like(g)
    delta[normed] = across - back / stiff + u * np.repeat(y[: len(k)], np.diff(inner))
    delta[~normed] = y[len(k) :]
    return delta


def _examples_cholesky(
    columns: ColumnsOfGroups, along: np.ndarray, stiff: np.ndarray
) -> Cholesky | None:
    """Of I + sum_g (A_g A_g^T - along_g along_g^T) / stiff_g; the 1 is all the damping it needs."""

    def make(dtype: Any, _: float) -> np.ndarray:
        # As BLAS orders it, the transpose: the upper triangle counts.
        N = columns.outer(1 / stiff, dtype).T
        part = (along / np.sqrt(stiff)[:, None]).astype(dtype).T
        syrk = linalg.blas.get_blas_funcs("syrk", (N,))
        N = syrk(-1, part, beta=1, c=N, overwrite_c=1)
        N.flat[:: len(N) + 1] += 1
        return N

    return Cholesky.of(make)


def step_length(
    slope: float,
    curvature: float,
    t: np.ndarray,
    r: np.ndarray,
    squares: np.ndarray,
    cross: np.ndarray,
    steps: np.ndarray,
) -> float:
    """The best tau <= 1 along a direction, by bisection of the derivative.

        -slope + curvature tau + sum_g (cross_g + steps_g tau) (t_g / l_g(tau) + r_g),
        l_g(tau)^2 = squares_g + 2 cross_g tau + steps_g tau^2

    with squares ||B_g||^2, cross <B_g, Delta_g> and steps ||Delta_g||^2.
    """

    def derivative(tau: float) -> float:
        lengths = np.sqrt(np.maximum(squares + (2 * cross + steps * tau) * tau, 1e-300))
        return curvature * tau - slope + float((cross + steps * tau) @ (t / lengths + r))

    if derivative(1.0) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    # Directions of a nearly singular Hessian are long: the best step may be a tiny share of one.
    for step in range(MOST_BISECTIONS):
        if step >= BISECTIONS and low > 0:
            break
        middle = (low + high) / 2
        if derivative(middle) <= 0:
            low = middle
        else:
            high = middle
    return low


@numba.njit(cache=True, nogil=True)
def _subtract_outer(M, u, k, starts):  # type: ignore[no-untyped-def]
    for g in range(len(k)):
        if k[g] > 0:
            for i in range(starts[g], starts[g + 1]):
                for j in range(starts[g], starts[g + 1]):
                    M[i, j] -= k[g] * u[i] * u[j]
