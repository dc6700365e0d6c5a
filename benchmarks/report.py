# ruff: noqa: E402  (the path comes first)
"""Writes the tables of the documentation, and a plot, from the committed result files.

    python benchmarks/report.py            rewrites what stands between the markers of README.md and docs
    python benchmarks/report.py --check    changes nothing; exit code 1 where a table or the plot is stale

A table stands between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->``; names are demo, cpu-ops, gpu-ops,
gpu-end-to-end and digits. Each shows the newest result file of its kind, by date; the demo's is results/demo/demo.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

from bdfast.testing import rows
from bdfast.testing.tables import Cell, Table, markdown_table
from benchmarks.stages import CHECKS, stages

RESULTS = ROOT / "benchmarks" / "results"
PLOT = RESULTS / "speed.png"
BLOCK = re.compile(r"(<!-- begin:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end:(?P=name) -->)", re.DOTALL)
BEGIN = re.compile(r"<!-- begin:([\w-]+) -->")
SOURCE = "Source"  # key of the PNG's text chunk that says which results it shows

Results = dict[str, dict[str, Any]]
"""The newest result of each kind: cpu, gpu, digits, demo."""


def main(argv: list[str] | None = None) -> int:
    """Rewrite, or check; 2 for a marker that cannot be filled."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("files", nargs="*", type=Path, help="README.md, benchmarks/README.md and docs unless given")
    arguments = parser.parse_args(argv)
    results = newest(arguments.results)
    stale = []
    for path in arguments.files or documents():
        text = path.read_text(encoding="utf-8")
        try:
            fresh = fill(text, results)
        except ValueError as error:
            print(f"report: {path}: {error}", file=sys.stderr)
            return 2
        if fresh != text:
            stale.append(path)
            if not arguments.check:
                path.write_text(fresh, encoding="utf-8")
    if plotted(arguments.plot) != digest(results):
        stale.append(arguments.plot)
        if not arguments.check:
            plot(results, arguments.plot)
    for path in stale:
        print(f"{'stale' if arguments.check else 'wrote'} {path}")
    return int(arguments.check and bool(stale))


def documents() -> list[Path]:
    """Every Markdown file that may hold a table."""
    return [path for path in (ROOT / "README.md", ROOT / "benchmarks/README.md") if path.exists()] + sorted(
        (ROOT / "docs").rglob("*.md")
    )


def newest(folder: Path) -> Results:
    """The latest result of each kind; those of a part of the cases do not count."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind, date = result["kind"], result["environment"]["date"]
        if result["complete"] and (kind not in found or date > found[kind]["environment"]["date"]):
            found[kind] = {**result, "file": path.name}
    demo_file = folder / "demo" / "demo.json"
    if demo_file.exists():
        found["demo"] = json.loads(demo_file.read_text(encoding="utf-8"))
    return found


def fill(text: str, results: Results) -> str:
    """``text`` with every marked block rewritten; blocks of other names belong to others.

    Raises:
        ValueError: a block without an end.

    Example:
        >>> fill("<!-- begin:digits -->\\nold\\n<!-- end:digits -->", {})
        '<!-- begin:digits -->\\n*Not measured yet.*\\n<!-- end:digits -->'
    """
    if [match["name"] for match in BLOCK.finditer(text)] != BEGIN.findall(text):
        raise ValueError("a marker `begin` expected its `end`, in order and not nested, got none; add it")

    def rewrite(match: re.Match[str]) -> str:
        table = TABLES.get(match["name"])
        return match[0] if table is None else f"{match[1]}{table(results)}\n{match[4]}"

    return BLOCK.sub(rewrite, text)


def cpu_ops(results: Results) -> str:
    """Both heaps, each case in its first dtype."""
    if "cpu" not in results:
        return NOT_MEASURED
    result = results["cpu"]
    titles = {"default": "glibc's default allocator", "kept": "memory kept by glibc (kernels alone)"}
    parts = [
        f"*{titles[heap]}*\n\n{markdown_table(rows.table(first_dtypes(records)))}"
        for heap, records in result["heaps"].items()
    ]
    return "\n\n".join([*parts, origin(result)])


def gpu_ops(results: Results) -> str:
    """Each case in its first dtype."""
    measured = results.get("gpu", {}).get("stages", {}).get("ops", {}).get("result")
    if not measured:
        return NOT_MEASURED
    table = stages()["ops"].table({**measured, "records": first_dtypes(measured["records"])})
    return f"{markdown_table(table)}\n\n{origin(results['gpu'])}"


def gpu_end_to_end(results: Results) -> str:
    """A table a stage."""
    measured = results.get("gpu", {}).get("stages", {})
    known = stages()
    parts = [
        f"*{known[name].title}*\n\n{markdown_table(known[name].table(report['result']))}"
        for name, report in measured.items()
        if name in known and name not in CHECKS and report.get("result")
    ]
    return "\n\n".join([*parts, origin(results["gpu"])]) if parts else NOT_MEASURED


def demo(results: Results) -> str:
    """What ``make demo`` printed."""
    if "demo" not in results:
        return NOT_MEASURED
    result = results["demo"]
    names = {"before": "backdoored", "ft": "fine-tuned (the baseline)", "d3": "D3"}
    lines: list[list[Cell]] = []
    for label, rates in result["rates"].items():
        rating = result["ratings"].get(label, {}).get("DER")
        figures = [f"{100 * rates[name]:.1f}" for name in ("acc", "asr", "ra")]
        seconds = result["seconds"].get(label)
        der = "" if rating is None else f"{100 * rating:.1f}"
        lines.append([names.get(label, label), *figures, der, "" if seconds is None else f"{seconds:.1f}"])
    header = ("model", "ACC", "ASR", "RA", "DER", "seconds")
    versions = result["versions"]
    origin = f"{versions['system']}, {result['device']}; torch {versions['torch']}; {result['date'][:10]}"
    return f"{markdown_table((header, lines))}\n\n`{result['command']}`; {origin}"


def digits(results: Results) -> str:
    """Means and ranges over seeds."""
    if "digits" not in results:
        return NOT_MEASURED
    return f"{markdown_table(over_seeds(results['digits']['records']))}\n\n{origin(results['digits'])}"


def over_seeds(records: Sequence[dict[str, Any]]) -> Table:
    """A line an attack, reserve and defense: mean (lowest to highest) in percent."""
    header = ("attack", "reserve", "defense", "seeds", "ACC before", "ASR before", "ACC", "ASR", "RA", "DER", "seconds")
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["attack"], record["reserve"], record["defense"]), []).append(record)
    lines: list[list[Cell]] = []
    for (attack, reserve, defense), group in sorted(groups.items()):
        before = [spread(record["before"][name] for record in group) for name in ("acc", "asr")]
        after = [spread(record["after"][name] for record in group) for name in ("acc", "asr", "ra")]
        rating = spread(record["der"] for record in group)
        seconds = statistics.median(record["seconds"] for record in group)
        lines.append([attack, reserve, defense, len(group), *before, *after, rating, seconds])
    return header, lines


def spread(values: Iterable[float]) -> str:
    """Mean (lowest to highest).

    Example:
        >>> spread([1.0, 2.0, 6.0])
        '3.0 (1.0-6.0)'
    """
    listed = list(values)
    mean = statistics.fmean(listed)
    return f"{mean:.1f} ({min(listed):.1f}-{max(listed):.1f})" if len(listed) > 1 else f"{mean:.1f}"


def first_dtypes(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first record of each case; the other dtypes stay in the result file."""
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for record in records:
        first.setdefault((record["op"], record["case"]), record)
    return list(first.values())


def origin(result: dict[str, Any]) -> str:
    """Where a table comes from, in one line."""
    facts = result["environment"]
    machine, versions, gpu = facts["machine"], facts["versions"], facts["gpu"]
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{machine['cpu']}, {machine['threads']} threads"
    date = facts["date"][:10]
    return (
        f"{where}; torch {versions['torch']}; commit {facts['commit']}, {date}; `{facts['command']}`; "
        f"`benchmarks/results/{result['file']}`"
    )


def plot(results: Results, path: Path) -> None:
    """Bars: how many times as long eager PyTorch takes, op by op."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = speed_ups(results)
    columns, bars = max(1, len(panels)), max([2, *map(len, panels.values())])
    figure, axes = plt.subplots(1, columns, figsize=(6.4 * columns, 1.0 + 0.42 * bars), squeeze=False)
    for axis, (title, ratios) in zip(axes[0], panels.items(), strict=False):
        names, values = list(ratios), list(ratios.values())
        axis.barh(names, values, color="#3465a4")
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.bar_label(axis.containers[0], fmt="%.1f", padding=2)
        axis.margins(x=0.12)  # for the figures beside the bars
        axis.invert_yaxis()
        axis.set_xlabel("times as fast as eager PyTorch")
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={SOURCE: digest(results)})
    plt.close(figure)


def speed_ups(results: Results) -> dict[str, dict[str, float]]:
    """Panel -> case -> ratio to eager."""
    panels: dict[str, dict[str, float]] = {}
    if "cpu" in results:
        records = results["cpu"]["heaps"].get("default", [])
        timed = [record for record in first_dtypes(records) if "eager" in record.get("ratios", {})]
        panels["CPU"] = {_label(record): record["ratios"]["eager"] for record in timed}
    measured = results.get("gpu", {}).get("stages", {}).get("ops", {}).get("result")
    if measured:
        timed = [record for record in first_dtypes(measured["records"]) if "modes" in record]
        figures = {_label(record): record["modes"].get("graph", record["modes"]["plain"]) for record in timed}
        panels[results["gpu"]["environment"]["gpu"]["name"]] = {
            label: f["ratios"]["eager"] for label, f in figures.items() if "eager" in f["ratios"]
        }
    return panels


def digest(results: Results) -> str:
    """Of what the plot shows."""
    return hashlib.sha256(json.dumps(speed_ups(results), sort_keys=True).encode()).hexdigest()


def plotted(path: Path) -> str | None:
    """The digest that a plot was made from; that of no result where there is no plot."""
    if not path.exists():
        return digest({})
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(SOURCE)


def _label(record: dict[str, Any]) -> str:
    return f"{record['op']}\n{record['case']}"


NOT_MEASURED = "*Not measured yet.*"

TABLES: dict[str, Callable[[Results], str]] = {
    "demo": demo,
    "cpu-ops": cpu_ops,
    "gpu-ops": gpu_ops,
    "gpu-end-to-end": gpu_end_to_end,
    "digits": digits,
}


if __name__ == "__main__":
    sys.exit(main())
