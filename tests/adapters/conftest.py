"""Small real-shaped networks: residual networks with torchvision's names, at tiny widths."""

from __future__ import annotations

from typing import Any

import pytest


def build_resnet(width: int = 4, blocks: int = 2, n_classes: int = 10) -> Any:
    import torch
    from torch import nn

    class BasicBlock(nn.Module):
        def __init__(self, c_in: int, c_out: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(c_out)
            self.relu = nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(c_out)
            self.downsample = None
            if stride != 1 or c_in != c_out:
                self.downsample = nn.Sequential(
                    nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
                )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # The shortcut first, to see that being called first does not make it the first layer.
            shortcut = x if self.downsample is None else self.downsample(x)
            out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            out += shortcut
            return self.relu(out)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.relu = nn.ReLU(inplace=True)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            c_in = width
            for i in range(4):
                c_out = width * 2**i
                layer = [BasicBlock(c_in, c_out, 1 if i == 0 else 2)]
                layer += [BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)]
                setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
                c_in = c_out
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(c_in, n_classes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(self.avgpool(x).flatten(1))

    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = ResNet()
    # Statistics of a network that has been trained: neither zero nor one.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    torch.set_rng_state(generator_state)
    return model


@pytest.fixture
def resnet() -> Any:
    return build_resnet()


@pytest.fixture(scope="module")
def built_resnet() -> Any:
    """One for a whole file: leave it as it is."""
    return build_resnet().eval()
