"""Penalties on the weights V (p, d, c), and their blend with a ridge.

A penalty is one small frozen class: its value, its proximal operator and its dual norm. The
solvers only see a ``Regularizer``: rho R(V) + (1 - rho)/2 ||V||_F^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import numpy as np


class Penalty(Protocol):
    """A norm R(V) that adds up over gates."""

    def value(self, V: np.ndarray) -> float:
        """R(V)."""
        ...

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """argmin over W of 1/2 ||W - V||^2 + t R(W)."""
        ...

    def dual_norm(self, C: np.ndarray) -> float:
        """R°(C), the largest <C, V> over R(V) <= 1."""
        ...

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """R° of each group, of shape (p,) or (p, c), and U (p, d, c) that attains it.

        <U_g, C_g> = R°(C_g) and R(U_g) = 1 for each group g with C_g != 0.
        """
        ...


def _shrink(norms: np.ndarray, t: float) -> np.ndarray:
    """Factors max(0, 1 - t / norm) of the proximal operator of a Euclidean norm."""
    factors = np.zeros_like(norms)
    np.divide(norms - t, norms, out=factors, where=norms > t)
    return factors


@dataclass(frozen=True)
class NeuronPenalty:
    """R(V) = sum_j sum_k ||V[j, :, k]||_2: each output has its own neurons ("one-vs-all")."""

    def _norms(self, V: np.ndarray) -> np.ndarray:
        return np.sqrt(np.einsum("pdc,pdc->pc", V, V))

    def value(self, V: np.ndarray) -> float:
        """Sum of the Euclidean norms of all columns."""
        return float(self._norms(V).sum(dtype=np.float64))

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Shrink each column's norm by t."""
        return V * _shrink(self._norms(V), t)[:, None, :]

    def dual_norm(self, C: np.ndarray) -> float:
        """Largest column norm."""
        return float(self._norms(C).max())

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Column norms (p, c) and the columns scaled to length 1."""
        norms = self._norms(C)
        return norms, C / np.where(norms > 0, norms, 1)[:, None, :]


@dataclass(frozen=True)
class GatePenalty:
    """R(V) = sum_j ||V[j]||_F: outputs share gates."""

    def _norms(self, V: np.ndarray) -> np.ndarray:
        return np.sqrt(np.einsum("pdc,pdc->p", V, V))

    def value(self, V: np.ndarray) -> float:
        """Sum of the Frobenius norms of all gates."""
        return float(self._norms(V).sum(dtype=np.float64))

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Shrink each gate's Frobenius norm by t."""
        return V * _shrink(self._norms(V), t)[:, None, None]

    def dual_norm(self, C: np.ndarray) -> float:
        """Largest Frobenius norm of a gate."""
        return float(self._norms(C).max())

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Frobenius norms (p,) and the gates scaled to norm 1."""
        norms = self._norms(C)
        return norms, C / np.where(norms > 0, norms, 1)[:, None, None]


@dataclass(frozen=True)
class Regularizer:
    """Omega(V) = l1_ratio * R(V) + (1 - l1_ratio)/2 * ||V||_F^2, as scikit-learn blends them.

    Parameters
    ----------
    penalty : Penalty
        The norm R.
    l1_ratio : float in [0, 1]
        1 is the norm alone, 0 the ridge alone.
    """

    penalty: Penalty
    l1_ratio: float = 1.0

    def value(self, V: np.ndarray) -> float:
        """Omega(V)."""
        value = self.l1_ratio * self.penalty.value(V) if self.l1_ratio > 0 else 0.0
        if self.l1_ratio < 1:
            value += (1 - self.l1_ratio) / 2 * float(np.sum(V * V, dtype=np.float64))
        return value

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """argmin over W of 1/2 ||W - V||^2 + t Omega(W): shrink, then scale down."""
        if self.l1_ratio > 0:
            V = self.penalty.prox(V, t * self.l1_ratio)
        if self.l1_ratio < 1:
            V = V / np.asarray(1 + t * (1 - self.l1_ratio), dtype=V.dtype)
        return V

    def feasible_scale(self, C: np.ndarray, alpha: float) -> float:
        """Largest s <= 1 with a finite conjugate at s C: min(1, alpha / R°(C)) for a pure norm."""
        if self.l1_ratio < 1:
            return 1.0
        norm = self.penalty.dual_norm(C)
        return 1.0 if norm <= alpha else alpha / norm

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The penalty's dual norms and polar directions; None for a blend, which bounds nothing."""
        return self.penalty.polar(C) if self.l1_ratio == 1 else None

    def conjugate(self, C: np.ndarray, alpha: float) -> float:
        """(alpha Omega)*(C) = ||prox_{alpha rho R}(C)||^2 / (2 alpha (1 - rho)), 0 for rho = 1.

        For rho = 1, C must be feasible: R°(C) <= alpha.
        """
        if self.l1_ratio == 1:
            return 0.0
        if self.l1_ratio > 0:
            C = self.penalty.prox(C, alpha * self.l1_ratio)
        return float(np.sum(C * C, dtype=np.float64)) / (2 * alpha * (1 - self.l1_ratio))


PENALTIES: dict[str, Penalty] = {"neuron": NeuronPenalty(), "gate": GatePenalty()}


def find_regularizer(penalty: str | Penalty, l1_ratio: float) -> Regularizer:
    """Return the regulariser of a penalty's name ("ridge" is l1_ratio = 0) or of a penalty.

    Raises
    ------
    ValueError
        If the name is unknown or ``l1_ratio`` is not in [0, 1].
    TypeError
        If ``l1_ratio`` is not a number.
    """
    if isinstance(penalty, str) and penalty not in (*PENALTIES, "ridge"):
        names = sorted([*PENALTIES, "ridge"])
        raise ValueError(f"penalty must be one of {names}, got {penalty!r}.")
    if not isinstance(l1_ratio, Real):
        raise TypeError(f"l1_ratio must be a number in [0, 1], got {l1_ratio!r}.")
    if not 0 <= l1_ratio <= 1:
        raise ValueError(f"l1_ratio must lie in [0, 1], got {l1_ratio!r}.")
    if penalty == "ridge":
        return Regularizer(GatePenalty(), 0.0)
    return Regularizer(PENALTIES[penalty] if isinstance(penalty, str) else penalty, float(l1_ratio))
