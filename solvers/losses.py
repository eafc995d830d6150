"""Losses L(Z, Y), averaged over examples, with what solvers and certificates ask of them.

A loss is one small frozen class with five methods; every solver takes every loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Loss(Protocol):
    """A convex loss of predictions Z (n, c) and targets Y (n, c), averaged over the n examples."""

    def value(self, Z: np.ndarray, Y: np.ndarray) -> float:
        """L(Z, Y)."""
        ...

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """-n times the gradient of L in Z, of shape (n, c)."""
        ...

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> float:
        """L(Z_new) - L(Z) - <grad L(Z), Z_new - Z>."""
        ...

    def best_intercept(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """argmin over b of L(Z + 1 b^T, Y), of shape (c,)."""
        ...

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> float:
        """L(Z) + L*(-theta / n) + <Z, theta> / n, which is never negative."""
        ...

    def dual_value(self, theta: np.ndarray, Y: np.ndarray) -> float:
        """-L*(-theta / n), with L* the convex conjugate."""
        ...


def _sum_of_squares(A: np.ndarray) -> float:
    """Sum of squares, accumulated in float64."""
    if A.dtype == np.float64:
        return float(np.vdot(A, A))
    return float(np.einsum("i,i->", A.ravel(), A.ravel(), dtype=np.float64))


@dataclass(frozen=True)
class SquaredLoss:
    """L(Z, Y) = 1/(2n) ||Z - Y||_F^2."""

    def value(self, Z: np.ndarray, Y: np.ndarray) -> float:
        """Return 1/(2n) ||Z - Y||_F^2."""
        return _sum_of_squares(Z - Y) / (2 * len(Y))

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return Y - Z."""
        return Y - Z

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> float:
        """Return 1/(2n) ||Z_new - Z||_F^2: no cancellation, however close the two are."""
        return _sum_of_squares(Z_new - Z) / (2 * len(Y))

    def best_intercept(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the column means of Y - Z."""
        return np.mean(Y - Z, axis=0, dtype=np.float64).astype(Y.dtype)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> float:
        """Return 1/(2n) ||Y - Z - theta||_F^2."""
        return _sum_of_squares(Y - Z - theta) / (2 * len(Y))

    def dual_value(self, theta: np.ndarray, Y: np.ndarray) -> float:
        """Return (||Y||^2 - ||Y - theta||^2) / (2n) = <theta, 2 Y - theta> / (2n)."""
        return float(np.sum(theta * (2 * Y - theta), dtype=np.float64)) / (2 * len(Y))


LOSSES: dict[str, Loss] = {"squared": SquaredLoss()}


def find_loss(loss: str | Loss) -> Loss:
    """Return the loss of that name, or the loss itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {sorted(LOSSES)}, got {loss!r}.")
    return LOSSES[loss]
