"""Random inputs of cases: drawn on the CPU, so that every device gets the same, unless they are asked for there."""

from __future__ import annotations

import torch


def seeded(seed: int) -> torch.Generator:
    """A generator on the default device: under ``with torch.device("cuda")`` all of a case is drawn there.

    Example:
        >>> seeded(0).device, seeded(3).initial_seed()
        (device(type='cpu'), 3)
    """
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
