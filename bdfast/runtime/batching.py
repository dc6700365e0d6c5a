"""How many images a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from bdfast.runtime.frozen import FrozenModel

CPU_PIXELS = 64 * 3 * 32 * 32  # a batch of 64 CIFAR images: activations near the caches, matrices wide enough
MOST = 1024  # PGD of a ResNet-18 on an H200, 32x32 images: a tenth faster than batches of 512, 2048 2 % more
SHARE = 0.5  # of the free memory of a GPU: fragmentation, and what others may take meanwhile
_TRIAL = 8  # images


def auto_batch_size(frozen: FrozenModel, shape: Sequence[int]) -> int:
    """A power of two: on the CPU by the size of an image, on a GPU by the memory that one takes, forward and backward.

    Args:
        frozen: the network; on a GPU it is run once.
        shape: ``[C, H, W]`` of the images.

    Example:
        >>> with FrozenModel(torch.nn.Flatten()) as frozen:
        ...     auto_batch_size(frozen, (3, 32, 32)), auto_batch_size(frozen, (3, 224, 224))
        (64, 8)
    """
    if frozen.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(frozen.device)
        wanted = SHARE * free / _bytes_per_image(frozen, shape)
    else:
        wanted = max(8, CPU_PIXELS / math.prod(shape))
    return int(min(MOST, 2 ** max(0, math.floor(math.log2(max(1.0, wanted))))))


def _bytes_per_image(frozen: FrozenModel, shape: Sequence[int]) -> float:
    x = torch.zeros(_TRIAL, *shape, dtype=torch.float32, device=frozen.device)
    frozen.input_gradient(x, lambda logits: logits.sum(1))  # the first call also allocates what stays
    torch.cuda.synchronize(frozen.device)
    torch.cuda.reset_peak_memory_stats(frozen.device)
    before = torch.cuda.memory_allocated(frozen.device)
    frozen.input_gradient(x, lambda logits: logits.sum(1))
    torch.cuda.synchronize(frozen.device)
    return max(1.0, (torch.cuda.max_memory_allocated(frozen.device) - before) / _TRIAL)
