"""Vanilla fine-tuning against a plain torch loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from bdfast.defenses import FineTuneConfig, fine_tune
from bdfast.runtime import ResidentData
from bdfast.training.loop import epoch_seed
from tests.defenses.conftest import Split


def test_it_is_sgd_with_weight_decay_bit_for_bit(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[4].p = 0.0  # dropout would draw from the global generator
    config = FineTuneConfig(epochs=3, batch_size=8, augment="none", seed=4)
    plain = copy.deepcopy(mlp).train().requires_grad_()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch in range(1, 4):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (epoch - 1) / 3)) / 2
        for x, y, _ in ResidentData(*tiny).batches(8, shuffle=True, epoch_seed=epoch_seed(4, epoch)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y).backward()
            optimizer.step()
    ours = fine_tune(mlp, tiny, config).model
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_wrong_arguments(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(ValueError, match="FineTuneConfig: `weight_decay` expected a finite number >= 0, got -1"):
        FineTuneConfig(weight_decay=-1)
    with pytest.raises(TypeError, match="fine_tune: `config` expected a FineTuneConfig, got int"):
        fine_tune(mlp, tiny, 3)  # type: ignore[arg-type]
