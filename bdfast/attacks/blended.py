"""Blended (Chen et al., 2017): a full-size image mixed into every poisoned one.

x' = (1 - a) * x + a * t
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number
from bdfast.attacks.patterns import blend_proc, check_pattern, fit, read_image, uniform_noise

GENERATED = {"blend-proc": blend_proc, "noise": uniform_noise}


@dataclass(frozen=True, eq=False)
class Blended(Attack):
    """A trigger image blended over the whole picture.

    Example:
        >>> grey = torch.full((1, 1, 2, 2), 100, dtype=torch.uint8)
        >>> Blended(pattern=torch.tensor([[255, 0], [50, 51]], dtype=torch.uint8)).apply(grey)
        tensor([[[[131,  80],
                  [ 90,  90]]]], dtype=torch.uint8)
    """

    name: ClassVar[str] = "blended"
    named_patterns: ClassVar[tuple[str, ...]] = tuple(GENERATED)

    pattern: Tensor | str | os.PathLike[str] = "blend-proc"
    """t: "blend-proc" (cosines and a checker), "noise" (independent uniform pixels), an image [C, h, w] or [h, w]
    (uint8, or float in [0, 1]), or the path of an image file. Resized to the data set's size. [BB]'s is Hello Kitty."""

    alpha: float = 0.2
    """a of poisoned training images, in [0, 1]; 0.2 [BB, AdvrBD]."""

    test_alpha: float | None = None
    """a of test images. None: that of training [BB, AdvrBD]."""

    pattern_seed: int = 0
    """Seed of a generated pattern. Apart from the run's seed: runs differ in the samples, not in the trigger."""

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_number(where, "alpha", self.alpha, 0.0, 1.0, "pass the opacity of the trigger image")
        if self.test_alpha is not None:
            check_number(where, "test_alpha", self.test_alpha, 0.0, 1.0, "pass the opacity at test time")
        check_integer(where, "pattern_seed", self.pattern_seed, 0, "pass a seed")
        pattern = self.pattern
        if isinstance(pattern, os.PathLike) or (isinstance(pattern, str) and pattern not in GENERATED):
            pattern = read_image(where, pattern)
        if not isinstance(pattern, str):
            pattern = check_pattern(where, "pattern", pattern)
        object.__setattr__(self, "pattern", pattern)

    def trigger_image(self, channels: int, height: int, width: int) -> Tensor:
        """t for images of this shape: [channels, height, width] float64 grey levels in [0, 255]."""
        shape = (channels, height, width)
        if isinstance(self.pattern, str):
            return GENERATED[self.pattern](shape, self.pattern_seed)
        assert isinstance(self.pattern, torch.Tensor)  # a path was read in __post_init__
        return fit(self.name, self.pattern, shape)

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Blend with the training opacity."""
        return self._blend(pixels, self.alpha)

    def test_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Blend with the test opacity."""
        return self._blend(pixels, self.alpha if self.test_alpha is None else self.test_alpha)

    def _blend(self, pixels: Tensor, a: float) -> Tensor:
        _, channels, height, width = pixels.shape
        t = self.trigger_image(channels, height, width).to(pixels.device)
        return (1 - a) * pixels + a * t
