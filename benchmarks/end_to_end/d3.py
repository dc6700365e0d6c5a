"""D3 and fine-tuning on a BadNets victim: PreAct-ResNet18 on CIFAR-10 (a small network on digits with --quick)."""

from __future__ import annotations

import statistics
from typing import Any

import bdfast
from bdfast.defenses import D3Config, FineTuneConfig, d3, fine_tune
from bdfast.testing.tables import Cell, Table
from bdfast.training import TrainConfig
from benchmarks import scenario
from benchmarks.scenario import Scenario, Victim
from benchmarks.stage import Context, Result, Stage

GOAL = 1.03  # a step of D3 is a step of fine-tuning, but for its update of the last layer
STEP_EPOCHS, WARM_UP_EPOCHS = 10, 5  # of each short run that steps are timed in: the first ones capture them


def run(context: Context) -> Result:
    """Train the victim, defend it, and compare the time of a step."""
    case, reserve = cifar10(context) if not context.quick else digits()
    victim = scenario.make_victim(case, context.device, context.scratch)
    precision: Any = "bf16" if context.device.type == "cuda" else "fp32"
    augment: Any = case.training.augment
    options = {"augment": augment, "precision": precision, **({"epochs": 2} if context.quick else {})}
    ours, baseline = D3Config(**options), FineTuneConfig(**options)
    result: Result = {"victim": scenario.percent(victim.metrics)}
    result["records"], clean = [], victim.reserve(reserve)
    runs = {"ft": lambda: fine_tune(victim.model, clean, baseline), "d3": lambda: d3(victim.model, clean, ours)}
    for name, run_one in runs.items():
        scenario.synchronize(context.device)
        purified = run_one()
        seconds = sum(purified.timings.values())
        record = scenario.record(victim, name, victim.evaluate(purified.model), reserve, seconds)
        timings = {part: round(value, 3) for part, value in purified.timings.items()}
        result["records"].append({**record, "timings": timings})
        context.save(result)
    result["step"] = step_times(victim, options, reserve, rounds=2 if context.quick else 4)
    return result


def cifar10(context: Context) -> tuple[Scenario, int]:
    """The published setting, with a shorter training of the victim, and 5 % of the data in reserve."""
    data = scenario.cifar10(context)
    precision: Any = "bf16" if context.device.type == "cuda" else "fp32"
    training = TrainConfig.fast_cifar10(epochs=scenario.VICTIM_EPOCHS, precision=precision)
    return Scenario(data, "cifar10", "preact_resnet18", "badnets", 0.1, training), len(data.train[1]) // 20


def digits() -> tuple[Scenario, int]:
    """So small that it proves no more than that everything runs."""
    training = TrainConfig.for_digits(epochs=2)
    return Scenario(bdfast.data.load("digits", limit=(400, 100)), "digits", "digits_cnn", "badnets", 0.1, training), 280


def step_times(victim: Victim, options: dict[str, Any], reserve: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a step of both, from short runs that alternate; ``ratio`` is the median over pairs of runs."""
    clean = victim.reserve(reserve)
    options = {**options, "epochs": STEP_EPOCHS}
    seconds: dict[str, list[float]] = {"ft": [], "d3": []}
    for _ in range(rounds):
        baseline = fine_tune(victim.model, clean, FineTuneConfig(**options))
        ours = d3(victim.model, clean, D3Config(**options))
        for name, result in (("ft", baseline), ("d3", ours)):
            seconds[name].append(statistics.median(epoch["seconds"] for epoch in result.history[WARM_UP_EPOCHS:]))
    steps = -(-reserve // D3Config().batch_size)
    ratios = [ours / theirs for ours, theirs in zip(seconds["d3"], seconds["ft"], strict=True)]
    return {
        **{f"{name}_ms": round(1e3 * statistics.median(values) / steps, 3) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "goal": GOAL,
    }


def table(result: Result) -> Table:
    """A line a defense; the step times below."""
    header, lines = scenario.table(result["records"])
    steps = result.get("step", {})
    times: dict[str, Cell] = {"ft": steps.get("ft_ms"), "d3": steps.get("d3_ms")}
    widened = [[*line, times.get(str(line[3])), _ratio(steps, str(line[3]))] for line in lines]
    return [*header, "ms a step", "vs ft"], widened


def _ratio(steps: dict[str, Any], defense: str) -> Cell:
    ratio = steps.get("ratio") if defense == "d3" else None
    return None if ratio is None else f"{ratio:.3f}"


STAGE = Stage("d3", "D3 and fine-tuning, CIFAR-10, PreAct-ResNet18, BadNets", 28.0, run, table)
