"""How each table is made again: the attacks in the order in which they tell most, and the methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from bdfast.attacks.presets import preset
from bdfast.data import DataSplits
from bdfast.defenses import (
    AdvrBDConfig,
    D3Config,
    FineTuneConfig,
    FTSAMConfig,
    PadFTConfig,
    advrbd,
    d3,
    fine_tune,
    ft_sam,
    pad_ft,
)  # fmt: skip
from bdfast.training import TrainConfig
from benchmarks.reproduction import published
from benchmarks.scenario import Scenario, Victim, network

Outcome: TypeAlias = Mapping[str, nn.Module]  # row of the table -> network
Method: TypeAlias = Callable[[Victim, "Scale"], Outcome]


@dataclass(frozen=True)
class Scale:
    """The data, and how long everything trains.

    Attributes:
        name: of the data.
        data: the clean set.
        device: where.
        precision: of training and defenses.
        architecture: in place of the paper's; None is the paper's.
        victim: how victims are trained.
        defense: options of fine-tuning defenses, in place of their defaults.
    """

    name: str
    data: DataSplits
    device: torch.device
    precision: Any
    architecture: str | None
    victim: TrainConfig
    defense: Mapping[str, Any]

    @property
    def reserve(self) -> int:
        """5 % of the training set; 10 % of one so small that 5 % are too few."""
        count = len(self.data.train[1])
        return count // 20 if count >= 10_000 else count // 10


@dataclass(frozen=True)
class Table:
    """One table of a paper.

    Attributes:
        name: as typed.
        architecture: of the paper.
        setting: a preset of :mod:`bdfast.attacks.presets`.
        rates: of poison, the paper's first one first.
        attacks: the most telling first.
        methods: name -> what makes its rows.
        published: rate -> attack -> row -> figures.
        differs: what is not as in the paper.
    """

    name: str
    architecture: str
    setting: str
    rates: tuple[float, ...]
    attacks: tuple[str, ...]
    methods: Mapping[str, Method]
    published: Mapping[float, Mapping[str, Mapping[str, published.Figures]]]
    differs: str

    def scenario(self, scale: Scale, attack: str, rate: float, seed: int) -> Scenario:
        """The victim of a cell."""
        options = {**preset(self.setting, attack), "rate": rate}
        architecture = scale.architecture or self.architecture
        return Scenario(scale.data, scale.name, architecture, attack, rate, scale.victim, seed, options)


def _d3(variant: Any) -> Method:
    def run(victim: Victim, scale: Scale) -> Outcome:
        config = D3Config(preset=variant, seed=victim.scenario.seed, precision=scale.precision, **scale.defense)
        return {
            "d3" if variant == "paper" else f"d3 ({variant})": d3(
                victim.model, victim.reserve(scale.reserve), config
            ).model
        }

    return run


def _fine_tune(victim: Victim, scale: Scale) -> Outcome:
    config = FineTuneConfig(seed=victim.scenario.seed, precision=scale.precision, **scale.defense)
    return {"ft": fine_tune(victim.model, victim.reserve(scale.reserve), config).model}


def _ft_sam(victim: Victim, scale: Scale) -> Outcome:
    config = FTSAMConfig(seed=victim.scenario.seed, precision=scale.precision, **scale.defense)
    return {"ft-sam": ft_sam(victim.model, victim.reserve(scale.reserve), config).model}


def _pad_ft(variant: Any) -> Method:
    def run(victim: Victim, scale: Scale) -> Outcome:
        make = PadFTConfig.for_digits if scale.name == "digits" else PadFTConfig.for_cifar10
        epochs = {} if "epochs" not in scale.defense else {"clip_epochs": scale.defense["epochs"], **scale.defense}
        epochs.pop("augment", None)
        config = make(preset=variant, seed=victim.scenario.seed, precision=scale.precision, **epochs)
        result = pad_ft(victim.model, victim.poisoned, config)
        suffix = "" if variant == "paper" else f" ({variant})"
        return {f"pad{suffix}": result.pad_model(), f"pad-ft{suffix}": result.model}

    return run


def _advrbd(variant: Any) -> Method:
    def run(victim: Victim, scale: Scale) -> Outcome:
        make = AdvrBDConfig.for_digits if scale.name == "digits" else AdvrBDConfig
        epochs = {name: value for name, value in scale.defense.items() if name == "epochs"}
        config = make(preset=variant, relabel=True, seed=victim.scenario.seed, precision=scale.precision, **epochs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # classes without a sample: the table shows it
            result = advrbd(lambda: network(victim.scenario, scale.device), victim.poisoned, config)
        suffix = "" if variant == "paper" else f" ({variant})"
        rows = {f"advrbd{suffix}": result.model}
        if result.relabeled_model is not None:  # there were suspects to label anew
            rows[f"advrbd+relabel{suffix}"] = result.relabeled_model
        return rows

    return run


FINE_TUNING: dict[str, Method] = {"ft": _fine_tune, "ft-sam": _ft_sam}
TRIGGERS = "triggers without a published file are procedural; victims are trained by one cycle of fewer epochs"

TABLES = {
    table.name: table
    for table in (
        Table(
            "d3", "preact_resnet18", "backdoorbench", (0.1,),
            ("badnets", "blended", "wanet", "sig", "lf", "ssba", "input_aware"),
            {"d3": _d3("paper"), **FINE_TUNING, "d3-release": _d3("release")},
            {0.1: published.D3}, TRIGGERS,
        ),
        Table(
            "pad-ft", "preact_resnet18", "backdoorbench", (0.1, 0.05), ("badnets", "blended", "wanet", "sig", "lf"),
            {"pad-ft": _pad_ft("paper"), "pad-ft-robust": _pad_ft("robust"), **FINE_TUNING},
            published.PAD_FT, f"{TRIGGERS}; k = 300, SCE(0.1, 1, A = -4)",
        ),
        Table(
            "advrbd", "resnet18", "advrbd", (0.05,),
            ("badnets", "blended", "wanet", "sig", "tact", "physical_ba", "adaptive_blend", "adaptive_patch"),
            {"advrbd": _advrbd("paper"), "advrbd-robust": _advrbd("robust")}, {0.05: published.ADVRBD},
            f"{TRIGGERS}; the paper's text lacks its algorithms and their numbers, which are reconstructed",
        ),
    )
}  # fmt: skip
