"""A training step that is replayed trains as one that Python takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bdfast
from bdfast.defenses import D3Config, FineTuneConfig, FTSAMConfig, d3, fine_tune, ft_sam
from bdfast.runtime import graphed
from bdfast.runtime.graphed import Replayed
from bdfast.training import TrainConfig, train_classifier
from bdfast.training.step import DeviceRates

pytestmark = pytest.mark.gpu
Data = tuple[Tensor, Tensor]


def data() -> Data:
    """70 a batch and a last one of 60: a graph each."""
    return bdfast.data.load("digits", limit=(200, 1)).train


def network() -> nn.Module:
    model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=0)
    return nn.Sequential(model, nn.Dropout(0.1)).cuda()


def trained(model: nn.Module) -> nn.Module:
    config = TrainConfig.for_digits(epochs=8, batch_size=70, deterministic=True, schedule="one_cycle")
    return train_classifier(model, data(), config).model


SHORT: dict[str, Any] = {"epochs": 8, "batch_size": 70, "deterministic": True}
RUNS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "train": trained,
    "d3": lambda model: d3(model, data(), D3Config(**SHORT, layers=["0.linear"])).model,
    "fine-tune": lambda model: fine_tune(model, data(), FineTuneConfig(**SHORT)).model,
    "ft-sam": lambda model: ft_sam(model, data(), FTSAMConfig(**SHORT)).model,
}


@pytest.mark.parametrize("name", RUNS)
def test_replayed_steps_train_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[bool] = []
    capture = Replayed._capture

    def count(self: Replayed, *arguments: Any) -> bool:
        captures.append(capture(self, *arguments))
        return captures[-1]

    monkeypatch.setattr(Replayed, "_capture", count)
    replayed = RUNS[name](network()).state_dict()
    assert captures == [True, True]
    monkeypatch.setattr(graphed, "_WARM_UP", 10**6)  # never
    plain = RUNS[name](network()).state_dict()
    for key, value in plain.items():
        assert torch.equal(replayed[key], value), key
    assert captures == [True, True]


def test_hooks_run_at_every_step() -> None:
    model, calls = network(), []
    model[1].register_forward_hook(lambda *_: calls.append(1))  # type: ignore[index]
    trained(model)
    assert len(calls) >= 8 * 3


def test_rates_follow_the_schedule() -> None:
    layer = nn.Linear(2, 2).cuda()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, fused=True)
    rates = DeviceRates(optimizer, torch.device("cuda"))
    optimizer.param_groups[0]["lr"] = 0.125
    rates.follow()
    with rates.in_place():
        assert optimizer.param_groups[0]["lr"].item() == 0.125
    assert optimizer.param_groups[0]["lr"] == 0.125
