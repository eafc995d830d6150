"""The group elastic net: a linear model whose features come and go in groups.

    minimise over B, b   L(X B + 1 b^T + O, Y)
                         + alpha * sum_g w_g (rho ||B_g||_F + (1 - rho)/2 ||B_g||_F^2)

for features in groups g, any loss averaged over weighted examples, fixed offsets O and rho the
``l1_ratio``. Groups of weight 0 are not penalised.

References
----------
Yuan and Lin 2006 (the group lasso); Friedman, Hastie and Tibshirani 2010; Simon and Tibshirani
2012 (its elastic net); Yang and Hastie 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cvxdistill.solvers.average_loss import AverageLoss
from cvxdistill.solvers.feature_columns import Columns, DenseColumns, GatedColumns
from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.group_penalties import Penalties
from cvxdistill.solvers.losses import LOSSES, HuberLoss, Loss, PoissonLoss, SquaredLoss

GROUP_LOSSES: dict[str, Loss] = {**LOSSES, "poisson": PoissonLoss()}


class GroupElasticNetProblem:
    """The group elastic net for given data.

    Parameters
    ----------
    X : array of shape (n, d), or GatedOperator
        float32 or float64. A gated operator stands for its p d gated features: feature i of gate j
        is number j d + i. With whole gates as groups none is formed, but by steps of Newton's
        method for the multinomial and the Huber loss, and those only of the groups at work.
    Y : array of shape (n,) or (n, c)
    groups : int, array of int of shape (d,), or sequence of sequences of int, optional
        A size (consecutive features in groups of it), a label for each feature, or the features of
        each group: every feature in one of them. By default every feature by itself, and for a
        gated operator the d features of each gate.
    group_weights : array of shape (groups,), optional
        w_g >= 0, 1 by default; of labels, in increasing order. Where features of weight 0 separate
        the classes a log loss has no minimiser: solvers stop by "no progress" with an infinite gap.
    l1_ratio : float in [0, 1], default=1.0
    loss : {"squared", "huber", "logistic", "multinomial", "poisson"} or Loss
    fit_intercept : bool, default=True
    offset : array of shape (n,) or (n, c), optional
    sample_weight : array of shape (n,), optional
        Positive.

    Raises
    ------
    ValueError, TypeError
        If shapes do not fit, numbers are not finite, or the groups are no partition.
    """

    def __init__(
        self,
        X: Any,
        Y: Any,
        groups: Any = None,
        *,
        group_weights: Any = None,
        l1_ratio: float = 1.0,
        loss: str | Loss = "squared",
        fit_intercept: bool = True,
        offset: Any = None,
        sample_weight: Any = None,
    ):
        self.columns: Columns
        if isinstance(X, GatedOperator):
            self.columns = GatedColumns(X)
            groups = X.d if groups is None else groups
        else:
            self.columns = DenseColumns(_matrix(X, "X"))
        n, d = self.columns.shape
        Y = _matrix(Y, "Y", like=self.columns.dtype)
        if len(Y) != n:
            raise ValueError(f"X and Y must have as many rows, got {n} and {len(Y)}.")
        self.members = _partition(groups, d)
        if not isinstance(l1_ratio, (int, float, np.number)) or not 0 <= l1_ratio <= 1:
            raise ValueError(f"l1_ratio must be a number in [0, 1], got {l1_ratio!r}.")
        self.l1_ratio = float(l1_ratio)
        self.group_weights = _group_weights(group_weights, len(self.members))
        if isinstance(loss, str):
            if loss not in GROUP_LOSSES:
                raise ValueError(f"loss must be one of {sorted(GROUP_LOSSES)}, got {loss!r}.")
            loss = GROUP_LOSSES[loss]
        self.fit_intercept = bool(fit_intercept)
        self.loss = AverageLoss(loss, Y, sample_weight, self.fit_intercept)
        self.offset: np.ndarray | None = None
        if offset is not None:
            self.offset = _matrix(offset, "offset", like=Y.dtype)
            if self.offset.shape != Y.shape:
                raise ValueError(
                    f"offset must have the shape of Y, {Y.shape}, got {self.offset.shape}."
                )
        # Blocks of the descent: the penalised groups, then all unpenalised features together, so
        # that each sweep ends with these exactly at their best.
        self.penalised = np.flatnonzero(self.group_weights > 0)
        free = np.flatnonzero(self.group_weights == 0)
        blocks = [self.members[g] for g in self.penalised]
        if len(free):
            blocks.append(np.concatenate([self.members[g] for g in free]))
        self.order = np.concatenate(blocks)
        sizes = [len(block) for block in blocks]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.block_weights = np.zeros(len(blocks))
        self.block_weights[: len(self.penalised)] = self.group_weights[self.penalised]

    def __repr__(self) -> str:
        n, d = self.columns.shape
        weighted = "" if self.loss.weights is None else ", weighted"
        return (
            f"GroupElasticNetProblem(n={n}, d={d}, c={self.n_outputs}, groups={len(self.members)}, "
            f"loss={self.loss.loss}, l1_ratio={self.l1_ratio}, "
            f"fit_intercept={self.fit_intercept}{weighted})"
        )

    @property
    def n_outputs(self) -> int:
        """The number c of outputs."""
        return self.loss.c

    def penalties(self, alpha: float) -> Penalties:
        """Those of all blocks at this alpha."""
        norm = alpha * self.l1_ratio * self.block_weights
        return Penalties(self.starts, norm, alpha * (1 - self.l1_ratio) * self.block_weights)

    def predictions(self, Z: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Z + 1 b^T + O."""
        F = Z + b.astype(Z.dtype)
        return F if self.offset is None else F + self.offset

    def intercept(self, Z: np.ndarray) -> np.ndarray:
        """The best b for predictions Z = X B; zeros without an intercept."""
        if not self.fit_intercept:
            return np.zeros(self.n_outputs, dtype=Z.dtype)
        return self.loss.best_intercept(Z if self.offset is None else Z + self.offset)

    def objective(self, coef: Any, intercept: Any, alpha: float) -> float:
        """The objective at coefficients (d, c) and an intercept (c,)."""
        B = self.coefficients(coef)
        Z = self.columns.forward(B)
        b = np.broadcast_to(np.asarray(intercept, dtype=Z.dtype), (self.n_outputs,))
        return self.loss.value(self.predictions(Z, b)) + self.penalties(alpha).value(B[self.order])

    def duality_gap(self, coef: Any, alpha: float) -> float:
        """Absolute duality gap of coefficients (d, c) with their best intercept.

        From their residual, made orthogonal to the unpenalised features and then scaled; infinite
        where that is not dual feasible.
        """
        B = self.coefficients(coef)
        Z = self.columns.forward(B)
        F = self.predictions(Z, self.intercept(Z))
        theta, lengths = self.dual_point(F, self.loss.residual(F))
        return self.gap(B, F, theta, lengths, alpha)

    def dual_point(self, F: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residual R made orthogonal to the unpenalised features, and ||C_g|| of all blocks.

        With C = X^T theta / n.
        """
        theta = self._orthogonal(F, R)
        C = self.columns.adjoint(theta)[self.order] / len(R)
        return theta, self.penalties(1.0).lengths(C)

    def gap(
        self, B: np.ndarray, F: np.ndarray, theta: np.ndarray, lengths: np.ndarray, alpha: float
    ) -> float:
        """Duality gap of B (d, c) with predictions F, from theta, scaled until it is feasible."""
        penalties = self.penalties(alpha)
        s, conjugate = penalties.conjugate_and_scale(lengths)
        scaled = theta * np.asarray(s, theta.dtype)
        gap = self.loss.fenchel_gap(F, scaled) + penalties.value(B[self.order]) + conjugate
        # Columns of theta sum to 0 where there is an intercept: it may stay in F.
        Z = F if self.offset is None else F - self.offset
        gap -= float(np.sum(Z * scaled, dtype=np.float64)) / len(F)
        return float(np.maximum(gap, 0.0))

    def _orthogonal(self, F: np.ndarray, R: np.ndarray) -> np.ndarray:
        """R moved, in the metric of the inverse Hessian, until X_u^T R = 0 for unpenalised u.

        And shrunk into the domain of the loss's conjugate, if that is bounded alike for all.
        """
        if len(self.penalised) == len(self.block_weights):
            return R
        h = row_weights(self.loss, F, R)
        U = self.columns.take(self.order[self.starts[-2] :])
        if self.fit_intercept:
            U = np.hstack([np.ones((len(U), 1)), U])
        weighted = h[:, None] * U
        move = np.linalg.lstsq(U.T @ weighted, U.T @ R.astype(np.float64), rcond=None)[0]
        theta: np.ndarray = (R - weighted @ move).astype(R.dtype)
        if isinstance(self.loss.loss, HuberLoss):
            # Huber's conjugate ends at its threshold, where outliers are; shrinking keeps the rest.
            delta = self.loss.loss.delta
            theta *= np.asarray(
                delta / max(delta, np.abs(self.loss.unweighted(theta)).max()), R.dtype
            )
        return theta

    def coefficients(self, coef: Any) -> np.ndarray:
        """Coefficients (d, c), or (d,) for one output, as finite float64 of shape (d, c).

        Raises
        ------
        ValueError
            If they are not.
        """
        d, c = self.columns.shape[1], self.n_outputs
        B = np.asarray(coef, dtype=np.float64)
        if B.shape == (d,) and c == 1:
            B = B[:, None]
        if B.shape != (d, c):
            raise ValueError(f"coef must have shape ({d}, {c}), got {B.shape}.")
        if not np.isfinite(B).all():
            raise ValueError("coef must be finite.")
        return B


def row_weights(loss: AverageLoss, F: np.ndarray, R: np.ndarray) -> np.ndarray:
    """Weights h (n,) of a quadratic model of the loss at predictions F, residual R, in float64.

    The second derivative for one output; for more a bound: 1 for the squared loss,
    max_k 2 q_k (1 - q_k) for the multinomial one (Gershgorin). For Huber's loss always its
    majoriser psi(u) / u at u = y - f, the largest over outputs.
    """
    if loss.is_coupled:
        h = loss.hessian_bound(R)
    elif isinstance(loss.loss, HuberLoss):
        U = loss.Y - F
        h = np.divide(R, U, out=loss.hessian(np.zeros_like(R)), where=U != 0).max(axis=1)
    elif isinstance(loss.loss, SquaredLoss):
        h = np.ones(len(R)) if loss.weights is None else loss.weights
    else:
        h = loss.hessian(R)[:, 0]
    return np.asarray(h, dtype=np.float64)


def _matrix(A: Any, name: str, like: Any = None) -> np.ndarray:
    """A as a finite floating-point matrix (n, k)."""
    array = np.asarray(A)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}.")
    if like is not None:
        array = array.astype(like, copy=False)
    elif array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if array.ndim == 1 and name != "X":
        array = array[:, None]
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a matrix that is not empty, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite: no NaN, no infinity.")
    return array


def _partition(groups: Any, d: int) -> list[np.ndarray]:
    """The features of each group."""
    if groups is None:
        return list(np.arange(d)[:, None])
    if isinstance(groups, (int, np.integer)) and not isinstance(groups, bool):
        if groups < 1 or d % groups:
            raise ValueError(
                f"groups={groups} must be a positive size that divides the {d} features."
            )
        return list(np.arange(d).reshape(-1, int(groups)))
    labels = np.asarray(groups) if not _is_nested(groups) else None
    if labels is not None:
        if labels.dtype.kind not in "iu" or labels.shape != (d,):
            raise ValueError(
                f"groups must be a size, {d} integer labels, or a list of lists of features; got "
                f"{labels.dtype} of shape {labels.shape}."
            )
        order = np.argsort(labels, kind="stable")
        cuts = np.flatnonzero(np.diff(labels[order])) + 1
        return np.split(order, cuts)
    members = [np.asarray(group).ravel() for group in groups]
    if any(len(group) == 0 for group in members):
        raise ValueError("groups must not hold an empty group.")
    for group in members:
        if group.dtype.kind not in "iu":
            raise ValueError(f"groups must hold numbers of features, got {group.tolist()}.")
    everything = np.sort(np.concatenate(members))
    if len(everything) != d or (everything != np.arange(d)).any():
        raise ValueError(f"groups must hold each of the {d} features exactly once.")
    return members


def _is_nested(groups: Any) -> bool:
    return (
        isinstance(groups, Sequence)
        and len(groups) > 0
        and all(isinstance(group, (Sequence, np.ndarray)) for group in groups)
    )


def _group_weights(weights: Any, groups: int) -> np.ndarray:
    if weights is None:
        return np.ones(groups)
    array = np.asarray(weights)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"group_weights must hold real numbers, got dtype {array.dtype}.")
    array = array.astype(np.float64)
    if array.shape != (groups,):
        raise ValueError(f"group_weights must have shape ({groups},), got {array.shape}.")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError("group_weights must be finite and not negative.")
    return array
