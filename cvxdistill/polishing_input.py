"""What ``polish`` is given: the units of a network, and data as the rows that they see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.solvers import GatedOperator, Neurons, Polishing, evaluate_gates
from cvxdistill.solvers.gates import check_gates
from cvxdistill.solvers.random_order import random_order
from cvxdistill.solvers.rows import check_rows

if TYPE_CHECKING:
    from cvxdistill.adapters import ConvLayout, DenseLayout, GatedStudent


class GatheredRows:
    """Rows with these numbers, gathered by ``take(indices)`` as they are asked for."""

    def __init__(
        self, take: Callable[[np.ndarray], np.ndarray], indices: np.ndarray, width: int, dtype: Any
    ):
        self.take, self.indices = take, indices
        self.shape, self.dtype = (len(indices), width), np.dtype(dtype)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.take(self.indices[rows])


@dataclass(frozen=True)
class RowData:
    """Examples of ``positions`` rows each, of X (n, d) and of Y (n, c), read where asked for.

    Attributes
    ----------
    rows_of_x, rows_of_y : callable
        From row numbers to rows.
    widths, dtypes : tuple
        d and c, and the types.
    examples, positions : int
        n is their product.
    """

    rows_of_x: Callable[[np.ndarray], np.ndarray]
    rows_of_y: Callable[[np.ndarray], np.ndarray]
    widths: tuple[int, int]
    dtypes: tuple[Any, Any]
    examples: int
    positions: int

    def of(self, examples: np.ndarray) -> tuple[GatheredRows, GatheredRows]:
        """X and Y of these examples."""
        rows = (examples[:, None] * self.positions + np.arange(self.positions)).ravel()
        return (
            GatheredRows(self.rows_of_x, rows, self.widths[0], self.dtypes[0]),
            GatheredRows(self.rows_of_y, rows, self.widths[1], self.dtypes[1]),
        )

    def all(self) -> tuple[GatheredRows, GatheredRows]:
        """X and Y of all examples."""
        return self.of(np.arange(self.examples))

    def split(self, share: float, rng: np.random.Generator) -> tuple[tuple, tuple]:
        """Rows to fit and rows held out, examples kept together."""
        if self.examples < 2:
            raise ValueError(
                f"X must hold at least 2 examples, to hold one out; got {self.examples}."
            )
        order = random_order(rng, self.examples)
        count = min(max(1, round(self.examples * share)), self.examples - 1)
        return self.of(np.sort(order[count:])), self.of(np.sort(order[:count]))


@dataclass(frozen=True)
class Reader:
    """A network's units, and how data become its rows and units become a network again.

    Attributes
    ----------
    neurons : Neurons
    intercept : ndarray of shape (c,)
    G : ndarray of shape (d, p) or (d + 1, p)
    rows : callable
        From X, Y and how an error calls them to ``RowData``.
    build : callable
        From a ``Polishing`` to a network.
    measure : callable
        From gate numbers of units to the gates and the numbers that the network stores.
    """

    neurons: Neurons
    intercept: np.ndarray
    G: np.ndarray
    rows: Callable[[Any, Any, str], RowData]
    build: Callable[[Polishing], Any]
    measure: Callable[[np.ndarray], tuple[int, int]]

    def operator(self, X: Any) -> GatedOperator:
        """Rows with their activation patterns."""
        return GatedOperator(X, evaluate_gates(X, self.G))


def read_neurons(neurons: Neurons, gates: Any, intercept: Any) -> Reader:
    """For units without a module."""
    W1, W2 = _array(neurons.W1, "network.W1"), _array(neurons.W2, "network.W2")
    gate = np.asarray(neurons.gate)
    if W1.ndim != 2 or W2.ndim != 2 or W1.shape[1] != len(W2) or gate.shape != (len(W2),):
        raise ValueError(
            "network must have W1 (d, m), W2 (m, c) and gate (m,), got "
            f"{W1.shape}, {W2.shape} and {gate.shape}."
        )
    d, c = len(W1), W2.shape[1]
    b = np.zeros(c, W2.dtype) if intercept is None else np.asarray(intercept, W2.dtype).ravel()
    if b.shape != (c,) or not np.isfinite(b).all():
        raise ValueError(f"intercept must be finite and of shape ({c},), got {intercept!r}.")
    if gates is None:
        G, own = W1, np.arange(len(gate))
    else:
        G, own = check_gates(gates, d), gate
        if gate.dtype.kind not in "iu" or gate.min() < 0 or gate.max() >= G.shape[1]:
            raise ValueError(f"network.gate must lie in range({G.shape[1]}), the columns of gates.")

    def rows(X: Any, Y: Any, name: str) -> RowData:
        return _matrix_rows(X, Y, d, c, name)

    def build(polishing: Polishing) -> Neurons:
        return replace(polishing.neurons, gate=gate[polishing.units])

    def measure(gate: np.ndarray) -> tuple[int, int]:
        n_gates = 0 if gates is None else len(np.unique(gate))
        return n_gates, len(gate) * (d + c) + n_gates * len(G) + c

    return Reader(Neurons(W1, W2, own), b, G, rows, build, measure)


def read_student(student: Any) -> Reader:
    """For a deployed module."""
    try:
        from cvxdistill.adapters import (
            GatedStudent,
            build_student,
            stored_size,
            student_neurons,
        )
    except ImportError as error:
        raise TypeError(f"network must be Neurons, got {type(student).__name__}.") from error
    if not isinstance(student, GatedStudent):
        raise TypeError(f"network must be a GatedStudent or Neurons, got {type(student).__name__}.")
    neurons, G, b = student_neurons(student)
    layout = student.layout

    def rows(X: Any, Y: Any, name: str) -> RowData:
        X = X if hasattr(X, "shape") else np.asarray(X)
        if tuple(X.shape)[1:] != layout.input_shape:
            return _matrix_rows(X, Y, layout.n_features, layout.n_outputs, name, student)
        inputs, outputs = (_array(A, name + label) for A, label in ((X, "X"), (Y, "Y")))
        if outputs.shape != (len(inputs), *layout.output_shape):
            raise ValueError(
                f"{name}Y must have shape {(len(inputs), *layout.output_shape)}, the block's "
                f"outputs, got {outputs.shape}."
            )
        return block_rows(layout, inputs, outputs)

    def build(polishing: Polishing) -> GatedStudent:
        left = polishing.neurons
        smaller = build_student(
            layout, left.W1, left.W2, left.gate, G, polishing.intercept, dtype=student.dtype
        )
        device = next(student.parameters()).device
        return smaller.to(device).train(student.training)

    return Reader(neurons, b, G, rows, build, lambda gate: stored_size(layout, gate, G))


def block_rows(
    layout: ConvLayout | DenseLayout, inputs: np.ndarray, outputs: np.ndarray
) -> RowData:
    """The rows of a block's inputs (N, *input_shape) and outputs (N, *output_shape)."""
    return RowData(
        layout.rows(inputs).take,
        lambda indices: layout.targets(outputs, indices),
        (layout.n_features, layout.n_outputs),
        (inputs.dtype, outputs.dtype),
        len(inputs),
        layout.n_positions,
    )


def _matrix_rows(
    X: Any, Y: Any, d: int, c: int, name: str, student: GatedStudent | None = None
) -> RowData:
    """Rows X (n, d), an array or a row source, and targets Y (n, c)."""
    X = check_rows(X.detach().cpu().numpy() if hasattr(X, "detach") else X, f"{name}X")
    expected = f"(n, {d})"
    if student is not None:
        expected = f"(N, {', '.join(map(str, student.layout.input_shape))}) or {expected}"
    if X.shape[1] != d:
        raise ValueError(f"{name}X must have shape {expected}, got {tuple(X.shape)}.")
    if student is not None and not (X[0:1][:, -1] == 1).all():
        raise ValueError(f"the last column of rows {name}X must be ones, where the biases apply.")
    Y = _array(Y, f"{name}Y")
    Y = Y[:, None] if Y.ndim == 1 else Y
    if Y.shape != (X.shape[0], c):
        raise ValueError(f"{name}Y must have shape {(X.shape[0], c)}, got {Y.shape}.")
    take = X.__getitem__ if isinstance(X, np.ndarray) else getattr(X, "take", None)
    if take is None:
        raise TypeError(f"{name}X must be an array or have take(indices), got {type(X).__name__}.")
    return RowData(take, Y.__getitem__, (d, c), (X.dtype, Y.dtype), X.shape[0], 1)


def _array(A: Any, name: str) -> np.ndarray:
    """A finite float32 or float64 array."""
    array = np.asarray(A.detach().cpu() if hasattr(A, "detach") else A)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}.")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    if array.ndim == 0 or 0 in array.shape:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} contains NaN or infinity.")
    return array
