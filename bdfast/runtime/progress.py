"""What a long run tells while it goes on: a record an epoch, and seconds a stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, TypeAlias

import torch

from bdfast.errors import message

Record: TypeAlias = dict[str, Any]
"""What one epoch came to: numbers, and numbers by layer name, all of them plain Python."""

Callback: TypeAlias = Callable[[Record], object]
"""Called with each epoch's record. What it raises ends the run, and the caller's model is as before."""


def check_callback(where: str, callback: object) -> None:
    """``callback`` can be called, or is None: a run of hours is not to end at the first record.

    Raises:
        TypeError: it is something else.

    Example:
        >>> check_callback("d3", 3)
        Traceback (most recent call last):
        TypeError: d3: `callback` expected a function of a record, got int; pass print, say
    """
    if callback is not None and not callable(callback):
        got = type(callback).__name__
        raise TypeError(message(where, "callback", "a function of a record", got, "pass print, say"))


class Stopwatch:
    """Seconds a stage, by name; a GPU is waited for at both ends of a stage.

    Example:
        >>> watch = Stopwatch(torch.device("cpu"))
        >>> with watch("train"):
        ...     pass
        >>> list(watch.seconds), watch.seconds["train"] < 1
        (['train'], True)
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class Progress:
    """A callback that shows epochs: one line that is rewritten on a terminal, one line an epoch elsewhere.

    Args:
        label: what runs.
        stream: where to write; standard error by default.

    Example:
        >>> progress = Progress("d3", sys.stdout)
        >>> progress({"epoch": 1, "epochs": 2, "loss": 0.25, "accuracy": 0.975, "distance": {"linear": 1.0}})
        d3 1/2  loss 0.25  accuracy 0.975
    """

    def __init__(self, label: str, stream: TextIO | None = None) -> None:
        self._label = label
        self._stream = sys.stderr if stream is None else stream

    def __call__(self, record: Record) -> None:
        numbers = [f"{key} {value:.4g}" for key, value in record.items() if isinstance(value, float)]
        line = "  ".join([f"{self._label} {record['epoch']}/{record['epochs']}", *numbers])
        if self._stream.isatty():
            last = record["epoch"] == record["epochs"]
            self._stream.write(f"\r\033[K{line}" + ("\n" if last else ""))
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
