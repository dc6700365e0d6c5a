"""MobileNetV2: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, Table 2.

Module names and strides are torchvision's (an overall stride of 32 at every image size).
"""

from __future__ import annotations

from torch import Tensor, nn

from bdfast.models.init import he_init_

# Table 2: expansion t, output channels c, repeats n, stride s of the first
_BOTTLENECKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM, _LAST = 32, 1280  # channels


def _conv_bn_relu6(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:  # [N, C_in, H, W] -> [N, C, H / stride, W / stride]
    conv = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Expand 1x1, filter each channel 3x3, project 1x1 without activation; a shortcut where the shape stays."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        layers: list[nn.Module] = [] if expansion == 1 else [_conv_bn_relu6(in_channels, hidden, 1)]
        layers.append(_conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden))
        layers += [nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.conv = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:  # [N, C_in, H, W] -> [N, C, H / stride, W / stride]
        out: Tensor = self.conv(x)
        return x + out if self.has_shortcut else out


class MobileNetV2(nn.Module):
    """A 3x3 stem of stride 2, 17 inverted residuals, a 1x1 convolution, global average pool, ``classifier`` head."""

    def __init__(self, num_classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn_relu6(channels, _STEM, 3, stride=2)]
        width = _STEM
        for expansion, out_channels, repeats, stride in _BOTTLENECKS:
            for repeat in range(repeats):
                layers.append(InvertedResidual(width, out_channels, stride if repeat == 0 else 1, expansion))
                width = out_channels
        layers.append(_conv_bn_relu6(width, _LAST, 1))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(_LAST, num_classes))
        he_init_(self, linear_std=0.01)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, K]
        logits: Tensor = self.classifier(self.avgpool(self.features(images)).flatten(1))
        return logits


def mobilenet_v2(num_classes: int, image_size: tuple[int, int], channels: int, *, dropout: float = 0.2) -> MobileNetV2:
    """MobileNetV2 of any image size: 314 tensors, 2,236,682 parameters for 10 classes of RGB images.

    Args:
        dropout: probability, in front of the linear layer.
    """
    return MobileNetV2(num_classes, channels, dropout)
