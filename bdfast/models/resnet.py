"""ResNet: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016.

::

    x_{l+1} = relu(bn2(conv2(relu(bn1(conv1(x_l))))) + shortcut(x_l))

Module names are torchvision's. Small images get the stem of the paper's CIFAR section, a 3x3 convolution of stride 1
and no max pool; large ones its ImageNet stem, 7x7 of stride 2 and a max pool. The two differ in the shape of
``conv1.weight`` and in no name.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from bdfast.errors import message
from bdfast.models.init import he_init_

_SMALL = 64  # pixels: up to the size of Tiny-ImageNet, an overall stride of 32 leaves too little to look at


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C, H / stride, W / stride]
        identity = x if self.downsample is None else self.downsample(x)
        residual = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(residual + identity)
        return out


class ResNet(nn.Module):
    """Stem, four stages of 64, 128, 256 and 512 channels, global average pool, ``fc`` head."""

    def __init__(
        self, depths: tuple[int, int, int, int], num_classes: int, channels: int, stem: Literal["cifar", "imagenet"]
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            self.maxpool: nn.Module = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(channels, 64, 7, 2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.layer1 = _stage(64, 64, depths[0], stride=1)
        self.layer2 = _stage(64, 128, depths[1], stride=2)
        self.layer3 = _stage(128, 256, depths[2], stride=2)
        self.layer4 = _stage(256, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        he_init_(self)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K]
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(depth - 1)))


def resnet18(
    num_classes: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    stem: Literal["cifar", "imagenet"] | None = None,
) -> ResNet:
    """ResNet-18: 122 tensors, 11,173,962 parameters for 10 classes of small RGB images.

    Args:
        stem: ``"cifar"`` (3x3, stride 1) or ``"imagenet"`` (7x7, stride 2, max pool; what torchvision always has);
            by default the first up to 64 pixels and the second above.
    """
    return ResNet((2, 2, 2, 2), num_classes, channels, _stem("resnet18", stem, image_size))


def resnet34(
    num_classes: int,
    image_size: tuple[int, int],
    channels: int,
    *,
    stem: Literal["cifar", "imagenet"] | None = None,
) -> ResNet:
    """ResNet-34: 218 tensors, 21,282,122 parameters for 10 classes of small RGB images; ``stem`` as in resnet18."""
    return ResNet((3, 4, 6, 3), num_classes, channels, _stem("resnet34", stem, image_size))


def _stem(
    where: str, stem: Literal["cifar", "imagenet"] | None, image_size: tuple[int, int]
) -> Literal["cifar", "imagenet"]:
    if stem is None:
        return "cifar" if max(image_size) <= _SMALL else "imagenet"
    if stem not in ("cifar", "imagenet"):
        remedy = "leave it out to choose by image size"
        raise ValueError(message(where, "stem", '"cifar" or "imagenet"', repr(stem), remedy))
    return stem
