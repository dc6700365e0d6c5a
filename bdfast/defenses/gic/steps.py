"""Steps of descent inside a ball, for images and for prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from bdfast.defenses.gic.config import Norm
from bdfast.ops import masked_pgd_step_, scale_to_ball_


@torch.no_grad()
def descend_(
    z: Tensor,  # [N, C, H, W]
    center: Tensor,  # [N, C, H, W]
    grad: Tensor,  # [N, C, H, W]
    *,
    p: Norm,
    size: float,
    delta: float,
    lower: float = 0.0,
    upper: float = 1.0,
) -> Tensor:
    """In place: a step of length ``size`` against ``grad``, projected on the ball around ``center`` and on the bounds.

    The step is along the sign of the gradient (p = "inf") or along each image's gradient direction (p = 2). A gradient
    of 0 does not move, nor does one that is not finite.

    Example:
        >>> z = torch.tensor([[[[0.5, 0.5]]]])
        >>> descend_(z, z.clone(), torch.tensor([[[[3.0, 0.0]]]]), p="inf", size=0.25, delta=0.125)
        tensor([[[[0.3750, 0.5000]]]])
    """
    if p == "inf":
        grad = grad.to(z.dtype)
        return masked_pgd_step_(
            z.detach(), center, grad, None, None, step_size=-size, eps=delta, lower=lower, upper=upper
        )
    length = torch.linalg.vector_norm(grad, dim=(1, 2, 3), keepdim=True)
    usable = length.isfinite() & (length > 0)
    d = z - center - torch.where(usable, size / length, 0.0) * torch.where(usable, grad, 0.0)
    return z.copy_(scale_to_ball_(d, delta).add_(center).clamp_(lower, upper))


class PromptDescent(Optimizer):
    """:func:`descend_` around 0 with momentum, for prompts ``[P, C, H, W]``; one whose gradient is 0 stays.

    Args:
        params: the prompts.
        lr: length of a step, > 0.
        momentum: in [0, 1).
        p: "inf" or 2.
        delta: radius of the ball.
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float, p: Norm, delta: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "p": p, "delta": delta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step; a closure is not called."""
        for group in self.param_groups:
            for prompt in group["params"]:
                state: dict[str, Any] = self.state[prompt]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(prompt))
                met = (prompt.grad != 0).flatten(1).any(1).view(-1, 1, 1, 1)
                buffer.copy_(torch.where(met, group["momentum"] * buffer + prompt.grad, buffer))
                descend_(
                    prompt, torch.zeros_like(prompt), torch.where(met, buffer, 0.0),
                    p=group["p"], size=group["lr"], delta=group["delta"], lower=-1.0,
                )  # fmt: skip
