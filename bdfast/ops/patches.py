"""What ops over square patches of images ``[N, C, H, W]`` share: checks, masks, and what the kernels are told.

The patch of an image is the square of half-width ``radius`` (side ``2 radius + 1``) around its center, cut at the
border, the same for all channels. A center may lie outside the image: what is left of its patch inside counts.
"""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from bdfast.backends.availability import runs_cuda
from bdfast.errors import message
from bdfast.ops.precision import compute_dtype
from bdfast.ops.validation import FLOATING, is_number

WHOLE = -1  # the radius of a patch that is the whole image, in raw ops
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)


# --- arguments -------------------------------------------------------------------------------------------------------


def check_images(op: str, images: Tensor, name: str) -> None:
    """``images`` is a floating-point tensor ``[N, C, H, W]``."""
    if not isinstance(images, Tensor):
        raise TypeError(message(op, name, "a tensor [N, C, H, W]", type(images).__name__, "pass a torch.Tensor"))
    if images.dtype not in FLOATING:
        raise TypeError(
            message(op, name, "float32, float16, bfloat16 or float64", str(images.dtype), "convert it with .float()")
        )
    if images.layout is not torch.strided:
        raise TypeError(message(op, name, "a dense tensor", str(images.layout), "convert it with .to_dense()"))
    if images.dim() != 4:
        raise ValueError(
            message(op, name, "shape [N, C, H, W]", str(list(images.shape)), "add the dimensions that are missing")
        )


def check_alike(op: str, tensor: Tensor, name: str, images: Tensor, images_name: str) -> None:
    """``tensor`` has the shape, dtype and device of ``images``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(message(op, name, "a tensor [N, C, H, W]", type(tensor).__name__, "pass a torch.Tensor"))
    if tensor.shape != images.shape:
        expected, got = f"the shape of {images_name}, {list(images.shape)}", str(list(tensor.shape))
        raise ValueError(message(op, name, expected, got, "pass tensors for the same images"))
    if tensor.dtype != images.dtype:
        expected = f"{images.dtype} like {images_name}"
        raise TypeError(message(op, name, expected, str(tensor.dtype), f"convert it with .to({images_name}.dtype)"))
    if tensor.device != images.device:
        expected = f"the device of {images_name}, {images.device}"
        raise ValueError(message(op, name, expected, str(tensor.device), "move it there"))


def check_radius(op: str, radius: SupportsIndex | None) -> int:
    """``radius`` as a number of pixels; :data:`WHOLE` where it is ``None``."""
    if radius is None:
        return WHOLE
    try:
        reach = operator.index(radius)
    except TypeError:
        raise TypeError(
            message(op, "radius", "an integer or None", type(radius).__name__, "pass pixels, None for whole images")
        ) from None
    if reach < 0:
        raise ValueError(message(op, "radius", "an integer >= 0 or None", str(reach), "pass None for whole images"))
    return reach


def check_patch(
    op: str, centers: Tensor | None, radius: SupportsIndex | None, images: Tensor
) -> tuple[Tensor | None, int]:
    """``centers`` and ``radius`` as raw ops take them: no centers and :data:`WHOLE` where ``radius`` is ``None``."""
    reach = check_radius(op, radius)
    if reach == WHOLE:
        return None, WHOLE
    if not isinstance(centers, Tensor):
        expected, remedy = "an integer tensor [N, 2] of rows and columns", "pass one center an image, or radius=None"
        raise TypeError(message(op, "centers", expected, type(centers).__name__, remedy))
    if centers.dtype not in INTEGERS:
        raise TypeError(message(op, "centers", "an integer dtype", str(centers.dtype), "convert it with .long()"))
    if centers.dim() != 2 or centers.shape[0] != images.shape[0] or centers.shape[1] != 2:
        expected, got = f"[{images.shape[0]}, 2], a row and a column an image", str(list(centers.shape))
        raise ValueError(message(op, "centers", expected, got, "pass one center an image"))
    if centers.device != images.device:
        expected = f"the device of the images, {images.device}"
        raise ValueError(message(op, "centers", expected, str(centers.device), "move it there"))
    if centers.dtype is not torch.int64 and centers.dtype is not torch.int32:
        centers = centers.to(torch.int64)
    return centers, min(reach, 2**31)  # beyond any image; sums with it stay inside int64


def check_ids(op: str, ids: Tensor) -> None:
    """``ids`` is an int64 ``[N]``."""
    if not isinstance(ids, Tensor):
        raise TypeError(message(op, "ids", "a tensor [N]", type(ids).__name__, "pass a torch.Tensor"))
    if ids.dtype != torch.int64:
        raise TypeError(message(op, "ids", "int64 sample ids", str(ids.dtype), "convert it with .long()"))
    if ids.dim() != 1:
        raise ValueError(message(op, "ids", "shape [N]", str(list(ids.shape)), "pass one id a sample"))


def check_seed(op: str, name: str, value: SupportsIndex) -> int:
    """``value`` is an integer that fits into 64 bits."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message(op, name, "an integer", type(value).__name__, "pass an int")) from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(message(op, name, "an integer of 64 bits", str(number), "pass a smaller one"))
    return number


def channel_value(
    op: str, name: str, value: float | Tensor, images: Tensor, *, lowest: float = -math.inf, finite: bool = True
) -> tuple[float, Tensor | None]:
    """``value`` as raw ops take it: a number, or one a channel ``[C]`` of the dtype that is computed in."""
    if isinstance(value, Tensor):
        check_channels(op, name, value, images)
        row = value.detach().to(compute_dtype(images)).reshape(-1)
        return 0.0, row.expand(images.shape[1]).contiguous()
    check_value(op, name, value, lowest=lowest, finite=finite)
    return float(value), None


def check_value(op: str, name: str, value: float | Tensor, *, lowest: float = -math.inf, finite: bool = True) -> None:
    """``value`` is a number in its range, or a tensor: that of a tensor is checked beside its images."""
    if isinstance(value, Tensor):
        return
    if not is_number(value):
        raise TypeError(message(op, name, "a number or a tensor [C]", type(value).__name__, "pass one of these"))
    if value != value or value < lowest or (finite and math.isinf(value)):
        kind = "a finite number" if finite else "a number"
        expected = kind if lowest == -math.inf else f"{kind} >= {lowest:g}"
        raise ValueError(message(op, name, expected, str(value), "correct it"))


def check_channels(op: str, name: str, value: float | Tensor, images: Tensor) -> None:
    """``value``, where it is a tensor, has one number for all channels of ``images`` or one for each."""
    if not isinstance(value, Tensor):
        return
    channels = images.shape[1]
    if not value.is_floating_point():
        raise TypeError(message(op, name, "a floating-point tensor", str(value.dtype), "convert it with .float()"))
    if value.device != images.device:
        expected = f"the device of the images, {images.device}"
        raise ValueError(message(op, name, expected, str(value.device), "move it there"))
    if value.dim() > 0 and (value.shape[0] != channels or math.prod(value.shape[1:]) != 1):
        got = f"shape {list(value.shape)}"
        raise ValueError(
            message(op, name, f"a number or a tensor [{channels}]", got, "pass one value for all channels or each")
        )


def check_range(op: str, lower: float | Tensor, upper: float | Tensor) -> None:
    """``lower <= upper`` where both are numbers (tensors are not read: that would sync)."""
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and lower > upper:
        raise ValueError(message(op, "lower", f"a number <= upper, {upper}", str(lower), "correct one of them"))


# --- reference -------------------------------------------------------------------------------------------------------


def patch_mask(images: Tensor, centers: Tensor | None, radius: int) -> Tensor:
    """``[N, 1, H, W]`` bool, true inside the patches."""
    samples, _, height, width = images.shape
    if radius == WHOLE or centers is None:
        return torch.ones((samples, 1, height, width), dtype=torch.bool, device=images.device)
    rows = _inside(centers[:, 0], radius, height)
    columns = _inside(centers[:, 1], radius, width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _inside(center: Tensor, radius: int, size: int) -> Tensor:  # [N] -> [N, size]
    positions = torch.arange(size, device=center.device)
    near = center.long().clamp(-radius - 1, size + radius)  # differences stay inside int64
    return (positions - near[:, None]).abs() <= radius


def per_channel(value: float, of_channel: Tensor | None, images: Tensor) -> Tensor:
    """``[C, 1, 1]`` or ``[]``, in the dtype that is computed in."""
    if of_channel is None:
        return torch.full((), value, dtype=compute_dtype(images), device=images.device)
    return of_channel[:, None, None]


# --- what the kernels are told ---------------------------------------------------------------------------------------


def runs_cuda_on_images(images: Any) -> str | None:
    """Why a CUDA kernel cannot take ``images`` (or a stand-in that has only a device and a dtype), or ``None``."""
    if isinstance(images, Tensor) and math.prod(images.shape[1:]) >= 2**31:
        return f"takes images of fewer than 2^31 elements, got {list(images.shape[1:])}"
    return runs_cuda(images)


def address(value: float, of_channel: Tensor | None) -> tuple[float, int]:
    """The number, or where the number of each channel is."""
    return value, 0 if of_channel is None else of_channel.data_ptr()


def address_of_centers(centers: Tensor | None) -> tuple[int, bool, int, int]:
    """Address, whether int64, and strides."""
    if centers is None:
        return 0, False, 0, 0
    row, column = centers.stride()
    return centers.data_ptr(), centers.dtype is torch.int64, row, column
