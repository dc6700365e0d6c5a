"""Pixel arrays in the one layout of the package: NCHW, uint8 or float in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.errors import message

CHANNEL_COUNTS = (1, 3, 4)  # gray, RGB, RGBA: what an axis that holds channels usually counts
RESIZE_CHUNK = 1024  # images resized at once, so that the temporary stays small beside the set


def to_nchw(images: Tensor, where: str, argument: str) -> Tensor:
    """View ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` as ``[N, C, H, W]``.

    Of axes 1 and 3 the channel axis is the one of size 1, 3 or 4 if only one is; otherwise it is the shorter one.

    Raises:
        ValueError: another number of axes, an empty one, or two candidates of one size.

    Example:
        >>> to_nchw(torch.zeros(5, 8, 8, 3), "load", "images").shape
        torch.Size([5, 3, 8, 8])
    """
    if images.ndim == 3 and images.numel():
        return images.unsqueeze(1)
    if images.ndim != 4 or not images.numel():
        raise ValueError(
            message(
                where,
                argument,
                "images as [N, H, W], [N, H, W, C] or [N, C, H, W], none of them 0",
                str(list(images.shape)),
                "reshape the array",
            )
        )
    first, last = images.shape[1], images.shape[3]
    usual = (first in CHANNEL_COUNTS, last in CHANNEL_COUNTS)
    if usual[0] == usual[1] and first == last:
        raise ValueError(
            message(
                where,
                argument,
                "an array that shows which axis holds the channels",
                str(list(images.shape)),
                "pass a tuple of NCHW tensors instead of a file",
            )
        )
    channels_first = usual[0] if usual[0] != usual[1] else first < last
    return images if channels_first else images.permute(0, 3, 1, 2)


def resize(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Antialiased bilinear resize of ``[N, C, H, W]`` to ``size`` = (height, width); None or the same size is free."""
    if size is None or tuple(images.shape[2:]) == size:
        return images
    parts = [
        F.interpolate(part, size=size, mode="bilinear", antialias=True)
        for part in torch.split(images.contiguous(), RESIZE_CHUNK)
    ]
    # The filter's weights sum to one only up to rounding: keep floats inside [0, 1].
    return torch.cat(parts).clamp_(0, 1) if images.is_floating_point() else torch.cat(parts)
