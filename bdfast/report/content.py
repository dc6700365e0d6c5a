"""What a report tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.attacks import TriggeredData
from bdfast.metrics import Metrics, predict
from bdfast.report.panels import Panel
from bdfast.runtime.progress import Record


@dataclass(frozen=True)
class Samples:
    """A few triggered test images, and what the models make of them."""

    images: Tensor  # [n, C, H, W] uint8, or float in [0, 1]
    truth: tuple[str, ...]  # names of the true classes
    predictions: Mapping[str, tuple[str, ...]]  # model -> names of the predicted classes


@dataclass(frozen=True)
class Report:
    """What a defense changed.

    Attributes:
        title: one line.
        rates: model -> its rates; the first is the model before. None for scores alone.
        history: a record an epoch of the defense; see :func:`bdfast.training.loop.fit`.
        settings: as resolved.
        timings: seconds a stage.
        versions: program -> version.
        samples: triggered images, where the trigger is known.
        panels: what else the defense has to show; see :mod:`bdfast.report.panels`.
    """

    title: str
    rates: Mapping[str, Metrics] = field(default_factory=dict)
    history: Sequence[Record] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    samples: Samples | None = None
    panels: Sequence[Panel] = ()


def pick_samples(
    networks: Mapping[str, nn.Module],
    triggered: TriggeredData,
    class_names: Sequence[str],
    *,
    count: int = 8,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Samples:
    """The first triggered images of each class in turn, of those that count for ASR, and each model's predictions.

    Example:
        >>> from bdfast import attacks
        >>> images, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
        >>> triggered = attacks.poison(images, labels, "badnets", rate=0.25).trigger(images, labels)
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> pick_samples({"before": model}, triggered, ("a", "b", "c"), count=2).truth
        ('b', 'c')
    """
    eligible = triggered.eligible.nonzero().flatten()
    classes = triggered.original_labels[eligible]
    rank = torch.empty_like(classes)  # of an image among those of its class
    for label in sorted(set(classes.tolist())):
        rank[classes == label] = torch.arange(int((classes == label).sum()))
    order = torch.argsort(rank * len(class_names) + classes)
    index = eligible[order[:count]]
    images = triggered.images[index]
    predictions = {label: predict(m, images, normalize=normalize).classes for label, m in networks.items()}
    names = {label: _names(classes, class_names) for label, classes in predictions.items()}
    return Samples(images, _names(triggered.original_labels[index], class_names), names)


def _names(classes: Tensor, class_names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes; a number where a model has more classes than the data, -1 where its logits were not finite."""
    return tuple(class_names[c] if 0 <= c < len(class_names) else str(c) for c in classes.tolist())
