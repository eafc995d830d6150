"""Local search over gates for those at which a residual violates the dual constraint most.

A gate g matters only through the activation pattern D(g) that it makes, which is constant on the
cells of the arrangement of the hyperplanes {g : x_i . g = 0}. On a great circle
g cos t + h sin t every hyperplane is crossed twice, so the best gate *of the whole circle* is found
exactly: sort the crossings and pass them in turn, with an update of rank one at each. The search
climbs from many starts at once, along circles through smoothed gradients, rows of X and random
directions. What it finds is a lower bound of the largest violation: the largest of many local
maxima need not be the largest of all.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.gates import evaluate_gates
from cvxdistill.solvers.great_circles import best_gated_angles, best_relu_angles, inner_products
from cvxdistill.solvers.penalties import GatePenalty, L1Penalty, NeuronPenalty, NuclearPenalty
from cvxdistill.solvers.threads import one_blas_thread

GatewisePenalty = NeuronPenalty | GatePenalty | NuclearPenalty | L1Penalty

# Scores (starts, n) that are in memory at once, in a handful of arrays.
SCORES_AT_ONCE = 4_000_000
# What starts are moved by, relative to their length: off the hyperplanes that they lie on.
JITTER = 1e-6
# What makes the circles, in turn, and the bandwidth of the smoothed gates, as a quantile of the
# distances of the rows from the hyperplane.
DIRECTIONS = (
    ("gradient", 1.0),
    ("random", 0.0),
    ("whitened gradient", 0.1),
    ("row", 0.0),
    ("whitened gradient", 1.0),
    ("random", 0.0),
    ("gradient", 0.1),
    ("row", 0.0),
)


class SearchObjective(Protocol):
    """A function f of gates, of which the dual constraint asks f <= alpha.

    Attributes
    ----------
    gate_inputs : ndarray of shape (n, q)
        What the gates of the search meet.
    gate_units : ndarray of shape (q, 1)
        Gates of the search are gates of X times these.
    R : ndarray of shape (n, c)
        Residual. Starts take its columns in turn where f is the largest over outputs.
    """

    gate_inputs: np.ndarray
    gate_units: np.ndarray
    R: np.ndarray

    def values(self, G: np.ndarray) -> np.ndarray:
        """f of each column of G, of shape (p,)."""
        ...

    def after_step(self, g: np.ndarray, alpha: float) -> SearchObjective:
        """The objective of the residual after the best step of the weights of gate g alone."""
        ...

    def view(self, S: np.ndarray, outputs: np.ndarray) -> Any:
        """What the other two methods need at the gates with scores S (m, n)."""
        ...

    def gains(self, view: Any) -> np.ndarray:
        """How much f rises, to first order, as each row is switched on, up to a factor (m, n)."""
        ...

    def best_angles(self, view: Any, S: np.ndarray, Q: np.ndarray) -> np.ndarray:
        """Angles t (m,) of the best of the gates with scores S cos t + Q sin t; 0 if t = 0 is."""
        ...


class GatedObjective:
    """f(g) = R°(X^T diag(D(g)) R) / n for a penalty that adds up over gates.

    R° is the largest column norm ("neuron"), the Frobenius norm ("gate"), the spectral norm
    ("nuclear") or the largest entry ("l1").

    Parameters
    ----------
    X : ndarray of shape (n, d)
        Inputs that the weights meet.
    gate_inputs : ndarray of shape (n, d) or (n, d + 1)
        Inputs that the gates meet.
    R : ndarray of shape (n, c)
        Residual.
    penalty : Penalty
    """

    def __init__(
        self, X: np.ndarray, gate_inputs: np.ndarray, R: np.ndarray, penalty: GatewisePenalty
    ):
        self.X = np.ascontiguousarray(X)
        self.gate_inputs = gate_inputs
        self.gate_units = np.ones((gate_inputs.shape[1], 1), X.dtype)
        self.R = np.ascontiguousarray(R, dtype=X.dtype)
        self.penalty = penalty

    def values(self, G: np.ndarray) -> np.ndarray:
        """R°(X^T diag(D(g)) R) / n for each column g of G, of shape (p,)."""
        return self._polar(G)[0]

    def after_step(self, g: np.ndarray, alpha: float) -> GatedObjective:
        """R less what brings f(g) down to alpha along the polar direction of gate g."""
        value, U = self._polar(g[:, None])
        T = np.where(self.gate_inputs @ g >= 0, 1, 0)[:, None] * (self.X @ U[0])
        return GatedObjective(
            self.X, self.gate_inputs, _step(self.R, T, value[0], alpha), self.penalty
        )

    def _polar(self, G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """R°(C_j) (p,) of C_j = X^T diag(D_j) R / n, and U (p, d, c), R(U_j) = 1, attaining it."""
        C = GatedOperator(self.X, evaluate_gates(self.gate_inputs, G)).adjoint(self.R)
        C = C.astype(np.float64) / len(self.X)
        gates, U = np.arange(len(C)), np.zeros_like(C)
        if isinstance(self.penalty, L1Penalty):
            i, k = _largest_entries(C)
            U[gates, i, k] = np.sign(C[gates, i, k])
        elif isinstance(self.penalty, NeuronPenalty):
            norms = np.linalg.norm(C, axis=1)
            k = norms.argmax(axis=1)
            U[gates, :, k] = C[gates, :, k] / _positive(norms[gates, k])[:, None]
        elif isinstance(self.penalty, GatePenalty):
            U[:] = C / _positive(np.linalg.norm(C, axis=(1, 2)))[:, None, None]
        else:
            A, _, Bt = np.linalg.svd(C, full_matrices=False)
            U[:] = A[:, :, :1] * Bt[:, :1]
        return np.einsum("pdc,pdc->p", C, U), U

    def view(self, S: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """X' (m or 1, n, d'), R' (m or 1, n, c') and C' (m, d', c') = X'^T diag(D) R'.

        n f = ||C'||_F at the gates with scores S, and n f >= ||C'||_F at all others; for the
        ``neuron`` penalty this holds of the share of each start's output in f.
        """
        X, R, D = self.X, self.R, S >= 0
        if isinstance(self.penalty, NeuronPenalty):
            r = np.ascontiguousarray(R.T[outputs])
            return X[None], r[:, :, None], ((D * r) @ X)[:, :, None]
        C = GatedOperator(X, D.T).adjoint(R)
        if isinstance(self.penalty, GatePenalty):
            return X[None], R[None], C
        if isinstance(self.penalty, NuclearPenalty):
            b = np.linalg.svd(C, full_matrices=False)[2][:, 0, :]
            return X[None], np.ascontiguousarray(b @ R.T)[:, :, None], C @ b[:, :, None]
        i, k = _largest_entries(C)
        x, r = np.ascontiguousarray(X.T[i]), np.ascontiguousarray(R.T[k])
        return x[:, :, None], r[:, :, None], C[np.arange(len(C)), i, k][:, None, None]

    def gains(self, view: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """<C', x'_i r'_i^T> for each start and row, (m, n)."""
        return inner_products(*view)

    def best_angles(
        self, view: tuple[np.ndarray, np.ndarray, np.ndarray], S: np.ndarray, Q: np.ndarray
    ) -> np.ndarray:
        """The middle of the best cell on each circle."""
        return best_gated_angles(*view, S, Q)


class ReLUObjective:
    """f(u) = max over outputs k of |r_k^T relu(X u)| / (n ||u||), for the penalty "neuron".

    Parameters
    ----------
    X : ndarray of shape (n, d)
    R : ndarray of shape (n, c)
        Residual.
    scale : ndarray of shape (d,), optional
        Divide column i of X by scale[i], and multiply row i of the gates by it.
    """

    def __init__(self, X: np.ndarray, R: np.ndarray, scale: np.ndarray | None = None):
        self.X, self.scale = X, scale
        self.gate_inputs = np.ascontiguousarray(X if scale is None else X / scale)
        self.gate_units = np.ones((X.shape[1], 1), X.dtype) if scale is None else scale[:, None]
        self.R = np.ascontiguousarray(R, dtype=X.dtype)

    def values(self, G: np.ndarray) -> np.ndarray:
        """f of each column of G, of shape (p,); 0 at zero."""
        return np.abs(self._slopes(G)).max(axis=1)

    def after_step(self, g: np.ndarray, alpha: float) -> ReLUObjective:
        """R less what brings f(g) down to alpha, by a neuron with the weights g."""
        slopes = self._slopes(g[:, None])[0]
        k = int(np.abs(slopes).argmax())
        T = np.zeros_like(self.R)
        length = np.linalg.norm(g * self.gate_units[:, 0])
        T[:, k] = np.maximum(self.X @ g, 0) * (np.sign(slopes[k]) / length)
        return ReLUObjective(self.X, _step(self.R, T, abs(slopes[k]), alpha), self.scale)

    def _slopes(self, G: np.ndarray) -> np.ndarray:
        """r_k^T relu(X u) / (n ||u||), of shape (p, c)."""
        products = (np.maximum(self.X @ G, 0).T @ self.R).astype(np.float64)
        lengths = np.linalg.norm(G * self.gate_units, axis=0)
        return products / (len(self.X) * _positive(lengths))[:, None]

    def view(self, S: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """The residual of each start's output (m, n), with the sign that makes r^T relu(s) > 0."""
        r = np.ascontiguousarray(self.R.T[outputs])
        negative = np.einsum("mn,mn->m", np.maximum(S, 0), r) < 0
        r[negative] *= -1
        return r

    def gains(self, view: np.ndarray) -> np.ndarray:
        """The slope in each score where it is positive."""
        return view

    def best_angles(self, view: np.ndarray, S: np.ndarray, Q: np.ndarray) -> np.ndarray:
        """The best point of each circle."""
        return best_relu_angles(view, S, Q)


def climb(
    objective: SearchObjective, starts: np.ndarray, *, max_steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Climb from every start along great circles, each of them searched exactly.

    Besides the ends, what has been reached after one round of directions is returned: climbs from
    many starts may end at the same few gates.

    Parameters
    ----------
    objective : SearchObjective
    starts : ndarray of shape (q, m)
        Gates of X, with a bias if the objective's have one.
    max_steps : int
        Circles for each start; fewer when none of them rises any more.
    rng : Generator

    Returns
    -------
    ndarray of shape (q, 2 m)
        Gates of X: the ends, and those on the way.
    """
    A, (q, m) = objective.gate_inputs, starts.shape
    G = starts * objective.gate_units
    G /= _positive(np.linalg.norm(G, axis=0))
    G = (G + JITTER * rng.standard_normal(G.shape)).astype(A.dtype)
    outputs = np.arange(m) % objective.R.shape[1]
    covariance = (A.T @ A).astype(np.float64)
    covariance[np.diag_indices(q)] += max(1e-3 * np.trace(covariance) / q, 1e-300)
    factor = cho_factor(covariance)
    size = max(1, SCORES_AT_ONCE // len(A))
    found = []
    with one_blas_thread():
        for first in range(0, m, size):
            part = slice(first, first + size)
            found += _climb_together(objective, G[:, part], outputs[part], factor, max_steps, rng)
    return np.hstack(found[::2] + found[1::2]) / objective.gate_units


def _climb_together(
    objective: SearchObjective,
    G: np.ndarray,
    outputs: np.ndarray,
    factor: Any,
    max_steps: int,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """The gates at the end, and those after one round of directions."""
    A, on_the_way = objective.gate_inputs, G
    lengths = _positive(np.linalg.norm(A, axis=1))
    idle = 0
    for step in range(max_steps):
        G = G / np.linalg.norm(G, axis=0)
        S = np.ascontiguousarray((A @ G).T)
        view = objective.view(S, outputs)
        kind, bandwidth = DIRECTIONS[step % len(DIRECTIONS)]
        if kind == "random":
            H = rng.standard_normal(G.shape)
        elif kind == "row":
            H = A[rng.integers(len(A), size=G.shape[1])].T
        else:
            H = A.T @ (_smoothed(S / lengths, bandwidth) * objective.gains(view)).T
            if kind == "whitened gradient":
                H = cho_solve(factor, H)
        H = H - G * np.einsum("qm,qm->m", G, H)
        H = (H / _positive(np.linalg.norm(H, axis=0))).astype(A.dtype)
        t = objective.best_angles(view, S, np.ascontiguousarray((A @ H).T))
        G = (G * np.cos(t) + H * np.sin(t)).astype(A.dtype)
        if step + 1 == len(DIRECTIONS):
            on_the_way = G
        idle = 0 if t.any() else idle + 1
        if idle == len(DIRECTIONS):
            break
    return [G / np.linalg.norm(G, axis=0), on_the_way / np.linalg.norm(on_the_way, axis=0)]


def _positive(norms: np.ndarray) -> np.ndarray:
    """The norms, with 1 for 0."""
    return np.where(norms > 0, norms, 1)


def _largest_entries(C: np.ndarray) -> tuple[np.ndarray, ...]:
    """Indices (i, k) of the entry of largest absolute value of each C[j]."""
    return np.unravel_index(np.abs(C).reshape(len(C), -1).argmax(axis=1), C.shape[1:])


def _step(R: np.ndarray, T: np.ndarray, value: float, alpha: float) -> np.ndarray:
    """R - t T with <T, R - t T> / n = alpha, where <T, R> / n = value."""
    curvature = float(np.vdot(T, T)) / len(R)
    return R - (max(value - alpha, 0) / curvature if curvature > 0 else 0.0) * T


def _smoothed(distances: np.ndarray, quantile: float) -> np.ndarray:
    """Slope of a smooth step, 1 / (1 + (s / tau)^2), with tau a quantile of |s|; 1 for the last."""
    if quantile == 1:
        return np.ones_like(distances)
    tau = np.quantile(np.abs(distances), quantile, axis=1, keepdims=True)
    return 1 / (1 + (distances / np.maximum(tau, np.finfo(distances.dtype).tiny)) ** 2)
