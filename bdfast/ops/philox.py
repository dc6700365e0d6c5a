"""Philox4x32-10 in integer arithmetic of torch: the specification of ``csrc/include/philox.h``.

A counter-based generator (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC11): the words are
a function of a key and a counter, so that a value depends on what it is for, and not on batches, order or threads.
"""

from __future__ import annotations

import functools

from torch import Tensor

from bdfast.runtime.determinism import stream_seed

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(key: int, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, in int64, for every 128-bit counter ``(low, high)`` of two int64 tensors.

    Example:
        >>> import torch
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [f"{int(word):08x}" for word in philox4x32(0, zero, zero)]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = low & _MASK, (low >> 32) & _MASK, high & _MASK, (high >> 32) & _MASK
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(10):
        # The product wraps around int64; its bits are those of the unsigned product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _MASK) ^ c1 ^ k0, ((product0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = product1 & _MASK, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=1024)
def stream_key(seed: int, purpose: str, round: int) -> int:
    """The key of one purpose's stream in one round; keys of others are unrelated."""
    return stream_seed(seed, f"{purpose}/{round}")
