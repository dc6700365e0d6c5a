"""Patches with their places: a full-size trigger image ``t`` and where it shows, ``m``, for

    x' = x + a * m * (t - x)

Those named ``*-proc`` replace pictures that cannot be redistributed (logos, backdoor-toolbox's trigger files): results
with them compare with published numbers in trend only. Sizes and places are for 32 x 32 and scale with the image.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.badnets import BadNets
from bdfast.attacks.checks import describe
from bdfast.attacks.patterns import check_pattern, read_image
from bdfast.attacks.quantize import LEVELS
from bdfast.attacks.seeding import stream
from bdfast.errors import message


class Patch(NamedTuple):
    """A trigger in its place."""

    t: Tensor  # [C, H, W] float64 grey levels
    m: Tensor  # [C, H, W] or [1, H, W] float64 in [0, 1]

    def draw(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        alpha: float = 1.0,
    ) -> Tensor:
        """x + a * m * (t - x), [B, C, H, W]."""
        t, m = self.t.to(pixels.device), self.m.to(pixels.device)
        return pixels + alpha * m * (t - pixels)


Shape = tuple[int, int, int]  # C, H, W
Corner = tuple[bool, bool]  # at the bottom, at the right


def square_proc(shape: Shape, seed: int) -> Patch:
    """8 x 8 pixels of U(0, 1) noise, 3 from the bottom and 3 from the right (rows and columns 21..28)."""
    return _noise(shape, seed, "square-proc", side=8, margin=3)


def corner_proc(shape: Shape, seed: int) -> Patch:
    """5 x 5 pixels of U(0, 1) noise in the bottom-right corner."""
    return _noise(shape, seed, "corner-proc", side=5, margin=0)


def logo_proc(shape: Shape, seed: int, corner: Corner = (True, True)) -> Patch:
    """A disc of radius 0.2 H with all hues once around, anti-aliased, a pixel from the corner; 13 x 13 pixels."""
    channels, height, width = shape
    side = _scaled(13, min(height, width))
    position = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    y, x = torch.meshgrid(position, position, indexing="ij")
    coverage = (0.2 * min(height, width) + 0.5 - torch.hypot(x, y)).clamp(0, 1)
    # Saturated hues: a cosine a channel, spread evenly over a turn.
    turns = torch.arange(channels, dtype=torch.float64)[:, None, None] / channels
    t = LEVELS * (0.5 + 0.5 * torch.cos(torch.atan2(y, x) - 2 * math.pi * turns))
    return _place(t, coverage[None], shape, corner, _margin(1, min(height, width), side))


def checker_corners(shape: Shape, seed: int) -> Patch:
    """The 3 x 3 checker of BadNets in all four corners."""
    channels, height, width = shape
    checker, _ = BadNets(pattern="checker").patch(channels, height, width)
    parts = [
        _place(checker, torch.ones_like(checker[:1]), shape, (bottom, right), 0)
        for bottom in (False, True)
        for right in (False, True)
    ]
    t = torch.stack([part.t for part in parts]).amax(0)
    return Patch(t, torch.stack([part.m for part in parts]).amax(0))


def _badnets(shape: Shape, seed: int, pattern: str | Tensor, mask: Tensor | None = None) -> Patch:
    t, m = BadNets(pattern=pattern, mask=mask).patch(*shape)
    return _place(t, m, shape, (True, True), 0)


NAMED: dict[str, Callable[[Shape, int], Patch]] = {
    "white": partial(_badnets, pattern="white"),
    "checker": partial(_badnets, pattern="checker"),
    "checker-corners": checker_corners,
    "square-proc": square_proc,
    "corner-proc": corner_proc,
    "logo-proc": logo_proc,
    "logo-proc-top-right": partial(logo_proc, corner=(False, True)),
    "logo-proc-top-left": partial(logo_proc, corner=(False, False)),
    "logo-proc-bottom-left": partial(logo_proc, corner=(True, False)),
}


def check_patch(
    where: str, pattern: Tensor | str | os.PathLike[str], mask: Tensor | None
) -> tuple[Tensor | str, Tensor | None]:
    """A name among :data:`NAMED`, or a user's image (a tensor, or a file that is read here) with its mask."""
    if isinstance(pattern, str) and pattern in NAMED:
        if mask is not None:
            expected, remedy = "None with a named pattern", "pass the pattern as a tensor too"
            raise ValueError(message(where, "mask", expected, describe(mask), remedy))
        return pattern, None
    if isinstance(pattern, (str, os.PathLike)):
        if isinstance(pattern, str) and not os.path.isfile(pattern):
            expected = f"one of {', '.join(NAMED)}, an image tensor or the path of an image file"
            raise ValueError(message(where, "pattern", expected, repr(pattern), "choose one of them"))
        pattern = read_image(where, pattern)
    pattern = check_pattern(where, "pattern", pattern)
    if mask is not None:
        mask = check_pattern(where, "mask", mask)
        if mask.shape != (1, *pattern.shape[1:]):
            expected = f"the pattern's height and width {list(pattern.shape[1:])}"
            raise ValueError(message(where, "mask", expected, describe(mask), "pass a mask [h, w]"))
        mask = mask[0]
    return pattern, mask


def patch(
    where: str,
    pattern: Tensor | str,  # of check_patch
    mask: Tensor | None,  # of check_patch
    shape: Shape,
    seed: int,
) -> Patch:
    """The patch for images of a shape. A user's image is drawn as it is, its bottom-right corner on the image's."""
    if isinstance(pattern, str):
        least = [3, 3] if pattern in ("white", "checker", "checker-corners") else [1, 1]  # the others shrink
    else:
        least = list(pattern.shape[1:])
    if least[0] > shape[1] or least[1] > shape[2]:
        expected = f"a patch within the {shape[1]} x {shape[2]} images"
        raise ValueError(message(where, "pattern", expected, f"{least[0]} x {least[1]} pixels", "pass a smaller one"))
    if isinstance(pattern, str):
        return NAMED[pattern](shape, seed)
    return _badnets(shape, seed, pattern, mask)


def _noise(shape: Shape, seed: int, name: str, side: int, margin: int) -> Patch:
    channels, height, width = shape
    small = min(height, width)
    drawn = torch.rand(channels, side, side, generator=stream(seed, name), dtype=torch.float64)
    size = _scaled(side, small)
    t = LEVELS * F.interpolate(drawn[None], size=(size, size), mode="nearest-exact")[0]
    return _place(t, torch.ones_like(t[:1]), shape, (True, True), _margin(margin, small, size))


def _scaled(pixels: int, small: int) -> int:
    """A length at 32 x 32 in an image whose shorter side is ``small``; at least 3 pixels, at most the image."""
    return min(small, max(3, math.floor(pixels * small / 32 + 0.5)))


def _margin(pixels: int, small: int, size: int) -> int:
    return min(math.floor(pixels * small / 32 + 0.5), small - size)


def _place(t: Tensor, m: Tensor, shape: Shape, corner: Corner, margin: int) -> Patch:
    channels, height, width = shape
    h, w = t.shape[1:]
    top = height - margin - h if corner[0] else margin
    left = width - margin - w if corner[1] else margin
    where = (..., slice(top, top + h), slice(left, left + w))
    whole, mask = (torch.zeros(count, height, width, dtype=torch.float64) for count in (channels, len(m)))
    whole[where] = t
    mask[where] = m
    return Patch(whole, mask)
