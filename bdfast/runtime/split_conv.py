r"""A first convolution on tensor cores that sees float32 images.

Between two neighbouring bfloat16 numbers near white lies half a step of an attack, so images must not be rounded to
that format. An image is the sum of two, though,

.. math::

    x \approx h + l, \qquad h = \mathrm{bf16}(x), \quad l = \mathrm{bf16}(x - h),

to 16 bits, and a convolution is linear: of h and l as 2 C channels, with the weights twice, it is that of x, added up
in float32. On an H200 the first layer of a ResNet-18 took 0.46 of 3.8 ms in TF32, with its casts to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from bdfast.runtime.fusing import is_relu
from bdfast.runtime.relu_gradient import Stride, every, relu_gradient

_CHANNELS = 8  # tensor cores take them in groups of so many


class SplitConv(nn.Module):
    """float32 images to ``conv(x)``, or its ReLU, in bfloat16; gradients reach x, not the weights.

    Attributes:
        relu: whether the ReLU is taken.
        fork: None, or which pixels a second reader of the ReLU sees; each reader then has an output of its own.

    Example:
        >>> conv = nn.Conv2d(3, 2, 3).requires_grad_(False)
        >>> x = torch.rand(1, 3, 4, 4)
        >>> exact = conv(x).relu()
        >>> y = SplitConv(conv, relu=True)(x)
        >>> y.dtype, bool((y - exact).abs().max() < 0.01)
        (torch.bfloat16, True)
    """

    weight: Tensor  # [O, 8, h, w]
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, *, relu: bool) -> None:
        super().__init__()
        half = conv.weight.detach().to(torch.bfloat16)
        self.channels = half.shape[1]
        filling = half.new_zeros(half.shape[0], -2 * self.channels % _CHANNELS, *half.shape[2:])
        weight = torch.cat((half, half, filling), 1).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach().to(torch.bfloat16))
        self.where: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        self.relu = relu
        self.fork: Stride | None = None

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor | tuple[Tensor, Tensor]:
        return _SplitConv.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]

    def parts(self, x: Tensor) -> Tensor:
        """h, l and channels of zeros, ``[N, 8, H, W]`` bfloat16, channels_last."""
        n, c, h, w = x.shape
        shape = (n, self.weight.shape[1], h, w)
        parts = torch.empty(shape, dtype=torch.bfloat16, device=x.device, memory_format=torch.channels_last)
        # Into their places: to make both and then join them are as many passes again.
        high = parts[:, :c].copy_(x)
        torch.sub(x, high, out=parts[:, c : 2 * c])
        parts[:, 2 * c :].zero_()
        return parts


class _SplitConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SplitConv) -> Tensor | tuple[Tensor, Tensor]:
        parts = layer.parts(x)
        if layer.relu and x.is_cuda:
            y: Tensor = torch.cudnn_convolution_relu(parts, layer.weight, layer.bias, *layer.where)
        else:
            y = torch.nn.functional.conv2d(parts, layer.weight, layer.bias, *layer.where)
            y = torch.relu(y) if layer.relu else y
        ctx.layer, ctx.dtype = layer, x.dtype
        ctx.save_for_backward(parts, *((y,) if layer.relu else ()))
        ctx.set_materialize_grads(False)
        return y if layer.fork is None else (y, every(y, layer.fork))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        layer: SplitConv = ctx.layer
        parts, *output = ctx.saved_tensors
        grad = relu_gradient(output[0], grads, layer.fork or (1, 1)) if output else grads[0]
        if grad is None:
            return None, None
        grad_parts, _, _ = torch.ops.aten.convolution_backward(
            grad, parts, layer.weight, None, *layer.where[:3], False, [0, 0], 1, [True, False, False]
        )
        assert grad_parts is not None
        return grad_parts[:, : layer.channels].to(ctx.dtype), None


def split_first(graph: fx.GraphModule) -> str | None:
    """Put :class:`SplitConv` where a convolution, and perhaps a ReLU behind it, is cast to bfloat16; its name.

    ``graph`` is changed.
    """
    for cast in list(graph.graph.nodes):
        if cast.op != "call_method" or cast.target != "to" or cast.args[1:] != (torch.bfloat16,):
            continue
        source = cast.args[0]
        layer = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
        plain = type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros"
        if not plain or isinstance(layer.padding, str) or layer.weight.requires_grad:  # type: ignore[union-attr]
            return None
        relu = next(iter(cast.users)) if len(cast.users) == 1 else None
        takes_relu = relu is not None and is_relu(graph, relu)
        last = relu if takes_relu and relu is not None else cast
        parent, _, name = str(source.target).rpartition(".")
        setattr(graph.get_submodule(parent), name, SplitConv(layer, relu=takes_relu))  # type: ignore[arg-type]
        last.replace_all_uses_with(source)
        for node in dict.fromkeys((last, cast)):
            graph.graph.erase_node(node)
        graph.graph.lint()
        graph.recompile()
        return str(source.target)
    return None
