"""A quadratic model of a loss over a working set of groups, rotated for block descent, that grows.

    1/(2n) sum_i h_i ||u_i - a_i (B - B_0)||^2

with weights h, working residuals u = R / h at B_0, and columns of A centred with weights h if there
is an intercept, which is minimised over in closed form. The columns of each group are rotated to
the eigenvectors of its block of A^T diag(h) A, which changes no norm of its coefficients.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import linalg

from cvxdistill.solvers.block_descent import BlockDescent
from cvxdistill.solvers.covariance_descent import CovarianceDescent
from cvxdistill.solvers.feature_columns import GatedColumns
from cvxdistill.solvers.gated_descent import GatedColumnsOfGroups, GatedDescent
from cvxdistill.solvers.group_elastic_net import GroupElasticNetProblem
from cvxdistill.solvers.group_penalties import Penalties
from cvxdistill.solvers.growing_matrix import GrowingMatrix
from cvxdistill.solvers.naive_descent import NaiveDescent
from cvxdistill.solvers.rotations import Rotations

# The largest Gram matrix: 1 GB.
MOST_COVARIANCE_FEATURES = 11_000


class QuadraticModel:
    """The model and its descent.

    Parameters
    ----------
    problem : GroupElasticNetProblem
    working : ndarray of int
        Blocks of the problem; an unpenalised one first.
    h : ndarray of shape (n,)
        Weights.
    coef : ndarray of shape (d, c)
        B_0; zero outside the working set.
    R : ndarray of shape (n, c)
        Residual there.
    form : {"auto", "covariance", "naive"}
        By default covariance for up to as many features as examples, or a quarter of that if there
        are more in all.
    """

    descent: BlockDescent

    def __init__(
        self,
        problem: GroupElasticNetProblem,
        working: np.ndarray,
        h: np.ndarray,
        coef: np.ndarray,
        R: np.ndarray,
        form: str,
    ):
        self.problem = problem
        self.blocks = Penalties(problem.starts, problem.block_weights, problem.block_weights)
        self.h = np.maximum(h, 1e-10 * h.max())
        self.root = np.sqrt(self.h)
        self.form = form
        self._fill(working, coef, R)

    @property
    def whole(self) -> bool:
        """Whether all blocks are in the model."""
        return len(self.working) == len(self.blocks.norm)

    @property
    def form_is_covariance(self) -> bool:
        """Whether the descent keeps a Gram matrix."""
        return isinstance(self.descent, CovarianceDescent)

    def _fill(self, working: np.ndarray, coef: np.ndarray, R: np.ndarray) -> None:
        self.working = np.zeros(0, dtype=np.int64)
        self.features = np.zeros(0, dtype=np.int64)
        self.mean = np.zeros(0)
        self.rotations = Rotations([])
        n, c = R.shape
        count = len(self.blocks.features(working))
        covariance = (
            count <= self._most_features() if self.form == "auto" else self.form == "covariance"
        )
        R = R.astype(np.float64)
        self.H = GrowingMatrix()
        if covariance:
            squares = float(np.sum(R * R / self.h[:, None])) / n
            nothing = np.zeros((0, c))
            self.descent = CovarianceDescent(self.H.values, nothing, nothing, squares, nothing)
        else:
            U, nothing = R / self.root[:, None], np.zeros((0, c))
            if self._by_gates():
                columns = self.problem.columns
                assert isinstance(columns, GatedColumns)
                d = columns.operator.d
                D, means, Q = np.zeros((n, 0), bool), np.zeros((0, d)), np.zeros((0, d, d))
                empty = GatedColumnsOfGroups(columns.inputs(), D, self.root, means, Q)
                self.descent = GatedDescent(empty, nothing, np.zeros(0), U)
            else:
                # Room for the columns, and for some that will come.
                self.buffer = np.empty((0, n))
                self.descent = NaiveDescent(self.buffer, nothing, np.zeros(0), U)
        self.extend(working, coef, R)

    def _most_features(self) -> int:
        """Features up to which the covariance form pays; fewer, where it would have to be left."""
        n, d = self.problem.columns.shape
        return min(n if d <= n else n // 4, MOST_COVARIANCE_FEATURES)

    def _by_gates(self) -> bool:
        """Whether the blocks are the gates of an operator."""
        columns, problem = self.problem.columns, self.problem
        if not isinstance(columns, GatedColumns):
            return False
        sizes = np.diff(self.blocks.starts)
        in_order = (problem.order == np.arange(columns.shape[1])).all()
        return bool(in_order and (sizes == columns.operator.d).all())

    def extend(self, new: np.ndarray, coef: np.ndarray, R: np.ndarray) -> None:
        """Add blocks to the working set; coef and R are those of the model now."""
        working = np.concatenate([self.working, new])
        size = len(self.features) + len(self.blocks.features(new))
        covariance = isinstance(self.descent, CovarianceDescent)
        if (
            covariance
            and self.form == "auto"
            and len(self.working)
            and size > self._most_features()
        ):
            self._fill(working, coef, R)
            return
        features = self.problem.order[self.blocks.features(new)]
        sizes = np.diff(self.blocks.starts)[new]
        if isinstance(self.descent, CovarianceDescent):
            self._extend_gram(self.descent, features, sizes, coef[features], R)
        elif isinstance(self.descent, GatedDescent):
            self._extend_gates(self.descent, new, coef[features])
        else:
            assert isinstance(self.descent, NaiveDescent)
            self._extend_columns(self.descent, features, sizes, coef[features])
        self.working = working
        self.features = np.concatenate([self.features, features])

    def _extend_gram(
        self,
        old: CovarianceDescent,
        features: np.ndarray,
        sizes: np.ndarray,
        coef: np.ndarray,
        R: np.ndarray,
    ) -> None:
        problem = self.problem
        n = len(R)
        cross, own, P, mean = problem.columns.moments(self.features, features, self.h, R)
        if problem.fit_intercept:
            total = self.h.sum()
            own -= np.outer(mean, mean / total)
            cross -= np.outer(self.mean, mean / total)
        own, cross, P = own / n, cross / n, P / n
        rotations = Rotations.of(own, sizes)
        own = rotations.of_rows(rotations.of_rows(own).T)
        rotations.clean(own)
        cross = rotations.of_rows(self.rotations.of_rows(cross).T)
        self.H.grow(cross.T, own)
        B = rotations.of_rows(coef)
        P = np.vstack([old.shadow, rotations.of_rows(P)])
        B = np.vstack([old.B, B])
        squares = 2 * old.fit()
        self.descent = CovarianceDescent.at(self.H.values, B, P, squares)
        self.descent.share, self.descent.factor = old.share, old.factor
        self.mean = np.concatenate([self.mean, mean])
        self.rotations = self.rotations.followed_by(rotations)

    def _extend_gates(self, old: GatedDescent, new: np.ndarray, coef: np.ndarray) -> None:
        columns, had = self.problem.columns, old.columns
        assert isinstance(columns, GatedColumns)
        D, X, d = columns.operator.D[:, new], had.X, had.d
        mean = (D * self.h[:, None]).T @ X
        center = np.zeros_like(mean)
        if self.problem.fit_intercept:
            center = mean / self.h.sum()
        blocks = np.empty((len(new), d, d))
        for block, mask, m in zip(blocks, D.T, center, strict=True):
            A = (X * mask[:, None] - m) * self.root[:, None]
            np.dot(A.T, A, out=block)
        eigenvalues, Q = np.linalg.eigh(blocks / len(X))
        rotations = Rotations([Q])
        gates = GatedColumnsOfGroups(
            X,
            np.ascontiguousarray(np.hstack([had.D, D])),
            self.root,
            np.vstack([had.means, center]),
            np.ascontiguousarray(np.concatenate([had.Q, Q])),
        )
        B = np.vstack([old.B, rotations.of_rows(coef)])
        eigenvalues = np.concatenate([old.eigenvalues, np.maximum(eigenvalues.ravel(), 0)])
        start = old.start if len(self.features) else None
        self.descent = GatedDescent(gates, B, eigenvalues, old.shadow, start)
        self.descent.share = old.share
        self.rotations = self.rotations.followed_by(rotations)
        self.mean = np.concatenate([self.mean, mean.ravel()])

    def _extend_columns(
        self, old: NaiveDescent, features: np.ndarray, sizes: np.ndarray, coef: np.ndarray
    ) -> None:
        A = self.problem.columns.take(features)
        mean = self.h @ A
        if self.problem.fit_intercept:
            A -= mean / self.h.sum()
        A *= self.root[:, None]
        m, n = len(self.features), len(A)
        if m + len(features) > len(self.buffer):
            grown = np.empty((max(m + len(features), 3 * len(self.buffer) // 2), n))
            grown[:m] = old.AT
            self.buffer = grown
        AT = self.buffer[: m + len(features)]
        new = AT[m:]
        new[...] = A.T
        del A
        starts = np.concatenate([[0], np.cumsum(sizes)])
        rotations = Rotations.of_columns(new, starts)
        rotations.rotate(new)
        eigenvalues = np.concatenate([old.eigenvalues, np.einsum("mn,mn->m", new, new) / n])
        B = np.vstack([old.B, rotations.of_rows(coef)])
        start = old.start if m else None
        self.descent = NaiveDescent(AT, B, eigenvalues, old.shadow, start)
        self.descent.share = old.share
        self.mean = np.concatenate([self.mean, mean])
        self.rotations = self.rotations.followed_by(rotations)

    def penalties(self, penalties: Penalties) -> Penalties:
        """Of the working blocks, from those of all."""
        return penalties.of(self.working)

    def move(self, coef: np.ndarray, R: np.ndarray) -> None:
        """The same weights h, but from here: other coefficients with their residual R."""
        old, n = self.descent, len(R)
        B = self.rotations.of_rows(coef[self.features])
        R = R.astype(np.float64)
        if isinstance(old, CovarianceDescent):
            C = self.problem.columns.adjoint(R)[self.features] / n
            squares = float(np.sum(R * R / self.h[:, None])) / n
            self.descent = CovarianceDescent.at(old.H, B, self.rotations.of_rows(C), squares)
        elif isinstance(old, GatedDescent):
            self.descent = GatedDescent(old.columns, B, old.eigenvalues, R / self.root[:, None])
        else:
            assert isinstance(old, NaiveDescent)
            self.descent = NaiveDescent(old.AT, B, old.eigenvalues, R / self.root[:, None])
        self.descent.share = old.share

    def go_to(self, coef: np.ndarray) -> None:
        """Go to other coefficients; those outside the working set are zero."""
        self.descent.go_to(self.rotations.of_rows(coef[self.features]))

    def preconditioner(
        self, features: np.ndarray, stiff: np.ndarray
    ) -> Callable[[np.ndarray], np.ndarray]:
        """(H + diag(stiff))^-1 on some of the model's features, as a function; not rotated."""
        M = self.descent.gram(features).copy()
        M.flat[:: len(M) + 1] += stiff + 1e-10 * (np.trace(M) / len(M) + stiff)
        factor = linalg.cho_factor(M, lower=True, overwrite_a=True, check_finite=False)
        everything = np.zeros_like(self.descent.B)

        def apply(G: np.ndarray) -> np.ndarray:
            everything[features] = G
            rotated = self.rotations.of_rows(everything)
            rotated[features] = linalg.cho_solve(factor, rotated[features], check_finite=False)
            return self.rotations.back(rotated)[features]

        return apply

    def residual(self) -> np.ndarray | None:
        """R of the model, where that is at hand."""
        if isinstance(self.descent, CovarianceDescent):
            return None
        self.descent.refresh()
        return self.descent.shadow * self.root[:, None]

    def mean_prediction(self) -> np.ndarray:
        """The mean of the rows of X B with weights h, (c,)."""
        return self.mean @ self.rotations.back(self.descent.B) / self.h.sum()

    def certify(self, penalties: Penalties) -> tuple[float, float, np.ndarray]:
        """Objective, duality gap and lengths ||C_g|| of all blocks, of a model that is whole."""
        local = self.penalties(penalties)
        self.descent.refresh()
        P = self.descent.gradient()
        lengths = np.empty(len(penalties.norm))
        lengths[self.working] = local.lengths(P)
        objective = self.descent.fit() + local.value(self.descent.B)
        return objective, max(self.descent.gap(local, P), 0.0), lengths

    def coefficients(self, coef: np.ndarray) -> np.ndarray:
        """coef with the model's in their places, rotated back."""
        out = coef.copy()
        out[self.features] = self.rotations.back(self.descent.B)
        return out
