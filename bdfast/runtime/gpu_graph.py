"""A frozen network's graph rewritten for a GPU, and compared with what it was."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from bdfast.runtime.forks import fork_relus
from bdfast.runtime.fusing import fuse_relus, replace_strided_pointwise, skip_identities
from bdfast.runtime.precision import full_float32
from bdfast.runtime.split_conv import split_first

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Of the largest logit, between the two: a wrong graph differs by far more."""

GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.4}
"""Of the norm of the gradient to the images: roundings that carry activations across 0 are many in bfloat16."""


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
    expected, gradient = _forth_and_back(graph, probe)
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
    try:
        got, got_gradient = _forth_and_back(merged, probe)
    except RuntimeError:  # no such kernel
        return graph, []
    alike = got.shape == expected.shape and got.dtype == expected.dtype
    same = alike and float((got - expected).abs().max()) <= TOLERANCE[got.dtype] * float(expected.abs().max())
    off = float((got_gradient - gradient).norm())
    same = same and off <= GRADIENT_TOLERANCE[got.dtype] * float(gradient.norm())
    return (merged, names) if names and same else (graph, [])


def _forth_and_back(
    graph: fx.GraphModule,
    probe: Tensor,  # [n, C, H, W]
) -> tuple[Any, Tensor]:
    """Logits, and the gradient of a sum of them with various weights to the images."""
    leaf = probe.detach().requires_grad_()
    with full_float32(), torch.enable_grad():
        output = graph(leaf)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output, torch.zeros_like(leaf)
        weights = torch.linspace(-1, 1, output[0].numel(), device=output.device).reshape(output[0].shape)
        (gradient,) = torch.autograd.grad((output.float() * weights).sum(), leaf)
    return output.detach(), gradient
