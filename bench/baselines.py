"""What others would put in a block's place: the opponents of the convex students.

All are fitted to the same recorded activations, without labels, and count their numbers as stored:
batch norms folded into the layers before them, pruned weights without their places.

    relu_student      CNN2(ReLU(CNN1(z))) with batch norms, by Adam
    gated_student     CNN3(CNN2(z) * 1[CNN1(z) > 0]), CNN1 frozen, by Adam
    pruned            the block with its smallest weights set to zero
    truncated_svd     the block with each convolution as two of low rank
    Ridges            one linear layer of low rank, unweighted

Adam runs for a budget of CPU seconds with a cosine schedule over it. To be an honest opponent it
may have, besides the learning rate, the first and the second layer's kernel sizes, the size of its
batches and its loss chosen: plain, or weighted by how the network uses the outputs. Its last batch
norm starts at the targets' means and deviations. After pruning and truncation batch norms may be
set anew on the recorded inputs.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cvxdistill.adapters import LinearStudent, build_linear_student, linear_student_size
from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.solvers import CentredMoments, GatedStatistics, ProjectedRidge

# Of a ridge, relative to the mean variance of a feature.
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# The first batch norms' momentum: few steps suffice for running means.
MOMENTUM = 0.1


@dataclass(frozen=True)
class Activations:
    """What a block takes and gives, (n, C, H, W) and (n, c, H', W'), float32."""

    inputs: Tensor
    outputs: Tensor

    def part(self, rows: slice) -> Activations:
        """Only these examples."""
        return Activations(self.inputs[rows], self.outputs[rows])


@dataclass(frozen=True)
class Convolution:
    """Kernel size, stride and padding of a student's first convolution."""

    kernel: int
    stride: int
    padding: int

    def layer(self, channels: int, filters: int) -> nn.Conv2d:
        """Without biases: a batch norm follows."""
        return nn.Conv2d(channels, filters, self.kernel, self.stride, self.padding, bias=False)


@dataclass(frozen=True)
class AdamSettings:
    """One way to train.

    Attributes
    ----------
    learning_rate : float
        At the start of the cosine.
    batch : int or None
        None: all examples at each step.
    first : Convolution
    second : int
        Kernel size of the second layer.
    weighted : bool
        Whether the loss is weighted by how the network uses the outputs.
    """

    learning_rate: float
    batch: int | None
    first: Convolution
    second: int
    weighted: bool


class ReLUStudent(nn.Module):
    """CNN2(ReLU(CNN1(z))), both with batch norms."""

    def __init__(self, channels: int, outputs: int, filters: int, settings: AdamSettings) -> None:
        super().__init__()
        k = settings.second
        self.first = settings.first.layer(channels, filters)
        self.first_norm = nn.BatchNorm2d(filters, momentum=MOMENTUM)
        self.second = nn.Conv2d(filters, outputs, k, padding=k // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs, momentum=MOMENTUM)

    def forward(self, z: Tensor) -> Tensor:
        hidden = nn.functional.relu(self.first_norm(self.first(z)))
        return self.norm(self.second(hidden))


class AdamGatedStudent(nn.Module):
    """CNN3(CNN2(z) * 1[CNN1(z) > 0]) with CNN1 as drawn, the paper's equation 8."""

    def __init__(self, channels: int, outputs: int, filters: int, settings: AdamSettings) -> None:
        super().__init__()
        self.gate = settings.first.layer(channels, filters).requires_grad_(False)
        self.first = settings.first.layer(channels, filters)
        self.first_norm = nn.BatchNorm2d(filters, momentum=MOMENTUM)
        self.second = nn.Conv2d(filters, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs, momentum=MOMENTUM)

    def forward(self, z: Tensor) -> Tensor:
        on = (self.gate(z) > 0).to(z.dtype)
        return self.norm(self.second(self.first_norm(self.first(z)) * on))


KINDS: dict[str, type[nn.Module]] = {"ReLU": ReLUStudent, "gated": AdamGatedStudent}


def stored_numbers(model: nn.Module) -> int:
    """Weights that are not 0, and a bias for each channel of a batch norm that folds away."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            total += module.num_features
        elif isinstance(module, LinearStudent):
            return module.parameters_stored
        elif isinstance(module, nn.Conv2d):
            total += int(torch.count_nonzero(module.weight))
            total += 0 if module.bias is None else module.bias.numel()
    return total


def filters_within(kind: str, budget: int, data: Activations, settings: AdamSettings) -> int:
    """The most filters with which a student of this kind stores at most ``budget`` numbers."""
    C, c = data.inputs.shape[1], data.outputs.shape[1]
    patch = settings.first.kernel**2 * C
    each = 2 * patch + 1 + c if kind == "gated" else patch + 1 + settings.second**2 * c
    return (budget - c) // each


def adam_student(
    kind: str,
    fitted: Activations,
    budget: int,
    settings: AdamSettings,
    seconds: float,
    root: Tensor,
    seed: int,
) -> nn.Module:
    """A student of at most ``budget`` numbers after so many CPU seconds of Adam.

    Parameters
    ----------
    kind : {"ReLU", "gated"}
    fitted : Activations
    budget : int
    settings : AdamSettings
    seconds : float
        Of this process, which should have one thread.
    root : Tensor of shape (c, c)
        Errors are multiplied by it where the loss is weighted.
    seed : int
        Of the first weights and the batches.

    Raises
    ------
    ValueError
        If not even one filter fits.
    """
    filters = filters_within(kind, budget, fitted, settings)
    if filters < 1:
        raise ValueError(f"no {kind} student has {budget:,} numbers or fewer.")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        student = KINDS[kind](fitted.inputs.shape[1], fitted.outputs.shape[1], filters, settings)
    last: nn.BatchNorm2d = student.norm
    with torch.no_grad():
        last.weight.copy_(fitted.outputs.std((0, 2, 3)))
        last.bias.copy_(fitted.outputs.mean((0, 2, 3)))
    learning = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learning, settings.learning_rate)
    n = len(fitted.inputs)
    start = time.process_time()
    student.train()
    while (spent := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + np.cos(np.pi * spent)) / 2
        x, y = fitted.inputs, fitted.outputs
        if settings.batch is not None and settings.batch < n:
            rows = torch.randint(n, (settings.batch,), generator=generator)
            x, y = x[rows], y[rows]
        wrong = student(x) - y
        if settings.weighted:
            wrong = wrong.movedim(1, -1) @ root
        optimizer.zero_grad()
        wrong.square().mean().backward()
        optimizer.step()
    return student.eval()


def pruned(block: nn.Module, budget: int, *, alike: bool) -> nn.Module:
    """The block with the weights of the largest magnitude, as many as fit.

    Parameters
    ----------
    block : nn.Module
    budget : int
    alike : bool
        Whether every convolution keeps the same share; else the magnitudes of all are compared.

    Raises
    ------
    ValueError
        If the biases alone are more.
    """
    block = copy.deepcopy(block)
    layers = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    biases = sum(m.num_features for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    total = sum(layer.weight.numel() for layer in layers)
    left = min(budget - biases, total)
    if left < 0:
        raise ValueError(f"pruned of all weights, the block still has {biases:,} biases.")
    with torch.no_grad():
        if alike:
            for layer in layers:
                _keep_largest([layer.weight], layer.weight.numel() * left // total)
        else:
            _keep_largest([layer.weight for layer in layers], left)
    return block.eval()


def _keep_largest(weights: list[nn.Parameter], count: int) -> None:
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    kept = torch.zeros(len(magnitudes), dtype=torch.bool)
    kept[magnitudes.argsort(descending=True)[:count]] = True
    for weight, mask in zip(weights, kept.split([w.numel() for w in weights]), strict=True):
        weight *= mask.reshape(weight.shape)


def truncated_svd(block: nn.Module, budget: int) -> nn.Module:
    """The block with convolutions W (c, C k^2) as U S and V^T, of the ranks that keep most energy.

    Ranks grow by the singular value with most energy for its numbers, C k^2 + c, until the budget
    is spent; a convolution with more numbers as two is kept whole.

    Raises
    ------
    ValueError
        If the biases alone are more.
    """
    block = copy.deepcopy(block)
    layers = {name: m for name, m in block.named_modules() if isinstance(m, nn.Conv2d)}
    biases = sum(m.num_features for m in block.modules() if isinstance(m, nn.BatchNorm2d))
    if budget < biases:
        raise ValueError("the block's biases alone are more numbers than there may be.")
    factors = {
        name: torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        for name, layer in layers.items()
    }
    prices = {name: U.shape[0] + Vh.shape[1] for name, (U, _, Vh) in factors.items()}
    whole: set[str] = set()
    while True:
        left = budget - biases - sum(layers[name].weight.numel() for name in whole)
        # Relative to the layer's own energy: their scales mean nothing before batch norms.
        offers = sorted(
            (
                (float(e) / prices[name], name)
                for name in layers.keys() - whole
                for e in factors[name][1].square() / factors[name][1].square().sum()
            ),
            reverse=True,
        )
        ranks = dict.fromkeys(layers, 0)
        for _, name in offers:
            if prices[name] <= left:
                ranks[name] += 1
                left -= prices[name]
        full = {n for n, r in ranks.items() if r * prices[n] >= layers[n].weight.numel()}
        if not full:
            break
        whole |= full
    for name, layer in layers.items():
        U, S, Vh = factors[name]
        r = ranks[name]
        if name in whole:
            continue
        inner = nn.Conv2d(
            layer.in_channels, r, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
        outer = nn.Conv2d(r, layer.out_channels, 1, bias=False)
        if r:
            with torch.no_grad():
                inner.weight.copy_((S[:r].sqrt()[:, None] * Vh[:r]).reshape(inner.weight.shape))
                outer.weight.copy_((U[:, :r] * S[:r].sqrt()).reshape(outer.weight.shape))
            pair: nn.Module = nn.Sequential(inner, outer)
        else:
            pair = _Nothing(layer)
        parent, _, own = name.rpartition(".")
        setattr(block.get_submodule(parent), own, pair)
    return block.eval()


class _Nothing(nn.Module):
    """A convolution of rank 0."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.outputs, self.stride = layer.out_channels, layer.stride

    def forward(self, z: Tensor) -> Tensor:
        rows, columns = (-(-size // s) for size, s in zip(z.shape[2:], self.stride, strict=True))
        return z.new_zeros(len(z), self.outputs, rows, columns)


def with_norms_anew(block: nn.Module, inputs: Tensor, batch: int = 500) -> nn.Module:
    """A copy whose batch norms have the means and variances that the inputs now give."""
    block = copy.deepcopy(block)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    block.train()
    with torch.no_grad():
        for part in inputs.split(batch):
            block(part)
    return block.eval()


class Ridges:
    """Ridge regressions of one block, unweighted, and their students cut to a rank.

    Parameters
    ----------
    fitted, held_out : Activations
    layout : ConvLayout or DenseLayout
    """

    def __init__(
        self, fitted: Activations, held_out: Activations, layout: ConvLayout | DenseLayout
    ) -> None:
        self.layout = layout
        moments = []
        for data in (fitted, held_out):
            X = layout.rows(data.inputs.numpy())[:][:, :-1]
            Y = layout.targets(data.outputs.numpy())
            sums = GatedStatistics.from_data(X, Y, np.ones((len(X), 1), dtype=bool))
            moments.append(CentredMoments.of(sums))
        self.held_out = moments[1]
        self.ridges = [ProjectedRidge(moments[0], 1, strength) for strength in STRENGTHS]

    def student(self, budget: int) -> LinearStudent:
        """Of the largest rank that fits, and the strength that is best on held-out examples.

        Raises
        ------
        ValueError
            If not even rank 1 fits.
        """
        ranks: list[int | None] = [None, *range(self.layout.n_outputs - 1, 0, -1)]
        sizes = ((rank, linear_student_size(self.layout, None, rank)) for rank in ranks)
        rank = next((rank for rank, size in sizes if size <= budget), 0)
        if rank == 0:
            raise ValueError(f"no linear layer has {budget:,} numbers or fewer.")
        fits = [ridge.fit(None, rank) for ridge in self.ridges]
        fit = min(fits, key=lambda fit: fit.error(self.held_out))
        return build_linear_student(self.layout, None, fit.W1, fit.W2, fit.intercept)
