"""The dense two-layer student of the paper's section 5.2, along a path of strengths.

The block's inputs z, with a one behind them, are rows X (n, d); the targets are the leading
principal components of its outputs, Y (n, c). One output at a time (penalty ``neuron``),

    minimise over V, b   1/(2n) ||sum_j diag(D[:, j]) X V[j] + 1 b^T - Y||_F^2
                         + alpha * sum_j sum_k ||V[j][:, k]||_2

is solved by R-FISTA to a certified gap, each alpha started at the solution before. The gates are an
always-on one and filters of the block's own first convolution. A column that is not zero is a
hidden unit, and the student stores these columns, their gates, the components and a mean.

Outputs may be weighted by how the network uses them: the components are then those of Y root, with
root^2 the mean of J^T J, J the Jacobian of what follows the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from baselines import Activations
from cpu_clock import CpuClock
from few_images import first_layer
from torch import Tensor, nn

from cvxdistill.adapters import DenseLayout
from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    Neurons,
    Solution,
    activation_patterns,
)

# With 40 components all units together have 1,025,000 weights.
N_GATES, COMPONENTS = 25, 40
# Multiples of alpha_max.
STRENGTHS = (0.1, 0.03, 0.01, 0.003)
TOLERANCE, MOST_ITERATIONS = 1e-2, 1000


@dataclass(frozen=True)
class Point:
    """A student of the path.

    Attributes
    ----------
    strength : float
        alpha / alpha_max.
    V : ndarray of shape (p, d, c)
    G : ndarray of shape (d, p)
    components : ndarray of shape (c, outputs)
        What each of the programme's outputs adds to the block's.
    intercept : ndarray of shape (outputs,)
    gap : float
        Relative duality gap.
    seconds : float
        From the activations to here, with all stronger alphas.
    """

    strength: float
    V: np.ndarray
    G: np.ndarray
    components: np.ndarray
    intercept: np.ndarray
    gap: float
    seconds: float

    @property
    def units(self) -> int:
        """Columns that are not zero."""
        return int(self.V.any(axis=1).sum())

    @property
    def gates(self) -> int:
        """Those that must be stored: in use, and not always on."""
        return int((self.V.any(axis=(1, 2)) & self.G.any(axis=0)).sum())

    @property
    def numbers(self) -> int:
        """That the student stores."""
        return (self.units + self.gates) * len(self.G) + self.components.size + len(self.intercept)

    def neurons(self) -> Neurons:
        """Its hidden units, each with its component as second layer."""
        gate, output = np.nonzero(self.V.any(axis=1))
        return Neurons(self.V[gate, :, output].T.copy(), self.components[output], gate)

    def student(self) -> OneVsAll:
        """As a module, from (N, C, H, W) to (N, outputs, 1, 1)."""
        return OneVsAll(self)


class OneVsAll(nn.Module):
    """b + (sum_j 1[x G[:, j] >= 0] x V[j]) components, with x = [z, 1]."""

    def __init__(self, point: Point):
        super().__init__()
        used = point.V.any(axis=(1, 2))
        for name, array in {
            "G": point.G[:, used],
            "V": point.V[used],
            "components": point.components,
            "intercept": point.intercept,
        }.items():
            self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(array, np.float32)))

    def forward(self, z: Tensor) -> Tensor:
        x = torch.cat([z.flatten(1), z.new_ones(len(z), 1)], dim=1)
        out = self.intercept
        on = (x @ self.G >= 0).to(x.dtype)
        for gate, V in zip(on.T, self.V, strict=True):
            out = out + gate[:, None] * (x @ V) @ self.components
        return out[:, :, None, None].expand(len(z), -1, 1, 1)


def layout_of(data: Activations) -> DenseLayout:
    """All of an example at once."""
    return DenseLayout(tuple(data.inputs.shape[1:]), tuple(data.outputs.shape[1:]))


def gates_of(block: nn.Module, shape: tuple[int, ...], count: int, seed: int) -> np.ndarray:
    """An always-on gate, and filters of the block's first convolution, (d, count)."""
    own = first_layer(nn.Sequential(block), shape)
    drawn = np.random.default_rng(seed).permutation(own.shape[1])[: count - 1]
    return np.hstack([np.zeros((len(own), 1), np.float32), own[:, np.sort(drawn)]])


def path(
    data: Activations,
    block: nn.Module,
    seed: int,
    strengths: tuple[float, ...] = STRENGTHS,
    n_gates: int = N_GATES,
    n_components: int = COMPONENTS,
    root: np.ndarray | None = None,
) -> Iterator[Point]:
    """The students of all strengths, from the strongest down; ``root`` weights the outputs."""
    clock = CpuClock()
    with clock:
        layout = layout_of(data)
        X = layout.rows(data.inputs.numpy())[:]
        Y = layout.targets(data.outputs.numpy())
        mean = Y.mean(axis=0)
        T = Y - mean if root is None else (Y - mean) @ root
        components = np.linalg.svd(T, full_matrices=False)[2][:n_components]
        G = gates_of(block, layout.input_shape, n_gates, seed)
        D, G = activation_patterns(X, G)
        problem = GatedReLUProblem(X, T @ components.T, D, fit_intercept=True)
        if root is not None:
            components = np.linalg.solve(root.T, components.T).T
        alpha_max = problem.alpha_max()
        solver = RFISTA(tol=TOLERANCE, max_iter=MOST_ITERATIONS, check_every=5)
        solution: Solution | None = None
    for strength in sorted(strengths, reverse=True):
        with clock:
            solution = solver.solve(problem, strength * alpha_max, warm_start=solution)
        intercept = mean + solution.intercept @ components
        gap = solution.relative_gap
        yield Point(strength, solution.V, G, components, intercept, gap, clock.seconds)
