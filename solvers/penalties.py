"""Penalties on the weights V (p, d, c), and their blend with a ridge.

A penalty is one small frozen class: its value, its proximal operator and its dual norm. The
solvers only see a ``Regularizer``: rho R(V) + (1 - rho)/2 ||V||_F^2. For ReLU networks the p
blocks are those of V and of U.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar, Protocol

import numpy as np


class Penalty(Protocol):
    """A norm R(V) of all weights."""

    @property
    def by_output(self) -> bool:
        """Whether R is a sum over outputs k of norms of V[:, :, k]."""
        ...

    @property
    def of_lengths(self) -> bool:
        """Whether R is a sum of Euclidean norms of whole columns or groups of whole columns.

        Then the proximal operator of R on a product of cones is that of R after the projection,
        and the best multipliers of the cones are those of the projection.
        """
        ...

    def value(self, V: np.ndarray) -> float:
        """R(V)."""
        ...

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """argmin over W of 1/2 ||W - V||^2 + t R(W)."""
        ...

    def dual_norm(self, C: np.ndarray) -> float:
        """R°(C), the largest <C, V> over R(V) <= 1."""
        ...

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """R° of each group, of shape (p,) or (p, c), and U (p, d, c) that attains it.

        <U_g, C_g> = R°(C_g) and R(U_g) = 1 for each group g with C_g != 0. None where groups are
        not gates, or the outputs of gates: then dual points are not corrected.
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

    by_output: ClassVar[bool] = True
    of_lengths: ClassVar[bool] = True

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

    by_output: ClassVar[bool] = False
    of_lengths: ClassVar[bool] = True

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
class NuclearPenalty:
    """R(V) = sum_j ||V[j]||_*, the sum of singular values: few hidden units a gate."""

    by_output: ClassVar[bool] = False
    of_lengths: ClassVar[bool] = False

    def value(self, V: np.ndarray) -> float:
        """Sum of the singular values of all gates."""
        return float(np.linalg.svd(V, compute_uv=False).sum(dtype=np.float64))

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Lower each singular value by t, to no less than 0."""
        A, S, Bt = np.linalg.svd(V, full_matrices=False)
        W = np.empty_like(V)
        W[...] = (A * np.maximum(S - t, 0)[:, None, :]) @ Bt
        return W

    def dual_norm(self, C: np.ndarray) -> float:
        """Largest singular value of a gate."""
        return float(np.linalg.svd(C, compute_uv=False).max())

    def polar(self, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Spectral norms (p,) and the leading singular pairs u v^T."""
        A, S, Bt = np.linalg.svd(C, full_matrices=False)
        U = np.empty_like(C)
        U[...] = A[:, :, :1] * Bt[:, :1, :]
        return S[:, 0], U


@dataclass(frozen=True)
class FeaturePenalty:
    """R(V) = sum_i ||V[:, i, :]||_F: a feature is used by all gates and outputs or by none."""

    by_output: ClassVar[bool] = False
    of_lengths: ClassVar[bool] = False

    def _norms(self, V: np.ndarray) -> np.ndarray:
        return np.sqrt(np.einsum("pdc,pdc->d", V, V))

    def value(self, V: np.ndarray) -> float:
        """Sum of the Frobenius norms of all features."""
        return float(self._norms(V).sum(dtype=np.float64))

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Shrink each feature's Frobenius norm by t."""
        return V * _shrink(self._norms(V), t)[:, None]

    def dual_norm(self, C: np.ndarray) -> float:
        """Largest Frobenius norm of a feature."""
        return float(self._norms(C).max())

    def polar(self, C: np.ndarray) -> None:
        """Groups are features: None."""


@dataclass(frozen=True)
class L1Penalty:
    """R(V) = sum of |V[j, i, k]|."""

    by_output: ClassVar[bool] = True
    of_lengths: ClassVar[bool] = False

    def value(self, V: np.ndarray) -> float:
        """Sum of absolute values."""
        return float(np.abs(V).sum(dtype=np.float64))

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Lower each absolute value by t, to no less than 0."""
        t = float(t)  # a NumPy scalar would turn float32 into float64
        return V - np.clip(V, -t, t)

    def dual_norm(self, C: np.ndarray) -> float:
        """Largest absolute value."""
        return float(np.abs(C).max())

    def polar(self, C: np.ndarray) -> None:
        """Groups are single weights: None."""


@dataclass(frozen=True)
class NoPenalty:
    """R(V) = 0. No scaling makes a residual dual feasible: solvers stop on the KKT residual."""

    by_output: ClassVar[bool] = True
    of_lengths: ClassVar[bool] = True

    def value(self, V: np.ndarray) -> float:
        """Return 0."""
        return 0.0

    def prox(self, V: np.ndarray, t: float) -> np.ndarray:
        """Return V."""
        return V

    def dual_norm(self, C: np.ndarray) -> float:
        """Infinite but at 0."""
        return np.inf if C.any() else 0.0

    def polar(self, C: np.ndarray) -> None:
        """There is no unit ball: None."""


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

    @property
    def of_lengths(self) -> bool:
        """Whether Omega only depends on lengths of columns; see ``Penalty.of_lengths``."""
        return self.l1_ratio == 0 or self.penalty.of_lengths

    @property
    def by_output(self) -> bool:
        """Whether Omega is a sum over outputs."""
        return self.l1_ratio == 0 or self.penalty.by_output

    @property
    def bounds_the_dual(self) -> bool:
        """Whether a residual can be scaled to a dual point: not without any penalty."""
        return self.l1_ratio < 1 or not isinstance(self.penalty, NoPenalty)

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

    def surely_zero(self, V: np.ndarray, t: float) -> np.ndarray:
        """Columns (blocks, c) that the proximal operator of Omega makes 0, if R is of lengths."""
        if self.l1_ratio > 0:
            polar = self.penalty.polar(V)
            if polar is not None:
                norms = polar[0].reshape(len(V), -1)
                return np.broadcast_to(norms <= t * self.l1_ratio, V.shape[::2])
        return np.zeros(V.shape[::2], dtype=bool)

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


PENALTIES: dict[str, Penalty] = {
    "neuron": NeuronPenalty(),
    "gate": GatePenalty(),
    "nuclear": NuclearPenalty(),
    "feature": FeaturePenalty(),
    "l1": L1Penalty(),
    "none": NoPenalty(),
}


def find_regularizer(penalty: str | Penalty, l1_ratio: float) -> Regularizer:
    """Return the regulariser of a penalty's name or of a penalty.

    "ridge" is l1_ratio = 0, and "none" has no ridge either, whatever ``l1_ratio`` says.

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
    if penalty == "none":
        return Regularizer(NoPenalty(), 1.0)
    return Regularizer(PENALTIES[penalty] if isinstance(penalty, str) else penalty, float(l1_ratio))
