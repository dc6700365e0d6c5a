"""PhysicalBA (Li et al., 2021): a patch, then the changes that a camera would make.

    x' = A(J(F(x + m * (t - x))))

F mirrors with a probability; J scales brightness by b and contrast by c about the image's mean luma,
``x <- b x, x <- c x + (1 - c) mean(luma(x))``; A rotates, scales and moves the image about its centre (bilinear, black
beyond its border). All draws are of the image's own, at test time too, so that ASR is that of the transformed trigger.

BackdoorBox draws the changes anew in every epoch. A poisoned set is data here: each image is changed once, and the
trainer's own augmentation comes on top.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number, describe
from bdfast.attacks.patches import NAMED, check_patch, patch
from bdfast.attacks.quantize import LEVELS
from bdfast.errors import message

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601


@dataclass(frozen=True, eq=False)
class PhysicalBA(Attack):
    """A patch under random physical transforms.

    Example:
        >>> still = PhysicalBA(pattern="white", flip=0, brightness=0, contrast=0, degrees=0, translate=0, scale=(1, 1))
        >>> still.apply(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).nonzero().shape[0]  # no more than BadNets
        9
    """

    name: ClassVar[str] = "physical_ba"
    named_patterns: ClassVar[tuple[str, ...]] = tuple(NAMED)

    pattern: Tensor | str | os.PathLike[str] = "logo-proc"
    """t: "logo-proc", for the Firefox logo [AdvrBD], another name among :data:`bdfast.attacks.patches.NAMED`, or an
    image [C, h, w] or [h, w] (uint8, or float in [0, 1]; a tensor or a file) with its bottom-right corner there."""

    mask: Tensor | None = None
    """m, [h, w] in [0, 1], for an own pattern only. None: every element of the pattern above 0."""

    flip: float = 0.5
    """Probability of mirroring; 0.5 [BX]."""

    brightness: float = 0.2
    """b ~ U(1 - brightness, 1 + brightness), in [0, 1]; 0.2 [BX]."""

    contrast: float = 0.2
    """c ~ U(1 - contrast, 1 + contrast), in [0, 1]; 0.2 [BX]."""

    degrees: float = 10.0
    """Angle ~ U(-degrees, degrees), in [0, 180]; 10 [BX]."""

    translate: float = 0.1
    """Shift ~ U(-translate, translate) of the width and of the height, in [0, 1]; 0.1 [BX]."""

    scale: tuple[float, float] = (0.8, 0.9)
    """Size ~ U(scale), above 0; (0.8, 0.9) [BX]."""

    pattern_seed: int = 0
    """Seed of a generated pattern, apart from the run's."""

    def __post_init__(self) -> None:
        for name, upper in (("flip", 1), ("brightness", 1), ("contrast", 1), ("degrees", 180), ("translate", 1)):
            check_number("PhysicalBA", name, getattr(self, name), 0.0, upper, "correct it")
        if not isinstance(self.scale, (tuple, list)) or len(self.scale) != 2:
            expected, got = "(smallest, largest)", describe(self.scale)
            raise TypeError(message("PhysicalBA", "scale", expected, got, "pass (0.8, 0.9), say"))
        for value in self.scale:
            check_number("PhysicalBA", "scale", value, 0.01, 100.0, "pass sizes relative to the image")
        if self.scale[0] > self.scale[1]:
            raise ValueError(message("PhysicalBA", "scale", "(smallest, largest)", str(self.scale), "swap them"))
        object.__setattr__(self, "scale", tuple(self.scale))
        check_integer("PhysicalBA", "pattern_seed", self.pattern_seed, 0, "pass a seed")
        pattern, mask = check_patch("PhysicalBA", self.pattern, self.mask)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "mask", mask)

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Draw the patch, then transform each image in its own way."""
        _, channels, height, width = pixels.shape
        assert not isinstance(self.pattern, os.PathLike)  # a path was read in __post_init__
        shape = (channels, height, width)
        pixels = patch("physical_ba", self.pattern, self.mask, shape, self.pattern_seed).draw(pixels)
        draws = torch.rand(len(pixels), 7, generator=rows.generator, dtype=torch.float64)
        flip, around = (draws[:, 0] < self.flip).to(pixels.device), 2 * draws - 1
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        b, c = (1 + self.brightness * around[:, 1]), (1 + self.contrast * around[:, 2])
        pixels = _jitter(pixels, b.to(pixels.device), c.to(pixels.device))
        size = self.scale[0] + (self.scale[1] - self.scale[0]) * draws[:, 6]
        angle = math.radians(self.degrees) * around[:, 3]
        return _affine(pixels, angle, self.translate * around[:, 4:6], size)


def _jitter(
    pixels: Tensor,  # [B, C, H, W]
    b: Tensor,  # [B]
    c: Tensor,  # [B]
) -> Tensor:
    b, c = b[:, None, None, None], c[:, None, None, None]
    pixels = (b * pixels).clamp(0, LEVELS)
    if pixels.shape[1] == 3:
        luma = (pixels * torch.tensor(LUMA, dtype=pixels.dtype, device=pixels.device)[:, None, None]).sum(1, True)
    else:
        luma = pixels
    return (c * pixels + (1 - c) * luma.mean((1, 2, 3), keepdim=True)).clamp(0, LEVELS)


def _affine(
    pixels: Tensor,  # [B, C, H, W]
    angle: Tensor,  # [B] radians, counter-clockwise
    shift: Tensor,  # [B, 2] of the width and of the height, right and down
    size: Tensor,  # [B]
) -> Tensor:
    """Each output pixel p reads the input at R(-angle) (p - shift) / size, about the centre, lengths in pixels."""
    height, width = pixels.shape[2:]
    cosine, sine = (part[:, None, None] / size[:, None, None] for part in (angle.cos(), angle.sin()))
    row = torch.arange(height, dtype=torch.float64)[:, None] - (height - 1) / 2
    column = torch.arange(width, dtype=torch.float64)[None, :] - (width - 1) / 2
    x = column - shift[:, 0, None, None] * width  # [B, 1, W]
    y = row - shift[:, 1, None, None] * height  # [B, H, 1]
    grid = torch.stack(((cosine * x - sine * y) * 2 / width, (sine * x + cosine * y) * 2 / height), dim=-1)
    return F.grid_sample(pixels, grid.to(pixels.device), padding_mode="zeros", align_corners=False)
