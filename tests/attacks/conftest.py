"""Small sets that every test of the attacks shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def make_set(count: int = 200, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random uint8 images and balanced labels."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % classes


@pytest.fixture(params=[(1, 8, 8), (3, 32, 32), (5, 12, 20)], ids=["grey", "rgb", "wide"])
def any_set(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return make_set(60, request.param)
