"""The precision that ops compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float32 for float32 and half precision, float64 for float64."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def upcast(tensor: Tensor) -> Tensor:
    """``tensor`` in the precision that ops compute in."""
    return tensor.to(compute_dtype(tensor))


def in_precision_of(tensor: Tensor, other: Tensor) -> Tensor:
    """``tensor`` in the precision that ops compute in on ``other``. Asks first: a call of ``to`` is a microsecond."""
    dtype = compute_dtype(other)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
