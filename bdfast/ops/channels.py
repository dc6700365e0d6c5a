"""What ops over the channels of activations ``[N, C, ...]`` share: checks, memory order, and bits for the backward.

The bits, one an element and gradient, are int32 ``[gradients, blocks, 16]``: bit ``b`` of word ``l`` of block ``k``
stands for element ``512 k + 16 b + l`` in memory order, whatever the backend (see ``csrc/include/channel_clip.h``).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.errors import message
from bdfast.ops.precision import in_precision_of, total
from bdfast.ops.validation import FLOATING, is_number

LANES = 16  # words of a block
BITS = 32  # of a word
BLOCK = LANES * BITS


# --- arguments -------------------------------------------------------------------------------------------------------


def check_activations(op: str, x: Tensor) -> None:
    """``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(message(op, "x", "a tensor [N, C, ...]", type(x).__name__, "pass a torch.Tensor"))
    if x.dtype not in FLOATING:
        raise TypeError(
            message(op, "x", "float32, float16, bfloat16 or float64", str(x.dtype), "convert it with .float()")
        )
    if x.layout is not torch.strided:
        raise TypeError(message(op, "x", "a dense tensor", str(x.layout), "convert it with .to_dense()"))


def check_per_channel(op: str, name: str, value: Tensor | None, x: Tensor) -> Tensor:
    """``value``, a parameter or statistic of a batch norm over ``x``: floating point, ``[C]``, on its device."""
    channels = x.shape[1]
    if not isinstance(value, Tensor):
        raise TypeError(message(op, name, f"a tensor [{channels}]", type(value).__name__, "pass a torch.Tensor"))
    if not value.is_floating_point():
        raise TypeError(message(op, name, "a floating-point tensor", str(value.dtype), "convert it with .float()"))
    if value.shape != (channels,):
        got = f"shape {list(value.shape)}"
        raise ValueError(message(op, name, f"one value a channel, [{channels}]", got, "pass the batch norm's own"))
    if value.device != x.device:
        raise ValueError(message(op, name, f"the device of x, {x.device}", str(value.device), "move it there"))
    return value


def split_bound(op: str, bound: Tensor | float, x: Tensor) -> tuple[Tensor | None, float]:
    """``bound`` as what the raw ops take: a tensor ``[]`` or ``[C]`` of the dtype that is computed in, or a number."""
    if isinstance(bound, Tensor):
        return _bound_tensor(op, bound, x), math.inf
    if not is_number(bound):
        raise TypeError(message(op, "bound", "a number or a tensor", type(bound).__name__, "pass one of these"))
    if not bound >= 0.0:
        raise ValueError(message(op, "bound", "a number >= 0", str(bound), "an activation behind a ReLU is >= 0"))
    return None, float(bound)


def _bound_tensor(op: str, bound: Tensor, x: Tensor) -> Tensor:
    if not bound.is_floating_point():
        raise TypeError(message(op, "bound", "a floating-point tensor", str(bound.dtype), "convert it with .float()"))
    if bound.device != x.device:
        raise ValueError(message(op, "bound", f"the device of x, {x.device}", str(bound.device), "move it there"))
    if bound.dim() > 0:
        channels = x.shape[1] if x.dim() > 1 else None
        if channels is None or bound.shape[0] != channels or math.prod(bound.shape[1:]) != 1:
            expected = "a number or a 0-dim tensor" + (
                "" if channels is None else f", [{channels}] or [{channels}, 1, 1]"
            )
            got = f"shape {list(bound.shape)} with x {list(x.shape)}"
            raise ValueError(message(op, "bound", expected, got, "pass one bound for all channels or one for each"))
        if bound.dim() > 1:  # else it would be a view of itself: one more node for autograd
            bound = bound.reshape(channels)
    return in_precision_of(bound, x)


# --- memory order ----------------------------------------------------------------------------------------------------


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` is dense with its channels next to each other, and not contiguous as well."""
    if x.dim() not in (4, 5) or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=_channels_last(x))


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """``x`` itself, or a copy where its elements do not follow each other in that order."""
    return x.contiguous(memory_format=_channels_last(x) if channels_last else torch.contiguous_format)


def empty_dense(x: Tensor, channels_last: bool) -> Tensor:
    """An uninitialised tensor of the shape, dtype and device of ``x`` in that order."""
    return torch.empty_like(x, memory_format=_channels_last(x) if channels_last else torch.contiguous_format)


def _channels_last(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


def layout(x: Tensor, channels_last: bool, channels: int) -> tuple[int, int, int]:
    """(elements, channels, distance of neighbouring channels in memory); one channel is one run of everything."""
    if channels == 1:
        return x.numel(), 1, max(1, x.numel())
    return x.numel(), channels, inner(x, channels_last)


def inner(x: Tensor, channels_last: bool) -> int:
    """Distance of neighbouring channels in memory."""
    return 1 if channels_last else math.prod(x.shape[2:])


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """``values`` ``[C]`` (or ``[]``) in the shape that broadcasts over ``x``."""
    return values.reshape(-1, *(1,) * (x.dim() - 2)) if values.dim() else values


def sum_over_channel(values: Tensor, bounds: int) -> Tensor:
    """Sums of ``values`` ``[N, C, ...]`` in float64: one a channel, or a single one for ``bounds == 1``."""
    if bounds == 1:
        return total(values).reshape(1)
    return values.sum(dim=[d for d in range(values.dim()) if d != 1], dtype=torch.float64)


# --- bits ------------------------------------------------------------------------------------------------------------


def empty_bits(x: Tensor, gradients: int) -> Tensor:
    """Uninitialised bits of ``x`` for that many gradients."""
    return x.new_empty(gradients, (x.numel() + BLOCK - 1) // BLOCK, LANES, dtype=torch.int32)


def pack(mask: Tensor, channels_last: bool) -> Tensor:  # bool, shape of x -> int32 [blocks, 16]
    """Bits of a mask."""
    flat = (mask.movedim(1, -1) if channels_last else mask).reshape(-1)
    elements = F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BITS, LANES)
    return (elements.int() << _shifts(mask.device)).sum(dim=1, dtype=torch.int32)


def unpack(bits: Tensor, x: Tensor, channels_last: bool) -> Tensor:  # int32 [blocks, 16] -> bool, shape of x
    """The mask that :func:`pack` made for a tensor of the shape of ``x``."""
    flat = ((bits[:, None, :] >> _shifts(bits.device)) & 1).bool().reshape(-1)[: x.numel()]
    return flat.reshape(x.movedim(1, -1).shape).movedim(-1, 1) if channels_last else flat.reshape(x.shape)


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(BITS, device=device, dtype=torch.int32)[:, None]
