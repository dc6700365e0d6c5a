"""ReLUs that two layers read, in networks that nobody trains: each reader gets an output of its own.

Backward, both gradients then arrive at the layer that has the ReLU, which adds and masks them in one pass instead of
two (:mod:`bdfast.runtime.relu_gradient`). In a ResNet this is where every block begins: the first convolution reads the
activation, and so does the shortcut, a sum or, of every second pixel, a projection.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from bdfast.runtime.fusing import ConvReLU, Pointwise, StridedPointwise
from bdfast.runtime.relu_gradient import Stride
from bdfast.runtime.split_conv import SplitConv
from bdfast.runtime.winograd import WinogradConv

_READERS = (ConvReLU, SplitConv, StridedPointwise, WinogradConv, nn.Conv2d)
_ENABLED = True  # for comparisons: a graph stays as it is where this is False
_STRIDED = True  # likewise: a second reader that sees every so many-th pixel is given all of them where it is False


def fork_relus(graph: fx.GraphModule) -> list[str]:
    """Give each of two readers of a ReLU that is part of a layer (:class:`ConvReLU`) its own output; those layers.

    The graph is changed. Readers are convolutions, alone or with what :mod:`bdfast.runtime.fusing` made of them: these
    neither change what they read nor hand it on.

    Example:
        >>> from bdfast.runtime.fusing import fuse_relus
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.conv1, self.conv2 = (nn.Conv2d(2, 2, 1) for _ in range(3))
        ...     def forward(self, x):
        ...         y = self.stem(x).relu()
        ...         return (self.conv2(self.conv1(y).relu()) + y).relu()
        >>> graph = fx.symbolic_trace(Net().requires_grad_(False))
        >>> fuse_relus(graph), fork_relus(graph)
        (['stem', 'conv1', 'conv2'], ['stem'])
    """
    if not _ENABLED:
        return []
    forked = []
    for node in list(graph.graph.nodes):
        layer = _called(graph, node)
        has_relu = isinstance(layer, ConvReLU) or (isinstance(layer, SplitConv) and layer.relu)
        readers = _two_readers(graph, node) if has_relu else None
        if readers is None:
            continue
        stride = _take_stride(graph, readers)
        layer.fork = stride  # type: ignore[union-attr,assignment]
        with graph.graph.inserting_after(node):
            outputs = [graph.graph.call_function(operator.getitem, (node, place)) for place in (0, 1)]
        for reader, output in zip(readers, outputs, strict=True):
            reader.replace_input_with(node, output)
        forked.append(str(node.target))
    graph.graph.lint()
    graph.recompile()
    return forked


def _two_readers(graph: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The readers, if they are two layers that read once each; one that sees part of the pixels comes last."""
    readers = list(node.users)
    if len(readers) != 2:
        return None
    for reader in readers:
        layer = _called(graph, reader)
        reads = sum(argument is node for argument in reader.args)
        if type(layer) not in _READERS or reads != 1 or reader.kwargs:
            return None
    first, second = sorted(readers, key=lambda reader: isinstance(_called(graph, reader), StridedPointwise))
    return first, second


def _take_stride(graph: fx.GraphModule, readers: tuple[fx.Node, fx.Node]) -> Stride:
    """The stride of the second reader, which then no longer has it; ``(1, 1)`` unless the first sees all pixels."""
    first, second = (_called(graph, reader) for reader in readers)
    if not _STRIDED or not isinstance(second, StridedPointwise) or isinstance(first, StridedPointwise):
        return 1, 1
    parent, _, name = str(readers[1].target).rpartition(".")
    setattr(graph.get_submodule(parent), name, Pointwise(second.conv))
    return second.conv.stride  # type: ignore[return-value]


def _called(graph: fx.GraphModule, node: fx.Node) -> Any:
    """The module that a node calls."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None
