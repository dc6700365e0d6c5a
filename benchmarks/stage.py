"""A part of the GPU check: what it runs, how long it may take, and how its result reads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bdfast.testing.tables import Table

Result = dict[str, Any]


class SkipStage(Exception):
    """A stage has nothing to run on; the message says what is missing."""


@dataclass(frozen=True)
class Context:
    """What a stage runs under.

    Attributes:
        device: where.
        quick: small cases and few rounds, to see that everything runs.
        data: CIFAR-10, a file or folder; None where there is none.
        deadline: when to be done, on the clock of :func:`time.monotonic`; the process is killed then.
        save: keeps a result so far, in case that happens.
        scratch: a folder that all stages of a check share, for victims that several of them attack.
    """

    device: torch.device
    quick: bool
    data: str | None
    deadline: float
    save: Callable[[Result], None]
    scratch: Path | None = None

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()


@dataclass(frozen=True)
class Stage:
    """Found by its name, run in a process of its own.

    Attributes:
        name: of the stage, and of its part of the result file.
        title: one line, for the report.
        seconds: its share of the time; what earlier stages leave over is shared out in these proportions.
        run: does the work; raises :class:`SkipStage` where something is missing. A result with a ``failures`` list that
            is not empty counts as failed.
        table: the result (perhaps one that :attr:`Context.save` kept halfway) as a table.
        timed: whether speed is measured, so that nothing else may run beside it.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Context], Result]
    table: Callable[[Result], Table]
    timed: bool = True
