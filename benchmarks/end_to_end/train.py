"""An epoch of ResNet18 on images of CIFAR-10's number and size: bdfast against the loops that people write."""

from __future__ import annotations

from typing import Any

from bdfast.testing.tables import Cell, Table
from benchmarks import training_loops
from benchmarks.stage import Context, Result, Stage

GOAL_SECONDS = 0.6  # a whole epoch of ResNet18 on one H100-class GPU
IMAGES, EPOCH = 6_400, 50_000  # trained on, of CIFAR-10's size, and those of an epoch
QUICK_STEPS, QUICK_BATCH = 2, 8


def run(context: Context) -> Result:
    """Time the loops; with ``--quick`` two steps of a small network."""
    records: list[dict[str, Any]] = []
    result: Result = {"records": records, "goal_seconds": GOAL_SECONDS}
    architectures = ("mobilenet_v2",) if context.quick else ("resnet18", "preact_resnet18")
    count, batch = (QUICK_STEPS * QUICK_BATCH, QUICK_BATCH) if context.quick else (IMAGES, 128)
    for architecture in architectures:
        data = training_loops.random_images(count)
        setting = training_loops.setting_for(architecture, context.device, data, None, batch)
        records.append(training_loops.measure(setting, rounds=1 if context.quick else 2))
        context.save(result)
    return result


def table(result: Result) -> Table:
    """A line a loop."""
    lines: list[list[Cell]] = [
        [record["architecture"], name, seconds * EPOCH / record["images"], record["vs bdfast"][name]]
        for record in result["records"]
        for name, seconds in record["seconds"].items()
    ]
    return ("network", "loop", "s for 50,000 images", "times bdfast"), lines


STAGE = Stage("train", "an epoch of training: 50,000 CIFAR-sized images, ResNet18, PreAct-ResNet18", 22.0, run, table)
