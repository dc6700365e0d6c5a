"""A residual network that learns 32x32 images on a processor: what whole CIFAR-10 shows on a GPU, as a trend."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

import bdfast
from bdfast.nn import normalized


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.shortcut(x))
        return out


def small_resnet(seed: int | None) -> nn.Module:
    """Stem of 16 channels at half the resolution, blocks of 32, 64 and 128: 0.3 M parameters, normalisation inside.

    Without a seed the weights are drawn from the global generator.
    """
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            Block(16, 32, 1), Block(32, 64, 2), Block(64, 128, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip
    return normalized(network, *bdfast.data.normalization("cifar10"))
