"""A small attack on 8x8 digits, as bdfast has it and as a record of BackdoorBench."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bdfast import attacks, models
from bdfast.attacks import PoisonedData, TriggeredData
from bdfast.data import load
from bdfast.integrations.backdoorbench import save_record


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
