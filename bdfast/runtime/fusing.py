"""Convolutions that take what surrounds them along, for networks that nobody trains.

PyTorch adds the bias of a convolution, adds the shortcut and takes the ReLU in a pass each over the activations; on an
H200 these passes took 1.0 of the 4.9 ms that 512 images of 32x32 pixels need forward and backward through a ResNet-18.
cuDNN does all three while the result is in registers (:class:`ConvReLU`), and on a CPU so does
:mod:`bdfast.runtime.winograd`. Backward, the ReLU's mask is read off its output, together with the gradients of two
readers where there are two (:mod:`bdfast.runtime.forks`). A strided 1x1 convolution, for which cuDNN may convert the
layout and leave the tensor cores idle, is a matrix product of every second pixel (:class:`StridedPointwise`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bdfast.runtime.hooks import has_hooks
from bdfast.runtime.relu_gradient import Stride, every, relu_gradient
from bdfast.runtime.winograd import WinogradConv, input_gradient

_RELU_CALLS = (torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_")
_SUM_CALLS = (operator.add, operator.iadd, torch.add, "add", "add_")


class ConvReLU(nn.Module):
    """``relu(conv(x) + z)``, or without z; gradients reach x and z, not the weights.

    Attributes:
        fork: None, or which pixels a second reader sees; each reader then has an output of its own.

    Example:
        >>> conv = nn.Conv2d(1, 2, 3).requires_grad_(False)
        >>> x = torch.rand(1, 1, 4, 4)
        >>> torch.equal(ConvReLU(conv)(x), conv(x).relu())
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv: nn.Conv2d | WinogradConv = conv
        self.fork: Stride | None = None

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        z: Tensor | None = None,  # [N, O, H', W']
    ) -> Tensor | tuple[Tensor, Tensor]:
        if _by_autograd(x) and isinstance(self.conv, nn.Conv2d):
            y = _conv_relu(x, z, self.conv)
            return y if self.fork is None else (y, y[:, :, :: self.fork[0], :: self.fork[1]])
        return _ConvReLU.apply(x, z, self)  # type: ignore[no-untyped-call,no-any-return]


def _by_autograd(x: Tensor) -> bool:
    """Whether to leave all to PyTorch."""
    return not x.is_cuda


def _conv_relu(x: Tensor, z: Tensor | None, conv: nn.Conv2d | WinogradConv) -> Tensor:
    if isinstance(conv, WinogradConv):
        return conv.run(x, z, relu=True)
    where: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
    if not x.is_cuda:
        y = conv(x)
        return torch.relu(y if z is None else y + z)
    if z is None:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *where)
    return torch.cudnn_convolution_add_relu(x, conv.weight, z, 1.0, conv.bias, *where)


class _ConvReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor | None, layer: ConvReLU) -> Tensor | tuple[Tensor, Tensor]:
        y = _conv_relu(x, z, layer.conv)
        ctx.conv, ctx.has_z, ctx.stride = layer.conv, z is not None, layer.fork or (1, 1)
        ctx.save_for_backward(x, y)
        ctx.set_materialize_grads(False)
        return y if layer.fork is None else (y, every(y, layer.fork))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        x, y = ctx.saved_tensors
        conv, needed = ctx.conv, ctx.needs_input_grad[0]
        if isinstance(conv, WinogradConv) and not ctx.has_z and len(grads) == 1:  # it masks the gradient as it reads it
            return conv.input_gradient(grads[0], x, y) if needed and grads[0] is not None else None, None, None
        grad = relu_gradient(y, grads, ctx.stride)
        if grad is None:
            return None, None, None
        return _input_gradient(grad, x, conv) if needed else None, grad if ctx.has_z else None, None


def _input_gradient(grad: Tensor, x: Tensor, conv: nn.Conv2d | WinogradConv) -> Tensor:
    return conv.input_gradient(grad, x) if isinstance(conv, WinogradConv) else input_gradient(grad, x, conv)


class StridedPointwise(nn.Module):
    """A 1x1 convolution with a stride, as a matrix product; gradients reach x, not the weights.

    Example:
        >>> conv = nn.Conv2d(3, 2, 1, stride=2).requires_grad_(False)
        >>> x = torch.rand(1, 3, 4, 4)
        >>> torch.equal(StridedPointwise(conv)(x), conv(x))
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
    ) -> Tensor:
        if not x.is_cuda:
            y: Tensor = self.conv(x)
            return y
        return _StridedPointwise.apply(x, self.conv)  # type: ignore[no-untyped-call,no-any-return]


class _StridedPointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, conv: nn.Conv2d) -> Tensor:
        ctx.conv = conv
        ctx.save_for_backward(x)
        return _pointwise(every(x, conv.stride), conv)  # type: ignore[arg-type]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return input_gradient(grad, x, ctx.conv), None


class Pointwise(nn.Module):
    """A 1x1 convolution without its stride: of the pixels that it sees, which are dense in memory.

    Example:
        >>> conv = nn.Conv2d(3, 2, 1, stride=2).requires_grad_(False)
        >>> x = torch.rand(1, 3, 4, 4)
        >>> torch.allclose(Pointwise(conv)(x[:, :, ::2, ::2]), conv(x))
        True
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(
        self,
        x: Tensor,  # [N, C, H', W']
    ) -> Tensor:
        return _pointwise(x, self.conv)


def _pointwise(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def skip_identities(graph: fx.GraphModule) -> None:
    """Let what reads an ``nn.Identity`` read its input, so that neighbours are seen to be that.

    Example:
        >>> graph = fx.symbolic_trace(nn.Sequential(nn.Identity(), nn.ReLU()))
        >>> skip_identities(graph)
        >>> [node.target for node in graph.graph.nodes if node.op == "call_module"]
        ['1']
    """
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        module = graph.get_submodule(str(node.target))
        if type(module) is nn.Identity and not has_hooks(module):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.recompile()


def fuse_relus(graph: fx.GraphModule) -> list[str]:
    """Put :class:`ConvReLU` where a convolution, or its sum with something, is read by a ReLU alone; their names.

    The graph is changed. Layers whose weights require a gradient, pad otherwise than with zeros, or carry hooks stay.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).requires_grad_(False)
        >>> fuse_relus(fx.symbolic_trace(net))
        ['0']
    """
    fused = []
    for relu in list(graph.graph.nodes):
        if not is_relu(graph, relu):
            continue
        source = relu.args[0]
        if (conv := _lone_conv(graph, source, relu)) is not None:
            arguments: tuple[Any, ...] = (source.args[0],)
        elif (found := _sum_of_conv(graph, source, relu)) is not None:
            conv, layer, other = found
            arguments = (layer.args[0], other)
            source, addition = layer, source
        else:
            continue
        name = str(source.target)
        with graph.graph.inserting_before(relu):
            parent, _, last = name.rpartition(".")
            setattr(graph.get_submodule(parent), last, ConvReLU(conv))
            merged = graph.graph.call_module(name, arguments)
        relu.replace_all_uses_with(merged)
        graph.graph.erase_node(relu)
        if len(arguments) == 2:
            graph.graph.erase_node(addition)
        graph.graph.erase_node(source)
        fused.append(name)
    graph.graph.lint()
    graph.recompile()
    return fused


def replace_strided_pointwise(graph: fx.GraphModule) -> list[str]:
    """Put :class:`StridedPointwise` in place of the convolutions that are that; their names.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 1, stride=2)).requires_grad_(False)
        >>> replace_strided_pointwise(fx.symbolic_trace(net))
        ['0']
    """
    replaced = []
    for node in graph.graph.nodes:
        if node.op != "call_module" or not node.users:
            continue
        conv = _lone_conv(graph, node, next(iter(node.users)))
        if conv is None or conv.kernel_size != (1, 1) or max(conv.stride) == 1 or conv.groups > 1 or any(conv.padding):  # type: ignore[arg-type]
            continue
        parent, _, name = str(node.target).rpartition(".")
        setattr(graph.get_submodule(parent), name, StridedPointwise(conv))
        replaced.append(str(node.target))
    return replaced


def is_relu(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node takes the ReLU of another."""
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in _RELU_CALLS


def _lone_conv(graph: fx.GraphModule, node: Any, reader: fx.Node) -> nn.Conv2d | None:
    """The convolution that ``node`` calls, if ``reader`` alone reads it and nobody calls it a second time."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or list(node.users) != [reader] or node.kwargs:
        return None
    module = graph.get_submodule(str(node.target))
    calls = sum(n.op == "call_module" and n.target == node.target for n in graph.graph.nodes)
    if type(module) is not nn.Conv2d or calls > 1 or has_hooks(module) or len(node.args) != 1:
        return None
    plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return module if plain and not any(p.requires_grad for p in module.parameters()) else None


def _sum_of_conv(graph: fx.GraphModule, node: Any, reader: fx.Node) -> tuple[nn.Conv2d, fx.Node, fx.Node] | None:
    """The convolution, its call, and the other term of a sum that ``reader`` alone reads."""
    is_sum = isinstance(node, fx.Node) and node.op in ("call_function", "call_method") and node.target in _SUM_CALLS
    if not is_sum or list(node.users) != [reader] or len(node.args) != 2 or node.kwargs:
        return None
    for layer, other in (node.args, node.args[::-1]):
        conv = _lone_conv(graph, layer, node)
        if conv is not None and isinstance(other, fx.Node) and other is not layer:
            return conv, layer, other
    return None
