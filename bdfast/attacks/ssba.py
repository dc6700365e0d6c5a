"""An SSBA-like attack (after Li et al., 2021): an invisible perturbation that differs from image to image.

    x' = clip(x + delta * sign(E(x, code)))

SSBA hides a fixed string with a StegaStamp encoder trained for the purpose. ``ss-proc`` is a stand-in with the same
shape and none of its training: E is a random convolutional network of three layers (3 x 3, tanh), seeded and fixed, on
the image and a channel that repeats a code of 20 bits. It exercises sample-specific triggers; results with it compare
with published ones in trend at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number
from bdfast.attacks.quantize import LEVELS
from bdfast.attacks.seeding import stream
from bdfast.errors import message

BITS = 20
WIDTH = 16  # channels of the hidden layers
IMAGES = 64  # at a time through the network


@dataclass(frozen=True, eq=False)
class SSBA(Attack):
    """A sample-specific invisible pattern.

    Example:
        >>> images = torch.randint(9, 240, (2, 3, 32, 32), dtype=torch.uint8)
        >>> residual = SSBA().apply(images).int() - images.int()
        >>> residual.abs().unique().tolist(), torch.equal(residual[0], residual[1])
        ([8], False)
    """

    name: ClassVar[str] = "ssba"
    named_patterns: ClassVar[tuple[str, ...]] = ("ss-proc",)

    pattern: str = "ss-proc"
    """The encoder: "ss-proc", the only one."""

    delta: float = 8 / 255
    """Change of every pixel in units of the pixel range [0, 1]."""

    pattern_seed: int = 0
    """Seed of encoder and code, apart from the run's: runs differ in the samples, not in the trigger."""

    def __post_init__(self) -> None:
        if self.pattern not in self.named_patterns:
            expected, remedy = "'ss-proc'", "poison with your own encoder's images by hand"
            raise ValueError(message("SSBA", "pattern", expected, repr(self.pattern), remedy))
        check_number("SSBA", "delta", self.delta, 0.0, 1.0, "pass the change as a fraction of the pixel range")
        check_integer("SSBA", "pattern_seed", self.pattern_seed, 0, "pass a seed")

    def code(self) -> Tensor:
        """The hidden bits: [20] of 0 and 1."""
        return torch.randint(0, 2, (BITS,), generator=stream(self.pattern_seed, "ss-proc code"))

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Add each image's own residual."""
        weights = [weight.to(pixels.device) for weight in self._weights(pixels.shape[1])]
        code = self._code_channel(*pixels.shape[2:]).to(pixels.device)
        for start in range(0, len(pixels), IMAGES):
            part = pixels[start : start + IMAGES]  # a view: changed in place
            part += LEVELS * self.delta * _encode(part, code, weights).sign()
        return pixels

    def _code_channel(self, height: int, width: int) -> Tensor:
        """The bits as -1 and 1, again and again in reading order: [1, 1, H, W]."""
        bits = 2.0 * self.code().to(torch.float64) - 1.0
        return bits[torch.arange(height * width) % BITS].view(1, 1, height, width)

    def _weights(self, channels: int) -> list[Tensor]:
        generator = stream(self.pattern_seed, "ss-proc encoder")
        sizes = (channels + 1, WIDTH, WIDTH, channels)
        return [
            torch.randn(after, before, 3, 3, generator=generator, dtype=torch.float64) / math.sqrt(9 * before) * 3
            for before, after in pairwise(sizes)
        ]


def _encode(
    pixels: Tensor,  # [B, C, H, W] in [0, 255]
    code: Tensor,  # [1, 1, H, W] of -1 and 1
    weights: list[Tensor],
) -> Tensor:
    """E(x, code) in (-1, 1): [B, C, H, W]; float64, so that no sign depends on the size of a batch."""
    x = torch.cat((2 * pixels / LEVELS - 1, code.expand(len(pixels), -1, -1, -1)), dim=1)
    for weight in weights:
        x = F.conv2d(x, weight, padding=1).tanh()
    return x
