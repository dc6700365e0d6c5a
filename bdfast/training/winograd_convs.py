"""3x3 convolutions that are trained on a CPU by Winograd's way, forward and backward.

All three passes of a step, forward, to the input and to the weights, have a quarter of the products
(:mod:`bdfast.runtime.winograd`). :func:`replace` puts a :class:`TrainedConv` in place of a layer's call; the layer, its
parameters and its name stay the model's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

from bdfast.runtime import winograd
from bdfast.runtime.winograd import ConvShape


class TrainedConv(nn.Module):
    """``conv(x)``, in training mode by Winograd's way where that pays, else as it was.

    Example:
        >>> conv = nn.Conv2d(16, 16, 3, padding=1)
        >>> x = torch.rand(2, 16, 8, 8)
        >>> torch.allclose(TrainedConv(conv)(x), conv(x), atol=1e-5)
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        conv, shape = self.conv, ConvShape.of(self.conv)
        recorded = conv.training and torch.is_grad_enabled()
        single = x.dtype == conv.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if recorded and single and winograd.takes(x, shape):
            return _TrainedConv.apply(x, conv.weight, conv.bias, shape)  # type: ignore[no-untyped-call,no-any-return]
        return conv(x)  # type: ignore[no-any-return]


class _TrainedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: ConvShape) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.shape = shape
        return winograd.convolve(x, winograd.pack(weight), shape, bias=bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous(memory_format=torch.channels_last)
        return (
            winograd.convolve(grad, winograd.pack(weight, gradient=True), ctx.shape.turned()) if to_x else None,
            winograd.weight_gradient(x, grad, weight, ctx.shape) if to_weight else None,
            grad.sum((0, 2, 3)) if to_bias else None,
            None,
        )


def replace(graph: fx.GraphModule) -> list[str]:
    """Put :class:`TrainedConv` where the graph calls a convolution that it is for; their names. ``graph`` is changed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        >>> replace(fx.symbolic_trace(net)) == (["0"] if winograd.available() else [])
        True
    """
    if not winograd.available():
        return []
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    names = [name for name in dict.fromkeys(calls) if winograd.fits(graph.get_submodule(name))]
    for name in names:
        graph.set_submodule(name, TrainedConv(graph.get_submodule(name)))  # type: ignore[arg-type]
    return names
