"""Independent random streams from one seed, always on the CPU, so that every device draws the same numbers."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose; the global random state is neither read nor changed.

    Example:
        >>> a, b = stream(0, "select"), stream(0, "noise")
        >>> a.initial_seed() == stream(0, "select").initial_seed() != b.initial_seed()
        True
    """
    digest = hashlib.sha256(f"bdfast.attacks/{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
