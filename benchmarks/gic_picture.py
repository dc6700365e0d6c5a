"""A heat map of defense ratings: families of data against purifiers, without and with GIC, and the difference."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdfast.errors import optional_import
from bdfast.files import atomic_write
from bdfast.report.style import DPI, INK, MUTED, STYLE

Grid = Mapping[str, Mapping[str, tuple[float | None, float | None]]]
"""family -> purifier -> DER in percent without and with GIC."""


def draw(path: Path, title: str, grid: Grid) -> None:
    """Write a PNG; the numbers stand in the cells, colours are secondary."""
    matplotlib = optional_import("matplotlib", extra="cli", purpose="to draw pictures")
    figures = optional_import("matplotlib.figure", extra="cli", purpose="to draw pictures")
    families = list(grid)
    purifiers = list(next(iter(grid.values()))) if grid else []
    panels = {
        "without GIC": [[_number(grid[f][p][0]) for p in purifiers] for f in families],
        "with GIC": [[_number(grid[f][p][1]) for p in purifiers] for f in families],
        "difference": [[_number(grid[f][p][1]) - _number(grid[f][p][0]) for p in purifiers] for f in families],
    }
    shown = [v for name in ("without GIC", "with GIC") for row in panels[name] for v in row if math.isfinite(v)]
    largest = max([1.0, *(abs(v) for row in panels["difference"] for v in row if math.isfinite(v))])
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(
            figsize=(11, 1.5 + 0.42 * len(families)), dpi=DPI, layout="constrained", facecolor="white"
        )
        figure.suptitle(f"{title}: DER, percent, mean over seeds", x=0.012, ha="left", fontsize=13, fontweight="bold")
        for axis, (name, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            signed = name == "difference"
            low, high = (-largest, largest) if signed else (min(shown, default=0.0), max(shown, default=1.0))
            axis.imshow(values, cmap="RdBu" if signed else "YlGn", vmin=low, vmax=high, aspect="auto")
            _write(axis, values, low, high, signed)
            axis.set_title(name)
            axis.set_xticks(range(len(purifiers)), purifiers, color=INK)
            axis.set_yticks(
                range(len(families)), families if name == "without GIC" else [""] * len(families), color=INK
            )
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": "bdfast"})
    with atomic_write(path, "wb") as file:
        file.write(buffer.getvalue())


def _write(axis: Any, values: list[list[float]], low: float, high: float, signed: bool) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text = "-" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}" if signed else f"{value:.1f}"
            share = abs(value) / high if signed else (value - low) / ((high - low) or 1.0)
            color = MUTED if math.isnan(value) else "white" if share > 0.65 else INK
            axis.text(j, i, text, ha="center", va="center", fontsize=10, color=color)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
