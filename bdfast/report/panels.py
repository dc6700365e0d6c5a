"""What a defense shows besides rates and history: distributions of scores, curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from bdfast.report.style import BAD, GOOD, GRID, MUTED, SERIES, heading, tidy

MOST_CLASSES = 20  # drawn by ClassHistograms; more would be too small to read
COLUMNS = 5
BINS = 40


@dataclass(frozen=True)
class Histogram:
    """Distributions of one score, over each other.

    Attributes:
        title, xlabel: texts.
        groups: name -> values ``[n]``; those that are not finite are left out. The first group is the good one, the
            last the bad one.
        marks: name -> a value to mark, such as a threshold.
    """

    title: str
    xlabel: str
    groups: Mapping[str, Tensor]
    marks: Mapping[str, float] | None = None


@dataclass(frozen=True)
class ClassHistograms:
    """Distributions of one score, a small picture a class; of many classes those with most of the last group.

    Attributes:
        title, xlabel: texts.
        values: ``[N]``; those that are not finite are left out.
        classes: int64 ``[N]``.
        groups: name -> bool ``[N]``; drawn over each other. The first group is the good one, the last the bad one.
        class_names: by class.
    """

    title: str
    xlabel: str
    values: Tensor
    classes: Tensor
    groups: Mapping[str, Tensor]
    class_names: Sequence[str]


@dataclass(frozen=True)
class Curves:
    """Lines in one pair of axes.

    Attributes:
        title, xlabel, ylabel: texts.
        lines: name -> (x, y).
        diagonal: draws x = y, too.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    diagonal: bool = False


Panel: TypeAlias = Histogram | ClassHistograms | Curves


def rows_of(panels: Sequence[Panel]) -> list[tuple[list[Panel], float]]:
    """Panels by rows, with the height of each in inches: class histograms are as wide as the page, others share a row.

    Example:
        >>> curves = Curves("ROC", "FPR", "TPR", {"s": ([0, 1], [0, 1])})
        >>> [(len(row), height) for row, height in rows_of([curves, curves, curves])]
        [(2, 3.2), (1, 3.2)]
    """
    rows: list[tuple[list[Panel], float]] = []
    for panel in panels:
        if isinstance(panel, ClassHistograms):
            lines = math.ceil(len(_shown(panel)) / COLUMNS)
            rows.append(([panel], 0.9 + 1.5 * lines))
        elif rows and len(rows[-1][0]) == 1 and not isinstance(rows[-1][0][0], ClassHistograms):
            rows[-1][0].append(panel)
        else:
            rows.append(([panel], 3.2))
    return rows


def draw_row(figure: Any, panels: Sequence[Panel]) -> None:
    """Draw one row of :func:`rows_of`."""
    if isinstance(panels[0], ClassHistograms):
        _draw_classes(figure, panels[0])
        return
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        if isinstance(panel, Histogram):
            _draw_histogram(axis, panel)
        elif isinstance(panel, Curves):
            _draw_curves(axis, panel)


def _draw_histogram(axis: Any, panel: Histogram) -> None:
    values = {name: _finite(group) for name, group in panel.groups.items()}
    _overlay(axis, values, _edges(torch.cat([*values.values(), torch.zeros(0)])))
    for name, mark in (panel.marks or {}).items():
        axis.axvline(mark, color=MUTED, linestyle="--", linewidth=1, label=name)
    axis.set(title=panel.title, xlabel=panel.xlabel, ylabel="share of the group")
    axis.legend(frameon=False, handlelength=1.0)
    tidy(axis)


def _draw_curves(axis: Any, panel: Curves) -> None:
    if panel.diagonal:
        axis.plot([0, 1], [0, 1], color=GRID, linewidth=1, zorder=1)
    for i, (name, (x, y)) in enumerate(panel.lines.items()):
        marker = "o" if len(x) <= 20 else ""
        color = SERIES[(i + 2) % len(SERIES)]
        axis.plot(x, y, label=name, color=color, linewidth=2, marker=marker, markersize=4, zorder=2)
    axis.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    axis.legend(frameon=False, handlelength=1.0)
    tidy(axis)


def _draw_classes(figure: Any, panel: ClassHistograms) -> None:
    heading(figure, panel.title)
    shown = _shown(panel)
    lines = math.ceil(len(shown) / COLUMNS)
    axes = figure.subplots(lines, COLUMNS, squeeze=False, sharex=True).ravel()
    edges = _edges(_finite(panel.values))
    for axis, label in zip(axes, shown, strict=False):
        here = panel.classes == label
        groups = {name: _finite(panel.values[here & group]) for name, group in panel.groups.items()}
        _overlay(axis, groups, edges, shares=False)
        name = panel.class_names[label] if label < len(panel.class_names) else str(label)
        axis.set_title(name, fontsize=9, fontweight="normal")
        tidy(axis)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    legend: dict[str, Any] = {}
    for axis in axes[: len(shown)]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            legend.setdefault(name, handle)
    figure.legend(list(legend.values()), list(legend), loc="upper right", ncols=len(legend), frameon=False)
    figure.supxlabel(panel.xlabel, fontsize=10, color=MUTED)


def _shown(panel: ClassHistograms) -> list[int]:
    """The classes to draw, in order."""
    present = sorted(set(panel.classes.tolist()))
    if len(present) <= MOST_CLASSES:
        return present
    last = list(panel.groups.values())[-1]
    counts = torch.bincount(panel.classes[last], minlength=present[-1] + 1)
    return sorted(sorted(present, key=lambda label: (-int(counts[label]), label))[:MOST_CLASSES])


def _overlay(axis: Any, groups: Mapping[str, Tensor], edges: list[float], *, shares: bool = True) -> None:
    colors = [GOOD, *[SERIES[1], SERIES[3]][: len(groups) - 2], BAD]
    for (name, values), color in zip(groups.items(), colors, strict=False):
        weights = [1 / len(values)] * len(values) if shares else None
        label = f"{name} ({len(values)})" if shares else name
        axis.hist(values.tolist(), edges, weights=weights, color=color, alpha=0.55, label=label)


def _finite(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return values[torch.isfinite(values)]


def _edges(values: Tensor) -> list[float]:
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return torch.linspace(low, high, BINS + 1, dtype=torch.float64).tolist()
