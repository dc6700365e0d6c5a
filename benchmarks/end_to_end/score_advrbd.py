"""AdvrBD's scores with the engine and with plain loops: ResNet-18 on CIFAR-10 (few images with --quick)."""

from __future__ import annotations

import time

from bdfast.attacks import KLScoreConfig
from bdfast.data.source import Source
from benchmarks import score_advrbd
from benchmarks.score_advrbd import table
from benchmarks.stage import Context, Result, Stage


def run(context: Context) -> Result:
    """Slices of one batch through every variant, until most of the time is over."""
    batch, count, steps = (8, 16, 1) if context.quick else (128, 5120, 5)
    if context.device.type != "cuda" and not context.quick:
        batch, count = 64, 2048
    images, labels, about = score_advrbd.pixels(context.data, count)
    result = score_advrbd.measure(
        score_advrbd.network("resnet18", None, images, context.device),
        Source("score_advrbd", (images, labels)),
        KLScoreConfig(steps=steps),
        images=len(images),
        batch=batch,
        deadline=time.monotonic() + 0.7 * context.seconds_left,
        save=context.save,
    )
    return {"about": f"random weights, {about}, PGD-{steps}", **result}


STAGE = Stage("score_advrbd", "AdvrBD's scores: PGD-5 of ResNet-18, engine and plain loops", 60.0, run, table)
