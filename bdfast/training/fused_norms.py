"""Batch norms that are trained together with the shortcut and the ReLU behind them.

Of a ResNet-18's step on 512 images, 8.4 ms on an H200, batch norms took 3.1 and additions and ReLUs about 1: each is a
pass over the activations of its own. On two cores of a CPU a step on 64 images takes 1.08 times as long with these
passes as fused. :func:`fuse` gives the same network with one call of :func:`bdfast.ops.batch_norm_relu` in place of
each such chain. Modules, parameters and buffers stay the model's own; what they are set to (training or not, which
parameters need gradients, momentum) is read at every call.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from bdfast.backends import BackendUnavailableError, requested
from bdfast.ops.batch_norm_relu import FORWARD, batch_norm_relu
from bdfast.ops.precision import compute_dtype
from bdfast.runtime.determinism import host_random_state
from bdfast.runtime.fusing import is_relu
from bdfast.runtime.hooks import has_hooks

_LOG = logging.getLogger(__name__)
_ENABLED = True  # for comparisons: what fuse() is given comes back where this is False
_REFERENCE_TOO = False  # for tests: the op instead of the chain where it has no kernel, too
_ADDITIONS = (operator.add, torch.add, "add")
_ADDITIONS_IN_PLACE = (operator.iadd, "add_")
_OPERATORS_IN_PLACE = ("iadd", "isub", "imul", "itruediv", "setitem")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NormChain(nn.Module):
    """``relu(norm(x) + residual)``, with or without either, in one pass where that is possible, else as it was.

    One pass it is in training mode, where the op has a kernel. In eval mode, and for tensors that the op does not take,
    batch norm, addition and ReLU follow each other.

    Example:
        >>> norm = nn.BatchNorm2d(3)
        >>> NormChain(norm, relu=True)(torch.rand(2, 3, 4, 4)).shape, norm.num_batches_tracked
        (torch.Size([2, 3, 4, 4]), tensor(1))
    """

    def __init__(self, norm: nn.BatchNorm2d, *, relu: bool) -> None:
        super().__init__()
        self.norm, self.relu = norm, relu

    def forward(
        self,
        x: Tensor,  # [N, C, H, W]
        residual: Tensor | None = None,  # [N, C, H, W]
    ) -> Tensor:
        norm = self.norm
        if not (norm.training and _is_taken(x, residual, norm)):
            y: Tensor = norm(x)
            y = y if residual is None else y + residual
            return torch.relu(y) if self.relu else y
        assert norm.momentum is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        return batch_norm_relu(
            x, norm.weight, norm.bias, residual, running_mean=norm.running_mean, running_var=norm.running_var,
            momentum=norm.momentum, eps=norm.eps, relu=self.relu,
        ).y  # fmt: skip


def _is_taken(x: Tensor, residual: Tensor | None, norm: nn.BatchNorm2d) -> bool:
    """Whether the op takes these, as they lie in memory; a batch norm has the errors for others."""
    dense = x.dim() == 4 and (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last))
    sizes = dense and x.shape[1] == norm.num_features and x.numel() > norm.num_features
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    single = all(s is not None and s.dtype == compute_dtype(x) and s.device == x.device for s in statistics)
    like = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype and residual.device == x.device)
    return sizes and single and like and x.dtype in _DTYPES and _has_kernel(x)


def _has_kernel(x: Tensor) -> bool:
    """Whether the op is more than its reference, which is slower than the chain, on the backend that is asked for."""
    if _REFERENCE_TOO:
        return True
    try:
        return FORWARD.choose(requested("auto", FORWARD.public), x).backend != "reference"
    except BackendUnavailableError:
        return False


def fuse(model: nn.Module, same: Callable[[nn.Module], bool] = lambda _: True) -> nn.Module:
    """``model`` with a :class:`NormChain` for each batch norm, or ``model`` itself where it cannot be rewritten.

    What comes back shares modules, parameters and buffers with ``model``, which is neither changed nor copied. Networks
    that look at their input or at themselves to decide what to do, that have hooks, and those without batch norms come
    back as they are; the log says why (level INFO).

    Args:
        model: from one tensor to anything.
        same: whether the network that it is given computes what ``model`` does, as a last check.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        >>> fused = fuse(net)
        >>> [type(module).__name__ for module in fused.modules() if isinstance(module, NormChain)]
        ['NormChain']
        >>> fused.get_submodule("0.1.norm") is net[1]
        True
    """
    if not _ENABLED or not any(_is_fusable(module) for module in model.modules()):
        return model
    try:
        graph = _traced(model)
        _rewrite(graph)
        if not same(graph):
            raise _NotTraceable("the rewritten network computes something else")
    except Exception as error:  # a forward of any kind may fail under a tracer in any way
        kind = "" if isinstance(error, _NotTraceable) else f"torch.fx: {type(error).__name__}: "
        text = str(error).splitlines()[0] if str(error) else ""
        _LOG.info("batch norms are trained as they are, in passes of their own: %s%s", kind, text)
        return model
    return graph


# --- tracing ---------------------------------------------------------------------------------------------------------


class _NotTraceable(Exception):
    """A trace would leave out something that the forward does."""


class _Tracer(fx.Tracer):
    """Looks only into modules that hold batch norms."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        holds = any(isinstance(module, nn.BatchNorm2d) for module in m.modules())
        return not holds or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> fx.GraphModule:
    """The graph of ``model``, which is the same in training and eval mode and nothing but a graph."""
    if any(map(has_hooks, model.modules())):
        raise _NotTraceable("modules have hooks")
    root = nn.Sequential(model)  # whose one argument is the input: others of the model's keep their defaults
    with _as_before(root):
        graphs = []
        for training in (False, True):
            root.train(training)
            graphs.append(fx.GraphModule(root, _Tracer().trace(root)))
            if any("_tensor_constant" in str(node.target) for node in graphs[-1].graph.nodes):
                raise _NotTraceable("the forward makes tensors that do not depend on its input")
    evaluated, trained = graphs
    if evaluated.code != trained.code:
        raise _NotTraceable("the forward differs in training mode by more than its layers")
    return trained


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Modes and attributes of all modules are put back; a forward that changed attributes, or drew, is no graph."""
    modes = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    drawn = host_random_state()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        changed = [module for module, before in attributes if not _same_objects(vars(module), before)]
        for module, before in attributes:
            vars(module).clear()
            vars(module).update(before)
    if changed:
        raise _NotTraceable(f"the forward of {type(changed[0]).__name__} changes its attributes")
    if drawn != host_random_state():
        raise _NotTraceable("the forward draws random numbers on the host")


def _same_objects(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a if name != "training")


# --- rewriting -------------------------------------------------------------------------------------------------------


class _Chain(NamedTuple):
    """What follows a batch norm: the last node that becomes part of it, the other term of a sum, and whether a ReLU."""

    nodes: list[fx.Node]
    residual: fx.Node | None
    relu: bool


def _rewrite(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not _is_fusable(graph.get_submodule(str(node.target))) or node.kwargs:
            continue
        if sum(other.op == "call_module" and other.target == node.target for other in graph.graph.nodes) > 1:
            continue
        _replace(graph, node, _chain_behind(graph, node))
    graph.graph.lint()
    graph.recompile()


def _replace(graph: fx.GraphModule, node: fx.Node, chain: _Chain) -> None:
    parent, _, name = str(node.target).rpartition(".")
    setattr(graph.get_submodule(parent), name, NormChain(graph.get_submodule(str(node.target)), relu=chain.relu))  # type: ignore[arg-type]
    last = chain.nodes[-1]
    with graph.graph.inserting_before(last):
        arguments = (node.args[0],) if chain.residual is None else (node.args[0], chain.residual)
        merged = graph.graph.call_module(str(node.target), arguments)
    last.replace_all_uses_with(merged)
    for gone in reversed(chain.nodes):
        graph.graph.erase_node(gone)


def _is_fusable(norm: nn.Module) -> bool:
    """A batch norm that is nothing but that, with weights and running statistics."""
    if type(norm) is not nn.BatchNorm2d or norm.momentum is None:
        return False
    kept = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return norm.track_running_stats and all(value is not None for value in kept)


def _chain_behind(graph: fx.GraphModule, node: fx.Node) -> _Chain:
    nodes, residual = [node], None
    reader = _only_reader(node)
    if reader is not None and (other := _other_term(reader, node)) is not None and not _changes_source(graph, node):
        nodes, residual, reader = [node, reader], other, _only_reader(reader)
    relu = reader is not None and is_relu(graph, reader) and reader.args[:1] == (nodes[-1],)
    return _Chain([*nodes, reader] if relu and reader is not None else nodes, residual, relu)


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_term(addition: fx.Node, term: fx.Node) -> fx.Node | None:
    """What is added to ``term``, if this is an addition of two tensors that writes to nothing but ``term``."""
    in_place = addition.target in _ADDITIONS_IN_PLACE
    if addition.op not in ("call_function", "call_method") or not (in_place or addition.target in _ADDITIONS):
        return None
    if len(addition.args) != 2 or addition.kwargs or (in_place and addition.args[0] is not term):
        return None
    other = addition.args[1] if addition.args[0] is term else addition.args[0]
    return other if isinstance(other, fx.Node) and other is not term else None


def _changes_source(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether anything changes in place what the batch norm reads, and would so before a sum is complete."""
    (source,) = node.all_input_nodes
    return any(_is_in_place(graph, reader) for reader in source.users)


def _is_in_place(graph: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(graph.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name in _OPERATORS_IN_PLACE or bool(node.kwargs.get("inplace", False))
