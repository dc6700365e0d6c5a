"""The arithmetic of forward and backward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

Precision = Literal["fp32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """``"bf16"`` runs matrix products and convolutions in bfloat16; ``"fp32"`` leaves the model's dtype alone.

    The choice holds whatever autocast the caller runs under. bfloat16 has the exponents of float32, so that no loss
    scaling is needed.

    Example:
        >>> with autocast(torch.device("cpu"), "bf16"):
        ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
