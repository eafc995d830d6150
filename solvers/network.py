"""Between the convex programme's weights and the neurons of a two-layer network.

gated ReLU   sum_j diag(D[:, j]) X V[j]  =  sum_h diag(D[:, gate[h]]) (X W1[:, h]) W2[h, :]
ReLU         sum_j relu(X V[j]) - relu(X U[j])  =  relu(X W1) W2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cvxdistill.solvers.gated_operator import GatedOperator, empty_weights
from cvxdistill.solvers.hidden_statistics import HiddenStatistics
from cvxdistill.solvers.penalties import PENALTIES
from cvxdistill.solvers.rows import row_blocks


@dataclass(frozen=True, repr=False)
class Neurons:
    """The hidden units of a gated ReLU or a ReLU network.

    Attributes
    ----------
    W1 : ndarray of shape (d, m)
        First layer.
    W2 : ndarray of shape (m, c)
        Second layer.
    gate : ndarray of int, shape (m,)
        The gate of each unit; in a ReLU network the one whose cone its first layer lies in.
    """

    W1: np.ndarray
    W2: np.ndarray
    gate: np.ndarray

    def __len__(self) -> int:
        return len(self.gate)

    def __repr__(self) -> str:
        d, c = self.W1.shape[0], self.W2.shape[1]
        return f"Neurons(m={len(self)}, d={d}, c={c}, gates={len(np.unique(self.gate))})"

    def weight_decay(self) -> float:
        """1/2 (||W1||_F^2 + ||W2||_F^2), the penalty of the non-convex form."""
        return 0.5 * float(np.sum(self.W1**2, dtype=float) + np.sum(self.W2**2, dtype=float))


def neurons_from_weights(V: Any, penalty: str = "neuron") -> Neurons:
    """The network of the convex weights.

    Parameters
    ----------
    V : array of shape (p, d, c), or (2, p, d, c) for a ReLU network
    penalty : str, default="neuron"
        "neuron": each non-zero column v is a unit with first layer v / sqrt(||v||) and output
        weight sqrt(||v||). Any other penalty: V[j] = A S B^T (thin SVD) is rank(V[j]) units with
        first layer A sqrt(S) and second layer sqrt(S) B^T. ReLU networks are always rebuilt
        column by column, with output weight -sqrt(||u||) for U: singular vectors leave the cones.

    Returns
    -------
    Neurons
        The units in the order of their gates, those of V before those of U. Their weight decay
        equals R for "neuron", and for "nuclear" with gated ReLU.

    Raises
    ------
    ValueError
        If the shape or the name is not one of these.

    References
    ----------
    Varshney and Pilanci 2024, theorem 2; Sahiner et al. 2021, theorem 3.3, for vector outputs.
    """
    V = np.asarray(V)
    if V.ndim not in (3, 4) or (V.ndim == 4 and len(V) != 2):
        raise ValueError(f"V must have shape (p, d, c) or (2, p, d, c), got {V.shape}.")
    if penalty not in (*PENALTIES, "ridge"):
        raise ValueError(f"penalty must be one of {[*PENALTIES, 'ridge']}, got {penalty!r}.")
    if V.ndim == 4:
        plus, minus = map(_neurons_of_columns, V)
        return Neurons(
            np.hstack([plus.W1, minus.W1]),
            np.vstack([plus.W2, -minus.W2]),
            np.concatenate([plus.gate, minus.gate]),
        )
    if penalty == "neuron":
        return _neurons_of_columns(V)
    first, second, gate = [], [], []
    for j in np.flatnonzero(V.any(axis=(1, 2))):
        A, S, Bt = np.linalg.svd(V[j], full_matrices=False)
        r = int((S[0] * max(V[j].shape) * np.finfo(V.dtype).eps < S).sum())
        first.append(A[:, :r] * np.sqrt(S[:r]))
        second.append(np.sqrt(S[:r])[:, None] * Bt[:r])
        gate.append(np.full(r, j))
    return _stack(V, first, second, gate)


def _neurons_of_columns(V: np.ndarray) -> Neurons:
    norms = np.sqrt(np.einsum("pdc,pdc->pc", V, V))
    gate, output = np.nonzero(norms)
    size = np.sqrt(norms[gate, output])
    W1 = (V[gate, :, output] / size[:, None]).T
    W2 = np.zeros((len(gate), V.shape[2]), dtype=V.dtype)
    W2[np.arange(len(gate)), output] = size
    return Neurons(np.ascontiguousarray(W1), W2, gate)


def _stack(V: np.ndarray, first: list, second: list, gate: list) -> Neurons:
    _, d, c = V.shape
    return Neurons(
        np.hstack([np.zeros((d, 0), V.dtype), *first]),
        np.vstack([np.zeros((0, c), V.dtype), *second]),
        np.concatenate([np.zeros(0, int), *gate]),
    )


def weights_from_neurons(neurons: Neurons, n_gates: int) -> np.ndarray:
    """V[j] = sum over the units h of gate j of W1[:, h] W2[h, :], of shape (p, d, c).

    Raises
    ------
    ValueError
        If a unit's gate is not in range(n_gates).
    """
    if len(neurons) and not (neurons.gate.min() >= 0 and neurons.gate.max() < n_gates):
        raise ValueError(f"Each unit's gate must lie in range({n_gates}), got {neurons.gate}.")
    d, c = neurons.W1.shape[0], neurons.W2.shape[1]
    V = empty_weights(n_gates, d, c, np.result_type(neurons.W1, neurons.W2))
    V[...] = 0
    for j in np.unique(neurons.gate):
        units = neurons.gate == j
        V[j] = neurons.W1[:, units] @ neurons.W2[units]
    return V


def leading_neurons(
    operator: GatedOperator, V: np.ndarray, n_neurons: int, *, center: bool = False
) -> Neurons:
    """The ``n_neurons`` units that carry most of what each gate contributes to the output.

    Gate j contributes T_j = diag(D[:, j]) X V[j] (n, c). With q the leading eigenvectors of
    T_j^T T_j, the units are W1 = V[j] q, W2 = q^T, and T_j q q^T is the best approximation of
    T_j of that rank (for one gate this is reduced-rank regression). The units with the largest
    eigenvalues, over all gates, are kept.

    Parameters
    ----------
    operator : GatedOperator
        The data and the patterns.
    V : ndarray of shape (p, d, c)
        Weights in the units of X.
    n_neurons : int
        Number of units to keep, at least 1; fewer are returned if V has fewer.
    center : bool, default=False
        Subtract the column means of T_j first: what an intercept will take over.

    Returns
    -------
    Neurons
        The units, largest contribution first, so that a prefix is the answer for a smaller number.
    """
    if n_neurons < 1:
        raise ValueError(f"n_neurons must be at least 1, got {n_neurons}.")
    c = V.shape[2]
    sizes, first, second, gate = [], [], [], []
    for j in np.flatnonzero(V.any(axis=(1, 2))):
        gram, total = np.zeros((c, c)), np.zeros(c)
        for rows in row_blocks(operator.n, c, operator.dtype):
            T = (operator.X[rows][operator.D[rows, j]] @ V[j]).astype(np.float64)
            gram += T.T @ T
            total += T.sum(axis=0)
        if center:
            gram -= np.outer(total, total) / operator.n
        eigenvalues, q = np.linalg.eigh(gram)
        keep = np.argsort(-eigenvalues)[: min(n_neurons, *V[j].shape)]
        # Squares of singular values, in float64: what is below rounding is nothing.
        floor = max((c * np.finfo(V.dtype).eps) ** 2, c * np.finfo(np.float64).eps)
        keep = keep[eigenvalues[keep] > floor * eigenvalues[-1]]
        q = q[:, keep].astype(V.dtype)
        sizes.append(eigenvalues[keep])
        first.append(V[j] @ q)
        second.append(q.T)
        gate.append(np.full(len(keep), j))
    units = _stack(V, first, second, gate)
    order = np.argsort(-np.concatenate([np.zeros(0), *sizes]), kind="stable")[:n_neurons]
    return Neurons(units.W1[:, order], units.W2[order], units.gate[order])


def hidden_features(
    operator: GatedOperator, neurons: Neurons, rows: slice = slice(None)
) -> np.ndarray:
    """H[:, h] = D[:, gate[h]] * (X W1[:, h]) on some rows, of shape (rows, m)."""
    H = operator.X[rows] @ neurons.W1
    H *= operator.D[rows][:, neurons.gate]
    return H


def refit_second_layer(
    operator: GatedOperator, neurons: Neurons, Y: np.ndarray, ridge: float = 1e-4
) -> tuple[Neurons, np.ndarray]:
    """The best second layer and intercept for a first layer that stays, by least squares.

        minimise over W2, b   1/(2n) ||H W2 + 1 b^T - Y||_F^2 + ridge s / 2 ||W2||_F^2,
        H[:, h] = D[:, gate[h]] * (X W1[:, h]),   s = mean variance of the columns of H

    Parameters
    ----------
    operator : GatedOperator
        The data and the patterns.
    neurons : Neurons
        Only W1 and gate are used; W2 may have any width.
    Y : ndarray of shape (n, c)
    ridge : float, default=1e-4
        Relative to the mean variance of H.

    Returns
    -------
    neurons : Neurons
        With W2 of shape (m, c).
    intercept : ndarray of shape (c,)
    """
    statistics = HiddenStatistics.empty(len(neurons), Y.shape[1])
    for rows in row_blocks(operator.n, len(neurons), operator.dtype):
        H = hidden_features(operator, neurons, rows)
        statistics += HiddenStatistics.of_rows(H, Y[rows])
    W2, intercept = statistics.second_layer(ridge)
    refitted = Neurons(neurons.W1, W2.astype(Y.dtype), neurons.gate)
    return refitted, intercept.astype(Y.dtype)
