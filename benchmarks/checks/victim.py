"""Trains the BadNets victim that whole defenses are timed on, while nothing is timed yet."""

from __future__ import annotations

from bdfast.testing.tables import Table
from benchmarks import scenario
from benchmarks.end_to_end import d3
from benchmarks.stage import Context, Result, Stage


def run(context: Context) -> Result:
    """Keep the victim in the scratch folder."""
    case, _ = d3.digits() if context.quick else d3.cifar10(context)
    victim = scenario.make_victim(case, context.device, context.scratch)
    result: Result = {"architecture": case.architecture, **scenario.percent(victim.metrics)}
    context.save(result)
    return result


def table(result: Result) -> Table:
    """One line."""
    names = ("architecture", "acc", "asr", "ra")
    return names, [[result[name] for name in names]]


STAGE = Stage("victim", "the victim of the defenses", 105.0, run, table, timed=False)
