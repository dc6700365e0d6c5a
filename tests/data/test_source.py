"""A data set read in parts."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bdfast.data.source import Source
from bdfast.runtime.determinism import host_random_state


class Augmented(Dataset[tuple[Tensor, int]]):
    """Draws from every global generator, as people's transforms do."""

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = torch.rand(1, 2, 2) * random.random() * np.random.random()  # noqa: NPY002
        return drawn.float(), index


def test_a_sample_is_the_same_whenever_it_is_read() -> None:
    source = Source("example", Augmented())
    whole, labels = source.read(range(9))
    assert labels.tolist() == list(range(9))
    assert len(torch.unique(whole)) > 9  # samples differ
    torch.manual_seed(5)
    assert torch.equal(source.read(torch.tensor([7, 2]))[0], whole[[7, 2]])
    assert torch.equal(Source("example", DataLoader(Augmented(), shuffle=True)).read(range(3, 9))[0], whole[3:])


def test_the_callers_generators_are_left_alone() -> None:
    before = host_random_state()
    Source("example", Augmented()).read(range(9))
    assert host_random_state() == before
