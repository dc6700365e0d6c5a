"""Arguments of image ops as the C libraries of this folder take them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import patches


def integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def geometry(images: Tensor, centers: Tensor, radius: int | None) -> list[Any]:
    """Radius, address of the centers, whether they are int64, and their strides."""
    kept, reach = patches.check_patch("", centers, radius, images)
    address, wide, *strides = patches.address_of_centers(kept)
    return [ctypes.c_int64(reach), ctypes.c_void_p(address), int(wide), integers(strides)]


def bounds(values: Sequence[float | Tensor], images: Tensor) -> tuple[list[Any], list[Tensor | None]]:
    """Numbers, and addresses of those given for each channel; and the tensors that have to live on."""
    split = [patches.channel_value("", "", value, images, finite=False) for value in values]
    addresses = [0 if table is None else table.data_ptr() for _, table in split]
    numbers = (ctypes.c_float * len(split))(*(number for number, _ in split))
    return [numbers, (ctypes.c_void_p * len(split))(*addresses)], [table for _, table in split]


def offset_by_an_element(x: Tensor) -> Tensor:
    """The same tensor at an address that is no multiple of 16 bytes."""
    storage = x.new_empty(x.numel() + 1)[1:]
    return torch.as_strided(storage, x.shape, x.stride(), storage.storage_offset()).copy_(x)
