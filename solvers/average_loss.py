"""A loss averaged over weighted examples, bound to its targets: L(Z) of DESIGN's programmes.

L(Z) = 1/n sum_i omega_i l(z_i, y_i),    omega_i = n w_i / sum w
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxdistill.solvers.losses import Loss, MultinomialLoss, SquaredLoss
from cvxdistill.solvers.rows import row_blocks

MOST_NEWTON_STEPS = 100


class AverageLoss:
    """L(Z) for targets Y (n, c) and sample weights w (n,), summed in float64.

    Dual points theta (n, c) are in the units of residuals: theta = -n grad L(Z) at the optimum.

    Parameters
    ----------
    loss : Loss
    Y : ndarray of shape (n, c)
    sample_weight : array of shape (n,), optional
        Positive; only ratios matter.
    fit_intercept : bool, default=False
        Whether ``best_intercept`` will be asked for; it must exist then.

    Raises
    ------
    ValueError, TypeError
        If the targets do not suit the loss, or a weight is not positive and finite.
    """

    def __init__(
        self,
        loss: Loss,
        Y: np.ndarray,
        sample_weight: Any = None,
        fit_intercept: bool = False,
    ):
        loss.check_targets(Y, fit_intercept)
        self.loss = loss
        self.Y = Y
        self.n, self.c = Y.shape
        self.weights = _check_weights(sample_weight, self.n)

    def __repr__(self) -> str:
        weights = "" if self.weights is None else ", weighted"
        return f"AverageLoss({self.loss}, n={self.n}, c={self.c}{weights})"

    @property
    def smoothness(self) -> float:
        """Largest curvature of the loss of one example, before weights."""
        return self.loss.smoothness

    def value(self, Z: np.ndarray) -> float:
        """L(Z)."""
        return self._mean(self.loss.value(Z, self.Y))

    def residual(self, Z: np.ndarray) -> np.ndarray:
        """-n grad L(Z), of shape (n, c)."""
        R = self.loss.residual(Z, self.Y)
        return R if self.weights is None else R * self.weights[:, None].astype(R.dtype)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray) -> float:
        """L(Z_new) - L(Z) - <grad L(Z), Z_new - Z>."""
        return self._mean(self.loss.bregman(Z_new, Z, self.Y))

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray) -> float:
        """L(Z) + L*(-theta / n) + <Z, theta> / n, which is never negative but for rounding."""
        return self._mean(self.loss.fenchel_gap(Z, self.unweighted(theta), self.Y))

    def dual_value(self, theta: np.ndarray) -> float:
        """-L*(-theta / n); minus infinity outside the domain of the conjugate."""
        return -self._mean(self.loss.conjugate(self.unweighted(theta), self.Y))

    def dual_values(self, theta: np.ndarray, by_output: bool) -> np.ndarray:
        """The dual value of each output (c,), if the loss couples none, or of all together (1,)."""
        if not by_output:
            return np.array([self.dual_value(theta)])
        # The loss of an example is a sum over its outputs: each is an example of its own.
        theta = self.unweighted(theta)
        values = self.loss.conjugate(theta.reshape(-1, 1), self.Y.reshape(-1, 1))
        return -self._column_means(values.reshape(self.n, self.c))

    def hessian(self, R: np.ndarray) -> np.ndarray:
        """n times the Hessian of L where the residual is R: (n, c) diagonal or (n, c, c)."""
        H = self.loss.hessian(self.unweighted(R), self.Y)
        if self.weights is None:
            return H
        return H * self.weights.reshape(-1, *(1,) * (H.ndim - 1)).astype(H.dtype)

    @property
    def is_coupled(self) -> bool:
        """Whether the Hessian of an example couples its outputs."""
        return hasattr(self.loss, "hessian_product")

    def hessian_product(self, R: np.ndarray, V: np.ndarray) -> np.ndarray:
        """n times the Hessian of L where the residual is R, times V (n, c)."""
        if not self.is_coupled:
            return self.hessian(R) * V
        product = self.loss.hessian_product(self.unweighted(R), self.Y, V)  # type: ignore[attr-defined]
        return product if self.weights is None else product * self.weights[:, None]

    def hessian_bound(self, R: np.ndarray) -> np.ndarray:
        """n times a bound (n,) of the eigenvalues of each example's Hessian; of a coupled loss."""
        bound = self.loss.hessian_bound(self.unweighted(R), self.Y)  # type: ignore[attr-defined]
        return bound if self.weights is None else bound * self.weights

    def mean_hessian(self, R: np.ndarray) -> np.ndarray:
        """Mean over examples of ``hessian``, (c,) or (c, c), in float64, a block at a time."""
        R = self.unweighted(R)
        total: Any = 0.0
        for rows in row_blocks(self.n, self.c**2, R.dtype):
            H = self.loss.hessian(R[rows], self.Y[rows])
            if self.weights is None:
                total = total + H.sum(axis=0, dtype=np.float64)
            else:
                total = total + np.tensordot(self.weights[rows], H, axes=1)
        return np.asarray(total) / self.n

    def best_intercept(self, Z: np.ndarray) -> np.ndarray:
        """argmin over b of L(Z + 1 b^T), of shape (c,), where the mean residual vanishes.

        The mean for the squared loss; otherwise Newton's method, each output for itself where the
        loss is a sum over outputs.
        """
        if isinstance(self.loss, SquaredLoss):
            b = self._column_means(self.Y - Z)
        elif self.loss.hessian(Z[:1], self.Y[:1]).ndim == 2:
            b = _bracketed_newton(self, Z)
        else:
            b = _regularized_newton(self, Z)
        return b.astype(self.Y.dtype)

    def _column_means(self, A: np.ndarray) -> np.ndarray:
        if self.weights is None:
            return np.asarray(np.mean(A, axis=0, dtype=np.float64))
        return np.average(A, axis=0, weights=self.weights)

    def _mean(self, values: np.ndarray) -> float:
        if self.weights is None:
            return float(np.mean(values, dtype=np.float64))
        return float(self.weights @ values) / self.n

    def unweighted(self, theta: np.ndarray) -> np.ndarray:
        """theta in the units of a loss without weights: divided by those of the examples."""
        if self.weights is None:
            return theta
        return theta / self.weights[:, None].astype(theta.dtype)


def _small_step(Z: np.ndarray, b: np.ndarray) -> float:
    """A step of a size whose square, on the losses' scale of 1, is lost in the rounding of b."""
    return (float(np.finfo(Z.dtype).eps) * max(1.0, float(np.abs(b).max()))) ** 0.5


def _bracketed_newton(loss: AverageLoss, Z: np.ndarray) -> np.ndarray:
    """Root of the mean residual of each output, which falls as b grows: Newton within a bracket."""
    b, low, high = np.zeros(loss.c), np.full(loss.c, -np.inf), np.full(loss.c, np.inf)
    reach, done = np.ones(loss.c), np.zeros(loss.c, bool)
    rounding = 4 * float(np.finfo(Z.dtype).eps)
    for _ in range(MOST_NEWTON_STEPS):
        R = loss.residual(Z + b.astype(Z.dtype))
        pull = np.mean(R, axis=0, dtype=np.float64)
        done |= np.abs(pull) <= rounding * np.mean(np.abs(R), axis=0, dtype=np.float64)
        if done.all():
            break
        low, high = np.where(pull > 0, b, low), np.where(pull < 0, b, high)
        curvature = loss.mean_hessian(R)
        step = np.where(pull < 0, -np.inf, np.inf)
        np.divide(pull, curvature, out=step, where=curvature > 0)
        last = np.abs(step) <= _small_step(Z, b)
        bounded = np.isfinite(low) & np.isfinite(high)
        newton = np.where(bounded, (b + step > low) & (b + step < high), np.abs(step) <= reach)
        middle = np.add(low, high, out=np.zeros_like(b), where=bounded) / 2
        otherwise = np.where(bounded, middle - b, np.sign(step) * reach)
        step = np.where(newton | last, step, otherwise)
        reach = np.where(bounded, reach, 2 * reach)
        b = np.where(done, b, b + step)
        done |= last
    return b


def _regularized_newton(loss: AverageLoss, Z: np.ndarray) -> np.ndarray:
    """Newton's method with steps (H + mu I)^-1 pull, mu = ||pull|| / radius.

    No step is longer than the radius, which grows as long as steps succeed: Hessians of outputs
    far from their targets vanish. Directions in which only rounding pulls are left alone. Far
    from all targets it would zigzag: hence the start, which gives all outputs the same mean.
    """
    means, radius = np.mean(Z, axis=0, dtype=np.float64), 16.0
    b = means.mean() - means
    R = loss.residual(Z + b.astype(Z.dtype))
    pull = _pull(loss, R)
    rounding = 4 * float(np.finfo(Z.dtype).eps)
    for _ in range(MOST_NEWTON_STEPS):
        curvatures, directions = np.linalg.eigh(loss.mean_hessian(R))
        slopes = directions.T @ pull
        slopes[np.abs(slopes) <= rounding * np.mean(np.abs(R), dtype=np.float64)] = 0
        if not slopes.any():
            break
        at, grown = Z + b.astype(Z.dtype), 4 * radius
        while radius > 1e-10:
            mu = np.linalg.norm(slopes) / radius
            step = directions @ (slopes / (np.maximum(curvatures, 0) + mu))
            new = Z + (b + step).astype(Z.dtype)
            R = loss.residual(new)
            pull_new = _pull(loss, R)
            # Halving the slope is progress enough, and cheaper to see than a lower value.
            if 2 * np.linalg.norm(pull_new) <= np.linalg.norm(pull):
                break
            if loss.bregman(new, at) <= 0.75 * float(pull @ step):
                break
            radius = grown = radius / 4
        b, pull, radius = b + step, pull_new, grown
        if np.abs(step).max() <= _small_step(Z, b):
            break
    return b


def _pull(loss: AverageLoss, R: np.ndarray) -> np.ndarray:
    """Mean residual; only rounding pulls all outputs of the multinomial loss alike."""
    pull = np.asarray(np.mean(R, axis=0, dtype=np.float64))
    return pull - pull.mean() if isinstance(loss.loss, MultinomialLoss) else pull


def _check_weights(sample_weight: Any, n: int) -> np.ndarray | None:
    """Weights in float64 with mean 1, or None where all are equal."""
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight)
    if weights.dtype.kind not in "fiub":
        raise TypeError(f"sample_weight must hold real numbers, got dtype {weights.dtype}.")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {weights.shape}.")
    weights = weights.astype(np.float64)
    if not (np.isfinite(weights).all() and (weights > 0).all()):
        raise ValueError(
            "sample_weight must be positive and finite; leave rows of weight zero out, of X and of "
            "the activation patterns too."
        )
    weights /= weights.mean()
    return None if (weights == weights[0]).all() else weights
