"""The forward pass of training: compiled, or shared by processes that average their gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parallel import DistributedDataParallel

from bdfast.errors import message
from bdfast.runtime.ranks import Ranks
from bdfast.training import resume, winograd_convs
from bdfast.training.fused_norms import fuse

# Newer versions of PyTorch warn of the older name.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


def training_forward(
    model: nn.Module, ranks: Ranks, compiled: bool, same: Callable[[nn.Module], bool] = lambda _: True
) -> Any:
    """``model`` as a training step calls it; its modules, their names and the state dict stay as they are.

    With several ranks all start from the weights and buffers of rank 0, and ``backward`` averages gradients. Batch
    statistics are of a rank's own part. Alone, and not compiled, batch norms take along what follows them, where
    ``same`` finds that the network stays the same (:mod:`bdfast.training.fused_norms`), and 3x3 convolutions have
    fewer products on a CPU (:mod:`bdfast.training.winograd_convs`).
    """
    forward: Any = model
    if ranks.size == 1 and not compiled:
        forward = fuse(model, same)
        if isinstance(forward, fx.GraphModule) and forward is not model:
            winograd_convs.replace(forward)
        return forward
    if ranks.size > 1:
        device = next(model.parameters()).device
        ids = [device] if device.type == "cuda" else None
        ranks.copy_(model.buffers())
        with torch.cuda.device(device) if ids else nullcontext():
            forward = DistributedDataParallel(model, device_ids=ids, **_OWN_BUFFERS)
    if compiled:
        # Two shapes, the batch and the last one: static code for each beats one that takes all.
        forward = torch.compile(forward, dynamic=False)
    return forward


def check_same(where: str, argument: str, options: Any, images: Tensor, labels: Tensor, ranks: Ranks) -> None:
    """Raise on every rank unless all were given the same samples and options."""
    if ranks.size == 1:
        return
    prints = ranks.gather(resume.fingerprint(where, options, (images, labels), ranks.size))
    others = [rank for rank, found in enumerate(prints) if found != prints[0]]
    if others:
        expected, got = "the same samples and config on every rank", f"others on rank {others[0]} than on rank 0"
        raise ValueError(message(where, argument, expected, got, "load all of the data on every rank"))
