"""The convex programme of ReLU networks: pairs of weights in cones.

minimise over V, U, b   L(Z, Y) + alpha * (R(V) + R(U)),
                        Z = sum_j diag(D[:, j]) X (V[j] - U[j]) + 1 b^T,
subject to              every column of V[j] and U[j] in K_j = {w : S_j X w >= 0}

with S_j = 2 diag(D[:, j]) - I. In the cones diag(D[:, j]) X w = relu(X w).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cvxdistill.solvers.cone_projector import ConeProjector
from cvxdistill.solvers.cones import cone_violations, interior_directions
from cvxdistill.solvers.losses import Loss
from cvxdistill.solvers.penalties import Penalty
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.relu_operator import ReLUOperator, relu_predictions
from cvxdistill.solvers.rows import RowSource, check_rows


class ReLUProblem(ConvexProblem):
    """C-ReLU for given data and activation patterns.

    Parameters are those of ``GatedReLUProblem``, and

    G : ndarray of shape (d, p), optional
        The gates of the patterns: directions inside their cones, which saves searching for some.

    Weights that users see have shape (2, p, d, c), V then U. The ``feature`` penalty joins a
    feature's weights in V and in U; all others add up over V and U.

    Raises
    ------
    ValueError, TypeError
        As ``GatedReLUProblem``; and if the cone of a gate has no interior, as happens to gates
        with a bias or through a row of X.

    References
    ----------
    Pilanci and Ergen 2020, theorem 1; Mishkin, Sahiner and Pilanci 2022, equation 2.
    """

    operator: ReLUOperator

    def __init__(
        self,
        X: RowSource,
        Y: Any,
        D: np.ndarray,
        *,
        G: np.ndarray | None = None,
        penalty: str | Penalty = "neuron",
        l1_ratio: float = 1.0,
        loss: str | Loss = "squared",
        fit_intercept: bool = False,
        normalize: bool = False,
        sample_weight: Any = None,
    ):
        X = check_rows(X)
        super().__init__(
            X,
            Y,
            penalty=penalty,
            l1_ratio=l1_ratio,
            loss=loss,
            fit_intercept=fit_intercept,
            normalize=normalize,
            sample_weight=sample_weight,
        )
        self.operator = ReLUOperator(X, D, scale=self.scale)
        _, inside = interior_directions(X, self.operator.D, G)
        if not (inside > 0).all():
            empty = np.flatnonzero(~(inside > 0))
            raise ValueError(
                f"Gate {empty[0]} ({len(empty)} of {self.operator.p}) has a cone without interior: "
                "no weights without bias have its activation pattern strictly. Use gates without "
                "bias (and a constant column in X instead) that keep clear of the rows of X, as "
                "nudge_gates makes them."
            )
        # Made when first asked for: each holds X once more.
        self._project_weights: ConeProjector | None = None
        self._project_gradients: ConeProjector | None = None

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """(2, p, d, c)."""
        return 2, self.operator.p, self.operator.d, self.n_outputs

    def predict(self, V: Any, intercept: Any = 0.0) -> np.ndarray:
        """relu(X V) - relu(X U), summed over gates, on the problem's own rows, of shape (n, c)."""
        V = np.asarray(V)
        W = self.weights_to_user(self.weights_from_user(V))
        return relu_predictions(self.operator.X, W) + np.asarray(intercept, self.dtype)

    def projector(self) -> ConeProjector:
        """A new projection on to the cones, in the solver's units."""
        X = self.operator.X if self.scale is None else self.operator.X[:] / self.scale
        return ConeProjector(X, self.operator.D, self.operator.n_blocks * self.n_outputs)

    def feasible(self, W: np.ndarray) -> np.ndarray:
        """The projection of every column onto its cone, in the solver's units."""
        if self._project_weights is None:
            self._project_weights = self.projector()
        return self._project_weights(W)

    def with_multipliers(
        self, C: np.ndarray, M: np.ndarray | None = None, alpha: float = 0.0
    ) -> np.ndarray:
        """C + M with M = X^T S_j Lambda_j, Lambda >= 0, for a solver's multipliers or better ones.

        Where the penalty only depends on lengths no Lambda makes C shorter than the projection of
        C on to the cones does; columns that M makes short enough for this alpha are left at that.
        """
        shifted = C if M is None else C + M
        if not self.regularizer.of_lengths:
            return shifted
        if self._project_gradients is None:
            self._project_gradients = self.projector()
        wanted = ~self.regularizer.surely_zero(shifted, alpha)
        return np.where(wanted[:, None, :], self._project_gradients(C, wanted), shifted)

    def violation(self, W: np.ndarray) -> float:
        """max_i [-s_i x_i . w]_+ / (||x_i|| ||w||) over all columns w, in the units of X."""
        W = W if self.scale is None else W / self.scale[:, None]
        return float(cone_violations(self.operator.X, self.operator.D, W).max())
