"""The defenses of ``bdfast defend``: one entry each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bdfast import defenses
from bdfast.attacks import PoisonedData
from bdfast.cli import advrbd, gic, pad_ft
from bdfast.cli.outputs import RESUME_FILE
from bdfast.report import Panel

TrainingSet = PoisonedData | tuple[Tensor, Tensor]


def no_panels(result: Any, training_set: TrainingSet, class_names: Sequence[str]) -> Sequence[Panel]:
    """Nothing besides rates and history."""
    return ()


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
        save: of a defense that makes data and no model, ``save(folder, result)`` writes them.
        describe: of such a defense, what it did in a few lines.
        panels: ``panels(result, training_set, class_names)``: what the report shows besides rates and history.
        keeps: names of what it leaves beside ``checkpoint`` to be continued from, until its results are written.
    """

    name: str
    function: Callable[..., Any]
    config: type
    needs: tuple[str, ...]
    summary: str
    panels: Callable[[Any, TrainingSet, Sequence[str]], Sequence[Panel]] = no_panels
    save: Callable[[Path, Any], None] | None = None
    describe: Callable[[Any], str] = str
    keeps: tuple[str, ...] = (RESUME_FILE,)


PLAIN: tuple[Defense, ...] = (
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
        pad_ft.panels,
        keeps=("resume.scores",),
    ),
    Defense(
        "advrbd",
        advrbd.defend,
        defenses.AdvrBDConfig,
        ("factory", "poisoned"),
        "splits the poisoned set and trains a new network on the clean part (arXiv 2405.12719)",
        advrbd.panels,
        keeps=("resume.stages",),
    ),
    Defense(
        "ft",
        defenses.fine_tune,
        defenses.FineTuneConfig,
        ("model", "reserve"),
        "fine-tuning on the same images: the baseline",
    ),
    Defense(
        "ft-sam",
        defenses.ft_sam,
        defenses.FTSAMConfig,
        ("model", "reserve"),
        "sharpness-aware fine-tuning on the same images (arXiv 2304.11823)",
    ),
)

GIC = Defense(
    "gic",
    gic.calibrate,
    defenses.GICConfig,
    ("model", "reserve"),
    "guided input calibration (arXiv 2502.07231, reconstructed): writes a calibrated set for any purifier",
    gic.panels,
    gic.save,
    gic.describe,
    keeps=("resume.gic",),
)


def behind_gic(defense: Defense) -> Defense:
    """The same defense on a calibrated set: ``gic+<name>``."""
    return replace(
        defense,
        name=f"gic+{defense.name}",
        function=gic.behind_gic(defense.function),
        config=gic.joined_config(defense.config),
        summary=f"{defense.name} on images that GIC calibrated",
        panels=gic.panels,
        keeps=(*GIC.keeps, *defense.keeps),
    )


PURIFIERS = tuple(defense for defense in PLAIN if defense.needs == ("model", "reserve"))
"""Those that train the model they are given with clean images."""

DEFENSES: tuple[Defense, ...] = (*PLAIN, GIC, *map(behind_gic, PURIFIERS))
