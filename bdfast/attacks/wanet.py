"""WaNet (Nguyen and Tran, 2021): a smooth, barely visible warp.

    n    = bicubic upsampling (align_corners) of P / mean|P|,    P ~ U(-1, 1) on a k x k grid of 2-vectors
    grid = clamp(I + s * n / H, -1, 1) * rescale,                I the identity grid on [-1, 1], order (x, y)
    x'   = bilinear sampling of x at grid (zero padding, align_corners)

Covers ("noise" or "cross" samples) are warped by ``clamp(grid + U(-1, 1) / H, -1, 1)``, drawn anew for every pixel and
image, and keep their labels: they teach the model that only this one warp is the trigger. One ``n`` a run.

For non-square images H stands for the width in x and for the height in y, so that s keeps its meaning in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import MAX_SIDE, check_integer, check_number
from bdfast.attacks.seeding import stream


@dataclass(frozen=True, eq=False)
class WaNet(Attack):
    """A warping trigger with cover samples.

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
        >>> attack = WaNet(grid_seed=0)
        >>> torch.equal(attack.apply(images, "poison"), attack.apply(images, "test"))
        True
    """

    name: ClassVar[str] = "wanet"
    has_cover: ClassVar[bool] = True

    s: float = 0.5
    """s, warping strength: pixels move by about s / 2 on average; 0.5 [BB, TB, AdvrBD]."""

    k: int = 4
    """k, side of the coarse grid; 4 [BB, TB, AdvrBD]."""

    grid_rescale: float = 1.0
    """rescale of the grid; 1 [BB, TB, AdvrBD]. Above 1 the border samples zeros."""

    cover_ratio: float = 2.0
    """Covers for each poisoned image where ``cover_rate`` is not given; 2 [BB]. [TB, AdvrBD] name cover_rate."""

    grid_seed: int | None = None
    """Seed of n. None: the seed of the run."""

    def __post_init__(self) -> None:
        check_number("WaNet", "s", self.s, 0.0, 1e3, "pass the warping strength")
        check_integer("WaNet", "k", self.k, 2, "pass the side of the coarse grid", MAX_SIDE)
        check_number("WaNet", "grid_rescale", self.grid_rescale, 0.0, 1e3, "pass the factor of the grid")
        check_number("WaNet", "cover_ratio", self.cover_ratio, 0.0, 1e3, "pass the covers for each poisoned image")
        if self.grid_seed is not None:
            check_integer("WaNet", "grid_seed", self.grid_seed, 0, "pass a seed, or None for that of the run")

    def default_cover_rate(self, rate: float) -> float:
        """``cover_ratio`` covers for each poisoned image."""
        return self.cover_ratio * rate

    def for_run(self, seed: int) -> WaNet:
        """With the run's grid, unless ``grid_seed`` names one."""
        return replace(self, grid_seed=seed) if self.grid_seed is None else self

    def grid(self, height: int, width: int) -> Tensor:
        """The trigger's sampling grid: [height, width, 2] float64, last axis (x, y), 1 = the far border."""
        generator = stream(self.grid_seed or 0, "wanet")
        coarse = torch.rand(1, 2, self.k, self.k, generator=generator, dtype=torch.float64) * 2 - 1
        coarse = coarse / coarse.abs().mean()
        n = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        y, x = torch.meshgrid(_unit_axis(height), _unit_axis(width), indexing="ij")
        size = torch.tensor([width, height], dtype=torch.float64)
        return (torch.stack((x, y), dim=-1) + self.s * n / size).clamp(-1, 1) * self.grid_rescale

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Warp with the run's grid."""
        grid = self.grid(*pixels.shape[2:]).to(pixels.device)
        return _sample(pixels, grid.expand(len(pixels), -1, -1, -1))

    def cover_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Warp each image with the run's grid and noise of its own."""
        height, width = pixels.shape[2:]
        noise = torch.rand(len(pixels), height, width, 2, generator=rows.generator, dtype=torch.float64) * 2 - 1
        size = torch.tensor([width, height], dtype=torch.float64)
        return _sample(pixels, (self.grid(height, width) + noise / size).clamp(-1, 1).to(pixels.device))


def _unit_axis(size: int) -> Tensor:
    return torch.linspace(-1, 1, size, dtype=torch.float64)


def _sample(pixels: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
