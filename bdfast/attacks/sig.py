"""SIG (Barni et al., 2019): vertical sine stripes on images of the target class, whose labels stay.

x' = clip(x + D * sin(2 * pi * j * f / W)),    j the column, W the width
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_number
from bdfast.attacks.quantize import LEVELS


@dataclass(frozen=True, eq=False)
class SIG(Attack):
    """A sinusoidal signal, the same in every row and channel; clean label.

    Example:
        >>> SIG(freq=1).apply(torch.full((1, 1, 1, 4), 100, dtype=torch.uint8))
        tensor([[[[100, 140, 100,  60]]]], dtype=torch.uint8)
    """

    name: ClassVar[str] = "sig"
    clean_label: ClassVar[bool] = True

    delta: float = 40 / 255
    """D, amplitude in units of the pixel range [0, 1]; 40/255 [BB], 30/255 [TB]."""

    freq: float = 6.0
    """f, cycles an image width; 6 [BB, TB]."""

    def __post_init__(self) -> None:
        check_number("SIG", "delta", self.delta, 0.0, 1.0, "pass the amplitude as a fraction of the pixel range")
        check_number("SIG", "freq", self.freq, 0.0, math.inf, "pass the cycles in an image width")

    def signal(self, width: int) -> Tensor:
        """D * sin(2 pi j f / W) in grey levels: [width] float64."""
        column = torch.arange(width, dtype=torch.float64)
        return LEVELS * self.delta * torch.sin(2 * math.pi * column * self.freq / width)

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Add the stripes."""
        return pixels + self.signal(pixels.shape[-1]).to(pixels.device)
