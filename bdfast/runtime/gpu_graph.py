"""A frozen network's graph rewritten for a GPU, and compared with what it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from bdfast.runtime.forks import fork_relus
from bdfast.runtime.fusing import fuse_relus, replace_strided_pointwise, skip_identities
from bdfast.runtime.same_network import Behaviour
from bdfast.runtime.split_conv import split_first


def for_gpu(
    graph: fx.GraphModule,
    probe: Tensor,  # [n, C, H, W], what the graph takes
) -> tuple[fx.GraphModule, list[str]]:
    """The network with its layers as :mod:`.fusing` and :mod:`.split_conv` have them, and the names of those.

    ``graph`` is not changed; it is returned as it is where the rewritten one cannot run, or differs on the probe, in
    its logits or in their gradient.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).requires_grad_(False)
        >>> for_gpu(fx.symbolic_trace(net), torch.rand(1, 1, 3, 3))[1]
        ['0']
    """
    merged = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    skip_identities(merged)
    first = split_first(merged)
    names = [*([] if first is None else [first]), *fuse_relus(merged)]
    before = Behaviour.of(graph, probe)
    # Not in float32, whose convolutions use tensor cores (TF32), and whose products do not. Images are float32 always.
    if isinstance(before.logits, Tensor) and before.logits.dtype != torch.float32:
        names += replace_strided_pointwise(merged)
    fork_relus(merged)
    try:
        same = before.agrees(Behaviour.of(merged, probe))
    except RuntimeError:  # no such kernel
        return graph, []
    return (merged, names) if names and same else (graph, [])
