"""ReLU with an upper bound a channel, as a module."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from bdfast.errors import message
from bdfast.ops.batch_norm_clipped_relu import batch_norm_clipped_relu
from bdfast.ops.clipped_relu import clipped_relu
from bdfast.ops.validation import check_number, is_number

# torch.fx traces networks through this layer, and takes its ops as they are.
fx.wrap("clipped_relu")
fx.wrap("batch_norm_clipped_relu")


class ClippedReLU(nn.Module):
    r"""``min(max(x, 0), bound)``, with the bound as its one parameter. A drop-in for ``nn.ReLU`` and ``nn.ReLU6``.

    .. math:: y = \min(\max(x, 0), z_c), \qquad z_c \le \text{ceiling}

    See :func:`bdfast.ops.clipped_relu` for the gradients.

    Args:
        bound: a number >= 0 for all channels, or a tensor ``[C]`` (0-dim and ``[C, 1, 1]`` too); stored in float32
            unless it has another floating-point dtype. An ``nn.Parameter`` is used as it is, so that it can be shared.
            ``inf`` leaves a ReLU.
        learnable: whether the bound requires grad; one that is a parameter keeps its own say.
        ceiling: no bound exceeds it, whatever it is trained to: 6 for what was a ReLU6.

    Raises:
        TypeError: the bound is neither a number nor a floating-point tensor.
        ValueError: the bound or the ceiling is a number that is negative or NaN.

    Example:
        >>> layer = ClippedReLU(torch.tensor([1.0, 2.0]))
        >>> layer(torch.tensor([[-1.0, 3.0], [4.0, 1.0]])).tolist()
        [[0.0, 2.0], [1.0, 1.0]]
        >>> layer
        ClippedReLU(bound=[2])
    """

    bound: nn.Parameter  # [], [C] or [C, 1, 1]

    def __init__(self, bound: Tensor | float, *, learnable: bool = True, ceiling: float = math.inf) -> None:
        super().__init__()
        check_number("ClippedReLU", "ceiling", ceiling, "6 makes a ReLU6")
        if not ceiling >= 0.0:
            raise ValueError(message("ClippedReLU", "ceiling", "a number >= 0", str(ceiling), "6 makes a ReLU6"))
        self.bound = _parameter(bound, learnable)
        self.ceiling = ceiling

    def forward(self, x: Tensor, batch_norm: nn.Module | None = None) -> Tensor:  # [N, C, ...] -> [N, C, ...]
        """Clip ``x``, or what ``batch_norm`` makes of it.

        A batch norm in eval mode whose weights need no gradient is computed in the same pass over ``x``; any other is
        called first.
        """
        bound: Tensor = self.bound
        if self.ceiling < math.inf:
            bound = bound.clamp(max=self.ceiling)
        if batch_norm is None:
            return clipped_relu(x, bound)
        if not _is_frozen(batch_norm):
            return clipped_relu(batch_norm(x), bound)
        bn = batch_norm
        return batch_norm_clipped_relu(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, bound, bn.eps)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        shape = list(self.bound.shape)
        return f"bound={shape}" if self.ceiling == math.inf else f"bound={shape}, ceiling={self.ceiling:g}"


def weight_beside_bounds(model: nn.Module) -> nn.Parameter | None:
    """The first floating-point parameter that is no bound: it says where, and in which dtype, a model wants images.

    Bounds stay in float32 and stand before the layers of a clipped model.

    Example:
        >>> weight_beside_bounds(nn.Sequential(ClippedReLU(1.0), nn.Linear(1, 1).double())).dtype
        torch.float64
    """
    bounds = {id(layer.bound) for layer in model.modules() if isinstance(layer, ClippedReLU)}
    return next((p for p in model.parameters() if p.is_floating_point() and id(p) not in bounds), None)


def _parameter(bound: Tensor | float, learnable: bool) -> nn.Parameter:
    if isinstance(bound, nn.Parameter):
        return bound
    if not isinstance(bound, Tensor):
        if not is_number(bound):
            got = type(bound).__name__
            raise TypeError(message("ClippedReLU", "bound", "a number or a tensor", got, "pass one of these"))
        if not bound >= 0.0:
            raise ValueError(
                message("ClippedReLU", "bound", "a number >= 0", str(bound), "an activation behind a ReLU is >= 0")
            )
        bound = torch.tensor(float(bound))
    if not bound.is_floating_point():
        raise TypeError(
            message("ClippedReLU", "bound", "a floating-point tensor", str(bound.dtype), "convert it with .float()")
        )
    return nn.Parameter(bound.detach().clone(), requires_grad=learnable)


def _is_frozen(batch_norm: nn.Module) -> bool:
    """Whether it is a fixed affine map that has no gradients to find."""
    if batch_norm.training or batch_norm.running_mean is None:
        return False
    weights = (batch_norm.weight, batch_norm.bias)
    return not (torch.is_grad_enabled() and any(isinstance(w, Tensor) and w.requires_grad for w in weights))
