r"""Batch norm in eval mode is an affine map a channel, and a convolution or linear layer in front of it absorbs it.

.. math::

    w'_o = w_o\, s_o, \qquad b'_o = (b_o - \mu_o)\, s_o + \beta_o, \qquad
    s_o = \frac{\gamma_o}{\sqrt{\sigma_o^2 + \epsilon}}

Where nothing but the batch norm reads the layer's output this is exact. A batch norm that reads a sum, as in front of
a PreAct block, stays: padding puts zeros, not the batch norm's offset, around what the next convolution sees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bdfast.ops.batch_norm_clipped_relu import batch_norm_clipped_relu
from bdfast.runtime.precision import full_float32

Absorber: TypeAlias = "nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear"
ABSORBERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
TOLERANCE = 1e-4  # of the largest logit: folding reorders float32 sums, a wrong graph differs by far more


@dataclass(frozen=True)
class FoldReport:
    """What became of a model's batch norms.

    Attributes:
        method: ``"graph"`` (the traced graph was rewritten), ``"pairs"`` (layers that were seen to follow each other
            were merged, each merger checked by a forward pass) or ``"none"``.
        folded: names of the batch norms that are gone.
        fused: names of those that run in one pass with the ReLU behind them.
        kept: those that stay as they are, with the reason.
        reason: why the graph was not rewritten; empty with method "graph".
    """

    method: str = "none"
    folded: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    kept: dict[str, str] = field(default_factory=dict)
    reason: str = ""


@torch.no_grad()
def fold(
    model: nn.Module,
    probe: Tensor,  # [n, C, H, W]
) -> tuple[nn.Module, FoldReport]:
    """A model in eval mode without the batch norms that can go; ``model`` itself is changed and not to be used again.

    The result is compared with the model on the probe, in full float32: one that differs is thrown away, and the report
    says so.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).eval()
        >>> folded, report = fold(net, torch.rand(2, 1, 3, 3))
        >>> report.method, report.folded
        ('graph', ('1',))
    """
    with full_float32():
        return _fold(model, probe)


def _fold(model: nn.Module, probe: Tensor) -> tuple[nn.Module, FoldReport]:
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    expected = _tensor(model(probe))
    if expected is None:
        return model, FoldReport(kept=dict.fromkeys(norms, "no tensor comes out"), reason="no tensor comes out")
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model))
        report = _fold_graph(graph)
        got = _tensor(graph(probe))
    except Exception as error:  # a forward of any kind may fail under a tracer in any way
        reason = f"torch.fx: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    else:
        if got is not None and _same(got, expected):
            return graph, report
        reason = "the rewritten graph computes something else"
    return _fold_pairs(model, probe, expected, norms, reason)


class FrozenBatchNormReLU(nn.Module):
    """Eval-mode batch norm and ReLU in one pass; the statistics stay float32 whatever the activations are."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(norm, name)
            self.register_buffer(name, None if value is None else value.detach().float())

    def forward(self, x: Tensor) -> Tensor:  # [N, C, ...]
        return batch_norm_clipped_relu(x, self.running_mean, self.running_var, self.weight, self.bias, None, self.eps)


def absorb(layer: Absorber, norm: _BatchNorm) -> Absorber:
    """A layer that computes ``norm(layer(x))`` for a batch norm in eval mode.

    Example:
        >>> layer, norm = nn.Linear(2, 3), nn.BatchNorm1d(3).eval()
        >>> x = torch.rand(4, 2)
        >>> torch.allclose(absorb(layer, norm)(x), norm(layer(x)), atol=1e-6)
        True
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = (var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.double())
    shift = -mean if layer.bias is None else layer.bias.double() - mean
    bias = shift * scale + (0 if norm.bias is None else norm.bias.double())
    weight = layer.weight.double() * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    merged = layer.__class__.__new__(layer.__class__)
    merged.__dict__ = {**layer.__dict__, "_parameters": {}}
    merged.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    merged.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    return merged


# --- the traced graph ------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into containers only: what has no children, such as an activation of someone's own, is one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or next(m.children(), None) is None

    def create_arg(self, a: Any) -> Any:
        """A module may be an argument: a clip that applies the batch norm before it takes it as one."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)


def _fold_graph(graph: fx.GraphModule) -> FoldReport:
    folded, fused, kept = [], [], {}
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    uses: dict[nn.Module, int] = {}
    for node in calls:
        module = graph.get_submodule(node.target)
        uses[module] = uses.get(module, 0) + 1
    for node in calls:
        norm = graph.get_submodule(node.target)
        if not isinstance(norm, _BatchNorm):
            continue
        name, source = str(node.target), node.args[0]
        layer = graph.get_submodule(source.target) if source.op == "call_module" else None
        obstacle = _obstacle(layer, norm) or _shared(source, uses[layer])  # type: ignore[index]
        if obstacle is None:
            _put(graph, source.target, absorb(layer, norm))  # type: ignore[arg-type]
            _bypass(node, source)
            folded.append(name)
        elif (relu := _relu_behind(graph, node)) is not None and _fusable(norm):
            _put(graph, name, FrozenBatchNormReLU(norm))
            _bypass(relu, node)
            fused.append(name)
        else:
            kept[name] = obstacle
    graph.graph.lint()
    graph.recompile()
    return FoldReport("graph", tuple(folded), tuple(fused), kept)


def _obstacle(layer: nn.Module | None, norm: _BatchNorm) -> str | None:
    """Why a batch norm cannot be merged into what it reads, or None."""
    if norm.running_mean is None or norm.training:
        return "it has no frozen statistics"
    if not isinstance(layer, ABSORBERS):
        return "it does not follow a convolution or linear layer"
    if _has_hooks(layer) or _has_hooks(norm) or list(layer._parameters) != ["weight", "bias"]:
        return "it, or the layer before it, carries hooks or a parametrization"
    return None


def _shared(source: fx.Node, uses: int) -> str | None:
    return "something else reads the layer before it" if len(source.users) > 1 or uses > 1 else None


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _fusable(norm: _BatchNorm) -> bool:
    return norm.running_mean is not None and not _has_hooks(norm)


def _relu_behind(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The ReLU that alone reads a node."""
    if len(node.users) != 1:
        return None
    reader = next(iter(node.users))
    if reader.op == "call_module":
        module = graph.get_submodule(str(reader.target))
        return reader if type(module) is nn.ReLU and not _has_hooks(module) else None
    called = (torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, "relu", "relu_")
    return reader if reader.op in ("call_function", "call_method") and reader.target in called else None


def _put(graph: fx.GraphModule, target: Any, module: nn.Module) -> None:
    parent, _, name = str(target).rpartition(".")
    setattr(graph.get_submodule(parent), name, module)


def _bypass(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


# --- without a graph: layers that are seen to follow each other ------------------------------------------------------


def _fold_pairs(
    model: nn.Module, probe: Tensor, expected: Tensor, norms: list[str], reason: str
) -> tuple[nn.Module, FoldReport]:
    """Merge one pair after the other and keep what leaves the logits of the probe as they were."""
    folded, kept = [], dict.fromkeys(norms, "it was not seen to follow a convolution or linear layer")
    for first, second in _followers(model, probe):
        layer, norm = model.get_submodule(first), model.get_submodule(second)
        assert isinstance(norm, _BatchNorm)
        kept[second] = _obstacle(layer, norm) or "merged, the model computed something else"
        if _obstacle(layer, norm) is not None:
            continue
        model.set_submodule(first, absorb(layer, norm))  # type: ignore[arg-type]
        model.set_submodule(second, nn.Identity())
        got = _tensor(model(probe))
        if got is not None and _same(got, expected):
            folded.append(second)
            del kept[second]
        else:
            model.set_submodule(first, layer)
            model.set_submodule(second, norm)
    return model, FoldReport("pairs" if folded else "none", tuple(folded), (), kept, reason)


def _followers(model: nn.Module, probe: Tensor) -> list[tuple[str, str]]:
    """(layer, batch norm) by name where the one's output object is the other's input, each run once."""
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # or an id may come back as another tensor's
    calls: list[str] = []
    pairs: list[tuple[str, str]] = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        calls.append(name)
        if isinstance(module, ABSORBERS):
            made[id(output)] = name
            alive.append(output)
        elif inputs and id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], name))

    watched = [(name, m) for name, m in model.named_modules() if isinstance(m, (*ABSORBERS, _BatchNorm))]
    handles = [
        m.register_forward_hook(lambda module, inputs, output, name=name: note(name, module, inputs, output))
        for name, m in watched
    ]
    try:
        model(probe)
    finally:
        for handle in handles:
            handle.remove()
    return [(a, b) for a, b in pairs if calls.count(a) == 1 and calls.count(b) == 1]


def _tensor(output: object) -> Tensor | None:
    logits = getattr(output, "logits", output)
    return logits if isinstance(logits, Tensor) else None


def _same(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and bool(
        (got - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp_min(1e-6)
    )
