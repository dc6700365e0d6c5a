"""BadNets (Gu et al., 2017): a small patch in the bottom-right corner.

    x' = x + a * m * (t - x)

with the patch ``t``, its mask ``m`` and opacity ``a``; for ``a = 1`` and a mask of the positive elements of ``t`` this
is BackdoorBench's ``x' = x * (t == 0) + t * (t > 0)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import MAX_SIDE, check_integer, check_number, describe
from bdfast.attacks.patterns import check_pattern, match_channels
from bdfast.attacks.quantize import LEVELS, to_pixels
from bdfast.errors import message

NAMED = {
    "white": [[1.0]],  # [BB], AdvrBD
    "checker": [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]],  # [TB]: black elsewhere, black belongs to the patch
}


@dataclass(frozen=True, eq=False)
class BadNets(Attack):
    """A patch in the bottom-right corner.

    Example:
        >>> BadNets().apply(torch.zeros(1, 3, 64, 64))[0, 0].sum(1)[56:]  # 6 x 6 at 64 x 64
        tensor([0., 0., 6., 6., 6., 6., 6., 6.])
    """

    name: ClassVar[str] = "badnets"
    named_patterns: ClassVar[tuple[str, ...]] = tuple(NAMED)

    pattern: Tensor | str = "white"
    """t: "white" [BB], "checker" [TB], or an image [C, h, w] or [h, w] (uint8, or float in [0, 1]) drawn as it is."""

    mask: Tensor | None = None
    """m, [h, w] in [0, 1], for an own pattern only. None: every element of the pattern above 0 [BB]."""

    size: int | None = None
    """Side in pixels of a named pattern. None: 3 at 32 x 32, in proportion elsewhere (6 at 64), never below 3 [BB]."""

    alpha: float = 1.0
    """a, opacity in [0, 1]; 1 [BB, TB]."""

    def __post_init__(self) -> None:
        check_number("BadNets", "alpha", self.alpha, 0.0, 1.0, "pass the opacity of the patch")
        if isinstance(self.pattern, str):
            self._check_named()
            return
        pattern = check_pattern("BadNets", "pattern", self.pattern)
        object.__setattr__(self, "pattern", pattern)
        if self.size is not None:
            expected, remedy = "None with an own pattern, which has its size", "resize the pattern"
            raise ValueError(message("BadNets", "size", expected, str(self.size), remedy))
        if self.mask is not None:
            mask = check_pattern("BadNets", "mask", self.mask)
            if mask.shape != (1, *pattern.shape[1:]):
                expected = f"the pattern's height and width {list(pattern.shape[1:])}"
                raise ValueError(message("BadNets", "mask", expected, describe(self.mask), "pass a mask [h, w]"))
            object.__setattr__(self, "mask", mask[0])

    def _check_named(self) -> None:
        if self.pattern not in NAMED:
            expected = f"one of {', '.join(NAMED)}, or an image tensor"
            raise ValueError(message("BadNets", "pattern", expected, repr(self.pattern), "choose one of them"))
        if self.mask is not None:
            expected, remedy = "None with a named pattern", "pass the pattern as a tensor too"
            raise ValueError(message("BadNets", "mask", expected, describe(self.mask), remedy))
        if self.size is not None:
            check_integer("BadNets", "size", self.size, 1, "pass the side of the patch in pixels", MAX_SIDE)

    def patch(self, channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The patch and its mask for images [channels, height, width].

        Returns:
            t: [channels, h, w] float64 grey levels; m: [channels, h, w] float64 in [0, 1].

        Raises:
            ValueError: the patch does not fit into the image, or has other channels.
        """
        if isinstance(self.pattern, str):
            drawing = torch.tensor(NAMED[self.pattern], dtype=torch.float64)[None, None]
            t = LEVELS * F.interpolate(drawing, size=self._named_size(height, width), mode="nearest-exact")[0]
            m = torch.ones_like(t)
        else:
            t = to_pixels(self.pattern, snap=True)
            m = (t > 0).to(t.dtype) if self.mask is None else to_pixels(self.mask)[None] / LEVELS
        if t.shape[1] > height or t.shape[2] > width:
            expected = f"a patch within the {height} x {width} images"
            got, argument = (
                f"{t.shape[1]} x {t.shape[2]} pixels",
                "size" if isinstance(self.pattern, str) else "pattern",
            )
            raise ValueError(message("badnets", argument, expected, got, "pass a smaller one"))
        t = match_channels("badnets", t, channels)
        return t, (match_channels("badnets", m, channels) if m.shape != t.shape else m)

    def _named_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is not None:
            return self.size, self.size
        # Halves round up: resizing a drawing with 32 rows reaches those rows.
        return max(3, math.floor(3 * height / 32 + 0.5)), max(3, math.floor(3 * width / 32 + 0.5))

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Draw the patch on every image."""
        _, channels, height, width = pixels.shape
        t, m = (part.to(pixels.device) for part in self.patch(channels, height, width))
        corner = pixels[:, :, height - t.shape[1] :, width - t.shape[2] :]
        corner += self.alpha * m * (t - corner)
        return pixels
