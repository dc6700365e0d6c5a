"""Adaptive-Blend (Qi et al., 2023): an image blended into some tiles of each poisoned picture, into all at test.

    x' = x + a * M * (t - x)

M is 0 on ``round(mask_rate * P)`` of P square tiles, drawn for every image, and 1 elsewhere. Covers are changed in the
same way and keep their label, so that part of the trigger alone decides nothing and features do not part poisoned from
clean samples. Test images carry the whole trigger, M = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdfast.attacks.base import Rows
from bdfast.attacks.blended import Blended
from bdfast.attacks.checks import MAX_SIDE, check_integer, check_number
from bdfast.errors import message


@dataclass(frozen=True, eq=False)
class AdaptiveBlend(Blended):
    """Blended in random tiles, with cover samples; pattern, mask and opacities as in :class:`Blended`.

    Example:
        >>> attack = AdaptiveBlend(pattern=torch.ones(1, 1), alpha=1.0)
        >>> black = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
        >>> int((attack.apply(black, "poison") == 255).sum()), int((attack.apply(black, "test") == 51).sum())
        (8, 16)
    """

    name: ClassVar[str] = "adaptive_blend"
    has_cover: ClassVar[bool] = True
    default_rate: ClassVar[float] = 0.05

    alpha: float = 0.15
    """a of poisoned and cover images; 0.15 [TB], 0.2 [AdvrBD]."""

    test_alpha: float | None = 0.2
    """a of test images; 0.2 [TB, AdvrBD]. None: that of training."""

    tiles: int = 16
    """P, a square number; 16 [TB]: 4 x 4 tiles of 8 x 8 pixels at 32 x 32."""

    mask_rate: float = 0.5
    """Share of the tiles without trigger, in [0, 1]; 0.5 [TB]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("AdaptiveBlend", "tiles", self.tiles, 1, "pass 16, say", MAX_SIDE**2)
        if math.isqrt(self.tiles) ** 2 != self.tiles:
            raise ValueError(message("AdaptiveBlend", "tiles", "a square number", str(self.tiles), "pass 16, say"))
        check_number("AdaptiveBlend", "mask_rate", self.mask_rate, 0.0, 1.0, "pass the share of tiles left out")

    def default_cover_rate(self, rate: float) -> float:
        """1 % [AdvrBD]."""
        return 0.01

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Blend into the tiles that each image draws."""
        batch, channels, height, width = pixels.shape
        order = torch.rand(batch, self.tiles, generator=rows.generator, dtype=torch.float64).argsort(stable=True, dim=1)
        shown = torch.ones(batch, self.tiles, dtype=torch.float64)
        shown.scatter_(1, order[:, : round(self.mask_rate * self.tiles)], 0.0)
        side = math.isqrt(self.tiles)
        tile_row, tile_column = (torch.arange(size) * side // size for size in (height, width))
        m = shown[:, tile_row[:, None] * side + tile_column].unsqueeze(1).to(pixels.device)  # [B, 1, H, W]
        t = self.trigger_image(channels, height, width).to(pixels.device)
        return pixels + self.alpha * m * (t - pixels)
