"""All stages of the GPU check: what every op goes through, then the modules of :mod:`benchmarks.end_to_end`."""

from __future__ import annotations

import importlib
import pkgutil

from benchmarks import end_to_end
from benchmarks.stage import Stage

CHECKS = ("build", "numerics", "tests", "ops", "large")


def stages() -> dict[str, Stage]:
    """By name, in the order in which they run."""
    names = [f"benchmarks.checks.{name}" for name in CHECKS]
    names += [f"{end_to_end.__name__}.{module.name}" for module in pkgutil.iter_modules(end_to_end.__path__)]
    found: list[Stage] = [importlib.import_module(name).STAGE for name in names]
    return {stage.name: stage for stage in found}
