"""The precision that ops compute in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RUN = 4096  # elements that one thread adds up; torch shares only longer sums among threads
PIECE = 2**22  # elements that are float64 at once


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


def total(values: Tensor) -> Tensor:
    """Sum of all elements in float64, the same whatever the number of threads: runs of elements, then their sums."""
    flat = values.reshape(-1)
    runs = F.pad(flat, (0, -flat.shape[0] % RUN)).view(-1, RUN)
    return runs.sum(dim=1, dtype=torch.float64).sum()


def norm_of(values: Tensor) -> Tensor:
    """L2 norm of all elements in float64, likewise; a piece at a time, since all of them as float64 may not fit."""
    pieces = [total(piece.double().square()) for piece in torch.split(values.reshape(-1), PIECE)]
    return torch.stack(pieces).sum().sqrt()
