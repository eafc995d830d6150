"""Cone decompositions: from a gated ReLU solution to a ReLU network with the same predictions.

Each column w of V[j] becomes a difference v - u of two columns in the cone
K_j = {w : S_j X w >= 0}, S_j = 2 diag(D[:, j]) - I. There diag(D[:, j]) X v = relu(X v), so that

    sum_j diag(D[:, j]) X V[j]  =  sum_j relu(X v_j) - relu(X u_j).

What it costs is length: ||v|| + ||u|| >= ||w||, and the more so the narrower the cone.

References
----------
Mishkin, Sahiner and Pilanci 2022, section 3 and appendix (cone decompositions, exact, approximate
and in closed form).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numba
import numpy as np
from tqdm import tqdm

from cvxdistill.solvers.cone_programme import smallest_pairs
from cvxdistill.solvers.cone_projection import TOLERANCE, unit_rows
from cvxdistill.solvers.cones import cone_violations, interior_directions, shift_into_cones
from cvxdistill.solvers.fista import RFISTA, start
from cvxdistill.solvers.gated_operator import as_weights, flat_weights
from cvxdistill.solvers.penalties import NeuronPenalty
from cvxdistill.solvers.rows import RowSource, check_rows, row_blocks
from cvxdistill.solvers.threads import one_blas_thread, run_in_threads

# Relative duality gap that each method stops at, unless told otherwise.
TOLERANCES = {"exact": 1e-8, "approximate": 1e-3, "closed-form": 0.0}
CHECK_EVERY = 20


@dataclass(frozen=True)
class ConeDecomposition:
    """Weights of a ReLU network, and what the decomposition did to them.

    Attributes
    ----------
    V, U : ndarray of shape (p, d, c)
        Pairs with the given difference V - U; every column lies in the cone of its gate.
    method : str
    norm_before : float
        Sum of the lengths of the columns that were decomposed.
    norm_after : float
        Sum of the lengths of the columns of V and U.
    relative_gap : float or None
        "exact": the largest of any column, so that norm_after is at most 1 + relative_gap times
        the smallest possible; "approximate": that of the penalised least squares, before the
        repair; None where nothing had to be solved.
    violation_before_repair : float
        Largest violation, relative to lengths, before the shift into the cones.
    violation : float
        Largest violation of V and U.
    """

    V: np.ndarray = field(repr=False)
    U: np.ndarray = field(repr=False)
    method: str
    norm_before: float
    norm_after: float
    relative_gap: float | None
    violation_before_repair: float
    violation: float

    @property
    def norm_growth(self) -> float:
        """norm_after / norm_before, at least 1; 1 where all weights are zero."""
        return self.norm_after / self.norm_before if self.norm_before > 0 else 1.0

    @property
    def weights(self) -> np.ndarray:
        """V and U as one array of shape (2, p, d, c), the weights of a ``ReLUProblem``."""
        return np.stack([self.V, self.U])

    def __str__(self) -> str:
        return (
            f"{self.method} cone decomposition of {self.V.shape[0]} gates: norm "
            f"{self.norm_before:.4g} -> {self.norm_after:.4g} (x {self.norm_growth:.3g}), "
            f"violation {self.violation_before_repair:.1e} -> {self.violation:.1e}"
        )


def decompose(
    X: RowSource,
    D: np.ndarray,
    V: Any,
    *,
    method: str = "exact",
    G: np.ndarray | None = None,
    rho: float = 1e-3,
    tol: float | None = None,
    max_iter: int = 1000,
    verbose: int = 0,
) -> ConeDecomposition:
    """Write each column w of V[j] as v - u with both in the cone K_j.

    With B = S_j X, rows scaled to length 1, v and u = v - w lie in K_j where B v >= max(0, B w).

    * "exact": the shortest such pair, minimising ||v|| + ||v - w|| (a second-order cone
      programme, by an interior point method on the rows that bind).
    * "approximate": R-FISTA on 1/2 ||[max(0, B w) - B v]_+||^2 + rho ||w|| ||v||, for all gates and
      outputs at once. The penalty leaves a violation of the order of rho, which the smallest shift
      of v and u into the cone repairs.
    * "closed-form": B v = max(0, B w) and B u = max(0, -B w) by the pseudo-inverse, which takes an
      X of full row rank. What w has outside the span of the rows goes to v and u in the shares
      that are shortest.

    Where w or -w lies in the cone, that is v or u, and the other is 0.

    Parameters
    ----------
    X : array or row source of shape (n, d)
    D : ndarray of bool, shape (n, p)
    V : array of shape (p, d, c)
        Weights of the gated ReLU programme, in the units of X.
    method : {"exact", "approximate", "closed-form"}, default="exact"
    G : ndarray of shape (d, p), optional
        Gates of these patterns: a hint where to look for directions inside the cones.
    rho : float, default=1e-3
        Strength of the penalty of "approximate", relative to the length of w.
    tol : float, optional
        Relative duality gap to stop at: by default 1e-8 for "exact", 1e-3 for "approximate".
    max_iter : int, default=1000
        Most iterations of R-FISTA.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    ConeDecomposition

    Raises
    ------
    ValueError, TypeError
        If shapes or types do not fit, values are not finite, or a setting is out of range; if the
        cone of a gate that needs decomposing has no interior; if X does not have full row rank for
        "closed-form".
    """
    _check_settings(method, rho, tol, max_iter)
    X, V, D = check_rows(X), np.asarray(V), np.asarray(D)
    outside = cone_violations(X, D, V).ravel() > TOLERANCE
    outside_negative = cone_violations(X, D, -V).ravel() > TOLERANCE
    p, d, c = V.shape
    if p != D.shape[1]:
        raise ValueError(f"V must have a block for each of the {D.shape[1]} gates, got {V.shape}.")
    if G is not None and np.shape(G) != (d, p):
        raise ValueError(f"G must have shape {(d, p)}, got {np.shape(G)}.")
    tol = tol or TOLERANCES[method]
    flat = flat_weights(V).astype(np.float64)
    v, u = np.zeros_like(flat), np.zeros_like(flat)
    v[~outside] = flat[~outside]
    u[outside & ~outside_negative] = -flat[outside & ~outside_negative]
    todo = np.flatnonzero(outside & outside_negative)
    gates = todo // c
    gap: float | None = None
    before = 0.0
    if method == "closed-form":
        v[todo], u[todo] = _closed_form(X, D, flat[todo], gates)
    elif len(todo):
        H = _inside(X, D, G, gates)
        if method == "exact":
            v[todo], u[todo], gaps, violations = smallest_pairs(
                X, D, flat[todo], gates, H, tol=tol, verbose=verbose
            )
            gap, before = float(gaps.max()), float(violations.max())
        else:
            v[todo], u[todo], gap, before = _approximate(
                X, D[:, gates], flat[todo], H[:, gates], rho, tol, max_iter, verbose
            )
    sides = [as_weights(side.reshape(p, c, d).transpose(0, 2, 1), V.dtype) for side in (v, u)]
    after = max(float(cone_violations(X, D, side).max()) for side in sides)
    norm = NeuronPenalty()
    return ConeDecomposition(
        V=sides[0],
        U=sides[1],
        method=method,
        norm_before=norm.value(V),
        norm_after=sum(map(norm.value, sides)),
        relative_gap=gap,
        violation_before_repair=before if method != "closed-form" and len(todo) else after,
        violation=after,
    )


def _check_settings(method: str, rho: float, tol: float | None, max_iter: int) -> None:
    if method not in TOLERANCES:
        raise ValueError(f"method must be one of {list(TOLERANCES)}, got {method!r}.")
    for name, value in (("rho", rho), ("tol", tol)):
        if value is None and name == "tol":
            continue
        if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number, got {value!r}.")
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be positive and finite, got {value!r}.")
    if not isinstance(max_iter, (int, np.integer)) or isinstance(max_iter, bool) or max_iter < 1:
        raise ValueError(f"max_iter must be a positive integer, got {max_iter!r}.")


def _inside(X: RowSource, D: np.ndarray, G: np.ndarray | None, gates: np.ndarray) -> np.ndarray:
    """Directions (d, p) of largest margin in the cones of these gates; zero for all others."""
    used = np.unique(gates)
    hint = None if G is None else np.asarray(G)[:, used]
    directions, margins = interior_directions(X, D[:, used], hint, best=True)
    if not (margins > 0).all():
        empty = used[~(margins > 0)]
        raise ValueError(
            f"Gate {empty[0]} ({len(empty)} of {len(used)}) has a cone without interior, in which "
            "not every difference can be had: no weights without bias have its activation pattern "
            "strictly. Use gates without bias that keep clear of the rows of X, as nudge_gates "
            "makes them."
        )
    H = np.zeros((X.shape[1], D.shape[1]))
    H[:, used] = directions
    return H


def _closed_form(
    X: RowSource, D: np.ndarray, flat: np.ndarray, gates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """B v = max(0, B w) and B u = max(0, -B w) for the weights in the rows of ``flat``."""
    kept = np.asarray(X[0 : X.shape[0]]).any(axis=1)
    unit = unit_rows(X[0 : X.shape[0]])[kept]
    rank = int(np.linalg.matrix_rank(unit)) if len(unit) else 0
    if rank < len(unit):
        raise ValueError(
            f"The closed form takes an X of full row rank: its {len(unit)} rows that are not zero "
            f"have rank {rank}. Use method='exact'."
        )
    scores = unit @ flat.T
    relevant = np.where(D[kept][:, gates], np.maximum(scores, 0), np.minimum(scores, 0))
    inverse = np.linalg.pinv(unit)
    v, span = (inverse @ relevant).T, (inverse @ scores).T
    u = v - span
    # ||v + x z||, ||u - (1 - x) z|| with z orthogonal to both: the shortest sum is a straight line.
    lengths = np.linalg.norm(v, axis=1, keepdims=True), np.linalg.norm(u, axis=1, keepdims=True)
    total = lengths[0] + lengths[1]
    share = np.divide(lengths[0], total, out=np.zeros_like(total), where=total > 0)
    v = v + share * (flat - span)
    return v, v - flat


class _OneSidedLeastSquares:
    """1/2 ||[r - B v]_+||^2 + rho ||v|| for many columns at once, as R-FISTA asks for it.

    Weights have shape (m, d, 1), one block for each column, and predictions B v shape (n, m).
    """

    def __init__(self, X: RowSource, D: np.ndarray, w: np.ndarray, rho: float):
        self.unit = unit_rows(X[0 : X.shape[0]])
        self.signs = np.where(np.ascontiguousarray(D), 1.0, -1.0)
        self.blocks = list(row_blocks(len(D), D.shape[1], np.float64))
        self.rho = rho
        self.penalty = NeuronPenalty()
        self.r = np.maximum(self.forward(w), 0)

    def forward(self, V: np.ndarray) -> np.ndarray:
        """B v of every column, (n, m)."""
        T = np.empty_like(self.signs)

        def work(blocks: list[slice]) -> None:
            for rows in blocks:
                np.dot(self.unit[rows], V[:, :, 0].T, out=T[rows])
                T[rows] *= self.signs[rows]

        run_in_threads(work, self.blocks)
        return T

    def residual(self, T: np.ndarray) -> np.ndarray:
        """[r - B v]_+, minus the gradient in B v."""
        short = self.r - T
        return np.maximum(short, 0, out=short)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """B^T R of every column, (m, d, 1)."""

        def work(blocks: list[slice]) -> np.ndarray:
            total = np.zeros((R.shape[1], self.unit.shape[1]))
            for rows in blocks:
                total += (R[rows] * self.signs[rows]).T @ self.unit[rows]
            return total

        return np.sum(run_in_threads(work, self.blocks), axis=0)[:, :, None]

    def bregman(self, T_new: np.ndarray, T: np.ndarray) -> float:
        """Bregman distance of 1/2 ||[r - T]_+||^2 from T to T_new."""
        return _one_sided_bregman(self.r, T_new, T)

    def prox(self, V: np.ndarray, s: float) -> np.ndarray:
        """Shrink the length of every column by s rho."""
        return self.penalty.prox(V, s * self.rho)

    def relative_gap(self, V: np.ndarray, T: np.ndarray, R: np.ndarray, C: np.ndarray) -> float:
        """Of all columns together, at V with predictions T.

        The dual r^T lambda - ||lambda||^2 / 2, ||B^T lambda|| <= rho, at lambda = R scaled.
        """
        short = self.residual(T)
        primal = np.vdot(short, short) / 2 + self.rho * self.penalty.value(V)
        norms = np.linalg.norm(C[:, :, 0], axis=1)
        scale = np.minimum(1.0, self.rho / np.maximum(norms, self.rho))
        dual = scale * np.einsum("nm,nm->m", self.r, R)
        dual -= scale**2 * np.einsum("nm,nm->m", R, R) / 2
        return float((primal - np.maximum(dual, 0).sum()) / primal)


def _approximate(
    X: RowSource,
    D: np.ndarray,
    flat: np.ndarray,
    H: np.ndarray,
    rho: float,
    tol: float,
    max_iter: int,
    verbose: int,
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Pairs for the weights in the rows of ``flat``, the relative gap and the repaired violation.

    D (n, m) and H (d, m) have one column for each weight.
    """
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    w = (flat / lengths)[:, :, None]
    composite = _OneSidedLeastSquares(X, D, w, rho)
    solver: Any = RFISTA()
    with one_blas_thread():
        state = start(composite, w)
        bar = tqdm(total=max_iter, disable=not verbose, desc="cone decomposition", leave=False)
        with bar:
            for iteration in range(1, max_iter + 1):
                state = solver.step(composite, rho, state)
                bar.update()
                if iteration % CHECK_EVERY == 0 or iteration == max_iter:
                    gap = composite.relative_gap(state.V, state.Z, state.R, state.C)
                    bar.set_postfix_str(f"gap {gap:.1e}", False)
                    if gap <= tol:
                        break
    v, u = state.V, state.V - w
    before = max(float(cone_violations(X, D, side).max()) for side in (v, u))
    v, u, _ = shift_into_cones(X, D, v, u, H)
    return v[:, :, 0] * lengths, u[:, :, 0] * lengths, gap, before


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract"})
def _one_sided_bregman(r, new, old):  # type: ignore[no-untyped-def]
    """Sum of 1/2 [r - new]_+^2 - 1/2 [r - old]_+^2 + [r - old]_+ (new - old), case by case."""
    total = 0.0
    for i in range(r.shape[0]):
        for k in range(r.shape[1]):
            was, now = max(r[i, k] - old[i, k], 0.0), max(r[i, k] - new[i, k], 0.0)
            change = new[i, k] - old[i, k]
            if now > 0 and was > 0:
                total += change * change / 2
            else:
                total += now * now / 2 + was * (change - was / 2)
    return total
