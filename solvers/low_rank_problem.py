"""The programme with the nuclear penalty in factored form, for hundreds of outputs.

    minimise over W1 (d, r), W2 (r, c), gate (r,), b
        1/(2n) || sum_h diag(D[:, gate_h]) X W1[:, h] W2[h, :] + 1 b^T - Y ||_F^2
        + alpha/2 (||W1||_F^2 + ||W2||_F^2)

With enough hidden units, its minimum is that of the convex programme with R(V[j]) = ||V[j]||_*,
whose V (p, d, c) is never formed; with fewer it is above, and the duality gap says by how much at
most.

References
----------
Burer and Monteiro 2003; Haeffele and Vidal 2015; Sahiner et al. 2021, theorem 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.linalg import eigh

from cvxdistill.solvers.gated_statistics import GatedStatistics
from cvxdistill.solvers.low_rank_operator import (
    GateSlices,
    GramOperator,
    LowRankOperator,
    RowsOperator,
    gate_slices,
)
from cvxdistill.solvers.network import Neurons
from cvxdistill.solvers.rows import RowSource, check_rows


class LowRankProblem:
    """The data of the factored programme: sums over the examples, or the examples.

    Parameters
    ----------
    statistics : GatedStatistics
        Kept, not copied: do not update them while the problem is in use.
    fit_intercept : bool, default=True
        Whether there is an unpenalised b.

    Raises
    ------
    TypeError, ValueError
        If it is something else, or there are no examples yet.
    """

    operator: LowRankOperator

    def __init__(self, statistics: GatedStatistics, *, fit_intercept: bool = True):
        if not isinstance(statistics, GatedStatistics):
            raise TypeError(
                "statistics must be GatedStatistics (for rows use LowRankProblem.from_rows), got "
                f"{type(statistics).__name__}."
            )
        if statistics.n == 0:
            raise ValueError("statistics has no examples yet.")
        self.fit_intercept = bool(fit_intercept)
        self.operator = GramOperator(statistics, self.fit_intercept)

    @classmethod
    def from_rows(
        cls, X: RowSource, Y: Any, D: np.ndarray, *, fit_intercept: bool = True
    ) -> LowRankProblem:
        """The problem of X (n, d), Y (n,) or (n, c) and patterns D (n, p), which stay as they are.

        For p d too large for a matrix of its square; else sums are faster as soon as n > p d / 2.
        """
        X, Y, D = check_rows(X), np.asarray(Y), np.asarray(D)
        Y = check_rows(Y[:, None] if Y.ndim == 1 else Y, "Y")
        if D.dtype != np.bool_:
            raise TypeError(f"D must be boolean, got dtype {D.dtype}.")
        if D.ndim != 2 or len(D) != X.shape[0] or D.shape[1] == 0:
            raise ValueError(f"D must have shape ({X.shape[0]}, p) with p >= 1, got {D.shape}.")
        if Y.shape[0] != X.shape[0]:
            raise ValueError(f"Y must have as many rows as X, got {len(Y)} and {X.shape[0]}.")
        problem = cls.__new__(cls)
        problem.fit_intercept = bool(fit_intercept)
        problem.operator = RowsOperator(X, np.asarray(Y), D, problem.fit_intercept)
        return problem

    def __repr__(self) -> str:
        A = self.operator
        form = "rows" if isinstance(A, RowsOperator) else "sums"
        return (
            f"LowRankProblem(n={A.n}, d={A.d}, p={A.p}, c={A.c}, form={form!r}, "
            f"fit_intercept={self.fit_intercept})"
        )

    def alpha_max(self) -> float:
        """Alpha at and above which no hidden unit is worth its price: max_j ||A_j^T Y||_2 / n."""
        return float(max(np.linalg.norm(C, 2) for C in self.operator.cross))

    def factors(self, neurons: Neurons) -> Factors:
        """Balanced factors of a network, or an error where it does not fit.

        Raises
        ------
        ValueError
            If shapes or gates do not fit, or weights are not finite.
        """
        A = self.operator
        U, W = np.asarray(neurons.W1, np.float64).T, np.asarray(neurons.W2, np.float64)
        gate = np.asarray(neurons.gate)
        if U.shape != (len(gate), A.d) or W.shape != (len(gate), A.c):
            raise ValueError(
                f"The network must have W1 of shape ({A.d}, r) and W2 of shape (r, {A.c}), got "
                f"{neurons.W1.shape} and {neurons.W2.shape}."
            )
        if len(gate) and not (gate.min() >= 0 and gate.max() < A.p):
            raise ValueError(f"Each unit's gate must lie in range({A.p}), got {gate}.")
        if not (np.isfinite(U).all() and np.isfinite(W).all()):
            raise ValueError("The network's weights contain NaN or infinity.")
        return balanced(U, W, gate)

    def neurons(self, factors: Factors) -> Neurons:
        """The network of the factors, in the type of the data."""
        dtype = self.operator.dtype
        return Neurons(
            np.ascontiguousarray(factors.U.T, dtype=dtype), factors.W.astype(dtype), factors.gate
        )

    def intercept(self, factors: Factors) -> np.ndarray:
        """The best b (c,): what the units miss of the mean of Y."""
        A = self.operator
        means = np.einsum("rd,rd->r", factors.U, A.feature_means[factors.gate])
        return A.target_means - means @ factors.W

    def evaluate(self, factors: Factors, alpha: float) -> Point:
        """Objective, gradients' parts and all that the next step needs."""
        A = self.operator
        U, W, units = factors.U, factors.W, factors.units
        T = A.hidden(U, units)
        C = A.blocks(T, W)
        K = A.inner(U, T, T, units)
        CW, UC = residual_products(C, factors)
        fit = float(np.sum(CW * U))
        # <V, A^T Y>/n = <V, C> + <V, A^T A V>/n.
        explained = 2 * fit + float(np.sum(K * (W @ W.T)))
        square = max(A.target_square - explained, 0.0)
        decay = 0.5 * float(np.sum(U**2) + np.sum(W**2))
        return Point(factors, alpha, T, K, C, CW, UC, fit, square, decay)

    def objective(self, neurons: Neurons, alpha: float) -> float:
        """Value of the factored programme at a network with its best intercept."""
        return self.evaluate(self.factors(neurons), alpha).objective

    def duality_gap(self, neurons: Neurons, alpha: float) -> float:
        """How far at most the balanced network is above the convex programme's minimum."""
        point = self.evaluate(self.factors(neurons), alpha)
        return duality_gap(point, leading_pairs(point.C, alpha).largest)


@dataclass(frozen=True)
class Factors:
    """U (r, d), W (r, c) and the gate (r,) of each unit, sorted by gate."""

    U: np.ndarray
    W: np.ndarray
    gate: np.ndarray
    units: GateSlices = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", gate_slices(self.gate))

    def __len__(self) -> int:
        return len(self.gate)

    def keep(self, chosen: np.ndarray) -> Factors:
        """Some of the units."""
        return Factors(self.U[chosen], self.W[chosen], self.gate[chosen])


@dataclass(frozen=True)
class Point:
    """The programme at some factors.

    Attributes
    ----------
    factors : Factors
    alpha : float
    T : ndarray
        The operator's ``hidden``.
    K : ndarray of shape (r, r)
        H^T H / n.
    C : ndarray of shape (p, d, c)
        A_j^T R / n with the residual R.
    CW, UC : ndarray of shapes (r, d) and (r, c)
        C_j(h) W[h] and C_j(h)^T U[h].
    fit : float
        <Z, R> / n.
    square : float
        ||R||_F^2 / n.
    decay : float
        1/2 (||U||_F^2 + ||W||_F^2).
    """

    factors: Factors
    alpha: float
    T: np.ndarray
    K: np.ndarray
    C: np.ndarray
    CW: np.ndarray
    UC: np.ndarray
    fit: float
    square: float
    decay: float

    @property
    def objective(self) -> float:
        """1/(2n) ||R||^2 + alpha/2 (||U||^2 + ||W||^2)."""
        return self.square / 2 + self.alpha * self.decay


def residual_products(C: np.ndarray, factors: Factors) -> tuple[np.ndarray, np.ndarray]:
    """C_j(h) W[h] of shape (r, d) and C_j(h)^T U[h] of shape (r, c)."""
    CW, UC = np.empty_like(factors.U), np.empty_like(factors.W)
    for j, own in factors.units:
        np.matmul(factors.W[own], C[j].T, out=CW[own])
        np.matmul(factors.U[own], C[j], out=UC[own])
    return CW, UC


def balanced(U: np.ndarray, W: np.ndarray, gate: np.ndarray) -> Factors:
    """The same V with least weight decay: U_j U_j^T = W_j W_j^T, diagonal, for each gate.

    The thin SVD U_j^T W_j = A S B^T gives the new U_j = sqrt(S) A^T and W_j = sqrt(S) B^T; then
    the weight decay is the sum of the nuclear norms.
    """
    order = np.argsort(gate, kind="stable")
    U, W, gate = U[order], W[order], gate[order]
    new_U, new_W, kept = [U[:0]], [W[:0]], [gate[:0]]
    for j, own in gate_slices(gate):
        Q1, R1 = np.linalg.qr(U[own].T)
        Q2, R2 = np.linalg.qr(W[own].T)
        left, S, right = np.linalg.svd(R1 @ R2.T, full_matrices=False)
        rank = int((4 * np.finfo(float).eps * S[0] < S).sum())
        root = np.sqrt(S[:rank])[:, None]
        new_U.append(root * (Q1 @ left[:, :rank]).T)
        new_W.append(root * (Q2 @ right[:rank].T).T)
        kept.append(np.full(rank, j, dtype=gate.dtype))
    return Factors(np.vstack(new_U), np.vstack(new_W), np.concatenate(kept))


@dataclass(frozen=True)
class SingularPairs:
    """Singular values of C_j above alpha, of all gates, with their vectors.

    Attributes
    ----------
    values, gate : ndarray of shape (m,)
    U, W : ndarray of shapes (m, d) and (m, c)
        U[h]^T C_j W[h] = values[h].
    largest : float
        max_j ||C_j||_2, or alpha where none is above it.
    """

    values: np.ndarray
    U: np.ndarray
    W: np.ndarray
    gate: np.ndarray
    largest: float


def leading_pairs(C: np.ndarray, alpha: float) -> SingularPairs:
    """All singular pairs of the C_j above alpha, by eigenvectors of the smaller Gram matrix."""
    values, first, second, gates = [np.zeros(0)], [C[0, :, :0].T], [C[0, :0]], [np.zeros(0, int)]
    for j, block in enumerate(C):
        wide = block.shape[0] < block.shape[1]
        gram = block @ block.T if wide else block.T @ block
        squares, vectors = eigh(gram, subset_by_value=(alpha**2, np.inf), driver="evr")
        S = np.sqrt(squares)
        others = (block.T if wide else block) @ vectors / S
        values.append(S)
        first.append((vectors if wide else others).T)
        second.append((others if wide else vectors).T)
        gates.append(np.full(len(S), j))
    S = np.concatenate(values)
    return SingularPairs(
        S,
        np.vstack(first),
        np.vstack(second),
        np.concatenate(gates),
        float(S.max(initial=alpha)),
    )


def duality_gap(point: Point, largest: float) -> float:
    """Absolute gap of a point with the dual point theta = s R, s = min(1, alpha / largest).

        ||R - theta||^2 / (2n) + alpha sum_j R(V[j]) - <Z, theta> / n

    in which the weight decay stands for R, which it is where the factors are balanced.
    """
    s = min(1.0, point.alpha / largest)
    gap = (1 - s) ** 2 * point.square / 2 + point.alpha * point.decay - s * point.fit
    return max(0.0, gap) if gap == gap else np.inf
