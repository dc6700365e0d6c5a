"""Colours and fonts that all pictures share."""

from __future__ import annotations

from typing import Any

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
BAD, GOOD = "#c8384a", "#1b7f5c"
SERIES = ("#c8384a", "#9aa5b1", "#2563a8", "#7b5ea7", "#d98e04")  # before, then what came after; the last stands out
MAIN = SERIES[2]
STAGES = (MAIN, SERIES[3], SERIES[4], SERIES[1], SERIES[0], GOOD)  # parts of one run, none of them better
DPI = 150
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names of classes and files may have a $ in them
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def tidy(axis: Any) -> None:
    """Two spines and a light grid."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color=GRID, linewidth=0.8, zorder=0)
    axis.set_axisbelow(True)


def heading(figure: Any, title: str) -> None:
    """The title of a part of a picture."""
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
