"""What a network computes, to see whether it still does once it is rewritten."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bdfast.runtime.precision import full_float32

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest logit, between the two: a wrong graph differs by far more."""

GRADIENT_TOLERANCE = {torch.float32: 0.1, torch.bfloat16: 0.4}
"""Of the norm of the gradient to the images: roundings carry activations across 0, many of them in bfloat16."""


class Behaviour(NamedTuple):
    """Of a network on a few images.

    Example:
        >>> a, b, x = nn.Linear(2, 2), nn.Linear(2, 2), torch.rand(3, 2)
        >>> Behaviour.of(a, x).agrees(Behaviour.of(a, x)), Behaviour.of(a, x).agrees(Behaviour.of(b, x))
        (True, False)
    """

    logits: object  # [n, K], of any kind of network
    gradient: Tensor | None  # [n, C, H, W] of a sum of the logits with various weights; None without a graph

    @classmethod
    def of(
        cls,
        network: nn.Module,
        probe: Tensor,  # [n, C, H, W]
    ) -> Behaviour:
        """Run forward, and back to the images."""
        leaf = probe.detach().requires_grad_()
        with full_float32(), torch.enable_grad():
            output = network(leaf)
            if not isinstance(output, Tensor) or not output.requires_grad:
                return cls(output, None)
            weights = torch.linspace(-1, 1, output[0].numel(), dtype=torch.float32, device=output.device)
            weights = weights.reshape(output[0].shape)
            (gradient,) = torch.autograd.grad((output.float() * weights).sum(), leaf)
        return cls(output.detach(), gradient)

    def agrees(self, other: Behaviour) -> bool:
        """Whether the two are the same but for roundings."""
        a, b = self.logits, other.logits
        if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.dtype not in TOLERANCE or (self.gradient is None) != (other.gradient is None):
            return False
        if float((a - b).abs().max()) > TOLERANCE[a.dtype] * float(a.abs().max()):
            return False
        if self.gradient is None or other.gradient is None:
            return True
        return float((self.gradient - other.gradient).norm()) <= GRADIENT_TOLERANCE[a.dtype] * float(
            self.gradient.norm()
        )
