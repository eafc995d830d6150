"""How the rest of a network uses a block's outputs: a metric for the errors of a student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvxdistill.adapters.batches import Batch, run_model
from cvxdistill.adapters.call_structure import Structure, tensors_in
from cvxdistill.adapters.module_tree import evaluating
from cvxdistill.adapters.spans import Span

# Random combinations of the model's outputs for each batch.
PROBES = 3
# Gradients differ between positions that count alike by no more than this share of the largest.
ALIKE = 1e-4


@dataclass(frozen=True)
class OutputMetric:
    """How errors of a block's outputs count for the model's.

    Attributes
    ----------
    matrix : ndarray of shape (c, c)
        Mean of J^T J over examples and positions.
    uniform : bool
        Whether J was the same at all positions of an image, as where they are averaged later.
    """

    matrix: np.ndarray
    uniform: bool


def output_metrics(
    model: nn.Module,
    spans: Sequence[Span],
    batches: Iterable[Batch],
    rng: np.random.Generator,
) -> list[OutputMetric | None]:
    """Mean of J^T J over examples and positions, for the outputs (c,) of every span.

    J is the Jacobian of the model's output with respect to the span's output at one position: a
    small change e of it moves the model's output by about e^T (J^T J) e, squared. J^T J is the
    expectation of g g^T for g = J^T v with standard normal v, and g comes by backpropagation; no
    weight is changed, and no label is needed.

    Parameters
    ----------
    model : nn.Module
    spans : sequence of Span
    batches : iterable of Tensor or dict
    rng : Generator

    Returns
    -------
    list of OutputMetric, or None where the model gives no gradient
    """
    uniform = [True] * len(spans)
    found: list[Tensor | None] = [None] * len(spans)
    sums: list[Any] = [0.0] * len(spans)
    modules = dict(model.named_modules(remove_duplicate=False))
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def keep(k: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            tensor, structure = Structure.split(output)
            if not tensor.requires_grad:
                tensor.requires_grad_()
            found[k] = tensor
            # A copy goes on: what comes next may change it in place.
            return structure.wrap(tensor.clone())

        return hook

    handles = [modules[s.last].register_forward_hook(keep(k)) for k, s in enumerate(spans)]
    try:
        with evaluating(model), torch.enable_grad():
            for batch in batches:
                outputs = [t for t in tensors_in(run_model(model, batch)) if t.is_floating_point()]
                if not outputs or not outputs[0].requires_grad:
                    return [None] * len(spans)
                tensors = [tensor for tensor in found if tensor is not None]
                for probe in range(PROBES):
                    v = torch.randn(outputs[0].shape, generator=generator).to(outputs[0])
                    gradients = torch.autograd.grad(
                        outputs[0], tensors, v, retain_graph=probe < PROBES - 1, allow_unused=True
                    )
                    for k, gradient in enumerate(gradients):
                        if gradient is not None:
                            g = _positions(gradient)
                            sums[k] = sums[k] + g.T @ g
                            uniform[k] = uniform[k] and _is_uniform(gradient)
    except RuntimeError:
        # Inference tensors, or operations without a derivative.
        return [None] * len(spans)
    finally:
        for handle in handles:
            handle.remove()
    return [
        OutputMetric(q, alike) if isinstance(q, np.ndarray) and np.isfinite(q).all() else None
        for q, alike in zip(sums, uniform, strict=True)
    ]


def change_when_rewritten(
    model: nn.Module,
    span: Span,
    rewritten: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
) -> float:
    """How much a model's outputs change when those of a span are rewritten.

    Parameters
    ----------
    model : nn.Module
    span : Span
    rewritten : callable
        From the span's output, a tensor of the same shape.
    batches : iterable of Tensor or dict

    Returns
    -------
    float
        ||F' - F||_F / ||F||_F of the worst of the model's outputs; infinite if one is not finite.
    """
    module = dict(model.named_modules(remove_duplicate=False))[span.last]

    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tensor, structure = Structure.split(output)
        return structure.wrap(rewritten(tensor))

    def outputs(batch: Batch) -> list[Tensor]:
        return [t.double() for t in tensors_in(run_model(model, batch)) if t.is_floating_point()]

    squares = np.zeros((1, 2))
    with evaluating(model), torch.no_grad():
        for batch in batches:
            originals = outputs(batch)
            handle = module.register_forward_hook(hook)
            try:
                pairs = zip(outputs(batch), originals, strict=True)
            finally:
                handle.remove()
            squares = squares + [
                [float((found - original).square().sum()), float(original.square().sum())]
                for found, original in pairs
            ]
    if not np.isfinite(squares).all():
        return float("inf")
    return float(np.sqrt(squares[:, 0] / np.maximum(squares[:, 1], 1e-300)).max())


def _is_uniform(gradient: Tensor) -> bool:
    """Whether gradients (N, c, H, W) are the same at more than one position."""
    if gradient.ndim != 4 or gradient[0, 0].numel() == 1:
        return False
    differ = (gradient - gradient[:, :, :1, :1]).abs().max()
    return bool(differ <= ALIKE * gradient.abs().max())


def _positions(gradient: Tensor) -> np.ndarray:
    """Gradients (N, c, H, W), (N, T, c) or (N, c) as rows, one a position."""
    if gradient.ndim == 4:
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(-1, gradient.shape[-1]).double().cpu().numpy()
