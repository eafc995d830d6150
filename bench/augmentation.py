"""Many pairs of a block's inputs and outputs from a few images: the teacher answers for any input.

``flip_and_shift`` changes images; ``mix_and_jitter`` changes what the block receives, so that only
the block has to answer. Neither needs a label.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# Pixels by which an image is moved at most, and standard deviations of the noise.
SHIFT = 4
NOISE = 2.0


def flip_and_shift(images: Tensor, rng: np.random.Generator, most: int = SHIFT) -> Tensor:
    """Return images (N, C, H, W), half of them mirrored, each moved by up to ``most`` pixels.

    Both directions of every move in [-most, most] are as likely; what comes in from outside is the
    image's reflection.
    """
    n, _, height, width = images.shape
    mirrored = torch.from_numpy(rng.random(n) < 0.5)
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    padded = functional.pad(images, (most,) * 4, mode="reflect")
    top, left = rng.integers(0, 2 * most + 1, (2, n))
    rows = torch.from_numpy(top[:, None] + np.arange(height))[:, None, :, None]
    columns = torch.from_numpy(left[:, None] + np.arange(width))[:, None, None, :]
    examples, channels = torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])
    return padded[examples, channels[None, :, None, None], rows, columns]


def mix_and_jitter(
    inputs: np.ndarray, rng: np.random.Generator, count: int, noise: float = NOISE
) -> np.ndarray:
    """Return ``count`` inputs (count, C, ...) of a block near those that it received, (m, C, ...).

    A share of the channels, uniform in (0, 1), comes from a second input. Gaussian noise is added,
    of ``noise`` standard deviations of each feature, and nothing falls below the least value that
    was seen: a block that follows a ReLU receives nothing negative. A fit to the block's answers
    there leans towards the block's average slope and not, as a ridge does, towards zero.
    """
    first, second = rng.integers(0, len(inputs), (2, count))
    one = (count, *[1] * (inputs.ndim - 1))
    channels = rng.random((count, inputs.shape[1], *one[2:])) < rng.random(one)
    mixed = np.where(channels, inputs[second], inputs[first])
    jitter = rng.standard_normal(mixed.shape, dtype=np.float32)
    mixed += np.float32(noise) * inputs.std(axis=0) * jitter
    return np.maximum(mixed, inputs.min(), out=mixed)
