"""``bdfast defend pad-ft``: PAD-FT as the command calls a defense."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.attacks import PoisonedData
from bdfast.defenses import PadFTConfig, PadFTResult, pad_ft
from bdfast.report import ClassHistograms, Curves, Panel


def defend(
    model: nn.Module, poisoned: PoisonedData, config: PadFTConfig, *, checkpoint: str | os.PathLike[str], **options: Any
) -> PadFTResult:
    """Run it; its scores lie in a folder beside ``checkpoint``, which the command removes once it has its results."""
    return pad_ft(model, poisoned, config, scores_dir=Path(checkpoint).with_suffix(".scores"), **options)


def panels(
    result: PadFTResult, training_set: PoisonedData | tuple[Tensor, Tensor], class_names: Sequence[str]
) -> Sequence[Panel]:
    """Margins by class, and the bounds of every site."""
    if isinstance(training_set, PoisonedData):
        labels, poisoned = training_set.labels, training_set.is_poisoned
    else:
        labels, poisoned = training_set[1], None
    trusted, suspect = (_mask(index, len(labels)) for index in (result.selected, result.suspects))
    groups = {"trusted": trusted, "not trusted": ~trusted & ~suspect, "suspect": suspect}
    if poisoned is not None:
        groups = {"trusted": trusted, "clean": ~trusted & ~poisoned, "poisoned": poisoned}
    shown = {name: group for name, group in groups.items() if group.any()}
    margins = ClassHistograms(
        "Margins by class: smaller is easier to fit",
        "SCE margin, nats",
        result.scores,
        labels.cpu(),
        shown,
        class_names,
    )
    lines = {
        name: ([(i + 1) / len(z) for i in range(len(z))], z.sort().values.tolist()) for name, z in result.bounds.items()
    }
    norms = {
        name: (
            [r["epoch"] for r in result.history if "norm" in r],
            [r["norm"][name] for r in result.history if "norm" in r],
        )
        for name in result.bounds
    }
    return [
        margins,
        Curves("Bounds by site, sorted", "share of the channels", "upper bound", lines),
        Curves("Norm of the bounds", "epoch of the defense", "norm", norms),
    ]


def _mask(index: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[index.cpu()] = True
    return mask
