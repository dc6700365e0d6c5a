"""Where a network calls its ReLUs, modules and functions alike.

Each module with a ``forward`` of its own (a *block*) is traced by ``torch.fx`` with its children as black boxes: one
that cannot be traced does not hide the others. A *site* is one ReLU call in the forward of one block.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_RELU_MODULES = (nn.ReLU, nn.ReLU6)
_RELU_FUNCTIONS = (torch.relu, torch.relu_, F.relu, F.relu_, F.relu6)
_RELU_METHODS = ("relu", "relu_")
_SIX = (nn.ReLU6, F.relu6)


@dataclass(frozen=True)
class Site:
    """One ReLU call.

    Attributes:
        name: the path of the module that is called, ``block.relu`` for a function; with ``:1``, ``:2``... behind it
            where a block calls the same several times.
        block: path of the module whose forward calls it.
        position: among the ReLU calls of that forward.
        ceiling: 6 for a ReLU6, else infinity.
        channels: C of the activation ``[N, C, ...]``; None where the network does not tell.
    """

    name: str
    block: str
    position: int
    ceiling: float
    channels: int | None

    @property
    def names(self) -> set[str]:
        """What it is called by: its own name, and that of all calls of the same."""
        return {self.name, self.name.rsplit(":", 1)[0]}


@dataclass(frozen=True)
class Network:
    """What tracing found.

    Attributes:
        model: the network.
        sites: in the order of execution.
        opaque: path of each block that calls ReLUs and cannot be traced, and why.
    """

    model: nn.Module
    sites: list[Site]
    opaque: dict[str, str]
    graphs: dict[nn.Module, fx.Graph] = field(repr=False)

    def channels_after(self, path: str) -> int | None:
        """C of what the module at ``path`` returns, or None where the network does not tell."""
        return _module_channels(self, self.model.get_submodule(path))


def find(model: nn.Module) -> Network:
    """Trace every block of ``model`` in its present mode, and list the ReLU calls."""
    graphs: dict[nn.Module, fx.Graph] = {}
    opaque: dict[str, str] = {}
    paths: dict[nn.Module, str] = {}
    for path, module in model.named_modules():
        paths[module] = path
        if not _has_own_forward(module):
            continue
        found = trace(module)
        if isinstance(found, fx.Graph):
            graphs[module] = found
        elif _calls_relu(module):
            opaque[path] = found
    network = Network(model, [], opaque, graphs)
    network.sites.extend(_in_order(network, paths))
    return network


# --- tracing ---------------------------------------------------------------------------------------------------------


class _BlockTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_arg(self, a: Any) -> Any:
        """As torch's, and objects that a forward fills and returns, such as ``SimpleNamespace(logits=...)``, or a
        mapping with attributes, as the models of transformers do: torch's would be a plain dict.
        """
        if isinstance(a, dict) and type(a) is not dict:
            return self._made(a, dict(a))
        try:
            return super().create_arg(a)
        except NotImplementedError:
            if not getattr(a, "__dict__", None) or isinstance(a, type):
                raise
            return self._made(a, {})

    def _made(self, a: Any, items: dict[Any, Any]) -> fx.Node:
        parts = self.create_arg(dict(getattr(a, "__dict__", {}))), self.create_arg(items)
        return self.create_node("call_function", _maker(type(a)), parts, {})


def _maker(kind: Any) -> Callable[[dict[str, Any], dict[Any, Any]], Any]:
    """What makes an object of ``kind`` from its attributes and items, as copying does: without its ``__init__``."""

    def made(attributes: dict[str, Any], items: dict[Any, Any]) -> Any:
        fresh = kind.__new__(kind)
        if attributes:
            fresh.__dict__.update(attributes)
        for key, value in items.items():
            fresh[key] = value
        return fresh

    return made


def trace(block: nn.Module) -> fx.Graph | str:
    """The graph of the block's forward in its present mode, or the reason why there is none."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(type(block).forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    # An option such as return_features=False may decide the way through the forward: then it is fixed at its default.
    attempts: list[dict[str, Any] | None] = [None, defaults] if defaults else [None]
    reason = ""
    for concrete in attempts:
        try:
            return _BlockTracer().trace(block, concrete)
        except Exception as error:  # a forward may raise anything when it meets a stand-in for a tensor
            reason = reason or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return reason


def _has_own_forward(module: nn.Module) -> bool:
    """Whether its forward may call a ReLU: torch's own layers do not, and containers only call their children."""
    own = type(module)
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return True
    return own is nn.Sequential or not own.__module__.startswith("torch.nn.")


def _calls_relu(module: nn.Module) -> bool:
    if any(isinstance(child, _RELU_MODULES) for child in module.children()):
        return True
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return bool(module.activation is F.relu)
    try:
        return "relu" in inspect.getsource(type(module)).lower()
    except (OSError, TypeError):
        return True


# --- ReLU calls ------------------------------------------------------------------------------------------------------


def relu_nodes(graph: fx.Graph, block: nn.Module) -> list[fx.Node]:
    """The ReLU calls of a traced forward, in order."""
    return [node for node in graph.nodes if _called(node, block) is not None]


def _called(node: fx.Node, block: nn.Module) -> object | None:
    """The ReLU's class or function, if the node calls one."""
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return type(module) if isinstance(module, _RELU_MODULES) else None
    if node.op == "call_function" and node.target in _RELU_FUNCTIONS:
        return node.target
    return node.target if node.op == "call_method" and node.target in _RELU_METHODS else None


def is_inplace(node: fx.Node, block: nn.Module) -> bool:
    """Whether a ReLU call overwrites its input."""
    if node.op == "call_module":
        return bool(getattr(block.get_submodule(str(node.target)), "inplace", False))
    return node.target in (torch.relu_, F.relu_, "relu_") or bool(_argument(node, 1, "inplace", False))


def input_of(node: fx.Node) -> fx.Node:
    """What a ReLU call, or a layer, is called on."""
    found = _argument(node, 0, "input", None)
    assert isinstance(found, fx.Node)
    return found


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _in_order(network: Network, paths: dict[nn.Module, str]) -> Iterator[Site]:
    """The sites in the order of execution, as far as the graphs tell; the rest in the order of the modules."""
    visited: set[nn.Module] = set()

    def walk(block: nn.Module) -> Iterator[Site]:
        if block in visited or block not in network.graphs:
            return
        visited.add(block)
        sites = iter(_sites_of(network, block, paths[block]))
        for node in network.graphs[block].nodes:
            if _called(node, block) is not None:
                yield next(sites)
            elif node.op == "call_module":
                yield from walk(block.get_submodule(str(node.target)))

    for module in paths:
        yield from walk(module)


def _sites_of(network: Network, block: nn.Module, path: str) -> Iterator[Site]:
    prefix = f"{path}." if path else ""
    nodes = relu_nodes(network.graphs[block], block)
    names = [prefix + (str(node.target) if node.op == "call_module" else "relu") for node in nodes]
    total, met = Counter(names), Counter[str]()
    for position, (node, name) in enumerate(zip(nodes, names, strict=True)):
        met[name] += 1
        ceiling = 6.0 if _called(node, block) in _SIX else math.inf
        full = f"{name}:{met[name]}" if total[name] > 1 else name
        yield Site(full, path, position, ceiling, _node_channels(network, block, input_of(node)))


# --- channels --------------------------------------------------------------------------------------------------------

# What returns as many channels as it gets.
_KEEPS_CHANNELS = {
    operator.add, operator.iadd, operator.mul, torch.add, torch.mul, "add", "add_", "mul", "contiguous", "clone",
    *_RELU_FUNCTIONS, *_RELU_METHODS, F.dropout, F.dropout2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.interpolate,
}  # fmt: skip


def _node_channels(network: Network, block: nn.Module, node: fx.Node) -> int | None:
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return _module_channels(network, module) or (
            _node_channels(network, block, input_of(node)) if _keeps_channels(network, module) else None
        )
    if node.op in ("call_function", "call_method") and node.target in _KEEPS_CHANNELS:
        found = (_node_channels(network, block, argument) for argument in node.all_input_nodes)
        return next((channels for channels in found if channels is not None), None)
    return None


def _module_channels(network: Network, module: nn.Module) -> int | None:
    """C of a module's output where that does not depend on its input."""
    for attribute in ("out_channels", "num_features", "out_features", "num_channels"):  # convolutions, norms, linear
        channels = getattr(module, attribute, None)
        if isinstance(channels, int) and type(module).__module__.startswith("torch.nn."):
            return channels
    graph = network.graphs.get(module)
    if graph is None:
        return None
    output = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return _node_channels(network, module, output) if isinstance(output, fx.Node) else None


def _keeps_channels(network: Network, module: nn.Module) -> bool:
    """Pools, activations, dropout: layers of torch without weights."""
    leaf = type(module).__module__.startswith("torch.nn.") and module not in network.graphs
    return leaf and not isinstance(module, nn.Flatten) and next(module.parameters(), None) is None
