"""The arithmetic of forward and backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

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
    # Without the cache: inside another autocast, even one that is off, it would keep the weights of the step before.
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products and convolutions of a GPU keep all 24 bits inside, TF32's 11 nowhere; process-wide.

    PyTorch lets cuDNN round to TF32 unless it is told otherwise: results then differ by 1e-3 of their size where
    nothing but an order of operations changed.

    Example:
        >>> with full_float32():
        ...     torch.backends.cudnn.conv.fp32_precision
        'ieee'
    """
    backends: Any = torch.backends  # of whose attributes not all are annotated
    places = (backends.cudnn.conv, backends.cuda.matmul)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


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
