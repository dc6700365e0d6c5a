"""PAD-FT, both presets, on a BadNets victim: PreAct-ResNet18 on CIFAR-10 (a small network on digits with --quick)."""

from __future__ import annotations

from typing import Any

from bdfast.defenses import PadFTConfig, pad_ft
from bdfast.testing.tables import Cell, Table
from benchmarks import scenario
from benchmarks.end_to_end.d3 import cifar10, digits
from benchmarks.stage import Context, Result, Stage

GOAL = 15.0  # seconds, on one H200, after the victim is trained


def run(context: Context) -> Result:
    """Train the victim, purify it with each preset, and say where the time went.

    The paper's preset runs twice: a first run compiles kernels, which the next ones of the machine find on its disk.
    """
    case, _ = digits() if context.quick else cifar10(context)
    victim = scenario.make_victim(case, context.device, context.scratch)
    result: Result = {"victim": scenario.percent(victim.metrics)}
    result["goal_seconds"], result["records"] = GOAL, []
    for name, preset in (("paper", "paper"), ("paper, again", "paper"), ("robust", "robust")):
        config = configuration(preset, context)
        scenario.synchronize(context.device)
        purified = pad_ft(victim.model, victim.poisoned, config)
        assert purified.purity is not None
        seconds = sum(purified.timings.values())
        record = scenario.record(victim, name, victim.evaluate(purified.model), len(purified.selected), seconds)
        pad = scenario.percent(victim.evaluate(purified.pad_model()))
        timings = {part: round(value, 3) for part, value in purified.timings.items()}
        result["records"].append({**record, "pad": pad, "timings": timings, "target_purity": purified.purity["0"]})
        context.save(result)
    return result


def configuration(preset: Any, context: Context) -> PadFTConfig:
    """The preset as published, in bfloat16 on a GPU; a few epochs with --quick."""
    if context.quick:
        return PadFTConfig.for_digits(preset=preset, k=10, clip_epochs=2, epochs=2)
    return PadFTConfig.for_cifar10(preset=preset, precision="bf16" if context.device.type == "cuda" else "fp32")


def table(result: Result) -> Table:
    """A line a preset."""
    header, lines = scenario.table(result["records"])
    widened: list[list[Cell]] = []
    for line, record in zip(lines, result["records"], strict=True):
        pad, times = record["pad"], record["timings"]
        stages = ", ".join(f"{name} {times[name]:.1f}" for name in ("score", "clip", "tune"))
        widened.append([*line, f"{pad['acc']:.1f}/{pad['asr']:.1f}", f"{100 * record['target_purity']:.0f} %", stages])
    return [*header, "PAD", "target purity", "seconds a step"], widened


STAGE = Stage("pad_ft", "PAD-FT, CIFAR-10, PreAct-ResNet18, BadNets", 38.0, run, table)
