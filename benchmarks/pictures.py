"""Pictures from result files: rooflines, speed-ups, and where the time of a defense goes.

Each is a function of the results; where they hold nothing for it, there is no file. A PNG keeps a digest of its data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdfast.testing.rows import BASELINES

Results = dict[str, dict[str, Any]]
"""The newest result of each kind."""

SOURCE = "Source"  # key of the PNG's text chunk that says which results it shows
INK, FAINT, OURS_COLOUR = "#24292f", "#8c959f", "#0969da"
COLOURS = {"usual": "#bf8700", "eager": "#cf222e", "compile": "#1a7f37"}
MARKERS = {"usual": "D", "eager": "o", "compile": "s"}
SHADES = (
    *("#0969da", "#54aeff", "#1a7f37", "#6fdd8b", "#bf8700", "#eac54f"),
    *("#cf222e", "#ff8182", "#8250df", "#c297ff", "#1b7c83", "#76e3ea", "#57606a", "#afb8c1"),
)  # dark and light in turns
STYLE = {
    "font.size": 9, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#d0d7de", "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "xtick.major.size": 0, "ytick.major.size": 0,
    "xtick.minor.size": 0, "ytick.minor.size": 0, "axes.grid": True, "grid.color": "#eaeef2", "axes.axisbelow": True,
    "legend.frameon": False, "savefig.dpi": 130, "savefig.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """What it shows of the results (empty: nothing yet), and how it is drawn."""

    shows: Callable[[Results], dict[str, Any]]
    draw: Callable[[dict[str, Any], Any], Any]

    def digest(self, results: Results) -> str:
        """Of what it shows."""
        return hashlib.sha256(json.dumps(self.shows(results), sort_keys=True).encode()).hexdigest()

    def is_fresh(self, results: Results, path: Path) -> bool:
        """Whether the file shows these results; where there is nothing to show, whether there is no file."""
        if not path.exists():
            return not self.shows(results)
        from PIL import Image

        with Image.open(path) as image:
            return bool(self.shows(results)) and image.info.get(SOURCE) == self.digest(results)

    def write(self, results: Results, path: Path) -> None:
        """Draw it, or remove the file of what is no longer there to show."""
        shown = self.shows(results)
        if not shown:
            path.unlink(missing_ok=True)
            return
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt

        with mpl.rc_context(STYLE):
            figure = self.draw(shown, plt)
            figure.savefig(path, metadata={SOURCE: self.digest(results)})
            plt.close(figure)


def first_dtypes(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first record of each case; the other dtypes stay in the result file."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["op"], record["case"]), record)
    return list(first.values())


def telling(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each op the case of fewest and that of most bytes; the latter alone where they differ little; wrong ones.

    Example:
        >>> sizes = {"small": 10, "middle": 100, "large": 1000}
        >>> [r["case"] for r in telling([{"op": "a", "case": c, "bytes": n} for c, n in sizes.items()])]
        ['small', 'large']
    """
    by_op: dict[str, list[dict[str, Any]]] = {}
    for record in first_dtypes(records):
        by_op.setdefault(record["op"], []).append(record)
    chosen = []
    for group in by_op.values():
        timed = sorted((r for r in group if "bytes" in r), key=lambda r: r["bytes"])
        chosen += [r for r in timed[:1] if 4 * r["bytes"] < timed[-1]["bytes"]] + timed[-1:]
        chosen += [r for r in group if "bytes" not in r]
    return chosen


# --- rooflines --------------------------------------------------------------------------------------------------------


def cpu_roofline(results: Results) -> dict[str, Any]:
    """op -> case -> bytes, GB/s, GB/s of a copy; memory kept by glibc: the kernels alone."""
    result = results.get("cpu")
    records = first_dtypes(result["heaps"].get("kept", [])) if result else []
    return _roofline([(r, r) for r in records if "us" in r], "CPU", "memory kept by glibc")


def gpu_roofline(results: Results) -> dict[str, Any]:
    """The same from replays of captured graphs, with a cold L2."""
    stage = results.get("gpu", {}).get("stages", {}).get("ops", {}).get("result") or {"records": []}
    records = [r for r in first_dtypes(stage["records"]) if r.get("modes", {}).get("plain")]
    name = results["gpu"]["environment"]["gpu"]["name"] if records else ""
    return _roofline([(r, r["modes"].get("graph") or r["modes"]["plain"]) for r in records], name, "cold L2")


def _roofline(timed: Sequence[tuple[dict[str, Any], dict[str, Any]]], where: str, how: str) -> dict[str, Any]:
    ops: dict[str, dict[str, list[float]]] = {}
    for record, figures in timed:
        if figures["gb_per_s"] > 0 and figures["share_of_copy"] > 0:
            copy = figures["gb_per_s"] / figures["share_of_copy"]
            ops.setdefault(record["op"], {})[record["case"]] = [record["bytes"], figures["gb_per_s"], round(copy, 3)]
    return {"where": where, "how": how, "ops": ops} if ops else {}


def draw_roofline(shown: dict[str, Any], plt: Any) -> Any:
    """A panel an op: GB/s over bytes, beside a copy of as many bytes in the same run."""
    ops: Mapping[str, Mapping[str, list[float]]] = shown["ops"]
    columns = min(5, len(ops))
    lines = -(-len(ops) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(0.6 + 2.35 * columns, 1.1 + 1.85 * lines), sharex=True, sharey=True, squeeze=False
    )
    floor = sorted((point[0], point[2]) for cases in ops.values() for point in cases.values())
    for axis, (op, cases) in zip(axes.flat, ops.items(), strict=False):
        points = sorted(cases.values())
        sizes, speeds = [p[0] for p in points], [p[1] for p in points]
        axis.plot(*zip(*_smooth(floor), strict=True), color=FAINT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
        axis.vlines(sizes, speeds, [p[2] for p in points], color=OURS_COLOUR, alpha=0.25, linewidth=3, zorder=2)
        axis.plot(sizes, speeds, "o-", color=OURS_COLOUR, markersize=4.5, linewidth=1.4, zorder=3)
        axis.set_title(op, fontsize=min(8.5, 190 / len(op)))  # it stands beside the share
        axis.set_title(f"{100 * speeds[-1] / points[-1][2]:.0f} %", loc="right", fontsize=9, color=OURS_COLOUR)
        axis.set(xscale="log", yscale="log")
    for axis in list(axes.flat)[len(ops) :]:
        axis.remove()
    for column in range(columns):  # the lowest panel of a column has the labels, where the last line is not full
        lowest = axes[max(row for row in range(lines) if row * columns + column < len(ops))][column]
        lowest.set_xlabel("bytes that it must move")
        lowest.tick_params(labelbottom=True)
    for row in axes:
        row[0].set_ylabel("GB/s")
    figure.suptitle(
        f"{shown['where']}: throughput of every op (blue) and of a copy of as many bytes (grey), {shown['how']}; "
        "%: of the copy, at the largest size",
        x=0.01, ha="left", fontsize=10.5, fontweight="bold",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.985), h_pad=1.0, w_pad=0.6)
    return figure


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of about one size as one, in the middle of them: a copy's speed is measured beside every case.

    Example:
        >>> _smooth([(100.0, 1.0), (110.0, 3.0), (1000.0, 5.0)])
        [(105.0, 2.0), (1000.0, 5.0)]
    """
    groups: list[list[tuple[float, float]]] = []
    for point in sorted(points):
        if groups and point[0] < 2 * groups[-1][0][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]  # type: ignore[misc]


# --- speed-ups --------------------------------------------------------------------------------------------------------


def speed_ups(results: Results) -> dict[str, Any]:
    """Panel -> op and case -> baseline -> how many times as long it takes."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    if "cpu" in results:
        records = [r for r in telling(results["cpu"]["heaps"].get("default", [])) if "us" in r]
        panels["CPU"] = {f"{r['op']}\n{r['case']}": r["ratios"] for r in records if r["ratios"]}
    measured = results.get("gpu", {}).get("stages", {}).get("ops", {}).get("result")
    if measured:
        timed = [r for r in telling(measured["records"]) if r.get("modes", {}).get("plain")]
        figures = {f"{r['op']}\n{r['case']}": r["modes"].get("graph") or r["modes"]["plain"] for r in timed}
        ratios = {label: {n: f["ratios"][n] for n in BASELINES if n in f["ratios"]} for label, f in figures.items()}
        panels[results["gpu"]["environment"]["gpu"]["name"]] = {label: r for label, r in ratios.items() if r}
    return {title: rows for title, rows in panels.items() if rows}


def draw_speed_ups(shown: dict[str, Any], plt: Any) -> Any:
    """A line a case, a mark a baseline: to the right of 1, bdfast is faster."""
    most = max(map(len, shown.values()))
    figure, axes = plt.subplots(1, len(shown), figsize=(7.2 * len(shown), 1.3 + 0.36 * most), squeeze=False)
    for axis, (title, cases) in zip(axes[0], shown.items(), strict=True):
        for place, ratios in enumerate(cases.values()):
            low, high = min(1.0, *ratios.values()), max(1.0, *ratios.values())
            axis.plot([low, high], [place, place], color="#d0d7de", linewidth=2, zorder=1)
            for name, ratio in ratios.items():
                style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 6, "linestyle": "none"}
                axis.plot([ratio], [place], **style, zorder=3)
        for name in BASELINES:
            axis.plot([], [], color=COLOURS[name], marker=MARKERS[name], linestyle="none", label=name)
        axis.axvline(1.0, color=INK, linewidth=1, zorder=2)
        axis.set_yticks(range(len(cases)), [label.replace("\n", "  ·  ") for label in cases], fontsize=8.5)
        axis.set_ylim(len(cases) - 0.5, -0.5)
        axis.set_xscale("log")
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t < 1.3 * axis.get_xlim()[1]]
        axis.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel("how many times as long plain PyTorch takes")
        axis.set_title(f"{title}: bdfast = 1", fontsize=11, pad=22)
        axis.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.995), ncols=len(BASELINES), borderaxespad=0.2)
    figure.tight_layout()
    return figure


# --- where the time goes ----------------------------------------------------------------------------------------------


def stage_times(results: Results) -> dict[str, Any]:
    """Defense -> part of it -> seconds, from the end-to-end stages of the GPU check."""
    measured = {
        name: report["result"]
        for name, report in results.get("gpu", {}).get("stages", {}).items()
        if report.get("result")
    }
    bars: dict[str, dict[str, float]] = {}
    for record in measured.get("d3", {}).get("records", []):
        bars[{"d3": "D3", "ft": "fine-tuning"}[record["defense"]]] = record.get("timings", {})
    for record in measured.get("pad_ft", {}).get("records", []):
        bars[f"PAD-FT, {record['defense']}"] = record["timings"]
    if "calibration" in measured.get("gic", {}):
        bars["GIC, calibration"] = measured["gic"]["calibration"]["timings"]
    if "timings" in measured.get("advrbd", {}):
        bars[f"AdvrBD, {measured['advrbd']['images']:,} images"] = measured["advrbd"]["timings"]
    bars = {name: {part: s for part, s in parts.items() if s > 0} for name, parts in bars.items()}
    bars = {name: parts for name, parts in bars.items() if parts}
    return {"where": results["gpu"]["environment"]["gpu"]["name"], "bars": bars} if bars else {}


def draw_stage_times(shown: dict[str, Any], plt: Any) -> Any:
    """A stacked bar a defense; parts that are wide enough say what they are."""
    bars: Mapping[str, Mapping[str, float]] = shown["bars"]
    parts = list(dict.fromkeys(part for timings in bars.values() for part in timings))
    colours = {part: SHADES[place % len(SHADES)] for place, part in enumerate(parts)}
    longest = max(sum(timings.values()) for timings in bars.values())
    legend = 0.2 * -(-len(parts) // 7) + 0.1  # inches
    height = 1.0 + 0.46 * len(bars) + legend
    figure, axis = plt.subplots(figsize=(9.0, height))
    for place, timings in enumerate(bars.values()):
        left = 0.0
        for part, seconds in timings.items():
            axis.barh(place, seconds, left=left, height=0.62, color=colours[part], edgecolor="white", linewidth=0.8)
            if seconds > 0.016 * longest * (len(part) + 1):
                ink = "white" if SHADES.index(colours[part]) % 2 == 0 else INK
                style = {"ha": "center", "va": "center", "color": ink, "fontsize": 8}
                axis.text(left + seconds / 2, place, part, fontweight="bold", **style)
            left += seconds
        axis.text(left + 0.01 * longest, place, f"{left:.1f} s", va="center", fontweight="bold")
    for part in parts:
        axis.barh(0, 0, color=colours[part], label=part)
    axis.set_yticks(range(len(bars)), list(bars))
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlim(0, 1.1 * longest)
    axis.grid(False, axis="y")
    axis.set_xlabel("seconds, the victim's training left out")
    axis.set_title(f"{shown['where']}: where the time of a defense goes", fontsize=11)
    figure.legend(loc="lower center", ncols=min(7, len(parts)), fontsize=8, handlelength=1.0)
    figure.tight_layout(rect=(0, legend / height, 1, 1))
    return figure


PICTURES = {
    "speed.png": Picture(speed_ups, draw_speed_ups),
    "roofline_cpu.png": Picture(cpu_roofline, draw_roofline),
    "roofline_gpu.png": Picture(gpu_roofline, draw_roofline),
    "stages_gpu.png": Picture(stage_times, draw_stage_times),
}
"""File name -> picture."""
