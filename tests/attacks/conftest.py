"""Small sets that every test of the attacks shares."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdfast.attacks import Attack, Relabel, get


def make_set(count: int = 200, shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> tuple[Tensor, Tensor]:
    """Random uint8 images and balanced labels."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % classes


@pytest.fixture(params=[(1, 8, 8), (3, 32, 32), (5, 12, 20)], ids=["grey", "rgb", "wide"])
def any_set(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    return make_set(60, request.param)


QUICK = {"input_aware": {"mask_epochs": 1, "generator_epochs": 1, "train_samples": 16}}
"""Options that keep training short, for attacks that train something."""


def ready(name: str, images: Tensor) -> Attack:
    """An attack with its defaults, trained on ``images`` where it is one that has to be."""
    labels = torch.arange(len(images)) % 10
    return get(name, **QUICK.get(name, {})).trained(images, labels, Relabel(), seed=0)
