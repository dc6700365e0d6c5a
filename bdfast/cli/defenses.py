"""The defenses of ``bdfast defend``: one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bdfast import defenses
from bdfast.cli import pad_ft


@dataclass(frozen=True)
class Defense:
    """A defense.

    Attributes:
        name: as typed.
        function: ``function(*needs, config, callback=..., normalize=..., checkpoint=...)``; returns something with
            ``.model``, ``.history``, ``.timings`` and ``.to_json()``.
        config: its frozen dataclass of options.
        needs: what it is given, of :data:`bdfast.cli.commands.defend.PROVIDERS`.
        summary: one line.
    """

    name: str
    function: Callable[..., Any]
    config: type
    needs: tuple[str, ...]
    summary: str


DEFENSES: tuple[Defense, ...] = (
    Defense(
        "d3",
        defenses.d3,
        defenses.D3Config,
        ("model", "reserve"),
        "distance-driven detoxification (arXiv 2411.09585), from a few hundred clean images",
    ),
    Defense(
        "pad-ft",
        pad_ft.defend,
        defenses.PadFTConfig,
        ("model", "poisoned"),
        "data purification, activation clipping, classifier fine-tuning (arXiv 2409.12072), from the poisoned set",
    ),
    Defense(
        "ft",
        defenses.fine_tune,
        defenses.FineTuneConfig,
        ("model", "reserve"),
        "fine-tuning on the same images: the baseline",
    ),
)
