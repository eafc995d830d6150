"""Linear operations that follow a block: pooling, frozen batch norms, linear layers.

A student that is fitted to what they make of the block's output, instead of to the output itself,
spends its size on what the network uses; the programme stays convex, because they are linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cvxdistill.adapters.batches import Batch
from cvxdistill.adapters.module_tree import is_span
from cvxdistill.adapters.span_search import search_span
from cvxdistill.adapters.streaming import BlockTaps
from cvxdistill.adapters.teacher_gates import folded_norm

PREFIX = "after:"
# What the map may differ by from the modules themselves, relative to their largest output.
PRECISION = 1e-4


@dataclass(frozen=True)
class FollowingMap:
    """y -> pool(y) M + 1 o^T for outputs y of a block, (N, c, H, W) or (N, c).

    Attributes
    ----------
    name : str
        The last module of those that the map stands for.
    pooled : bool
        Whether positions are averaged.
    matrix : ndarray of shape (c, c')
        M.
    offset : ndarray of shape (c',)
    """

    name: str
    pooled: bool
    matrix: np.ndarray
    offset: np.ndarray

    def __call__(self, outputs: np.ndarray) -> np.ndarray:
        """Apply it to outputs (N, c, ...): rows (N, c') if pooled, else one for each position."""
        flat = outputs.reshape(*outputs.shape[:2], -1)
        rows = (
            flat.mean(axis=2) if self.pooled else np.moveaxis(flat, 1, 2).reshape(-1, flat.shape[1])
        )
        return rows @ self.matrix.astype(rows.dtype) + self.offset.astype(rows.dtype)

    def before(self, W2: np.ndarray) -> np.ndarray:
        """The second layer (m, c) of least norm that the map turns into W2 (m, c')."""
        return W2 @ np.linalg.pinv(self.matrix)

    def offset_before(self, b: np.ndarray) -> np.ndarray:
        """The intercept (c,) of least norm that the map turns into b (c',)."""
        return (b - self.offset) @ np.linalg.pinv(self.matrix)


def find_following(model: nn.Module, block: str, match: str, batch: Batch) -> FollowingMap:
    """Compose what runs from the end of a block to the end of another module.

    Parameters
    ----------
    model : nn.Module
    block : str
        A block or span.
    match : str
        "after:NAME".
    batch : Tensor or dict
        One small batch, to run the model on.

    Raises
    ------
    ValueError
        If ``match`` is written otherwise, the module does not run after the block in one chain, or
        something in between is not linear.
    """
    if not match.startswith(PREFIX) or not match[len(PREFIX) :]:
        raise ValueError(
            f"match must be 'outputs', 'network' or 'after:NAME' of a module, got {match!r}."
        )
    name = match[len(PREFIX) :]
    last = block.split(":")[-1] if is_span(model, block) else block
    if name == last:
        raise ValueError(f"match={match!r} names the block itself; use match='outputs'.")
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise ValueError(f"match={match!r} names no module of the model.")
    span = search_span(model, f"{last}:{name}", batch)
    taps = BlockTaps(model, [search_span(model, last, batch), span])
    (_, given), (_, wanted) = taps.run(batch)
    c = given.shape[1]
    pooled, matrix, offset = False, np.eye(c), np.zeros(c)
    for part in span.names[1:]:
        module = modules[part]
        if isinstance(module, (nn.Identity, nn.Dropout, nn.Flatten)):
            continue
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AvgPool2d)):
            pooled = True
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            scale, shift = folded_norm(module)
            matrix, offset = matrix * scale, offset * scale + shift
        elif isinstance(module, nn.Linear) or _is_pointwise(module):
            weight = _array(module.weight).reshape(len(module.weight), -1).T
            bias = 0.0 if module.bias is None else _array(module.bias)
            if weight.shape[0] != matrix.shape[1]:
                raise ValueError(f"{part!r} mixes positions, which match={match!r} cannot fold in.")
            matrix, offset = matrix @ weight, offset @ weight + bias
        else:
            raise ValueError(
                f"match={match!r}: {part!r} is a {type(module).__name__}, not an average pooling, "
                "batch norm or linear layer."
            )
    following = FollowingMap(name, pooled, matrix, offset)
    expected = np.moveaxis(wanted.reshape(*wanted.shape[:2], -1).numpy(), 1, 2)
    expected = expected.reshape(-1, expected.shape[-1])
    got = following(given.numpy())
    size = np.abs(expected).max(initial=0.0)
    if got.shape != expected.shape or np.abs(got - expected).max(initial=0.0) > PRECISION * size:
        raise ValueError(
            f"match={match!r}: what runs between is not linear, or pools only parts of the image."
        )
    return following


def _is_pointwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and tuple(module.stride) == (1, 1)
        and module.groups == 1
        and tuple(module.padding) == (0, 0)
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to(device="cpu", dtype=torch.float64).numpy()
