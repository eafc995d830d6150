"""The two published networks that the benchmarks compress, under their published names.

``resnet20`` is the network for CIFAR-10 of He et al. (2016, section 4.2) in Idelbayev's training;
``resnet18`` that of their section 3 with torchvision's names and shapes. Both also serve as models
for the command line: ``cvxdistill inspect bench/teachers.py:resnet20 --input-shape 3,32,32``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from datasets import data_folder
from torch import Tensor, nn
from torch.nn import functional

from cvxdistill.adapters.model_loading import load_weights


class Teacher(NamedTuple):
    """A trained model in eval mode, and the mean and std of its inputs' channels in [0, 1]."""

    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class PaddedShortcut(nn.Module):
    """He et al.'s option A: every second pixel, and zeros for the channels that are new."""

    def __init__(self, planes: int) -> None:
        super().__init__()
        self.planes = planes

    def forward(self, x: Tensor) -> Tensor:
        pad = self.planes // 4
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with batch norm, added to a shortcut."""

    def __init__(
        self, in_planes: int, planes: int, stride: int, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + shortcut)


def _stage(in_planes: int, planes: int, n_blocks: int, *, projection: bool) -> nn.Sequential:
    """Basic blocks, the first of which halves the image where the width changes."""
    stride = 1 if in_planes == planes else 2
    downsample: nn.Module | None = None
    if stride == 2 and projection:
        downsample = nn.Sequential(
            nn.Conv2d(in_planes, planes, 1, stride=2, bias=False), nn.BatchNorm2d(planes)
        )
    elif stride == 2:
        downsample = PaddedShortcut(planes)
    first = BasicBlock(in_planes, planes, stride, downsample)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1, None) for _ in range(n_blocks - 1)))


class ResNet20(nn.Module):
    """(N, 3, 32, 32) to (N, 10): widths 16, 32, 64, three basic blocks each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 3, projection=False)
        self.layer2 = _stage(16, 32, 3, projection=False)
        self.layer3 = _stage(32, 64, 3, projection=False)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))


class ResNet18(nn.Module):
    """(N, 3, H, W) to (N, num_classes): widths 64 to 512, two basic blocks each."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, 64, 2, projection=True)
        self.layer2 = _stage(64, 128, 2, projection=True)
        self.layer3 = _stage(128, 256, 2, projection=True)
        self.layer4 = _stage(256, 512, 2, projection=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(self.avgpool(out).flatten(1))


def resnet20() -> ResNet20:
    """Return the network with weights still to be loaded."""
    return ResNet20()


def resnet18(num_classes: int = 10) -> ResNet18:
    """Return the network with weights still to be loaded."""
    return ResNet18(num_classes)


def load_teacher(name: str) -> Teacher:
    """Return the trained "resnet20" or "resnet18" from the folder CVXDISTILL_DATA.

    Raises
    ------
    ValueError
        If ``name`` is neither.
    FileNotFoundError
        If the weights are not there.
    """
    if name == "resnet20":
        model: nn.Module = resnet20()
        file, mean, std = "resnet20_cifar10.th", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    elif name == "resnet18":
        model, file = resnet18(), "resnet18_cifar10.safetensors"
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    else:
        raise ValueError(f"name must be 'resnet20' or 'resnet18', got {name!r}.")
    load_weights(model, data_folder() / file)
    return Teacher(model.eval(), mean, std)


def accuracy(
    model: nn.Module, images: np.ndarray, labels: np.ndarray, batch_size: int = 250
) -> float:
    """Return the share of normalised images (n, 3, H, W) whose largest output is their label."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
            answers = model(batch).argmax(dim=1).numpy()
            right += int((answers == labels[start : start + batch_size]).sum())
    return right / len(images)
