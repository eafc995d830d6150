"""Layers whose weights are mostly zero: whole in memory, few numbers in a state dict.

They compute as the layers that they are made of do, in the same time. Their state dicts hold the
weights at the places that may differ from zero, in order, and a bit for each place of the weight,
32 to an int32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BITS = 32


class SparseLayer(nn.Module):
    """What is stored of ``weight``. It takes no gradient: training would fill the zeros.

    Attributes
    ----------
    places : Tensor of bool of the shape of ``weight``
        Where it may differ from zero.
    """

    weight: Tensor
    places: Tensor

    def reset_places(self) -> None:
        """All of them."""
        self.weight.requires_grad_(False)
        everywhere = torch.ones_like(self.weight, dtype=torch.bool)
        self.register_buffer("places", everywhere, persistent=False)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = destination.pop(prefix + "weight")
        destination[prefix + "values"] = weight[self.places]
        destination[prefix + "places"] = packed(self.places)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        stored = [state_dict.pop(prefix + name, None) for name in ("values", "places")]
        absent = [
            prefix + name
            for name, tensor in zip(("values", "places"), stored, strict=True)
            if tensor is None
        ]
        if not absent:
            values, words = stored
            shape = self.weight.shape
            places = unpacked(words, shape)
            if places is None or int(places.sum()) != values.numel():
                error_msgs.append(
                    f"{prefix}values: {values.numel():,} weights do not fit the places of a weight "
                    f"of shape {tuple(shape)}."
                )
                places = torch.zeros(shape, dtype=torch.bool)
                values = values[:0]
            places = places.to(values.device)
            weight = torch.zeros(shape, dtype=values.dtype, device=values.device)
            weight[places] = values
            self.places = places.to(self.weight.device)
            state_dict[prefix + "weight"] = weight
        found: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, found, unexpected_keys, error_msgs
        )
        missing_keys += [*absent, *(name for name in found if name != prefix + "weight")]


class SparseLinear(SparseLayer, nn.Linear):
    """``nn.Linear`` with few weights, once ``reset_places`` was called."""


class SparseConv2d(SparseLayer, nn.Conv2d):
    """``nn.Conv2d`` with few weights, once ``reset_places`` was called."""


def keep_places(layer: SparseLinear | SparseConv2d, places: np.ndarray) -> None:
    """Keep a layer's weights at these places alone, (in, out), and make the others zero."""
    mask = torch.from_numpy(np.ascontiguousarray(places.T)).reshape(layer.weight.shape)
    layer.places = mask.to(layer.weight.device)
    with torch.no_grad():
        layer.weight[~layer.places] = 0


def packed(places: Tensor) -> Tensor:
    """Booleans as the bits of int32 numbers, the first as the lowest."""
    bits = np.packbits(places.detach().cpu().numpy().ravel(), bitorder="little")
    words = np.zeros(words_for(places.numel()) * (BITS // 8), dtype=np.uint8)
    words[: len(bits)] = bits
    return torch.from_numpy(words.view("<i4").astype(np.int32)).to(places.device)


def unpacked(words: Tensor, shape: torch.Size) -> Tensor | None:
    """The booleans that were packed; None if they are not so many."""
    count = math.prod(shape)
    if words.dtype != torch.int32 or words.shape != (words_for(count),):
        return None
    raw = words.detach().cpu().numpy().astype("<i4").view(np.uint8)
    bits = np.unpackbits(raw, bitorder="little")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)


def words_for(count: int) -> int:
    """How many numbers say which of ``count`` weights are kept."""
    return -(-count // BITS)
