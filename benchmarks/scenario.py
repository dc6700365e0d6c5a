"""A backdoored network, defenses for it, and what they are judged by: shared by every end-to-end measurement."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bdfast
from bdfast.attacks import PoisonedData
from bdfast.data import DataSplits
from bdfast.files import atomic_write
from bdfast.metrics import Metrics, defense_effectiveness_rating, evaluate
from bdfast.testing.tables import Cell, Table
from bdfast.training import TrainConfig, train_classifier
from benchmarks.stage import Context, SkipStage

VICTIM_EPOCHS = (
    24  # of one cycle on CIFAR-10; one of 12 loses 2.6 points to D3 instead of 1.4, as it does to fine-tuning
)
Split = tuple[Tensor, Tensor]
Defense = Callable[[nn.Module, Split], nn.Module]
"""(model, clean data) to another model."""


@dataclass(frozen=True)
class Scenario:
    """One attack on one network.

    Attributes:
        data: the clean data set.
        name: of the data set: that of its normalization, too.
        architecture: see :func:`bdfast.models.build`.
        attack, rate: see :func:`bdfast.attacks.poison`; the target is class 0.
        training: of the victim.
        seed: of everything.
        options: of the attack, such as another target.
    """

    data: DataSplits
    name: str
    architecture: str
    attack: str
    rate: float
    training: TrainConfig
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Victim:
    """A trained network with a backdoor."""

    scenario: Scenario
    model: nn.Module
    poisoned: PoisonedData
    metrics: Metrics
    seconds: float

    def evaluate(self, model: nn.Module) -> Metrics:
        """ACC on the test set, ASR and RA on all of it with the trigger."""
        test = self.scenario.data.test
        return evaluate(model, test, self.poisoned.trigger(*test))

    def reserve(self, count: int) -> Split:
        """Clean training samples, which a defender may hold; the same ones for every defense."""
        images, labels = self.scenario.data.train
        chosen = bdfast.data.reserve(labels, count=count, seed=self.scenario.seed)
        return images[chosen], labels[chosen]


def cifar10(context: Context, limit: tuple[int, int] | None = None) -> DataSplits:
    """CIFAR-10 as it was given; decoded by the first stage that asks, read from the scratch folder by the others.

    Raises:
        SkipStage: there is none.
    """
    if context.data is None:
        raise SkipStage("no CIFAR-10: pass --data, or set BDFAST_DATA")
    kept = None if context.scratch is None else context.scratch / "cifar10.npz"
    if kept is not None and kept.exists():
        return bdfast.data.load(kept, limit=limit)
    data = bdfast.data.load(context.data)
    if kept is not None:
        arrays = {"x_train": data.train[0], "y_train": data.train[1], "x_test": data.test[0], "y_test": data.test[1]}
        with atomic_write(kept, "wb") as file:
            np.savez(file, class_names=np.array(data.class_names), **{name: t.numpy() for name, t in arrays.items()})
    return data if limit is None else bdfast.data.load(context.data, limit=limit)


def make_victim(scenario: Scenario, device: torch.device, scratch: Path | None = None) -> Victim:
    """Poison the training set and train on it; a folder ``scratch`` keeps the victim for whoever asks for it next."""
    images, labels = scenario.data.train
    poisoned = bdfast.attacks.poison(
        images, labels, scenario.attack, **{"rate": scenario.rate, "seed": scenario.seed, **scenario.options}
    )
    model = network(scenario, device, scenario.seed)
    kept = None if scratch is None else scratch / f"{_slug(scenario)}.pt"
    trained = train_classifier(model, poisoned, scenario.training, checkpoint=kept)
    seconds = sum(epoch["seconds"] for epoch in trained.history)
    test = scenario.data.test
    return Victim(scenario, model, poisoned, evaluate(model, test, poisoned.trigger(*test)), seconds)


def network(scenario: Scenario, device: torch.device, seed: int | None = None) -> nn.Module:
    """A new network for the data; without a seed of the generator's weights."""
    images, _ = scenario.data.train
    return bdfast.models.build(
        scenario.architecture,
        num_classes=len(scenario.data.class_names),
        image_size=(images.shape[2], images.shape[3]),
        channels=images.shape[1],
        normalize=bdfast.data.normalization(scenario.name),
        seed=seed,
    ).to(device)


def _slug(scenario: Scenario) -> str:
    size = len(scenario.data.train[1])
    parts = (scenario.name, size, scenario.architecture, scenario.attack, scenario.rate, scenario.seed)
    rest = repr((scenario.training, sorted(scenario.options.items())))
    return "-".join(map(str, (*parts, zlib.crc32(rest.encode()))))


def judge(victim: Victim, defenses: Mapping[str, Defense], reserve: int) -> list[dict[str, Any]]:
    """A record a defense: what it made of the victim, and how long it took."""
    device = next(victim.model.parameters()).device
    clean = victim.reserve(reserve)
    records = []
    for name, defense in defenses.items():
        synchronize(device)
        began = time.perf_counter()
        model = defense(victim.model, clean)
        synchronize(device)
        seconds = time.perf_counter() - began
        records.append(record(victim, name, victim.evaluate(model), reserve, seconds))
    return records


def record(victim: Victim, defense: str, after: Metrics, reserve: int, seconds: float) -> dict[str, Any]:
    """Rates in percent, as papers print them."""
    return {
        "data": victim.scenario.name,
        "attack": victim.scenario.attack,
        "seed": victim.scenario.seed,
        "defense": defense,
        "reserve": reserve,
        "before": percent(victim.metrics),
        "after": percent(after),
        "der": round(100 * defense_effectiveness_rating(victim.metrics, after), 2),
        "seconds": round(seconds, 2),
        "victim_seconds": round(victim.seconds, 2),
    }


def percent(metrics: Metrics) -> dict[str, float]:
    """ACC, ASR and RA."""
    return {name: round(100 * getattr(metrics, name), 2) for name in ("acc", "asr", "ra")}


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(records: list[dict[str, Any]]) -> Table:
    """A line a record."""
    header = ("data", "attack", "seed", "defense", "reserve", "ACC", "ASR", "ACC'", "ASR'", "RA'", "DER", "s")
    lines: list[list[Cell]] = []
    for line in records:
        before, after = line["before"], line["after"]
        head: list[Cell] = [line["data"], line["attack"], line["seed"], line["defense"], line["reserve"]]
        lines.append([*head, before["acc"], before["asr"], *after.values(), line["der"], line["seconds"]])
    return header, lines
