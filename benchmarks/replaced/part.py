"""A replaced function: its work, the two ways to do it, how far their results may lie apart, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from bdfast.testing.device_timing import wall_clock
from bdfast.testing.tables import Table
from bdfast.testing.timing import Step, Timing, host_clock

CALLS = 10  # of a short part, in a row: a sample


@dataclass(frozen=True)
class Sizes:
    """How much work.

    Attributes:
        images: of rankings and evaluations.
        thresholds: of CLP's sweep.
        batch: images of one call of a loss, a projection or a transform.
        attacked: images of SAU's attack.
        side: of an image, in pixels.
        network: which one.
    """

    images: int = 300
    thresholds: int = 21
    batch: int = 256
    attacked: int = 32
    side: int = 32
    network: str = "preact_resnet18"


SMALL = Sizes(images=8, thresholds=2, batch=8, attacked=2, side=8)
"""Enough to compare results."""

TINY = replace(SMALL, network="digits_cnn")
"""Enough to see that everything runs."""


@dataclass(frozen=True)
class Setting:
    """Sizes, and where the tensors are and of which kind."""

    sizes: Sizes
    device: torch.device
    dtype: torch.dtype = torch.float32

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform in [0, 1), the same on every device."""
        return torch.rand(*shape).to(self.device, self.dtype)

    def randn(self, *shape: int) -> torch.Tensor:
        """Normal, the same on every device."""
        return torch.randn(*shape).to(self.device, self.dtype)


@dataclass(frozen=True)
class Part:
    """A function in its usual and in its replaced form.

    Attributes:
        name: of its row.
        replaces: what is replaced, as ``bdfast.patch.backdoorbench`` calls it.
        work: what is done, with names of :class:`Sizes` in braces.
        goal: times as fast as the usual form, on a CPU; None: as fast.
        make: the usual and the replaced form of that work, each with a result.
        difference: of the two results, in the unit of ``allowed``.
        allowed: the largest difference.
        weight: how many times fewer rounds than of a short part.
        compared_in: dtype of the comparison: float64 where rounding in float32 decides signs or an order.
    """

    name: str
    replaces: tuple[str, ...]
    work: str
    goal: float | None
    make: Callable[[Setting], tuple[Step, Step]]
    difference: Callable[[Any, Any], float]
    allowed: float
    weight: int = 1
    compared_in: torch.dtype = torch.float32

    def compare(self, sizes: Sizes, device: torch.device) -> float:
        """How far the results of both forms lie apart."""
        torch.manual_seed(0)
        usual, ours = self.make(Setting(sizes, device, self.compared_in))
        return self.difference(usual(), ours())

    def measure(self, sizes: Sizes, device: torch.device, rounds: int, compared: Sizes = SMALL) -> dict[str, Any]:
        """Both forms in turn; the ratio is the median over rounds. On a GPU until the device is done."""
        difference = self.compare(compared, device)
        torch.manual_seed(0)
        usual, ours = self.make(Setting(sizes, device))
        ours()  # what is allocated and looked up once
        if device.type == "cuda":  # kernels are loaded when they first run
            usual()
        clock = wall_clock if device.type == "cuda" else host_clock
        calls = CALLS if self.weight == 1 else 1
        samples = [(clock(usual, calls), clock(ours, calls)) for _ in range(max(1, rounds // self.weight))]
        theirs, mine = (Timing(column, calls) for column in zip(*samples, strict=True))
        return {
            "part": self.name, "replaces": list(self.replaces), "work": self.work.format(**asdict(sizes)),
            "goal": self.goal, "ratio": round(mine.times(theirs), 3),
            "usual": theirs.record(), "ours": mine.record(),
            "difference": difference, "allowed": self.allowed,
        }  # fmt: skip


def table(records: list[dict[str, Any]]) -> Table:
    """A line a part."""
    header = ("part", "work", "usual ms", "ours ms", "times as fast", "goal", "rounds", "difference", "allowed")
    lines = [
        (
            r["part"], r["work"], r["usual"]["us"] / 1e3, r["ours"]["us"] / 1e3, r["ratio"], r["goal"],
            r["ours"]["rounds"], r["difference"], r["allowed"],
        )
        for r in records
    ]  # fmt: skip
    return header, lines


def published(records: list[dict[str, Any]]) -> Table:
    """A line a part: what it replaces, milliseconds of both forms, and the median ratio."""
    lines = [
        [
            ", ".join(f"`{name}`" for name in r["replaces"]) or "-", r["work"],
            r["usual"]["us"] / 1e3, r["ours"]["us"] / 1e3, r["ratio"],
        ]
        for r in records
    ]  # fmt: skip
    return ("replaces", "work", "usual ms", "bdfast ms", "times as fast"), lines


def runs(records: list[dict[str, Any]]) -> list[str]:
    """Commit, date and command of each run that records come from, with its parts where there are several."""
    found: dict[str, list[str]] = {}
    for r in records:
        measured = r["measured"]
        run = f"commit {measured['commit']}, {measured['date'][:10]}; `{measured['command']}`"
        found.setdefault(run, []).append(r["part"])
    return [f"{run} ({', '.join(names)})" if len(found) > 1 else run for run, names in found.items()]


def failures(records: list[dict[str, Any]]) -> list[str]:
    """Parts whose results lie too far apart, in sentences."""
    return [
        f"{r['part']}: results differ by {r['difference']:.3g}, more than {r['allowed']:.3g}"
        for r in records
        if not r["difference"] <= r["allowed"]
    ]
