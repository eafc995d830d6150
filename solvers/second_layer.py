"""The second layer of a network whose first layer stays: a group elastic net from sums over rows.

With A = [H, 1] of shape (n, m + 1), H[:, h] = D[:, gate[h]] * (X W1[:, h]), the squared loss needs
the rows only through A^T A, A^T Y and the column squares of Y. These add up over blocks of rows, so
H is never held, and the programme that is solved has one row more than there are units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular

from cvxdistill.solvers.coordinate_descent import BlockCoordinateDescent, group_alpha_max
from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.network import Neurons, hidden_features
from cvxdistill.solvers.rows import RowSource, row_blocks

# Of the least squares on the units that are left, in units of a feature's variance.
REFIT_RIDGE = 1e-4
# Units that contribute less than this share of the largest one are all charged alike.
SMALLEST_LENGTH = 1e-3
# Shares of a feature's mean square and of a correlation that are rounding.
CONSTANT, DUPLICATE = 1e-10, 1e-9


@dataclass(frozen=True)
class SecondLayer:
    """Numbers of some units, their rows W2 (k, c), and an intercept (c,)."""

    units: np.ndarray
    W2: np.ndarray
    intercept: np.ndarray

    def weights(self, m: int) -> np.ndarray:
        """[W2; b] in float64, with zero rows for those of m units that are gone."""
        theta = np.zeros((m + 1, len(self.intercept)))
        theta[self.units] = self.W2
        theta[-1] = self.intercept
        return theta


@dataclass(frozen=True)
class RowSums:
    """Sums over rows of A = [H, 1], of the residual E = Y - A [W2; b] of a network, and of Y.

    Attributes
    ----------
    n : int
        Rows.
    gram : ndarray of shape (m + 1, m + 1)
        A^T A.
    cross : ndarray of shape (m + 1, c)
        A^T E.
    squares : float
        ||E||_F^2.
    column_squares : ndarray of shape (c,)
        Sums of squares of the columns of Y.
    """

    n: int
    gram: np.ndarray
    cross: np.ndarray
    squares: float
    column_squares: np.ndarray

    def error(self, move: np.ndarray) -> float:
        """Activation error ||E - A move||_F / ||Y||_F after [W2; b] has moved by this much."""
        change = float(np.vdot(move, self.gram @ move - 2 * self.cross))
        return _relative(self.squares + change, float(self.column_squares.sum()))


def _relative(squares: float, total: float) -> float:
    return (max(squares, 0.0) / (total if total > 0 else 1.0)) ** 0.5


def activation_error(
    operator: GatedOperator, neurons: Neurons, theta: np.ndarray, Y: RowSource
) -> float:
    """||Y' - Y||_F / ||Y||_F from the rows themselves."""
    wrong = total = 0.0
    for rows in row_blocks(operator.n, sum(theta.shape), np.float64):
        E = hidden_features(operator, neurons, rows) @ theta[:-1] + theta[-1]
        targets = Y[rows].astype(np.float64)
        total += float(np.vdot(targets, targets))
        E -= targets
        wrong += float(np.vdot(E, E))
    return _relative(wrong, total)


def sum_rows(operator: GatedOperator, neurons: Neurons, theta: np.ndarray, Y: RowSource) -> RowSums:
    """A^T A, A^T E, ||E||^2 and the sums of squares of Y (c,), in float64, from blocks of rows."""
    m, c = len(neurons), theta.shape[1]
    G, cross = np.zeros((m + 1, m + 1)), np.zeros((m + 1, c))
    squares, columns = 0.0, np.zeros(c)
    for rows in row_blocks(operator.n, m + c, np.float64):
        A = np.ones((rows.stop - rows.start, m + 1))
        A[:, :m] = hidden_features(operator, neurons, rows)
        targets = Y[rows].astype(np.float64)
        columns += np.einsum("nc,nc->c", targets, targets)
        E = targets - A @ theta
        squares += float(np.vdot(E, E))
        G += A.T @ A
        cross += A.T @ E
    return RowSums(operator.n, G, cross, squares, columns)


class SecondLayerProgramme:
    """The group elastic net of the units that are neither constant nor multiples of others.

    Parameters
    ----------
    sums : RowSums
        Of the rows to fit.
    theta : ndarray of shape (m + 1, c)
        [W2; b] of the network given, where the descent may start.
    l1_ratio : float
    tol : float
        Relative duality gap.
    dtype : dtype
        Of the second layers that come out.
    """

    def __init__(self, sums: RowSums, theta: np.ndarray, l1_ratio: float, tol: float, dtype: Any):
        self.solver, self.dtype = BlockCoordinateDescent(tol=tol), dtype
        mean = sums.gram[-1, :-1] / sums.n
        targets = (sums.cross + sums.gram @ theta) / sums.n
        self.center = targets[-1]
        variances = np.maximum(sums.column_squares / sums.n - self.center**2, 0)
        mean_squares = np.diagonal(sums.gram)[:-1] / sums.n
        covariance = sums.gram[:-1, :-1] / sums.n - np.outer(mean, mean)
        self.units = np.flatnonzero(np.diagonal(covariance) > CONSTANT * mean_squares)
        correlation = self._normalise(covariance)
        twins = np.triu(np.abs(correlation) > 1 - DUPLICATE, 1).any(axis=0)
        self.units = self.units[~twins]
        self.correlation = self._normalise(covariance)
        self.scale = np.sqrt(np.diagonal(covariance)[self.units])
        self.mean = mean[self.units]
        self.cross = targets[self.units] - np.outer(self.mean, self.center)
        self.cross /= self.scale[:, None]
        self.warm = theta[self.units] * self.scale[:, None]
        self.problem: GroupElasticNetProblem | None = None
        if len(self.units):
            X, Y = _equal_rows(self.correlation, self.cross, variances)
            self.problem = GroupElasticNetProblem(
                X, Y, group_weights=self._weights(), l1_ratio=l1_ratio, fit_intercept=False
            )
        self.last = np.zeros_like(self.warm)

    def _normalise(self, covariance: np.ndarray) -> np.ndarray:
        scale = np.sqrt(np.diagonal(covariance)[self.units])
        return covariance[np.ix_(self.units, self.units)] / np.outer(scale, scale)

    def _weights(self) -> np.ndarray:
        """w_h = 1 / ||B[h, :]|| of least squares on all units, divided by their median."""
        lengths = np.linalg.norm(self._least_squares(np.arange(len(self.units))), axis=1)
        if not lengths.any():
            return np.ones(len(lengths))
        weights = 1 / np.maximum(lengths, SMALLEST_LENGTH * lengths.max())
        return weights / np.median(weights)

    def alpha_max(self) -> float:
        """The smallest alpha that leaves no unit; 0 where no unit explains anything."""
        return group_alpha_max(self.problem) if self.problem is not None else 0.0

    def solve(self, alpha: float) -> tuple[float, list[SecondLayer]]:
        """Relative gap, and the second layers: the elastic net's, and least squares on its units.

        It starts from the solution before or from the given second layer, whichever has the lower
        objective. For alpha = 0 there are the least squares alone.
        """
        problem = self.problem
        if alpha == 0 or problem is None:
            return 0.0, [self._refit(np.arange(len(self.units)))]
        none = np.zeros(problem.n_outputs)
        starts = [(problem.objective(B, none, alpha), B) for B in (self.last, self.warm)]
        start = min(starts, key=lambda pair: pair[0])[1]
        solution = self.solver.solve(problem, alpha, warm_start=start)
        self.last = solution.coef
        own = self._layer(solution.features, solution.values)
        return solution.relative_gap, [own, self._refit(solution.features)]

    def _refit(self, features: np.ndarray) -> SecondLayer:
        return self._layer(features, self._least_squares(features))

    def _least_squares(self, features: np.ndarray) -> np.ndarray:
        C = self.correlation[np.ix_(features, features)]
        C[np.diag_indices(len(C))] += REFIT_RIDGE
        return np.linalg.solve(C, self.cross[features])

    def _layer(self, features: np.ndarray, B: np.ndarray) -> SecondLayer:
        W2 = (B / self.scale[features, None]).astype(self.dtype)
        intercept = self.center - self.mean[features] @ W2.astype(np.float64)
        return SecondLayer(self.units[features], W2, intercept.astype(self.dtype))


def _equal_rows(
    C: np.ndarray, q: np.ndarray, variances: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """X (m + 1, m) and Y (m + 1, c) with X^T X = n C, X^T Y = n q, column squares n variances.

    n = m + 1. The last row of X is zero: it holds what no coefficients can explain.
    """
    n = len(C) + 1
    jitter = np.finfo(float).eps * n
    while True:
        try:
            L = np.linalg.cholesky(C + jitter * np.eye(n - 1))
            break
        except np.linalg.LinAlgError:
            # Features that depend on each other, but for the rounding of their sums.
            jitter *= 100
    T = solve_triangular(L, q, lower=True)
    X, Y = np.zeros((n, n - 1)), np.zeros((n, q.shape[1]))
    X[:-1], Y[:-1] = np.sqrt(n) * L.T, np.sqrt(n) * T
    Y[-1] = np.sqrt(n * np.maximum(variances - np.einsum("mc,mc->c", T, T), 0))
    return X, Y
