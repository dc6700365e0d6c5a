"""A frozen network's graph rewritten for a GPU, and compared with what it was."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx

from bdfast.runtime.forks import fork_relus
from bdfast.runtime.fusing import fuse_relus, replace_strided_pointwise, skip_identities
from bdfast.runtime.precision import full_float32
from bdfast.runtime.split_conv import split_first

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest logit, between the two: a wrong graph differs by far more."""


@torch.no_grad()
def for_gpu(
    graph: fx.GraphModule,
    probe: Tensor,  # [n, C, H, W], what the graph takes
) -> tuple[fx.GraphModule, list[str]]:
    """The network with its layers as :mod:`.fusing` and :mod:`.split_conv` have them, and the names of those.

    ``graph`` is not changed; it is returned as it is where the rewritten one cannot run, or differs on the probe.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU()).requires_grad_(False)
        >>> for_gpu(fx.symbolic_trace(net), torch.rand(1, 1, 3, 3))[1]
        ['0']
    """
    with full_float32():
        expected = graph(probe)
    if not isinstance(expected, Tensor) or expected.dtype not in TOLERANCE:
        return graph, []
    merged = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    skip_identities(merged)
    first = split_first(merged)
    names = [*([] if first is None else [first]), *fuse_relus(merged)]
    # Not in float32, whose convolutions use tensor cores (TF32), and whose products do not. Images are float32 always.
    if expected.dtype != torch.float32:
        names += replace_strided_pointwise(merged)
    fork_relus(merged)
    with full_float32():
        try:
            got = merged(probe)
        except RuntimeError:  # no such kernel
            return graph, []
    allowed = TOLERANCE[got.dtype] * float(expected.abs().max())
    alike = got.shape == expected.shape and got.dtype == expected.dtype
    same = alike and float((got - expected).abs().max()) <= allowed
    return (merged, names) if names and same else (graph, [])
