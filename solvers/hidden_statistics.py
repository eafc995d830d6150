"""Sums over rows that give the best second layer of a network whose first layer stays.

With hidden features H (n, m) and targets Y (n, c) the squared loss of every second layer needs the
rows only through their count, the means mu and nu of H and Y, and the centred sums

    S = (H - 1 mu^T)^T (H - 1 mu^T),   T = (H - 1 mu^T)^T (Y - 1 nu^T),   ||Y[:, k] - nu_k||^2.

They add up over blocks, batches and machines, and stay of one size however many rows have come.
Held centred, they lose no digits to large means (Chan, Golub and LeVeque 1983).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_factor, cho_solve

if TYPE_CHECKING:
    from cvxdistill.solvers.gated_statistics import GatedStatistics
    from cvxdistill.solvers.network import Neurons


@dataclass(frozen=True, repr=False, eq=False)
class HiddenStatistics:
    """Count, means and centred sums of hidden features H and targets Y, in float64.

    ``a + b`` are those of the rows of both. Nothing is changed in place.

    Attributes
    ----------
    n : float
        Rows; a weight, and no longer whole, after ``scaled``.
    hidden_mean : ndarray of shape (m,)
    target_mean : ndarray of shape (c,)
    gram : ndarray of shape (m, m)
    cross : ndarray of shape (m, c)
    target_squares : ndarray of shape (c,)
        Sums of squares of the columns of Y about their means.
    """

    n: float
    hidden_mean: np.ndarray
    target_mean: np.ndarray
    gram: np.ndarray
    cross: np.ndarray
    target_squares: np.ndarray

    @classmethod
    def empty(cls, m: int, c: int) -> HiddenStatistics:
        """Of no rows, for m hidden features and c targets."""
        return cls(0.0, np.zeros(m), np.zeros(c), np.zeros((m, m)), np.zeros((m, c)), np.zeros(c))

    @classmethod
    def of_rows(cls, H: np.ndarray, Y: np.ndarray) -> HiddenStatistics:
        """Of H (n, m) and Y (n, c), with products taken in float64: pass a large H in blocks.

        Raises
        ------
        ValueError
            If they are not matrices with the same number of rows, at least one.
        """
        if H.ndim != 2 or Y.ndim != 2 or len(H) != len(Y) or len(H) == 0:
            raise ValueError(
                f"H and Y must have shapes (n, m) and (n, c) with n >= 1, got {H.shape} and "
                f"{Y.shape}."
            )
        mu, nu = H.mean(axis=0, dtype=np.float64), Y.mean(axis=0, dtype=np.float64)
        H, Y = H - mu, Y - nu
        return cls(float(len(H)), mu, nu, H.T @ H, H.T @ Y, np.einsum("nc,nc->c", Y, Y))

    @classmethod
    def of_neurons(cls, statistics: GatedStatistics, neurons: Neurons) -> HiddenStatistics:
        """Of the units H[:, h] = D[:, gate_h] * (X W1[:, h]), from sums of gated features.

        A large mean costs digits here, because those sums are not centred.
        """
        p, d, n, m = statistics.p, statistics.d, statistics.n, len(neurons)
        W1 = np.asarray(neurons.W1, np.float64)
        products = np.empty((p * d, m))
        cross, means = np.empty((m, statistics.c)), np.empty(m)
        for j in np.unique(neurons.gate):
            units = neurons.gate == j
            products[:, units] = statistics.gram[:, j * d : (j + 1) * d] @ W1[:, units]
            cross[units] = W1[:, units].T @ statistics.cross[j]
            means[units] = W1[:, units].T @ statistics.feature_sums[j] / n
        gram = np.empty((m, m))
        for j in np.unique(neurons.gate):
            units = neurons.gate == j
            gram[units] = W1[:, units].T @ products[j * d : (j + 1) * d]
        target_mean = statistics.target_sums / n
        squares = statistics.target_squares - n * target_mean**2
        gram -= n * np.outer(means, means)
        cross -= n * np.outer(means, target_mean)
        return cls(float(n), means, target_mean, gram, cross, np.maximum(squares, 0.0))

    def first(self, m: int) -> HiddenStatistics:
        """Of the first m features alone."""
        return HiddenStatistics(
            self.n,
            self.hidden_mean[:m],
            self.target_mean,
            self.gram[:m, :m],
            self.cross[:m],
            self.target_squares,
        )

    def __repr__(self) -> str:
        m, c = self.shape
        return f"HiddenStatistics(n={self.n:g}, m={m}, c={c})"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, c)."""
        m, c = self.cross.shape
        return m, c

    def __add__(self, other: HiddenStatistics) -> HiddenStatistics:
        if not isinstance(other, HiddenStatistics):
            return NotImplemented
        if self.shape != other.shape:
            raise ValueError(
                f"statistics must be of as many features and targets to be added, got "
                f"(m, c) = {self.shape} and {other.shape}."
            )
        if other.n == 0 or self.n == 0:
            return self if other.n == 0 else other
        n = self.n + other.n
        share, weight = other.n / n, self.n * (other.n / n)
        move = other.hidden_mean - self.hidden_mean
        turn = other.target_mean - self.target_mean
        return HiddenStatistics(
            n,
            self.hidden_mean + share * move,
            self.target_mean + share * turn,
            self.gram + other.gram + weight * np.outer(move, move),
            self.cross + other.cross + weight * np.outer(move, turn),
            self.target_squares + other.target_squares + weight * turn**2,
        )

    def scaled(self, factor: float) -> HiddenStatistics:
        """Every row so far counts this much, in (0, 1]: less and less, if done batch after batch.

        Raises
        ------
        ValueError
            If the factor does not lie there.
        """
        if not 0 < factor <= 1:
            raise ValueError(f"factor must lie in (0, 1], got {factor!r}.")
        return HiddenStatistics(
            self.n * factor,
            self.hidden_mean,
            self.target_mean,
            self.gram * factor,
            self.cross * factor,
            self.target_squares * factor,
        )

    def is_finite(self) -> bool:
        """Whether nothing has overflowed."""
        return all(bool(np.isfinite(array).all()) for array in self.arrays().values())

    def second_layer(
        self,
        ridge: float = 1e-4,
        prior: tuple[np.ndarray, np.ndarray] | None = None,
        prior_rows: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best second layer and intercept for these rows.

            minimise over W2, b   1/(2n) ||H W2 + 1 b^T - Y||_F^2 + ridge s/2 ||W2 - W2_0||_F^2
                                  + r/(2n) (s ||W2 - W2_0||_F^2 + ||z - z_0||^2)

        s is the mean variance of the columns of H, r = ``prior_rows``, and z = W2^T mu + b is the
        mean output, which is z_0 for (W2_0, b_0). The last line is worth r rows on which that
        layer is right: it rules while few rows have come and fades as 1/n.

        Parameters
        ----------
        ridge : float, default=1e-4
            At least 0. Where H does not vary beyond rounding, W2 stays W2_0 in any case.
        prior : (W2_0 of shape (m, c), b_0 of shape (c,)), optional
            Zeros if not given.
        prior_rows : float, default=0.0

        Returns
        -------
        W2 : ndarray of shape (m, c)
        intercept : ndarray of shape (c,)

        Raises
        ------
        ValueError
            If there are no rows.
        """
        if not self.n > 0:
            raise ValueError("a second layer needs statistics of at least one row.")
        m, c = self.shape
        W2, intercept = (np.zeros((m, c)), np.zeros(c)) if prior is None else prior
        error = self.target_mean - self.hidden_mean @ W2 - intercept
        step = np.zeros((m, c))
        if m:
            covariance = self.gram / self.n
            penalty = (ridge + prior_rows / self.n) * np.trace(covariance) / m
            step = _solve(covariance, penalty, (self.cross - self.gram @ W2) / self.n)
        gain = self.n / (self.n + prior_rows)
        return W2 + step, intercept + gain * error - self.hidden_mean @ step

    def error(self, W2: np.ndarray, intercept: np.ndarray) -> float:
        """Activation error ||H W2 + 1 b^T - Y||_F / ||Y||_F; no finer than 1e-8, from sums."""
        mean = self.hidden_mean @ W2 + intercept - self.target_mean
        wrong = np.vdot(W2, self.gram @ W2 - 2 * self.cross) + self.target_squares.sum()
        wrong += self.n * np.vdot(mean, mean)
        total = self.target_squares.sum() + self.n * np.vdot(self.target_mean, self.target_mean)
        return float(np.sqrt(max(wrong, 0.0) / (total if total > 0 else 1.0)))

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as named float64 arrays, to be stored or sent."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> HiddenStatistics:
        """Back from ``arrays``.

        Raises
        ------
        ValueError
            If one is missing, or their shapes, types or values cannot be those of statistics.
        """
        missing = [field.name for field in fields(cls) if field.name not in arrays]
        if missing:
            raise ValueError(f"statistics lack {', '.join(missing)}.")
        parts = {field.name: np.asarray(arrays[field.name]) for field in fields(cls)}
        m, c = parts["hidden_mean"].size, parts["target_mean"].size
        expected = {name: array.shape for name, array in cls.empty(m, c).arrays().items()}
        for name, array in parts.items():
            if array.shape != expected[name] or array.dtype != np.float64:
                raise ValueError(
                    f"{name} must be float64 of shape {expected[name]}, got {array.dtype} of "
                    f"shape {array.shape}."
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{name} contains NaN or infinity.")
        if parts["n"] < 0 or (np.diagonal(parts["gram"]) < 0).any():
            raise ValueError("n and sums of squares must not be negative.")
        return cls(float(parts.pop("n")), **parts)


def _solve(A: np.ndarray, penalty: float, B: np.ndarray) -> np.ndarray:
    """(A + penalty I)^-1 B for A positive semidefinite but for the rounding of its sums.

    The penalty is at least what a factorisation cannot tell from zero, so that dead units and
    units that depend on each other do not make the system singular.
    """
    m, largest = len(A), float(np.diagonal(A).max())
    penalty = max(penalty, 10 * m * np.finfo(float).eps * largest, np.finfo(float).tiny)
    while True:
        try:
            return cho_solve(cho_factor(A + penalty * np.eye(m), lower=True), B)
        except np.linalg.LinAlgError:
            penalty *= 100
