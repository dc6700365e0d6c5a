"""A small attack on 8x8 digits, as bdfast has it and as a record of BackdoorBench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast import attacks, models
from bdfast.attacks import PoisonedData, TriggeredData
from bdfast.data import load
from bdfast.integrations.backdoorbench import Record, load_record, save_record


@dataclass(frozen=True)
class Attack:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    model: nn.Module
    poisoned: PoisonedData
    triggered: TriggeredData

    def save(self, folder: Path, *, in_memory: bool = False) -> Path:
        save_record(
            folder, self.model, model_name="digits_cnn", num_classes=10, clean_data="digits",
            train=self.poisoned, test=self.triggered, in_memory=in_memory,
        )  # fmt: skip
        return folder


def joined(folder: Path, attack: Attack) -> Record:
    return load_record(folder, train=attack.train, test=attack.test)


def assert_same(record: Record, attack: Attack, poisoned: PoisonedData | None = None) -> None:
    """Images, labels, flags and weights, bit for bit."""
    poisoned = poisoned or attack.poisoned
    assert record.train is not None
    for name in ("images", "labels", "original_labels", "is_poisoned", "is_cover"):
        assert torch.equal(getattr(record.train, name), getattr(poisoned, name)), name
    eligible = attack.triggered.eligible
    for ours, theirs in zip(record.triggered_test, attack.triggered[:3], strict=True):
        assert torch.equal(ours, theirs[eligible])
    weights = record.model.state_dict()
    for key, value in attack.model.state_dict().items():
        assert torch.equal(weights[key], value), key


def saved_as(tmp_path: Path, attack: Attack, poisoned: PoisonedData | None, triggered: Any = None) -> Record:
    save_record(
        tmp_path / "record", attack.model, model_name="digits_cnn", num_classes=10, clean_data="digits",
        train=poisoned, test=triggered or attack.triggered,
    )  # fmt: skip
    return joined(tmp_path / "record", attack)


@pytest.fixture(scope="session")
def attack() -> Attack:
    train, test, _ = load("digits", limit=(120, 60))
    model = models.build("digits_cnn", num_classes=10, image_size=8, seed=3)
    poisoned = attacks.poison(*train, "badnets", rate=0.2, target=3, seed=1, num_classes=10)
    return Attack(train, test, model.eval(), poisoned, poisoned.trigger(*test))


@pytest.fixture(scope="session")
def record_folder(attack: Attack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attack.save(tmp_path_factory.mktemp("bench") / "record" / "badnet_0_1")


@pytest.fixture(scope="session")
def record_in_memory(attack: Attack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return attack.save(tmp_path_factory.mktemp("bench") / "record" / "badnet_0_1", in_memory=True)


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> None:
    torch.set_num_threads(1)
