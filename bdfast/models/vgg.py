"""VGG with batch norm: Simonyan, Zisserman, "Very Deep Convolutional Networks", ICLR 2015, configuration E.

Module names and shapes are torchvision's, with the 7x7 average pool in front of the head at every image size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast.errors import message
from bdfast.models.init import he_init_

_STAGES = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # channels, convolutions; each stage ends in a max pool
_GRID = 7  # the head reads 512 x 7 x 7 features
_STRIDE = 32


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, a 7x7 average pool, a head of three linear layers."""

    def __init__(self, num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, depth in _STAGES:
            for _ in range(depth):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = AdaptiveAveragePool(_GRID)
        self.classifier = nn.Sequential(
            nn.Linear(channels * _GRID**2, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4096, num_classes),
        )
        he_init_(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K]
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits


class AdaptiveAveragePool(nn.Module):
    """``nn.AdaptiveAvgPool2d(size)`` with a deterministic backward on CUDA (torch's own adds up with atomics).

    Example:
        >>> AdaptiveAveragePool(2)(torch.arange(3.0).reshape(1, 1, 1, 3)).tolist()
        [[[[0.5, 1.5], [0.5, 1.5]]]]
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, size, size]
        return _adaptive_average(x, self.size)

    def extra_repr(self) -> str:
        return f"size={self.size}"


@torch.fx.wrap  # one node of a traced graph: which way is taken depends on the shape
def _adaptive_average(x: Tensor, size: int) -> Tensor:
    height, width = x.shape[-2:]
    if height == width == 1:  # images of 32 pixels
        return x.expand(-1, -1, size, size)
    if height % size == 0 and width % size == 0:  # images of 224 pixels, and their multiples
        return F.avg_pool2d(x, (height // size, width // size))
    return _average_windows(_average_windows(x, -2, size), -1, size)


def _average_windows(x: Tensor, dim: int, size: int) -> Tensor:
    """Window i of ``size`` is [floor(i n / size), ceil((i + 1) n / size)) of the n entries along ``dim``."""
    n = x.shape[dim]
    bounds = [(i * n // size, -((i + 1) * n // -size)) for i in range(size)]
    return torch.stack([x.narrow(dim, start, end - start).mean(dim) for start, end in bounds], dim)


def vgg19_bn(num_classes: int, image_size: tuple[int, int], channels: int, *, dropout: float = 0.5) -> VGG:
    """VGG19 with batch norm: 118 tensors, 139,622,218 parameters for 10 classes of RGB images of 32 pixels or more.

    Args:
        dropout: probability, after the first two layers of the head.
    """
    if min(image_size) < _STRIDE:
        expected = f"at least {_STRIDE} pixels on each side"
        raise ValueError(message("vgg19_bn", "image_size", expected, f"{image_size}", "resize the images"))
    return VGG(num_classes, channels, dropout)
