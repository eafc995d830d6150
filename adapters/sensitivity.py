"""How the rest of a network uses a block's outputs: a metric for the errors of a student."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def output_metrics(
    model: nn.Module,
    spans: Sequence[Span],
    batches: Iterable[Batch],
    rng: np.random.Generator,
) -> list[np.ndarray | None]:
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
    list of ndarray of shape (c, c), or None where the model gives no gradient
    """
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
    except RuntimeError:
        # Inference tensors, or operations without a derivative.
        return [None] * len(spans)
    finally:
        for handle in handles:
            handle.remove()
    return [q if isinstance(q, np.ndarray) and np.isfinite(q).all() else None for q in sums]


def _positions(gradient: Tensor) -> np.ndarray:
    """Gradients (N, c, H, W), (N, T, c) or (N, c) as rows, one a position."""
    if gradient.ndim == 4:
        gradient = gradient.permute(0, 2, 3, 1)
    return gradient.reshape(-1, gradient.shape[-1]).double().cpu().numpy()
