"""A network small enough to train on two CPU cores in seconds, for the 8x8 digits of scikit-learn."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Three 3x3 convolutions with batch norm and ReLU (32, 64, 64), global average pool, ``linear`` head."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K]
        x = self.relu1(self.bn1(self.conv1(images)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


def digits_cnn(num_classes: int, image_size: tuple[int, int], channels: int) -> DigitsCNN:
    """The digits network: 20 tensors, 56,554 parameters for 10 classes of grayscale images of any size."""
    return DigitsCNN(num_classes, channels)
