"""A deployed student back as the units of a gated network: the inverse of ``build_student``."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.quantization import refuse_int8
from cvxdistill.adapters.student import GatedStudent, always_on
from cvxdistill.solvers import Neurons


class StudentNeurons(NamedTuple):
    """Z = sum_h (D[:, gate_h] * (X W1[:, h])) W2[h] + b on rows X with a last column of ones."""

    neurons: Neurons
    G: np.ndarray
    intercept: np.ndarray


def student_neurons(student: GatedStudent) -> StudentNeurons:
    """Read the units of a student, its gates G (d, p) and its intercept (c,) from its layers.

    Units of the linear path come last and use the last gate, a column of zeros, which is always
    on. A linear path that is one matrix is taken apart by its thin SVD: A sqrt(S), sqrt(S) B^T,
    into as many units as its rank, and enough for ``build_student`` to store one matrix again.

    Raises
    ------
    TypeError
        If ``student`` is not a GatedStudent, or its weights are in int8.
    """
    if not isinstance(student, GatedStudent):
        raise TypeError(f"student must be a GatedStudent, got {type(student).__name__}.")
    refuse_int8(student)
    d, c = student.layout.n_features, student.layout.n_outputs
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    gates = np.zeros((d, 0), np.float32)
    intercept: np.ndarray | None = None
    if student.gate is not None and student.first is not None and student.second is not None:
        gates = np.vstack(_weights(student.gate))
        index = _array(student.gate_index) if student.shared_gates else np.arange(student.n_units)
        W2, intercept = _weights(student.second)
        parts.append((np.vstack(_weights(student.first)), W2, index))
    p = gates.shape[1]
    if student.linear is not None:
        if isinstance(student.linear, nn.Sequential):
            A, _ = _weights(student.linear[0])
            B, bias = _weights(student.linear[1])
        else:
            matrix, bias = _weights(student.linear)
            A, B = _factors(matrix)
        gates = np.hstack([gates, np.zeros((d, 1), gates.dtype)])
        W1 = np.vstack([A, np.zeros((1, A.shape[1]), A.dtype)])
        parts.append((W1, B, np.full(len(B), p)))
        intercept = bias if intercept is None else intercept
    if not parts:
        gates = np.zeros((d, 1), np.float32)
        parts.append((np.zeros((d, 0)), np.zeros((0, c)), np.zeros(0, np.int64)))
        intercept = _array(student.constant)
    first, second, gate = zip(*parts, strict=True)
    neurons = Neurons(np.hstack(first), np.vstack(second), np.concatenate(gate).astype(np.int64))
    assert intercept is not None
    return StudentNeurons(neurons, gates, np.ravel(intercept))


def stored_size(
    layout: DenseLayout | ConvLayout, gate: np.ndarray, G: np.ndarray
) -> tuple[int, int]:
    """Gates, and all numbers, that ``build_student`` stores for units with these gates (m,)."""
    d, c = layout.n_features, layout.n_outputs
    free = always_on(G)[gate] if len(gate) else np.zeros(0, bool)
    f, u = int(free.sum()), int((~free).sum())
    g = len(np.unique(gate[~free]))
    shared = u if g < u else 0
    return g, g * d + u * (d + c) + shared + min(f * (d - 1 + c), (d - 1) * c) + c


def _factors(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    A, S, B = np.linalg.svd(matrix, full_matrices=False)
    rank = int((S[0] * max(matrix.shape) * np.finfo(S.dtype).eps < S).sum())
    rank = max(rank, -(-matrix.size // sum(matrix.shape)))
    root = np.sqrt(S[:rank])
    return A[:, :rank] * root, root[:, None] * B[:rank]


def _weights(layer: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (in, out) and the bias (1, out) of a layer, zeros where it has none."""
    tensors = dict(layer.named_parameters())
    weight = _array(tensors["weight"])
    matrix = weight.reshape(len(weight), -1).T
    bias = _array(tensors["bias"]) if "bias" in tensors else np.zeros(len(weight), weight.dtype)
    return matrix, bias[None]


def _array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    return tensor.numpy()
