"""Second moments about the mean of features and targets: all that ridge regression needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cvxdistill.solvers.gated_statistics import GatedStatistics


@dataclass(frozen=True)
class CentredMoments:
    """Of features x (d,) and targets y (c,) over n examples.

    Attributes
    ----------
    xx : ndarray of shape (d, d)
        1/n sum_i (x_i - x_mean) (x_i - x_mean)^T.
    xy : ndarray of shape (d, c)
        1/n sum_i (x_i - x_mean) (y_i - y_mean)^T.
    x_mean : ndarray of shape (d,)
    y_mean : ndarray of shape (c,)
    variance : float
        1/n sum_i ||y_i - y_mean||^2.
    noise : float
        How well xx is known: sums of rounded squares about zero know those about the mean only so
        well.
    """

    xx: np.ndarray
    xy: np.ndarray
    x_mean: np.ndarray
    y_mean: np.ndarray
    variance: float
    noise: float

    @classmethod
    def of(cls, statistics: GatedStatistics) -> CentredMoments:
        """From sums over examples, of one gate that is always on.

        Raises
        ------
        ValueError
            If there is another number of gates, or no example.
        """
        n, d = statistics.n, statistics.d
        if statistics.p != 1:
            raise ValueError(f"statistics must have one gate, got {statistics.p}.")
        if n == 0:
            raise ValueError("statistics has no examples yet.")
        x_mean, y_mean = statistics.feature_sums[0] / n, statistics.target_sums / n
        variance = statistics.target_squares / n - y_mean**2
        xx = np.outer(-x_mean, x_mean)
        xx += statistics.gram / n
        square = float(np.trace(statistics.gram)) / n / d
        return cls(
            xx,
            statistics.cross[0] / n - np.outer(x_mean, y_mean),
            x_mean,
            y_mean,
            float(np.maximum(variance, 0).sum()),
            4 * float(np.finfo(statistics.dtype).eps) * d**0.5 * square,
        )

    def unexplained(self, W: np.ndarray) -> float:
        """Mean squared error of the map W (d, c) of centred features to centred targets."""
        inner = float(np.vdot(W, self.xx @ W)) - 2 * float(np.vdot(W, self.xy))
        return max(self.variance + inner, 0.0)

    def error(self, W: np.ndarray, intercept: np.ndarray) -> float:
        """||X W + 1 b^T - Y||_F^2 / ||Y - mean Y||_F^2, of W (d, c) and the intercept b (c,)."""
        offset = self.y_mean - self.x_mean @ W - intercept
        wrong = self.unexplained(W) + float(offset @ offset)
        return wrong / self.variance if self.variance > 0 else float(wrong > 0)
