"""GIC in front of D3 and FT-SAM on a BadNets victim, with blurred images: PreAct-ResNet18 on CIFAR-10 (or digits)."""

from __future__ import annotations

from typing import Any

import bdfast
from bdfast.defenses import D3Config, FTSAMConfig, GICConfig, d3, ft_sam, gic
from bdfast.testing.tables import Cell, Table
from benchmarks import scenario
from benchmarks.calibrate import measure
from benchmarks.end_to_end.d3 import cifar10, digits
from benchmarks.stage import Context, Result, Stage

FAMILY = "blur"
EPOCHS = 20  # of the purifiers, a fifth of their usual ones: four runs of them have to fit
WITHOUT, WITH = "blurred", "calibrated"


def run(context: Context) -> Result:
    """Train the victim, calibrate its reserve, purify with both sets, and time calibration against plain loops."""
    case, reserve = digits() if context.quick else cifar10(context)
    victim = scenario.make_victim(case, context.device, context.scratch)
    precision: Any = "bf16" if context.device.type == "cuda" else "fp32"
    epochs = 2 if context.quick else EPOCHS
    options: dict[str, Any] = {"precision": precision, "augment": case.training.augment, "epochs": epochs}
    result: Result = {"victim": scenario.percent(victim.metrics)}

    images, labels = victim.reserve(reserve)
    blurred = bdfast.data.shift(images.to(context.device), FAMILY), labels.to(context.device)
    config = GICConfig(steps=3 if context.quick else 20)
    first = gic(victim.model, blurred, config)  # compiles kernels, which the next run finds on disk
    made = gic(victim.model, blurred, config)
    result["calibration"] = {
        "first": {name: round(value, 3) for name, value in first.timings.items()},
        "timings": {name: round(value, 3) for name, value in made.timings.items()},
        "loss": list(made.imprint.loss), "drift": made.imprint.drift, "counts": made.counts,
    }  # fmt: skip
    result["records"] = []
    for name, data in ((WITHOUT, blurred), (WITH, made.data)):
        for purifier, model in {
            "ft-sam": lambda data=data: ft_sam(victim.model, data, FTSAMConfig(**options)),
            "d3": lambda data=data: d3(victim.model, data, D3Config(**options)),
        }.items():
            purified = model()
            seconds = sum(purified.timings.values())
            after = victim.evaluate(purified.model)
            result["records"].append(scenario.record(victim, f"{purifier}, {name}", after, len(labels), seconds))
            context.save(result)
    if context.quick:
        result["speed"] = measure(context.device, 16, 8, 2, 2, network="digits_cnn")
    else:
        result["speed"] = measure(context.device, 2500, 250, 20, 5)
    return result


def table(result: Result) -> Table:
    """A line a purifier and set; seconds of calibration and how much faster it was than the loops people write."""
    header, lines = scenario.table(result["records"])
    times = result.get("speed", {}).get("times", {})
    text = ", ".join(f"{p}: {t['plain']:.2f}x plain, {t['common']:.2f}x common" for p, t in times.items())
    seconds = result["calibration"]["timings"]["calibrate"]
    widened: list[list[Cell]] = [[*line, seconds if WITH in str(line[3]) else None, text] for line in lines]
    return [*header, "s to calibrate", "speed"], widened


STAGE = Stage("gic", "GIC before D3 and FT-SAM, CIFAR-10, PreAct-ResNet18, BadNets", 27.0, run, table)
