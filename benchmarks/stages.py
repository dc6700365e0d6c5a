"""All stages of the GPU check: what every op goes through, then the modules of :mod:`benchmarks.end_to_end`."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks import end_to_end
from benchmarks.stage import Stage

CHECKS = ("build", "numerics", "compile", "large", "victim", "ops")
"""What fills caches and trains the victim comes first, at the same time."""

END_TO_END = ("d3", "pad_ft", "score_advrbd", "pgd", "gic", "train", "backdoorbench", "advrbd")
"""On the victim of the stage ``victim``; modules that are not named here come last."""


LAST = ("sanitizer", "tests")
"""At the same time, with whatever is left: the sanitizer's processes slow everything beside them."""


def stages() -> dict[str, Stage]:
    """By name, in the order in which they run."""
    names = [f"benchmarks.checks.{name}" for name in CHECKS]
    modules = {module.name for module in pkgutil.iter_modules(end_to_end.__path__)}
    names += [f"{end_to_end.__name__}.{name}" for name in (*END_TO_END, *sorted(modules - set(END_TO_END)))]
    names += [f"benchmarks.checks.{name}" for name in LAST]
    found: list[Stage] = [importlib.import_module(name).STAGE for name in names]
    return {stage.name: stage for stage in found}
