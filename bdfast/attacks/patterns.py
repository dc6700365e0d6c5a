"""Trigger images: read from a file, fitted to a data set, or generated.

The generated ones replace pictures that cannot be redistributed (Hello Kitty, LF's stored pattern). They are named
``*-proc``: results with them compare with published numbers in trend only.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.attacks.checks import describe
from bdfast.attacks.quantize import LEVELS, to_pixels
from bdfast.attacks.seeding import stream
from bdfast.errors import message, optional_import

MAX_FILE_PIXELS = 1 << 26  # 64 Mpixel: far above any trigger, far below a decompression bomb


def read_image(where: str, path: str | os.PathLike[str]) -> Tensor:
    """An image file as RGB uint8 [3, H, W].

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or more than 64 megapixels.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            message(where, "pattern", "the path of an image file", repr(str(file)), "check the path")
        )
    pil = optional_import("PIL.Image", extra="data", purpose="to read trigger images")
    try:
        with pil.open(file) as image:
            if image.width * image.height > MAX_FILE_PIXELS:
                expected = f"an image of at most {MAX_FILE_PIXELS} pixels"
                got = f"{image.width} x {image.height} in {file}"
                raise ValueError(message(where, "pattern", expected, got, "resize the file"))
            array = np.array(image.convert("RGB"))
    except (OSError, pil.DecompressionBombError) as error:
        expected, remedy = "an image that Pillow can read", "pass PNG or JPEG"
        raise ValueError(message(where, "pattern", expected, f"{file} ({error})", remedy)) from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def check_pattern(where: str, argument: str, pattern: Tensor) -> Tensor:
    """A private CPU copy of a user's image [C, h, w] or [h, w], uint8 or float in [0, 1], as [C, h, w]."""
    expected = "an image [C, h, w] or [h, w], uint8 or float in [0, 1]"
    remedy = "convert with torch.as_tensor"
    if not isinstance(pattern, Tensor) or not (pattern.dtype == torch.uint8 or pattern.is_floating_point()):
        raise TypeError(message(where, argument, expected, describe(pattern), remedy))
    if pattern.ndim not in (2, 3) or pattern.numel() == 0:
        raise ValueError(message(where, argument, expected, describe(pattern), "pass one image, channels first"))
    if pattern.is_floating_point() and not bool(((pattern >= 0) & (pattern <= 1)).all()):
        raise ValueError(message(where, argument, expected, "values outside [0, 1]", "divide by 255, or clamp"))
    pattern = pattern.detach().cpu().clone()
    return pattern if pattern.ndim == 3 else pattern.unsqueeze(0)


def match_channels(
    where: str,
    pixels: Tensor,  # [c, h, w]
    channels: int,
) -> Tensor:
    """The pattern with the data set's channels: grey is repeated, RGB becomes luma (ITU-R 601) for grey images."""
    if len(pixels) == channels:
        return pixels
    if len(pixels) == 1:
        return pixels.expand(channels, -1, -1)
    if len(pixels) == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114], dtype=pixels.dtype)
        return (weights[:, None, None] * pixels).sum(0, keepdim=True)
    expected = f"1 channel or {channels}, as the images have"
    raise ValueError(message(where, "pattern", expected, f"{len(pixels)} channels", "convert the pattern"))


def fit(
    where: str,
    pattern: Tensor,  # [c, h, w] uint8, or float in [0, 1]
    shape: tuple[int, int, int],
) -> Tensor:
    """The pattern in a data set's ``shape``: [C, H, W] float64 grey levels, resized bilinearly with anti-aliasing."""
    channels, *size = shape
    pixels = to_pixels(pattern, snap=True)
    if list(pixels.shape[1:]) != size:
        pixels = F.interpolate(pixels[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    return match_channels(where, pixels, channels)


def blend_proc(
    shape: tuple[int, int, int],  # C, H, W
    seed: int,
) -> Tensor:
    """Three parts of six random cosines a channel (1 to 4 cycles an image) and one part of a 4 x 4 tile checker.

    Tiles are 8 pixels at 32 x 32 and scale with the image, so that the pattern is the same at every size.
    Returns [C, H, W] float64 in [0, 255].
    """
    channels, height, width = shape
    generator = stream(seed, "blend-proc")
    row = torch.arange(height, dtype=torch.float64)[:, None] / height  # [H, 1]
    column = torch.arange(width, dtype=torch.float64)[None, :] / width  # [1, W]
    cycles = torch.randint(1, 5, (channels, 6, 2, 1, 1), generator=generator).to(torch.float64)
    phase = torch.rand(channels, 6, 1, 1, generator=generator, dtype=torch.float64)
    waves = torch.cos(2 * math.pi * (cycles[:, :, 0] * row + cycles[:, :, 1] * column + phase)).sum(1)
    checker = ((row * 4).floor() + (column * 4).floor()) % 2
    return LEVELS * (0.75 * _unit_range(waves, dim=(1, 2)) + 0.25 * checker)


def uniform_noise(
    shape: tuple[int, int, int],  # C, H, W
    seed: int,
) -> Tensor:
    """Independent U(0, 255) pixels: [C, H, W] float64."""
    return LEVELS * torch.rand(shape, generator=stream(seed, "noise"), dtype=torch.float64)


def lf_proc(
    shape: tuple[int, int, int],  # C, H, W
    seed: int,
) -> Tensor:
    """Normal noise in the 4 x 4 lowest DCT-II coefficients without the DC one, min-max normalised over the image.

    Returns [C, H, W] float64 in [0, 1].
    """
    channels, height, width = shape
    coefficients = torch.randn(channels, 4, 4, generator=stream(seed, "lf-proc"), dtype=torch.float64)
    coefficients[:, 0, 0] = 0.0
    return _unit_range(_cosines(height) @ coefficients @ _cosines(width).T, dim=(0, 1, 2))


def _cosines(size: int) -> Tensor:
    """DCT-II basis of the four lowest frequencies: [size, 4]."""
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.cos(math.pi * position[:, None] * torch.arange(4, dtype=torch.float64))


def _unit_range(values: Tensor, dim: tuple[int, ...]) -> Tensor:
    lowest, highest = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    return (values - lowest) / (highest - lowest).clamp(min=torch.finfo(values.dtype).tiny)  # a single pixel gives 0
