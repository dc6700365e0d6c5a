"""An epoch of ResNet18 on images of CIFAR-10's number and size: bdfast against the loops that people write."""

from __future__ import annotations

import itertools
from typing import Any

from bdfast.testing.tables import Cell, Table
from benchmarks import training_loops
from benchmarks.stage import Context, Result, Stage

GOAL_SECONDS = 0.6  # a whole epoch of ResNet18 on one H100-class GPU
IMAGES, EPOCH = 6_400, 50_000  # trained on, of CIFAR-10's size, and those of an epoch
BATCH, LARGE_BATCHES, LARGE_IMAGES = 128, (512, 1024), 25_600  # larger ones by bdfast alone
QUICK_STEPS, QUICK_BATCH = 2, 8


def run(context: Context) -> Result:
    """Time the loops; with ``--quick`` two steps of a small network."""
    records: list[dict[str, Any]] = []
    result: Result = {"records": records, "goal_seconds": GOAL_SECONDS}
    architectures = ("mobilenet_v2",) if context.quick else ("resnet18", "preact_resnet18")
    large_batches = () if context.quick else LARGE_BATCHES
    for architecture, batch in itertools.product(architectures, large_batches):
        setting = _setting(context, architecture, LARGE_IMAGES, batch)
        seconds = {"bdfast": training_loops.seconds_of_ours(setting, rounds=3)}
        records.append({"architecture": architecture, "batch": batch, "images": LARGE_IMAGES, "seconds": seconds})
        context.save(result)
    for architecture in architectures:
        count, batch = (QUICK_STEPS * QUICK_BATCH, QUICK_BATCH) if context.quick else (IMAGES, BATCH)
        measured = training_loops.measure(_setting(context, architecture, count, batch), 1 if context.quick else 2)
        records.append({**measured, "batch": batch})
        context.save(result)
    return result


def _setting(context: Context, architecture: str, count: int, batch: int) -> training_loops.Setting:
    return training_loops.setting_for(architecture, context.device, training_loops.random_images(count), None, batch)


def table(result: Result) -> Table:
    """A line a loop."""
    lines: list[list[Cell]] = [
        [record["architecture"], record.get("batch"), name, seconds * EPOCH / record["images"], _ratio(record, name)]
        for record in result["records"]
        for name, seconds in record["seconds"].items()
    ]
    return ("network", "batch", "loop", "s for 50,000 images", "times bdfast"), lines


def _ratio(record: dict[str, Any], name: str) -> Cell:
    ratio: Cell = record.get("vs bdfast", {}).get(name)
    return ratio


STAGE = Stage("train", "an epoch of training: 50,000 CIFAR-sized images, ResNet18, PreAct-ResNet18", 35.0, run, table)
