"""Grey levels: attacks compute on 0..255 and images are stored with 8 bits.

BackdoorBench stores poisoned images as 8-bit PNG: clip to [0, 255], then truncate toward zero. backdoor-toolbox keeps
floats in [0, 1] instead (``quantize=False``).

Arithmetic is float64 on every device, so that devices agree, and a result less than ``SLACK`` below a grey level counts
as that level: the formula decides, not its round-off. Without it ``x + D sin(6 pi)`` would darken a whole column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.errors import message

LEVELS = 255.0
SLACK = 1e-9  # grey levels; float64 round-off is below 1e-12
SNAP = 1e-5  # grey levels; float32(k / 255) * 255 is off k by up to 7.6e-6


def to_pixels(
    images: Tensor,  # [..., C, H, W] uint8, or float in [0, 1]
    snap: bool = False,
) -> Tensor:
    """Images as float64 grey levels in [0, 255].

    With ``snap``, values within ``SNAP`` of a whole level become it, so that 8-bit images give the same result whether
    they come as uint8 or as float.
    """
    pixels = images.to(torch.float64)
    if images.dtype == torch.uint8:
        return pixels
    pixels = pixels * LEVELS
    if not snap:
        return pixels
    whole = pixels.round()
    return torch.where((pixels - whole).abs() < SNAP, whole, pixels)


def from_pixels(
    pixels: Tensor,  # [..., C, H, W] float64 grey levels, any range
    dtype: torch.dtype,
    quantize: bool,
) -> Tensor:
    """Clip to [0, 255], truncate toward zero if ``quantize``, and return to ``dtype``.

    Example:
        >>> from_pixels(torch.tensor([[-3.0, 41.99, 42 - 1e-12, 300.0]], dtype=torch.float64), torch.uint8, True)
        tensor([[  0,  41,  42, 255]], dtype=torch.uint8)
    """
    pixels = pixels.clamp(0.0, LEVELS)
    if quantize:
        pixels = (pixels + SLACK).floor()
    if dtype == torch.uint8:
        return pixels.to(torch.uint8)
    # Whole levels are exact in float32, so k / 255 is the float that every ToTensor gives.
    return pixels.to(dtype) / LEVELS if quantize else (pixels / LEVELS).to(dtype)


def check_storable(where: str, dtype: torch.dtype, quantize: bool) -> None:
    """Raise when unquantised pixels are asked for in 8-bit images."""
    if dtype == torch.uint8 and not quantize:
        expected, got = "True for uint8 images, which hold whole grey levels only", "False"
        raise ValueError(message(where, "quantize", expected, got, "pass images.float() / 255 to keep fractions"))
