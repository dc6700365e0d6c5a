"""The arithmetic of forward and backward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch
from torch import Tensor, nn

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


class Autocast(nn.Module):
    """A network whose forward and backward passes run in a precision of their own; its outputs are float32.

    Attributes:
        module: the network, which is not copied.

    Example:
        >>> net = Autocast(nn.Linear(2, 1), "bf16")
        >>> net(torch.ones(3, 2)).dtype
        torch.float32
    """

    def __init__(self, module: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.module, self._precision = module, precision
        self.training = module.training

    def forward(
        self,
        images: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        with autocast(images.device, self._precision):
            output = self.module(images)
        logits: Tensor = getattr(output, "logits", output)
        return logits.float()


def in_precision(module: nn.Module, precision: Precision) -> nn.Module:
    """``module``, in :class:`Autocast` where the precision is not the module's own."""
    return module if precision == "fp32" else Autocast(module, precision)
