"""AdvrBD, the preset "robust", on CIFAR-10 poisoned by BadNets: ResNet18 (few digits with --quick)."""

from __future__ import annotations

import warnings
from typing import Any

import bdfast
from bdfast.attacks import poison
from bdfast.attacks.presets import preset
from bdfast.defenses import AdvrBDConfig, advrbd
from bdfast.metrics import evaluate
from bdfast.testing.tables import Cell, Table
from benchmarks import scenario
from benchmarks.stage import Context, Result, Stage

SHORT = {"warm_up_epochs": 6, "content_networks": 5, "content_epochs": 4, "rounds": 3, "epochs": 8, "lr": 0.1}
"""What differs from the preset, so that a stage has time for it; benchmarks/reproduce.py --table advrbd takes it as it
is."""

GOAL = 300.0  # seconds for all of CIFAR-10 with the preset's own epochs, on one H200


def run(context: Context) -> Result:
    """Split the poisoned set, train on what is clean, and say where the time went."""
    data, build, config = digits() if context.quick else cifar10(context)
    poisoned = poison(*data.train, "badnets", **preset("advrbd", "badnets"), seed=0)
    result: Result = {"goal_seconds": GOAL, "images": len(poisoned.labels), "stages": {}, "epochs": {}}

    def note(record: dict[str, Any]) -> None:  # once an epoch: what was done is known even if the time runs out
        seconds = result["stages"].get(record["stage"], 0.0) + record["seconds"]
        result["stages"][record["stage"]] = round(seconds, 3)
        result["epochs"].setdefault(record["stage"], []).append(round(record["seconds"], 3))
        context.save(result)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # so short a run may misclassify nothing
        found = advrbd(lambda: build().to(context.device), poisoned, config, callback=note)
    scenario.synchronize(context.device)
    metrics = scenario.percent(evaluate(found.model, data.test, poisoned.trigger(*data.test)))
    quality = {key: value for key, value in (found.quality or {}).items() if isinstance(value, int | float)}
    result |= {
        "after": metrics,
        "quality": {key: None if value != value else round(float(value), 4) for key, value in quality.items()},
        "timings": {stage: round(seconds, 3) for stage, seconds in found.timings.items()},
        "seconds": round(sum(found.timings.values()), 2),
    }
    context.save(result)
    return result


def cifar10(context: Context) -> tuple[bdfast.data.DataSplits, Any, AdvrBDConfig]:
    """The published attack and network."""
    data = scenario.cifar10(context)
    precision: Any = "bf16" if context.device.type == "cuda" else "fp32"
    normalize = bdfast.data.normalization("cifar10")
    return (
        data,
        lambda: bdfast.models.build("resnet18", num_classes=10, image_size=32, normalize=normalize),
        AdvrBDConfig(preset="robust", precision=precision, **SHORT),
    )


def digits() -> tuple[bdfast.data.DataSplits, Any, AdvrBDConfig]:
    """So small that it proves no more than that everything runs."""
    short: dict[str, Any] = {"warm_up_epochs": 1, "content_epochs": 1, "rounds": 2, "epochs": 1, "steps": 1}
    return (
        bdfast.data.load("digits", limit=(300, 60)),
        lambda: bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1),
        AdvrBDConfig.for_digits(preset="robust", **short),
    )


def table(result: Result) -> Table:
    """One line: rates, the split, seconds in all and of every stage; of a run that did not end, the stages alone."""
    after, quality, timings = (result.get(name, {}) for name in ("after", "quality", "timings"))
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in (timings or result["stages"]).items())
    line: list[Cell] = [result["images"], *(after.get(name) for name in ("acc", "asr", "ra"))]
    line += [quality.get("tpr"), quality.get("fpr"), result.get("seconds"), stages]
    return ("images", "ACC'", "ASR'", "RA'", "TPR", "FPR", "s", "seconds a stage"), [line]


STAGE = Stage("advrbd", "AdvrBD, CIFAR-10, ResNet18, BadNets", 75.0, run, table)
