"""LF (Zeng et al., 2021): a fixed, smooth, low-frequency pattern added to the image.

x' = clip(x + v)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number
from bdfast.attacks.patterns import check_pattern, fit, lf_proc
from bdfast.attacks.quantize import LEVELS
from bdfast.errors import message


@dataclass(frozen=True, eq=False)
class LF(Attack):
    """An additive low-frequency pattern.

    Example:
        >>> import torch
        >>> v = LF().trigger_image(3, 32, 32)
        >>> round(v.min().item(), 6), round(v.max().item(), 6)
        (0.0, 51.0)
    """

    name: ClassVar[str] = "lf"
    named_patterns: ClassVar[tuple[str, ...]] = ("lf-proc",)

    pattern: Tensor | str = "lf-proc"
    """v: "lf-proc" (noise in the 4 x 4 lowest DCT coefficients), or an image to add, [C, h, w] or [h, w] (uint8, or
    float in [0, 1]), such as the one that [BB] stores for a data set."""

    magnitude: float = 0.2
    """Peak of "lf-proc" in units of the pixel range [0, 1]; 0.2 [BB] (51 grey levels). Not used with an own image."""

    pattern_seed: int = 0
    """Seed of "lf-proc". Apart from the run's seed: v is fixed for a data set [BB]."""

    def __post_init__(self) -> None:
        check_number("LF", "magnitude", self.magnitude, 0.0, 1.0, "pass the peak as a fraction of the pixel range")
        check_integer("LF", "pattern_seed", self.pattern_seed, 0, "pass a seed")
        if not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", check_pattern("LF", "pattern", self.pattern))
        elif self.pattern != "lf-proc":
            expected = "'lf-proc' or an image tensor"
            raise ValueError(message("LF", "pattern", expected, repr(self.pattern), "choose one of them"))

    def trigger_image(self, channels: int, height: int, width: int) -> Tensor:
        """v for images of this shape: [channels, height, width] float64 grey levels."""
        shape = (channels, height, width)
        if isinstance(self.pattern, str):
            return LEVELS * self.magnitude * lf_proc(shape, self.pattern_seed)
        return fit("lf", self.pattern, shape)

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Add the pattern."""
        _, channels, height, width = pixels.shape
        return pixels + self.trigger_image(channels, height, width).to(pixels.device)
