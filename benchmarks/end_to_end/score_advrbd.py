"""AdvrBD's scores with the engine and with plain loops, on a BadNets victim and its poisoned set, as a defender has it.

Without CIFAR-10 the network and the images are random: times are the same, how well bfloat16 agrees says nothing.
"""

from __future__ import annotations

import time

from torch import Tensor, nn

from bdfast.attacks import KLScoreConfig
from bdfast.data.source import Source
from benchmarks import scenario, score_advrbd
from benchmarks.end_to_end.d3 import cifar10, digits
from benchmarks.score_advrbd import table
from benchmarks.stage import Context, Result, Stage


def run(context: Context) -> Result:
    """Slices of one batch through every variant, until most of the time is over."""
    batch, count, steps = (8, 16, 1) if context.quick else (1024, 10240, 5)
    if context.device.type != "cuda" and not context.quick:
        batch, count = 64, 2048
    model, images, labels, about = subject(context, count)
    result = score_advrbd.measure(
        model,
        Source("score_advrbd", (images, labels)),
        KLScoreConfig(steps=steps),
        images=len(images),
        batch=batch,
        deadline=time.monotonic() + 0.7 * context.seconds_left,
        save=context.save,
    )
    return {"about": f"{about}, PGD-{steps}", **result}


def subject(context: Context, count: int) -> tuple[nn.Module, Tensor, Tensor, str]:
    """Network, images, labels, and what they are."""
    if context.data is None and not context.quick:
        images, labels, about = score_advrbd.pixels(None, count)
        model = score_advrbd.network("preact_resnet18", None, images, context.device)
        return model, images, labels, f"PreAct-ResNet18, random weights, {about}"
    case, _ = digits() if context.quick else cifar10(context)
    victim = scenario.make_victim(case, context.device, context.scratch)
    poisoned = victim.poisoned
    return victim.model.eval(), poisoned.images[:count], poisoned.labels[:count], f"{case.architecture}, BadNets victim"


STAGE = Stage("score_advrbd", "AdvrBD's scores: PGD-5 of PreAct-ResNet18, engine and plain loops", 18.0, run, table)
