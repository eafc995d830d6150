"""Tasks of a few images a class: ``layer4`` of the ResNet-18, and Adam tuned once for them.

A seed draws as many training images of each of the ten classes. That is all that the labels are
used for; students see none. Smaller numbers are drawn out of the larger ones of the same seed. A
tenth of the images is held out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from baselines import Activations, AdamSettings, adam_student, filters_within
from contest import (
    BATCH,
    HELD_OUT,
    NETWORKS,
    PILOT,
    RATES,
    Made,
    Opponents,
    Task,
    make_task,
)
from cpu_clock import CpuClock
from datasets import load_cifar10, normalise
from teachers import load_teacher

from cvxdistill.adapters import capture

BLOCK = next(block for block in NETWORKS["resnet18"] if block.name == "layer4")
CLASSES = 10
# The least CPU seconds that Adam has here, where there are few images.
LEAST_SECONDS = 5.0


class Drawing:
    """The network, all test images (or some) as the block sees them, and tasks of drawn images."""

    def __init__(self, test_images: int | None = None):
        self.teacher = load_teacher("resnet18")
        self._whole = make_task(self.teacher, BLOCK.start, 50, test_images)
        self._photos, labels = load_cifar10("train")
        self._of_class = [np.flatnonzero(labels == k) for k in range(CLASSES)]

    def images(self, a_class: int, seed: int) -> np.ndarray:
        """Numbers of the images, in a random order."""
        rng = np.random.default_rng(seed)
        parts = [rng.permutation(rows)[:a_class] for rows in self._of_class]
        return rng.permutation(np.concatenate(parts))

    def task(self, a_class: int, seed: int) -> Task:
        """The network from the block on, and what it makes of a seed's images."""
        photos = self._photos[self.images(a_class, seed)]
        images = torch.from_numpy(normalise(photos, self.teacher.mean, self.teacher.std))
        with capture(self.teacher.model, BLOCK.start, images, verbose=0) as captured:
            inputs = torch.from_numpy(np.array(captured.inputs))
        fitted = slice(0, round(len(inputs) * (1 - HELD_OUT)))
        return replace(self._whole, training=inputs, fitted=fitted)


def all_images(opponents: Opponents) -> Activations:
    """What the block makes of the fitted and the held-out images."""
    parts = (opponents.fitted, opponents.held_out)
    return Activations(*(torch.cat(pair) for pair in zip(*map(_pair, parts), strict=True)))


def _pair(data: Activations) -> tuple[torch.Tensor, torch.Tensor]:
    return data.inputs, data.outputs


def tuned(opponents: Opponents, budget: int, seconds: float) -> AdamSettings:
    """Adam's learning rate, kernels and loss: each tried for a quarter of the seconds.

    Those whose student classifies the most held-out images as the network does.
    """
    ways = [
        AdamSettings(rate, BATCH, first, second, weighted)
        for rate in RATES[BATCH]
        for first in BLOCK.first
        for second in BLOCK.second
        for weighted in (False, True)
    ]
    ways = [way for way in ways if filters_within("ReLU", budget, opponents.fitted, way) >= 1]
    if not ways:
        raise ValueError(f"no ReLU student has {budget:,} numbers or fewer.")
    pilot = PILOT * max(seconds, LEAST_SECONDS)
    tried = [
        adam_student("ReLU", opponents.fitted, budget, way, pilot, opponents.root, seed=0)
        for way in ways
    ]
    made = [opponents.placed(student, pilot, "") for student in tried]
    return ways[made.index(opponents.best(made))]


def relu_by_adam(
    opponents: Opponents, budget: int, way: AdamSettings, seconds: float, seed: int
) -> Made:
    """The ReLU student of at most ``budget`` numbers, trained on all images for so long."""
    clock = CpuClock()
    with clock:
        data = all_images(opponents)
        student = adam_student("ReLU", data, budget, way, seconds, opponents.root, seed)
    about = f"{student.first.out_channels} filters, {described(way)}"
    return opponents.placed(student, clock.seconds, about)


def described(way: AdamSettings) -> str:
    """Learning rate and loss; the kernels are the block's."""
    return f"{way.learning_rate:g}, {'weighted' if way.weighted else 'plain'}"


def as_settings(kept: dict[str, Any]) -> AdamSettings:
    """From a row's ``learning_rate`` and ``weighted``."""
    (first,), (second,) = BLOCK.first, BLOCK.second
    return AdamSettings(kept["learning_rate"], BATCH, first, second, bool(kept["weighted"]))
