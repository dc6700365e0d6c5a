r"""NAD (Li et al., ICLR 2021, arXiv 2101.05930): the attention maps that student and teacher are to share.

.. math::

    a_{hw} = \sum_c |f_{chw}|^p, \qquad \text{map} = \frac{a}{\lVert a \rVert_2 + \epsilon}

The usual form writes :math:`|f|` and :math:`|f|^p` out in full, and keeps both for the backward pass; here the sum over
channels is one reduction that reads f once, and the backward pass is one product with f.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.switch import switchable


def plain_attention_map(self: Any, fm: Tensor, eps: float = 1e-6) -> Tensor:
    """The equation, operation by operation."""
    am = fm.abs().pow(self.p).sum(dim=1, keepdim=True)
    return _normalized(am, eps)


@switchable(plain_attention_map)
def attention_map(self: Any, fm: Tensor, eps: float = 1e-6) -> Tensor:
    """The attention map ``[N, 1, H, W]`` of features ``[N, C, H, W]``, with the exponent ``self.p``; differentiable.

    Agrees with the usual form to 1e-6 relative in float32, gradients too.

    Raises:
        TypeError, ValueError: ``fm`` is not a floating-point tensor of four dimensions.

    Example:
        >>> attention_map(AT(2), torch.tensor([3.0, 4.0]).view(1, 1, 1, 2)).flatten()
        tensor([0.4903, 0.8716])
    """
    where = "AT.attention_map"
    if not isinstance(fm, Tensor) or not fm.is_floating_point():
        got = str(fm.dtype) if isinstance(fm, Tensor) else type(fm).__name__
        raise TypeError(message(where, "fm", "a floating-point tensor [N, C, H, W]", got, "pass a layer's activations"))
    if fm.dim() != 4:
        raise ValueError(message(where, "fm", "shape [N, C, H, W]", str(list(fm.shape)), "pass a layer's activations"))
    am = cast(Tensor, cast(Any, _PowerSum).apply(fm, self.p))
    return _normalized(am, eps)


def _normalized(am: Tensor, eps: float) -> Tensor:  # [N, 1, H, W]
    length: Tensor = torch.linalg.vector_norm(am, dim=(2, 3), keepdim=True)
    return am / (length + eps)


class _PowerSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fm: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(fm)
        ctx.p = p
        length: Tensor = torch.linalg.vector_norm(fm, ord=p, dim=1, keepdim=True)
        return length.pow_(p)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (fm,) = ctx.saved_tensors
        slope = fm if ctx.p == 2 else fm.abs().pow_(ctx.p - 1).mul_(fm.sign())
        return slope * (ctx.p * grad), None


class AT(nn.Module):
    """Attention transfer: the mean squared difference of two attention maps.

    Args:
        p: exponent of the activations (2 in the paper).

    Example:
        >>> AT(2)(torch.ones(1, 3, 2, 2), 5 * torch.ones(1, 3, 2, 2)).item() < 1e-12
        True
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, fm_s: Tensor, fm_t: Tensor) -> Tensor:
        """Scalar, for features of student and teacher ``[N, C, H, W]``; C may differ."""
        return F.mse_loss(self.attention_map(fm_s), self.attention_map(fm_t))

    def attention_map(self, fm: Tensor, eps: float = 1e-6) -> Tensor:
        """``[N, 1, H, W]``, see :func:`attention_map`."""
        return attention_map(self, fm, eps)
