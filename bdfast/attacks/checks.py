"""Checks that the attacks share; each names the function and the argument it speaks of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdfast.errors import LabelRangeError, message

MAX_SIDE = 4096  # of a patch or a grid: a poisoned set from somebody else says how large a trigger is


def describe(value: object) -> str:
    """What came, in a few words: dtype and shape of a tensor, type and value of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{type(value).__name__} {value!r:.80}"


def check_images(
    where: str,
    images: Tensor,  # [N, C, H, W]
) -> None:
    """Raise unless ``images`` is NCHW, uint8 or floating point in [0, 1]."""
    expected = "a tensor [N, C, H, W], uint8 or float in [0, 1]"
    if not isinstance(images, Tensor):
        raise TypeError(message(where, "images", expected, describe(images), "convert with torch.as_tensor"))
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(message(where, "images", expected, describe(images), "convert to uint8 or float"))
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise ValueError(
            message(where, "images", expected, describe(images), "move channels first and add a batch axis")
        )
    if images.is_floating_point() and images.numel() > 0:
        lowest, highest = (bound.item() for bound in torch.aminmax(images))
        if not (lowest >= 0.0 and highest <= 1.0):  # also catches NaN
            got = f"values from {lowest:.8g} to {highest:.8g}"
            raise ValueError(message(where, "images", expected, got, "undo the normalisation, or divide by 255"))


def check_labels(
    where: str,
    labels: Tensor,  # [N]
    count: int,
    num_classes: int | None,
) -> None:
    """Raise unless ``labels`` holds one integer class for each of ``count`` images, below ``num_classes`` if given."""
    expected = f"an integer tensor [{count}], one class for each image"
    if not isinstance(labels, Tensor):
        raise TypeError(message(where, "labels", expected, describe(labels), "convert with torch.as_tensor"))
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(message(where, "labels", expected, describe(labels), "convert with labels.long()"))
    if tuple(labels.shape) != (count,):
        raise ValueError(message(where, "labels", expected, describe(labels), "pass as many labels as images"))
    if count == 0:
        return
    lowest, highest = (int(bound.item()) for bound in torch.aminmax(labels))
    if lowest < 0 or (num_classes is not None and highest >= num_classes):
        upper = "" if num_classes is None else f" and below num_classes={num_classes}"
        got = f"labels from {lowest} to {highest}"
        raise LabelRangeError(message(where, "labels", f"classes from 0{upper}", got, "check labels and num_classes"))


def check_number(where: str, argument: str, value: float, lower: float, upper: float, remedy: str) -> None:
    """Raise unless ``value`` is a finite number in [lower, upper]."""
    expected = f"a number in [{lower:g}, {upper:g}]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(where, argument, expected, describe(value), remedy))
    if not (math.isfinite(value) and lower <= value <= upper):
        raise ValueError(message(where, argument, expected, repr(value), remedy))


def check_integer(where: str, argument: str, value: int, lower: int, remedy: str, upper: int | None = None) -> None:
    """Raise unless ``value`` is an integer of at least ``lower``, and at most ``upper``."""
    expected = f"an integer of at least {lower}" if upper is None else f"an integer in [{lower}, {upper}]"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message(where, argument, expected, describe(value), remedy))
    if value < lower or (upper is not None and value > upper):
        raise ValueError(message(where, argument, expected, str(value)[:80], remedy))
