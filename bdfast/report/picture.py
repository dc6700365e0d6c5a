"""The picture: triggered images with predictions before and after, bars of the rates, curves of the history."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bdfast.errors import optional_import, printable
from bdfast.files import atomic_write
from bdfast.metrics import Metrics
from bdfast.report.content import Report, Samples
from bdfast.report.panels import draw_row, rows_of
from bdfast.report.style import BAD, DPI, GOOD, GRID, INK, MAIN, MUTED, SERIES, STAGES, STYLE, heading, tidy
from bdfast.runtime.progress import Record


def write_png(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw ``report`` into a PNG file.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    content = draw(report)
    with atomic_write(path, "wb") as file:
        file.write(content)


def draw(report: Report) -> bytes:
    """The picture as PNG; samples and curves are left out where there are none.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = optional_import("matplotlib", extra="cli", purpose="to draw pictures")
    figures = optional_import("matplotlib.figure", extra="cli", purpose="to draw pictures")
    panels = rows_of(report.panels)
    heights = [2.3] * bool(report.samples) + [3.9] * bool(report.rates) + [height for _, height in panels]
    with matplotlib.rc_context(STYLE):
        # A Figure of its own: pyplot would keep global state, and might open a window.
        figure = figures.Figure(figsize=(11, 0.6 + sum(heights)), dpi=DPI, layout="constrained", facecolor="white")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        figure.suptitle(printable(report.title), x=0.012, ha="left", fontsize=14, fontweight="bold")
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        if report.samples:
            _draw_samples(next(parts), report.samples)
        if report.rates:
            bars, *curves = _axes(next(parts), bool(report.history))
            _draw_bars(bars, report.rates)
            if curves:
                _draw_history(curves, report.history)
        for (row, _), part in zip(panels, parts, strict=True):
            draw_row(part, row)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "bdfast"})
    return buffer.getvalue()


def _axes(figure: Any, history: bool) -> list[Any]:
    """An axis for the bars, and two beside it, one above the other, for the curves."""
    if not history:
        return [figure.subplots()]
    mosaic = figure.subplot_mosaic([["bars", "upper"], ["bars", "lower"]], width_ratios=[1.15, 1])
    return [mosaic["bars"], mosaic["upper"], mosaic["lower"]]


def _draw_samples(figure: Any, samples: Samples) -> None:
    title = "Test images with the trigger, and what they are taken for"
    heading(figure, title)
    axes = figure.subplots(1, len(samples.truth), squeeze=False)[0]
    for i, (axis, image, truth) in enumerate(zip(axes, samples.images, samples.truth, strict=True)):
        axis.imshow(_pixels(image), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set(xticks=[], yticks=[], anchor="N")
        axis.spines[:].set_color(GRID)
        _below(axis, 0.5, 0, truth, "center", INK)
        for line, names in enumerate(samples.predictions.values(), start=1):
            _below(axis, 0.5, line, names[i], "center", GOOD if names[i] == truth else BAD, weight="bold")
    for line, label in enumerate(["true class", *samples.predictions]):
        _below(axes[0], -0.08, line, label, "right", MUTED)


def _below(axis: Any, x: float, line: int, text: str, align: str, color: str, weight: str = "normal") -> None:
    axis.annotate(
        text, (x, -0.08 - 0.2 * line), xycoords="axes fraction", annotation_clip=False,
        ha=align, va="top", fontsize=10, fontweight=weight, color=color,
    )  # fmt: skip


def _pixels(image: Tensor) -> Any:
    """[C, H, W] to what imshow takes."""
    pixels = image.cpu() if image.dtype == torch.uint8 else (image.cpu() * 255).round().to(torch.uint8)
    return pixels[0].numpy() if len(pixels) != 3 else pixels.permute(1, 2, 0).numpy()


def _draw_bars(axis: Any, rates: Mapping[str, Metrics]) -> None:
    names = {"acc": "ACC\nclean accuracy", "asr": "ASR\nattack success", "ra": "RA\ntriggered, classified right"}
    width = 0.8 / len(rates)
    colors = [*SERIES[: len(rates) - 1], MAIN] if 1 < len(rates) <= 3 else SERIES
    for j, (label, metrics) in enumerate(rates.items()):
        values = [100 * getattr(metrics, name) for name in names]
        heights = [0.0 if math.isnan(value) else value for value in values]
        places = [i + (j - (len(rates) - 1) / 2) * width for i in range(len(names))]
        axis.bar(places, heights, width * 0.92, label=label, color=colors[j % len(colors)], zorder=2)
        for x, height, value in zip(places, heights, values, strict=True):
            text = "-" if math.isnan(value) else f"{value:.0f}" if len(rates) > 2 else f"{value:.1f}"
            axis.text(x, height + 1.5, text, ha="center", va="bottom", fontsize=9)
    axis.set_xticks(range(len(names)), list(names.values()), color=INK)
    axis.set(ylim=(0, 118), yticks=range(0, 101, 20), ylabel="percent")
    axis.legend(ncols=len(rates), loc="upper right", frameon=False, handlelength=1.0, borderaxespad=0.1)
    axis.set_title("What changed")
    tidy(axis)
    axis.tick_params(axis="x", length=0)


def _draw_history(axes: Sequence[Any], history: Sequence[Record]) -> None:
    epochs = [record["epoch"] for record in history]
    if "hinge" in history[0]:
        first, title = [record["hinge"] for record in history], "Clean loss above eps, nats"
    else:
        first, title = [record["loss"] for record in history], "Loss, nats"
    if "distance" in history[0]:
        second = [sum(record["distance"].values()) for record in history]
        below = "Distance from the backdoored weights"
    else:
        second = [100 * record["accuracy"] for record in history]
        below = "Accuracy as met in training, percent"
    for axis, values, text in zip(axes, (first, second), (title, below), strict=True):
        _draw_stages(axis, history, epochs, values)
        axis.set_title(text)
        axis.set_xlim(0, epochs[-1])
        axis.locator_params(axis="y", nbins=5)
        axis.locator_params(axis="x", integer=True)
        axis.ticklabel_format(axis="y", useOffset=False)
        tidy(axis)
    low, high = min(0.0, *first), max(0.0, *first)
    axes[0].set_ylim(low, high + 0.08 * (high - low or 1.0))
    axes[0].tick_params(labelbottom=False)
    axes[1].set_xlabel("epoch of the defense")


def _draw_stages(axis: Any, history: Sequence[Record], epochs: Sequence[int], values: Sequence[float]) -> None:
    """One line, or one a stage, whose losses are not comparable."""
    stages = [record.get("stage", "") for record in history]
    families = list(dict.fromkeys(stage.split(" ")[0] for stage in stages))  # "content 0", "content 1", ...
    told = set()
    for stage in dict.fromkeys(stages):
        family = stage.split(" ")[0]
        color = STAGES[families.index(family) % len(STAGES)]
        x, y = zip(*((e, v) for e, v, s in zip(epochs, values, stages, strict=True) if s == stage), strict=True)
        label = family if family not in told else None
        axis.plot(x, y, color=color, linewidth=2, marker="o" if len(x) == 1 else "", zorder=2, label=label)
        told.add(family)
    if any(stages):
        axis.legend(frameon=False, handlelength=1.0, ncols=-(-len(families) // 3))
