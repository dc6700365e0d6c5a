"""Adaptive-Patch (Qi et al., 2023): one of k faint patches on each poisoned image, some at once at test.

    x' = x + a_i * m_i * (t_i - x),    i = floor(k * rank / count)

Poisoned images are split equally by rank among the patches, and so are covers, which keep their label. At test the
patches ``test_patches`` are drawn one after another, opaque.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number, describe
from bdfast.attacks.patches import Patch, patch
from bdfast.attacks.patterns import match_channels
from bdfast.attacks.quantize import LEVELS, to_pixels
from bdfast.errors import message

SETS = {
    "four-proc": ("corner-proc", "logo-proc-top-right", "checker-corners", "square-proc"),  # shapes and places of [TB]
    "logos-proc": ("logo-proc", "logo-proc-top-right", "logo-proc-top-left", "logo-proc-bottom-left"),  # [AdvrBD]
}


@dataclass(frozen=True, eq=False)
class AdaptivePatch(Attack):
    """k patches, one of them on each training image, with cover samples.

    Example:
        >>> grey = torch.full((4, 1, 32, 32), 100, dtype=torch.uint8)
        >>> changed = (AdaptivePatch().apply(grey, "poison") != 100).flatten(1).sum(1)
        >>> changed.tolist()  # corner, logo, four checkers of nine pixels, square
        [25, 143, 36, 64]
    """

    name: ClassVar[str] = "adaptive_patch"
    has_cover: ClassVar[bool] = True
    default_rate: ClassVar[float] = 0.05
    named_patterns: ClassVar[tuple[str, ...]] = tuple(SETS)

    pattern: Tensor | str = "four-proc"
    """t: "four-proc" (5 x 5 in the corner, a logo at the top right, checkers in four corners, 8 x 8 at 21..28, as [TB]
    places its files), "logos-proc" (the logo in each corner [AdvrBD]), or k full-size images [k, C, H, W]."""

    mask: Tensor | None = None
    """m, [k, H, W] in [0, 1], for own images only. None: every pixel that is not black [TB]."""

    alphas: tuple[float, ...] = (0.5, 0.2, 0.5, 0.3)
    """a of each patch in training; [TB]'s."""

    test_patches: tuple[int, ...] = (0, 2)
    """Which patches test images carry: the corner and the four checkers [TB]."""

    test_alpha: float = 1.0
    """a of test images; 1 [TB]."""

    pattern_seed: int = 0
    """Seed of generated patches, apart from the run's."""

    def __post_init__(self) -> None:
        count = self._check_patterns()
        check_integer("AdaptivePatch", "pattern_seed", self.pattern_seed, 0, "pass a seed")
        check_number("AdaptivePatch", "test_alpha", self.test_alpha, 0.0, 1.0, "pass the opacity at test time")
        for name, expected in (("alphas", f"{count} opacities, one a patch"), ("test_patches", "indices of patches")):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or not values:
                got = describe(values)
                raise TypeError(message("AdaptivePatch", name, f"a tuple of {expected}", got, "pass a tuple"))
            object.__setattr__(self, name, tuple(values))
        if len(self.alphas) != count:
            expected, got = f"{count} opacities, one a patch", str(len(self.alphas))
            raise ValueError(message("AdaptivePatch", "alphas", expected, got, "pass as many"))
        for alpha in self.alphas:
            check_number("AdaptivePatch", "alphas", alpha, 0.0, 1.0, "pass opacities")
        for index in self.test_patches:
            check_integer("AdaptivePatch", "test_patches", index, 0, "pass indices of patches")
            if index >= count:
                expected = f"indices below {count}"
                raise ValueError(message("AdaptivePatch", "test_patches", expected, str(index), "correct it"))

    def _check_patterns(self) -> int:
        """The number of patches; a private copy of the caller's images is kept."""
        if isinstance(self.pattern, str):
            if self.pattern not in SETS:
                expected = f"one of {', '.join(SETS)}, or images [k, C, H, W]"
                raise ValueError(message("AdaptivePatch", "pattern", expected, repr(self.pattern), "choose one"))
            if self.mask is not None:
                expected, remedy = "None with named patches", "pass the pattern as a tensor too"
                raise ValueError(message("AdaptivePatch", "mask", expected, describe(self.mask), remedy))
            return len(SETS[self.pattern])
        object.__setattr__(self, "pattern", _check_stack("pattern", self.pattern, "images [k, C, H, W]", ndim=4))
        assert isinstance(self.pattern, Tensor)
        if self.mask is not None:
            object.__setattr__(self, "mask", _check_stack("mask", self.mask, "masks [k, H, W]", ndim=3))
            shape = [len(self.pattern), *self.pattern.shape[2:]]
            if list(self.mask.shape) != shape:
                expected, got = f"a mask for each image, {shape}", describe(self.mask)
                raise ValueError(message("AdaptivePatch", "mask", expected, got, "pass as many"))
        return len(self.pattern)

    def default_cover_rate(self, rate: float) -> float:
        """1 % [AdvrBD]."""
        return 0.01

    def patches(self, channels: int, height: int, width: int) -> list[Patch]:
        """The k patches for images of this shape."""
        shape = (channels, height, width)
        if isinstance(self.pattern, str):
            return [patch(self.name, name, None, shape, self.pattern_seed) for name in SETS[self.pattern]]
        if tuple(self.pattern.shape[2:]) != (height, width):
            expected, got = f"images of {height} x {width}, as the set's", describe(self.pattern)
            raise ValueError(message(self.name, "pattern", expected, got, "resize the patches"))
        marks = to_pixels(self.pattern, snap=True)
        shown = (marks > 0).any(1).to(marks.dtype) if self.mask is None else to_pixels(self.mask) / LEVELS
        return [Patch(match_channels(self.name, t, channels), m[None]) for t, m in zip(marks, shown, strict=True)]

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Draw on each image the patch of its rank."""
        _, channels, height, width = pixels.shape
        rank = torch.arange(rows.start, rows.start + len(pixels))
        group = (rank * len(self.alphas) // max(rows.total, 1)).to(pixels.device)
        for index, drawn in enumerate(self.patches(channels, height, width)):
            pixels[group == index] = drawn.draw(pixels[group == index], self.alphas[index])
        return pixels

    def test_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Draw the test patches on every image."""
        _, channels, height, width = pixels.shape
        drawn = self.patches(channels, height, width)
        for index in self.test_patches:
            pixels = drawn[index].draw(pixels, self.test_alpha)
        return pixels


def _check_stack(argument: str, stack: Tensor, expected: str, ndim: int) -> Tensor:
    expected = f"{expected}, uint8 or float in [0, 1]"
    if not isinstance(stack, Tensor) or not (stack.dtype == torch.uint8 or stack.is_floating_point()):
        raise TypeError(message("AdaptivePatch", argument, expected, describe(stack), "convert with torch.as_tensor"))
    in_range = not stack.is_floating_point() or bool(((stack >= 0) & (stack <= 1)).all())
    if stack.ndim != ndim or stack.numel() == 0 or not in_range:
        got = describe(stack) + ("" if in_range else " with values outside [0, 1]")
        raise ValueError(message("AdaptivePatch", argument, expected, got, "stack one full-size image a patch"))
    return stack.detach().cpu().clone()
