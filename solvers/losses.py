"""Losses l(z, y) of one example, with what solvers and certificates ask of them.

A loss is one small frozen class whose methods work on all rows of Z (n, c) and Y (n, c) at once.
Averages, sample weights and intercepts are the subject of ``cvxdistill.solvers.average_loss``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from scipy.special import expit, log_softmax, logsumexp, softmax, xlogy


class Loss(Protocol):
    """A convex, smooth loss of predictions z and targets y in R^c."""

    @property
    def smoothness(self) -> float:
        """Largest eigenvalue that the Hessian in z can have."""
        ...

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Raise ValueError if Y (n, c) cannot be the targets, or would have no best intercept."""
        ...

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """l(z, y), of shape (n,)."""
        ...

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Minus the gradient of l in z, of shape (n, c)."""
        ...

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """l(z_new) - l(z) - <grad l(z), z_new - z>, of shape (n,), without cancellation."""
        ...

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Hessian in z where the residual is R: its diagonal (n, c), or whole, (n, c, c)."""
        ...

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """sup over z of <-theta, z> - l(z, y), of shape (n,); infinite outside its domain."""
        ...

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """l(z) + l*(-theta) + <z, theta>, of shape (n,), never negative, without cancellation."""
        ...


@dataclass(frozen=True)
class SquaredLoss:
    """l(z, y) = 1/2 ||z - y||^2."""

    smoothness: ClassVar[float] = 1.0

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Any numbers will do."""

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return 1/2 ||z - y||^2."""
        return _half_squares(Z - Y)

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return y - z."""
        return Y - Z

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return 1/2 ||z_new - z||^2."""
        return _half_squares(Z_new - Z)

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return ones: the diagonal of the identity."""
        return np.ones_like(R)

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return <theta, theta / 2 - y>."""
        return np.einsum("nc,nc->n", theta, theta / 2 - Y)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return 1/2 ||y - z - theta||^2."""
        return _half_squares(Y - Z - theta)


@dataclass(frozen=True)
class HuberLoss:
    """l(z, y) = sum_k h(y_k - z_k), with h(u) = u^2 / 2 up to |u| = delta and a line beyond.

    Parameters
    ----------
    delta : float, default=1.35
        In units of the targets; nothing is scaled.

    References
    ----------
    Huber 1964; the default is that of scikit-learn's HuberRegressor, without its scale estimate.
    """

    delta: float = 1.35
    smoothness: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.delta < np.inf:
            raise ValueError(f"delta must be positive and finite, got {self.delta!r}.")

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Any numbers will do."""

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return sum_k h(y_k - z_k)."""
        U = Y - Z
        psi = self._clip(U)
        return np.einsum("nc,nc->n", psi, U - psi / 2)

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return y - z clipped to [-delta, delta]."""
        return self._clip(Y - Z)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the Fenchel gap between z_new and the gradient at z."""
        return self.fenchel_gap(Z_new, self._clip(Y - Z), Y)

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the diagonal: 1 where |r| < delta, else 0."""
        return (np.abs(R) < self.delta * (1 - _slack(R))).astype(R.dtype)

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return <theta, theta / 2 - y> where every |theta_k| <= delta."""
        inside = (np.abs(theta) <= self.delta * (1 + _slack(theta))).all(axis=1)
        return np.where(inside, np.einsum("nc,nc->n", theta, theta / 2 - Y), np.inf)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return sum_k (psi - theta)((psi - theta)/2 + u - psi), u = y - z, psi = u clipped.

        Infinity where some |theta_k| > delta.
        """
        U = Y - Z
        psi = self._clip(U)
        change = psi - theta
        inside = (np.abs(theta) <= self.delta * (1 + _slack(theta))).all(axis=1)
        return np.where(inside, np.einsum("nc,nc->n", change, change / 2 + (U - psi)), np.inf)

    def _clip(self, U: np.ndarray) -> np.ndarray:
        return np.clip(U, -self.delta, self.delta)


@dataclass(frozen=True)
class LogisticLoss:
    """l(z, y) = log(1 + exp(-y z)), one column, y = -1 or +1."""

    smoothness: ClassVar[float] = 0.25

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Raise ValueError unless Y is one column of -1 and +1."""
        if Y.shape[1] != 1 or not (np.abs(Y) == 1).all():
            raise ValueError(
                "The logistic loss needs Y of one column that holds only -1 and +1, got "
                f"{Y.shape[1]} column(s) with values from {Y.min():g} to {Y.max():g}; use "
                "'multinomial' with one-hot rows for more classes."
            )
        if fit_intercept and np.ptp(Y) == 0:
            raise ValueError(
                "With an intercept the logistic loss needs examples of both classes in Y, got only "
                f"{Y[0, 0]:g}."
            )

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return log(1 + exp(-y z)), for any margin."""
        return np.logaddexp(0, -(Y * Z)[:, 0])

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return y / (1 + exp(y z))."""
        return Y * expit(-Y * Z)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return log(1 - q + q exp(e)) - q e, with q = 1 / (1 + exp(y z)), e = y (z - z_new)."""
        margin, change = Y * Z, Y * (Z - Z_new)
        log_P = -np.logaddexp(0, np.hstack([-margin, margin]))
        return _log_partition_bregman(log_P, np.hstack([np.zeros_like(change), change]))

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return q (1 - q) with q = y r."""
        q = np.clip(Y * R, 0, 1)
        return q * (1 - q)

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return q log q + (1 - q) log(1 - q), q = y theta in [0, 1]."""
        q = (Y * theta)[:, 0]
        inside = (q >= -_slack(q)) & (q <= 1 + _slack(q))
        q = np.clip(q, 0, 1)
        return np.where(inside, xlogy(q, q) + xlogy(1 - q, 1 - q), np.inf)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the relative entropy between y theta and 1 / (1 + exp(y z))."""
        q, margin = (Y * theta)[:, 0], (Y * Z)[:, 0]
        return _relative_entropy(q, -margin) + _relative_entropy(1 - q, margin)


@dataclass(frozen=True)
class MultinomialLoss:
    """l(z, y) = log(sum_k exp(z_k)) - <y, z>, y one-hot or any probabilities."""

    smoothness: ClassVar[float] = 0.5

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Raise ValueError unless the rows of Y are probabilities of at least two classes."""
        if Y.shape[1] < 2 or (Y < 0).any() or (np.abs(Y.sum(axis=1) - 1) > 1e-5).any():
            raise ValueError(
                "The multinomial loss needs rows of Y that are probabilities of at least two "
                "classes, one-hot for labels: not negative, with sum 1; got "
                f"{Y.shape[1]} column(s) with values from {Y.min():g} to {Y.max():g}."
            )
        if fit_intercept and not Y.any(axis=0).all():
            missing = np.flatnonzero(~Y.any(axis=0))
            raise ValueError(
                "With an intercept the multinomial loss needs examples of every class, got none of "
                f"columns {missing.tolist()} of Y."
            )

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return log(sum_k exp(z_k - <y, z>)), for any margin."""
        return logsumexp(Z - np.einsum("nc,nc->n", Y, Z)[:, None], axis=1)

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return y - softmax(z)."""
        return Y - softmax(Z, axis=1)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the relative entropy between the softmax of z and of z_new."""
        return _log_partition_bregman(log_softmax(Z, axis=1), Z_new - Z)

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return diag(q) - q q^T with q = y - r, of shape (n, c, c)."""
        Q = np.clip(Y - R, 0, 1)
        H = -np.einsum("nk,nl->nkl", Q, Q)
        H[:, np.arange(Q.shape[1]), np.arange(Q.shape[1])] += Q
        return H

    def hessian_product(self, R: np.ndarray, Y: np.ndarray, V: np.ndarray) -> np.ndarray:
        """Return the Hessian times V (n, c), q v - q <q, v>, without forming it."""
        Q = np.clip(Y - R, 0, 1)
        product = Q * V
        product -= Q * product.sum(axis=1, keepdims=True)
        return product

    def hessian_bound(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return max_k 2 q_k (1 - q_k) (n,), above the eigenvalues of the Hessian (Gershgorin)."""
        Q = np.clip(Y - R, 0, 1)
        return 2 * (Q * (1 - Q)).max(axis=1)

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return sum_k q_k log q_k, q = y - theta a probability."""
        Q = Y - theta
        inside = _is_probability(Q)
        Q = np.maximum(Q, 0)
        return np.where(inside, xlogy(Q, Q).sum(axis=1), np.inf)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return the relative entropy between y - theta and the softmax of z."""
        Q = Y - theta
        log_P = log_softmax(Z, axis=1)
        inside = _is_probability(Q)
        Q = np.maximum(Q, 0)
        return np.where(inside, (xlogy(Q, Q) - Q * log_P).sum(axis=1), np.inf)


@dataclass(frozen=True)
class PoissonLoss:
    """l(z, y) = exp(z) - y z + y log y - y for counts y >= 0: half the deviance, least 0.

    Its curvature has no bound, so it is not one of ``LOSSES``, which all solvers of networks take.
    """

    smoothness: ClassVar[float] = np.inf

    def check_targets(self, Y: np.ndarray, fit_intercept: bool = False) -> None:
        """Raise ValueError unless Y is one column of numbers >= 0, not all 0 for an intercept."""
        if Y.shape[1] != 1 or (Y < 0).any():
            raise ValueError(
                "The Poisson loss needs Y of one column of numbers >= 0, got "
                f"{Y.shape[1]} column(s) with values from {Y.min():g} to {Y.max():g}."
            )
        if fit_intercept and not Y.any():
            raise ValueError("With an intercept the Poisson loss needs a number > 0 in Y.")

    def value(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return exp(z) - y z + y log y - y."""
        return self.fenchel_gap(Z, np.zeros_like(Z), Y)

    def residual(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return y - exp(z)."""
        return Y - _exp(Z)

    def bregman(self, Z_new: np.ndarray, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return exp(z) (exp(e) - 1 - e), e = z_new - z."""
        E = (Z_new - Z)[:, 0].astype(np.float64)
        small = np.abs(E) < 0.5
        rise = np.where(small, 0, _exp(E) - 1 - E)
        rise[small] = _expm1_minus_identity(E[small])
        return _exp(Z[:, 0]) * rise

    def hessian(self, R: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return exp(z) = y - r."""
        return np.maximum(Y - R, 0)

    def conjugate(self, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return q log q - q - y log y + y with q = y - theta >= 0."""
        q, y = (Y - theta)[:, 0], Y[:, 0]
        inside = q >= -_slack(q) * np.maximum(1, y)
        q = np.maximum(q, 0)
        return np.where(inside, xlogy(q, q) - q - xlogy(y, y) + y, np.inf)

    def fenchel_gap(self, Z: np.ndarray, theta: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Return exp(z) - q z + q log q - q with q = y - theta."""
        z, q = Z[:, 0], (Y - theta)[:, 0]
        inside = q >= -_slack(q) * np.maximum(1, Y[:, 0])
        q = np.maximum(q, 0)
        # q (exp(u) - 1 - u) with u = z - log q, which does not cancel where they agree.
        u = z - np.log(np.where(q > 0, q, 1))
        small = (np.abs(u) < 0.5) & (q > 0)
        value = np.where(q > 0, _exp(z) - q * (1 + u), _exp(z))
        value[small] = q[small] * _expm1_minus_identity(u[small].astype(np.float64))
        return np.where(inside, value, np.inf)


def _exp(Z: np.ndarray) -> np.ndarray:
    """Exponentials; infinite, without a warning, where they overflow."""
    with np.errstate(over="ignore"):
        return np.exp(Z)


def _slack(A: np.ndarray) -> float:
    """What rounding may add to a number on the boundary of a conjugate's domain."""
    return 16 * float(np.finfo(A.dtype).eps)


def _is_probability(Q: np.ndarray) -> np.ndarray:
    """Which rows of Q are probabilities, but for rounding and what ``check_targets`` lets pass."""
    return (-_slack(Q) <= Q).all(axis=1) & (np.abs(Q.sum(axis=1) - 1) <= 1e-4)


def _half_squares(A: np.ndarray) -> np.ndarray:
    """1/2 ||a||^2 of each row."""
    return np.einsum("nc,nc->n", A, A) / 2


def _relative_entropy(q: np.ndarray, logit: np.ndarray) -> np.ndarray:
    """q log(q / s) with s = 1 / (1 + exp(-logit)), for any logit; infinite for negative q."""
    log_s = -np.logaddexp(0, -logit)
    value = xlogy(np.maximum(q, 0), np.maximum(q, 0)) - np.maximum(q, 0) * log_s
    return np.where(q < -_slack(q), np.inf, value)


def _log_partition_bregman(log_P: np.ndarray, change: np.ndarray) -> np.ndarray:
    """log(sum_k p_k exp(e_k)), e = change - <p, change>: the sum is 1 + O(e^2), kept so."""
    P = np.exp(log_P)
    E = change - np.einsum("nc,nc->n", P, change)[:, None]
    small = np.abs(E).max(axis=1) < 0.5
    out = np.empty(len(P))
    E_small = E[small].astype(np.float64)
    out[small] = np.log1p(np.sum(P[small] * _expm1_minus_identity(E_small), axis=1))
    # Not from P: what underflows there may be what the change brings to the fore.
    out[~small] = logsumexp(log_P[~small] + E[~small], axis=1)
    return out


def _expm1_minus_identity(E: np.ndarray) -> np.ndarray:
    """exp(e) - 1 - e for |e| < 1/2, by its series: the difference itself loses all digits."""
    total, term = np.zeros_like(E), E.copy()
    for k in range(2, 15):
        term = term * E / k
        total += term
    return total


LOSSES: dict[str, Loss] = {
    "squared": SquaredLoss(),
    "huber": HuberLoss(),
    "logistic": LogisticLoss(),
    "multinomial": MultinomialLoss(),
}


def find_loss(loss: str | Loss) -> Loss:
    """Return the loss of that name, or the loss itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {sorted(LOSSES)}, got {loss!r}.")
    return LOSSES[loss]
