"""Sums over the examples that are all that squared loss needs: of gated features and targets.

With A_j = diag(D[:, j]) X and A = [A_1, ..., A_p], these are A^T A, A^T Y, A^T 1, Y^T 1, the
squared norm of each output, and n. They add up over batches, machines and time, and whatever is
made from them costs the same however many examples there were.

The block of gates j and k is a sum over the examples where both are on,

    A_j^T A_k = sum_{i: D_ij D_ik} x_i x_i^T,

which is symmetric: where half of the gates are on, an eighth of the work of a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cvxdistill.solvers.gates import evaluate_gates
from cvxdistill.solvers.rows import RowSource, check_rows

# Rows whose products are formed in the type of the data before they are added up in float64.
BLOCK_ROWS = 4096


class GatedStatistics:
    """The sums of gated features and targets, accumulated batch by batch.

    Parameters
    ----------
    n_gates, n_features, n_outputs : int
        p, d and c.
    gates : ndarray of shape (d, p) or (d + 1, p), optional
        G, with which ``update`` makes D = [X G >= 0] itself; the last of d + 1 rows is a bias.

    Attributes
    ----------
    n : int
        Examples so far.
    gram : ndarray of float64, shape (p d, p d)
        A^T A; feature i of gate j is row j d + i.
    cross : ndarray of float64, shape (p, d, c)
        A_j^T Y.
    feature_sums : ndarray of float64, shape (p, d)
        A_j^T 1.
    target_sums, target_squares : ndarray of float64, shape (c,)
        Sum and sum of squares of each output.
    dtype : dtype
        float64 once any batch was: the type in which products with the sums need be made.

    Raises
    ------
    ValueError, TypeError
        From here and from the updates, if sizes, shapes, types or values do not fit.
    """

    def __init__(
        self, n_gates: int, n_features: int, n_outputs: int, *, gates: np.ndarray | None = None
    ):
        sizes = {"n_gates": n_gates, "n_features": n_features, "n_outputs": n_outputs}
        for name, size in sizes.items():
            if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}.")
        self.p, self.d, self.c = int(n_gates), int(n_features), int(n_outputs)
        self.gates = None
        if gates is not None:
            self.gates = np.array(gates)
            if self.gates.ndim != 2 or self.gates.shape[1] != self.p:
                raise ValueError(
                    f"gates must have n_gates = {self.p} columns, got {np.shape(gates)}."
                )
            evaluate_gates(np.zeros((1, self.d), self.gates.dtype), self.gates)
        self.n = 0
        self.dtype: np.dtype = np.dtype(np.float32)
        self.gram = np.zeros((self.p * self.d, self.p * self.d))
        self.cross = np.zeros((self.p, self.d, self.c))
        self.feature_sums = np.zeros((self.p, self.d))
        self.target_sums = np.zeros(self.c)
        self.target_squares = np.zeros(self.c)

    def __repr__(self) -> str:
        return f"GatedStatistics(n={self.n}, d={self.d}, p={self.p}, c={self.c}, {self.dtype})"

    @classmethod
    def from_data(cls, X: RowSource, Y: Any, D: np.ndarray) -> GatedStatistics:
        """The sums over all of X (n, d), Y (n,) or (n, c) and D (n, p)."""
        X, Y, D = check_rows(X), np.asarray(Y), np.asarray(D)
        statistics = cls(D.shape[1] if D.ndim == 2 else 1, X.shape[1], _columns(Y))
        return statistics.update(X, Y, D)

    def update(self, X: RowSource, Y: Any, D: np.ndarray | None = None) -> GatedStatistics:
        """Add examples: X (m, d), Y (m,) or (m, c), and D (m, p) unless there are ``gates``.

        Returns
        -------
        GatedStatistics
            Itself.
        """
        X = check_rows(X)
        if X.shape[1] != self.d:
            raise ValueError(f"X must have {self.d} columns, got {X.shape[1]}.")
        Y = self._check_targets(Y, X.shape[0])
        if D is None:
            self._gates()
        else:
            D = np.asarray(D)
            if D.dtype != np.bool_:
                raise TypeError(f"D must be boolean, got dtype {D.dtype}.")
            if D.shape != (X.shape[0], self.p):
                raise ValueError(f"D must have shape {(X.shape[0], self.p)}, got {D.shape}.")
        for rows, y in self._blocks(X.shape[0], Y, X.dtype):
            x = X[rows]
            if not isinstance(X, np.ndarray) and not np.isfinite(x).all():
                raise ValueError("X contains NaN or infinity.")
            on = evaluate_gates(x, self._gates()) if D is None else D[rows]
            self._add_block(np.ascontiguousarray(x), y, np.ascontiguousarray(on.T))
        return self

    def update_features(self, A: np.ndarray, Y: Any) -> GatedStatistics:
        """Add examples by their features, whatever made them: A (m, p, d) or (m, p d), Y (m, c).

        For features that are averaged over positions, say. Only whole products are formed.

        Returns
        -------
        GatedStatistics
            Itself.
        """
        A = np.asarray(A)
        if A.shape[1:] not in ((self.p, self.d), (self.p * self.d,)):
            raise ValueError(
                f"A must have shape (m, {self.p}, {self.d}) or (m, {self.p * self.d}), got "
                f"{A.shape}."
            )
        A = np.asarray(check_rows(A.reshape(len(A), self.p * self.d), "A"))
        Y = self._check_targets(Y, A.shape[0])
        for rows, y in self._blocks(A.shape[0], Y, A.dtype):
            a = np.ascontiguousarray(A[rows])
            self.gram += a.T @ a
            self.cross += (a.T @ y).reshape(self.cross.shape)
            self.feature_sums += a.sum(axis=0, dtype=np.float64).reshape(self.p, self.d)
        return self

    def _gates(self) -> np.ndarray:
        if self.gates is None:
            raise ValueError("D must be given where the statistics were made without gates.")
        return self.gates

    def _check_targets(self, Y: Any, m: int) -> np.ndarray:
        Y = np.asarray(Y)
        Y = check_rows(Y[:, None] if Y.ndim == 1 else Y, "Y")
        if Y.shape != (m, self.c):
            raise ValueError(f"Y must have shape {(m, self.c)}, got {Y.shape}.")
        return np.asarray(Y)

    def _blocks(self, m: int, Y: np.ndarray, dtype: Any) -> Iterator[tuple[slice, np.ndarray]]:
        """Blocks of rows with their targets, whose own sums are added on the way."""
        dtype = np.dtype(np.float32 if dtype == np.float32 else np.float64)
        self.dtype = np.promote_types(self.dtype, dtype)
        for start in range(0, m, BLOCK_ROWS):
            rows = slice(start, min(start + BLOCK_ROWS, m))
            y = np.ascontiguousarray(Y[rows], dtype=dtype)
            yield rows, y
            self.n += rows.stop - rows.start
            self.target_sums += y.sum(axis=0, dtype=np.float64)
            self.target_squares += np.einsum("nc,nc->c", y, y, dtype=np.float64)

    def _add_block(self, x: np.ndarray, y: np.ndarray, masks: np.ndarray) -> None:
        """Add rows x (m, d) with targets y (m, c) where gates ``masks`` (p, m) are on."""
        d = self.d
        for k in range(self.p):
            on = np.flatnonzero(masks[k])
            if len(on) == 0:
                continue
            mine = x[on]
            own = mine.T @ mine
            self.cross[k] += mine.T @ y[on]
            self.feature_sums[k] += mine.sum(axis=0, dtype=np.float64)
            for j, both in enumerate(masks[: k + 1, on]):
                if both.all():
                    product = own
                elif both.any():
                    a = mine[both]
                    product = a.T @ a
                else:
                    continue
                self.gram[k * d : (k + 1) * d, j * d : (j + 1) * d] += product
                if j < k:
                    self.gram[j * d : (j + 1) * d, k * d : (k + 1) * d] += product

    def __add__(self, other: GatedStatistics) -> GatedStatistics:
        """The sums over the examples of both."""
        if not isinstance(other, GatedStatistics):
            return NotImplemented
        if (self.p, self.d, self.c) != (other.p, other.d, other.c):
            raise ValueError(f"Statistics must be of the same sizes, got {self} and {other}.")
        mine, theirs = self.gates, other.gates
        if mine is None or theirs is None:
            same = mine is theirs
        else:
            same = np.array_equal(mine, theirs)
        if not same:
            raise ValueError("Statistics must be of the same gates.")
        both = GatedStatistics(self.p, self.d, self.c, gates=self.gates)
        both.n = self.n + other.n
        both.dtype = np.promote_types(self.dtype, other.dtype)
        for name in SUMS:
            np.add(getattr(self, name), getattr(other, name), out=getattr(both, name))
        return both

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays by name, for ``numpy.savez`` or safetensors."""
        arrays = {name: getattr(self, name) for name in SUMS}
        arrays["n"] = np.array(self.n)
        arrays["itemsize"] = np.array(self.dtype.itemsize)
        if self.gates is not None:
            arrays["gates"] = self.gates
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GatedStatistics:
        """Statistics from what ``arrays`` returned.

        Raises
        ------
        ValueError
            If one is missing, or their shapes do not fit each other.
        """
        missing = [name for name in (*SUMS, "n", "itemsize") if name not in arrays]
        if missing:
            raise ValueError(f"arrays lacks {', '.join(missing)}.")
        if np.ndim(arrays["cross"]) != 3:
            raise ValueError(f"cross must have shape (p, d, c), got {np.shape(arrays['cross'])}.")
        gates = arrays.get("gates")
        statistics = cls(*np.shape(arrays["cross"]), gates=gates)
        for name in SUMS:
            values, mine = np.asarray(arrays[name], dtype=np.float64), getattr(statistics, name)
            if values.shape != mine.shape:
                raise ValueError(f"{name} must have shape {mine.shape}, got {values.shape}.")
            if not np.isfinite(values).all():
                raise ValueError(f"{name} contains NaN or infinity.")
            mine[...] = values
        statistics.n = int(arrays["n"])
        if int(arrays["itemsize"]) == 8:
            statistics.dtype = np.dtype(np.float64)
        return statistics


SUMS = ("gram", "cross", "feature_sums", "target_sums", "target_squares")


def _columns(Y: np.ndarray) -> int:
    return Y.shape[1] if Y.ndim == 2 else 1
