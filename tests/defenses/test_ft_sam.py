"""FT-SAM against a plain loop, and on digits."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bdfast.defenses import FineTuneConfig, FTSAMConfig, fine_tune, ft_sam
from bdfast.runtime import ResidentData
from bdfast.training.loop import epoch_seed
from tests.defenses.conftest import Split, Victim


def test_it_is_adaptive_sam_with_statistics_of_the_first_pass(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[4].p = 0.0  # dropout would draw from the global generator
    config = FTSAMConfig(epochs=2, batch_size=8, augment="none", seed=4, rho=0.5, label_smoothing=0.2)
    plain = copy.deepcopy(mlp).train().requires_grad_()
    weights = list(plain.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.01, momentum=0.9, weight_decay=5e-4)
    for epoch in (1, 2):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * (epoch - 1) / 2)) / 2
        for x, y, _ in ResidentData(*tiny).batches(8, shuffle=True, epoch_seed=epoch_seed(4, epoch)):
            loss = nn.functional.cross_entropy(plain(x), y, label_smoothing=0.2)
            gradients = torch.autograd.grad(loss, weights)
            norm = torch.cat([(w.detach().abs() * g).flatten() for w, g in zip(weights, gradients, strict=True)]).norm()
            kept, statistics = [w.detach().clone() for w in weights], copy.deepcopy(dict(plain.named_buffers()))
            with torch.no_grad():
                for w, g in zip(weights, gradients, strict=True):
                    w.add_(0.5 * w.square() * g / norm)
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(x), y, label_smoothing=0.2).backward()
            with torch.no_grad():
                for w, old in zip(weights, kept, strict=True):
                    w.copy_(old)
                for name, buffer in plain.named_buffers():
                    buffer.copy_(statistics[name])
            optimizer.step()
    result = ft_sam(mlp, tiny, config)
    for p, q in zip(result.model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_rho_zero_is_fine_tuning_bit_for_bit(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[4].p = 0.0
    ours = ft_sam(mlp, tiny, FTSAMConfig(epochs=3, batch_size=8, rho=0.0, label_smoothing=0.0)).model
    theirs = fine_tune(mlp, tiny, FineTuneConfig(epochs=3, batch_size=8)).model
    assert all(torch.equal(p, q) for p, q in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_it_resumes_bit_for_bit(mlp: nn.Sequential, tiny: Split, tmp_path: Path) -> None:
    config = FTSAMConfig(epochs=4, batch_size=8, seed=2)

    def stop(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ft_sam(mlp, tiny, config, callback=stop, checkpoint=tmp_path / "run.pt")
    resumed = ft_sam(mlp, tiny, config, checkpoint=tmp_path / "run.pt").model.state_dict()
    straight = ft_sam(mlp, tiny, config).model.state_dict()
    assert all(torch.equal(p, q) for p, q in zip(resumed.values(), straight.values(), strict=True))


def test_it_removes_a_backdoor(victim: Victim) -> None:
    result = ft_sam(victim.model, victim.reserve(140, seed=0), FTSAMConfig.for_digits(epochs=20))
    before, after = victim.evaluate(victim.model), victim.evaluate(result.model)
    assert before.asr > 0.9
    assert after.asr < 0.3
    assert after.acc > before.acc - 0.1


def test_wrong_arguments(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(TypeError, match="FTSAMConfig: `adaptive` expected True or False, got 1"):
        FTSAMConfig(adaptive=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="FTSAMConfig: `label_smoothing` expected a finite number >= 0 and < 1, got 1"):
        FTSAMConfig(label_smoothing=1)
    with pytest.raises(TypeError, match="ft_sam: `config` expected an FTSAMConfig, got int"):
        ft_sam(mlp, tiny, 3)  # type: ignore[arg-type]
