"""Every function that is put into BackdoorBench beside its usual form, results compared: PreAct-ResNet18."""

from __future__ import annotations

from bdfast.testing.tables import Table
from benchmarks.replaced import part, parts
from benchmarks.replaced.part import SMALL, TINY, Sizes
from benchmarks.stage import Context, Result, Stage

SIZES = Sizes(images=300, thresholds=2, attacked=256)
ROUNDS = 10  # of short parts; long ones run fewer
LAST_SECONDS = 3.0  # too few to begin another part


def run(context: Context) -> Result:
    """Compare and time one part after the other."""
    sizes, compared, rounds = (TINY, TINY, 1) if context.quick else (SIZES, SMALL, ROUNDS)
    result: Result = {"records": [], "failures": [], "left_out": []}
    for one in parts.PARTS:
        if context.seconds_left < LAST_SECONDS:
            result["left_out"].append(one.name)
            continue
        result["records"].append(one.measure(sizes, context.device, rounds, compared))
        result["failures"] = part.failures(result["records"])
        context.save(result)
    return result


def table(result: Result) -> Table:
    """A line a part."""
    return part.table(result["records"])


STAGE = Stage("backdoorbench", "Parts put into BackdoorBench", 4.0, run, table)
