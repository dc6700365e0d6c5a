"""PreAct-ResNet: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016.

Batch norm and ReLU come before each convolution, so that the identity path stays untouched::

    x_{l+1} = x_l + conv2(relu(bn2(conv1(relu(bn1(x_l))))))

This is the variant of the backdoor benchmarks: no batch norm after the last block, and where the shape changes the
1x1 shortcut reads the activated input ``relu(bn1(x_l))``.
"""

from __future__ import annotations

from torch import Tensor, nn


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind batch norm and ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C, H / stride, W / stride]
        activated = self.relu1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(activated)
        residual: Tensor = self.conv2(self.relu2(self.bn2(self.conv1(activated))))
        return residual + identity


class PreActResNet(nn.Module):
    """A 3x3 stem, four stages of 64, 128, 256 and 512 channels, global average pool, ``linear`` head."""

    def __init__(self, depths: tuple[int, int, int, int], num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, depths[0], stride=1)
        self.layer2 = _stage(64, 128, depths[1], stride=2)
        self.layer3 = _stage(128, 256, depths[2], stride=2)
        self.layer4 = _stage(256, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K]
        features = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        logits: Tensor = self.linear(self.avgpool(features).flatten(1))
        return logits


def _stage(in_channels: int, channels: int, depth: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(depth - 1)))


def preact_resnet18(num_classes: int, image_size: tuple[int, int], channels: int) -> PreActResNet:
    """PreAct-ResNet18 of any image size: 102 tensors, 11,171,146 parameters for 10 classes of RGB images."""
    return PreActResNet((2, 2, 2, 2), num_classes, channels)
