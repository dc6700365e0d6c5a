"""``bdfast defend advrbd``: AdvrBD as the command calls a defense."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.attacks import PoisonedData
from bdfast.defenses import AdvrBDConfig, AdvrBDResult, advrbd
from bdfast.report import ClassHistograms, Curves, Panel


def defend(
    factory: Callable[[], nn.Module],
    poisoned: PoisonedData,
    config: AdvrBDConfig,
    *,
    checkpoint: str | os.PathLike[str],
    **options: Any,
) -> AdvrBDResult:
    """Run it; its stages lie in a folder beside ``checkpoint``, which the command removes once it has its results."""
    return advrbd(factory, poisoned, config, checkpoint=Path(checkpoint).with_suffix(".stages"), **options)


def panels(
    result: AdvrBDResult, training_set: PoisonedData | tuple[Tensor, Tensor], class_names: Sequence[str]
) -> Sequence[Panel]:
    """Scores by class, what each round made of the training set, and how much of each class is left."""
    if isinstance(training_set, PoisonedData):
        labels, poisoned = training_set.labels.cpu(), training_set.is_poisoned.cpu()
    else:
        labels, poisoned = training_set[1].cpu(), None
    clean = torch.zeros(len(labels), dtype=torch.bool)
    clean[result.clean_indices] = True
    groups = {"held to be clean": clean, "suspected": ~clean}
    if poisoned is not None:
        groups = {"clean": ~poisoned, "poisoned": poisoned}
    shown = {name: group for name, group in groups.items() if group.any()}
    values, title = result.scores, f"First scores ({result.config.rank}): larger is presumed cleaner"
    if result.content is not None:
        values, title = result.content, "Content margins: above 0 a sample looks like its class"
    rounds = [float(record["round"]) for record in result.rounds]
    names = {"clean_as_labelled": "clean", "poisoned_as_labelled": "poisoned"}
    kept = {name: (rounds, [r[key] for r in result.rounds]) for key, name in names.items() if key in result.rounds[0]}
    if not kept:
        wrong = [1 - record["misclassified"] / len(labels) for record in result.rounds]
        kept = {"all samples": (rounds, wrong)}
    classes = torch.unique(labels).tolist()
    shares = [float(clean[labels == c].double().mean()) for c in classes]
    retention = {"held to be clean": ([float(c) for c in classes], shares)}
    if result.quality is not None:
        given = result.quality["retention"]
        retention["clean ones held to be clean"] = ([float(c) for c in classes], [given[str(c)] for c in classes])
    told_apart: list[Panel] = []
    if result.contrast is not None and bool(result.contrast.isfinite().any()):
        heading = "Contrast of the suspects: above 0 they have what the clean ones lack"
        told_apart = [ClassHistograms(heading, "log density ratio", result.contrast, labels, shown, class_names)]
    return [
        ClassHistograms(title, "score", values, labels, shown, class_names),
        *told_apart,
        Curves("Classified as labelled by the enhanced network", "round", "share of the training set", kept),
        Curves("What is left of each class", "class", "share", retention),
    ]
