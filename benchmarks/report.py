# ruff: noqa: E402  (the path comes first)
"""Writes the tables and pictures of the documentation from the committed result files.

    python benchmarks/report.py            rewrites what stands between the markers of README.md and docs, and pictures
    python benchmarks/report.py --check    changes nothing; exit code 1 where a table or a picture is stale

A table stands between ``<!-- begin:NAME -->`` and ``<!-- end:NAME -->``. Names: demo; digits; cifar10, a defense
a line; cpu-ops and gpu-ops; gpu-defenses, stages of the GPU check with rates of defended networks, and gpu-throughput,
the other ones; score-advrbd; cpu-convolutions, alone and in networks; kernels, what they compile to; predictions;
backdoorbench, the parts put into it.
Each shows the newest result file of its kind, by date, a table of a stage of the GPU check the newest run that has
something to show of it; the demo's is results/demo/demo.json, that of kernels tools/kernel_table.json.
Pictures are those of benchmarks/pictures.py; one that has nothing to show is not there.
"""

from __future__ import annotations

import argparse
import itertools
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
from benchmarks import convolutions, score_advrbd
from benchmarks.pictures import PICTURES, Results, first_dtypes, telling
from benchmarks.replaced import part
from benchmarks.stage import Stage
from benchmarks.stages import CHECKS, LAST, stages
from tools import kernel_table

RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- begin:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end:(?P=name) -->)", re.DOTALL)
BEGIN = re.compile(r"<!-- begin:([\w-]+) -->")


def main(argv: list[str] | None = None) -> int:
    """Rewrite, or check; 2 for a marker that cannot be filled."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, help="their folder (that of the results)")
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
    for name, picture in PICTURES.items():
        path = (arguments.pictures or arguments.results) / name
        if not picture.is_fresh(results, path):
            stale.append(path)
            if not arguments.check:
                picture.write(results, path)
    for path in stale:
        print(f"{'stale' if arguments.check else 'wrote'} {path}")
    return int(arguments.check and bool(stale))


def documents() -> list[Path]:
    """Every Markdown file that may hold a table."""
    return [path for path in map(ROOT.joinpath, FILES) if path.exists()] + sorted((ROOT / "docs").rglob("*.md"))


def newest(folder: Path) -> Results:
    """The latest result of each kind; those of a part of the cases do not count, but for the GPU check's stages."""
    found: Results = {}
    runs = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kind, date = result.get("kind"), result.get("environment", {}).get("date")
        if kind == "gpu":
            runs.append({**result, "file": path.name})
        elif result.get("complete") and (kind not in found or date > found[kind]["environment"]["date"]):
            found[kind] = {**result, "file": path.name}
    if merged := gpu_runs(runs):
        found["gpu"] = merged
    demo_file = folder / "demo" / "demo.json"
    if demo_file.exists():
        found["demo"] = json.loads(demo_file.read_text(encoding="utf-8"))
    return found


def gpu_runs(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Runs of the GPU check as one, each stage with its ``run``: the newest in which it ended by itself, or, where its
    time was always over before, the newest that has something to show of it.
    """
    known, merged = stages(), {}
    real = [run for run in runs if run["environment"]["gpu"] and "--quick" not in run["environment"]["command"]]
    ordered = sorted(real, key=lambda run: str(run["environment"]["date"]))
    for run in ordered:
        for name, report in run["stages"].items():
            if name not in known or not shows_something(known[name], report.get("result")):
                continue
            if report["status"] != "out of time" or merged.get(name, report)["status"] == "out of time":
                merged[name] = {**report, "run": {"environment": run["environment"], "file": run["file"]}}
    return {**ordered[-1], "stages": merged} if merged else {}


def shows_something(stage: Stage, result: Any) -> bool:
    """Whether a stage's table would have a line."""
    try:
        return bool(result and stage.table(result)[1])
    except KeyError:  # it ended before there was anything
        return False


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
    return f"{markdown_table(table)}\n\n{origin(results['gpu']['stages']['ops']['run'])}"


def predictions(results: Results) -> str:
    """The least time that a GPU of :data:`PREDICTED_BYTES_PER_SECOND` needs, and what one took."""
    stage = results.get("gpu", {}).get("stages", {}).get("ops", {}).get("result") or {"records": []}
    timed = [r for r in first_dtypes(stage["records"]) if r.get("modes", {}).get("plain")]
    measured = {(r["op"], r["case"]): r["modes"].get("graph") or r["modes"]["plain"] for r in timed}
    cpu = telling(results["cpu"]["heaps"]["default"]) if "cpu" in results else []
    sizes = {(r["op"], r["case"]): r["bytes"] for r in (*cpu, *telling(timed)) if "bytes" in r}
    lines: list[list[Cell]] = []
    for (op, case), size in sorted(sizes.items()):
        expected = 1e6 * max(size / PREDICTED_BYTES_PER_SECOND, LAUNCH_SECONDS)
        figures = measured.get((op, case))
        found: list[Cell] = ["not measured", ""]
        if figures:
            found = [figures["us"], f"{100 * figures['share_of_copy']:.0f} %"]
        lines.append([op, case, size / 1e6, round(expected, 1), *found])
    return markdown_table((("op", "case", "MB", "predicted us", "measured us", "of clone"), lines))


def kernels(results: Results) -> str:
    """Registers, stack and widths on one architecture; the file has all."""
    if not kernel_table.TABLE.exists():
        return "*Not compiled yet.*"
    kept = json.loads(kernel_table.TABLE.read_text(encoding="utf-8"))
    shown = {name: {arch: p for arch, p in by.items() if arch == ARCHITECTURE} for name, by in kept["kernels"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in kept["versions"].items())
    return f"{kernel_table.markdown({'kernels': shown})}\n{versions}; `tools/{kernel_table.TABLE.name}`"


def gpu_defenses(results: Results) -> str:
    """A table a stage that defends networks."""
    return _gpu_stages(results, lambda table: AFTER in table[0])


def gpu_throughput(results: Results) -> str:
    """A table a stage that only times something."""
    return _gpu_stages(results, lambda table: AFTER not in table[0])


def _gpu_stages(results: Results, wanted: Callable[[Table], bool]) -> str:
    """Tables with their titles; where they come from once after all those of one run."""
    known, parts = stages(), []
    for name, report in results.get("gpu", {}).get("stages", {}).items():
        table = known[name].table(report["result"]) if name not in (*CHECKS, *LAST) else None
        if table is not None and wanted(table):
            text = f"*{known[name].title}*{_unfinished(report)}\n\n{markdown_table(table)}"
            parts.append((text, origin(report["run"])))
    runs = itertools.groupby(parts, key=lambda part: part[1])
    return "\n\n".join("\n\n".join([*(text for text, _ in group), run]) for run, group in runs) or NOT_MEASURED


def cifar10(results: Results) -> str:
    """A line a defense of the GPU check; its victim's rates before, and its own."""
    measured = results.get("gpu", {}).get("stages", {})
    lines: list[list[Cell]] = []
    origins: list[str] = []
    for stage, names in DEFENSES.items():
        records = (measured.get(stage, {}).get("result") or {}).get("records", [])
        for record in (r for r in records if r["defense"] in names):
            before, after = (f"{record[when]['acc']:.1f} / {record[when]['asr']:.1f}" for when in ("before", "after"))
            lines.append([names[record["defense"]], before, after, record["seconds"]])
            origins.append(origin(measured[stage]["run"]))
    if not lines:
        return NOT_MEASURED
    table = markdown_table((("defense", "ACC / ASR before", "after", "seconds"), lines))
    return "\n\n".join([table, *dict.fromkeys(origins)])


def _unfinished(report: dict[str, Any]) -> str:
    return "" if report["status"] == "passed" else f" ({report['status']}: what there was by then)"


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


def backdoorbench(results: Results) -> str:
    """A line a part, and every run that they come from."""
    if "backdoorbench_parts" not in results:
        return NOT_MEASURED
    result = results["backdoorbench_parts"]
    said = "; ".join([machine(result), f"`benchmarks/results/{result['file']}`", *part.runs(result["records"])])
    return f"{markdown_table(part.published(result['records']))}\n\n{said}"


def scores(results: Results) -> str:
    """AdvrBD's scores: the engine beside two loops, a line a variant."""
    if "score_advrbd" not in results:
        return NOT_MEASURED
    result = results["score_advrbd"]
    what = f"{result['about']}; {result['samples']} samples, medians of {result['slices']} slices"
    return f"{markdown_table(score_advrbd.table(result))}\n\n{what}; {origin(result)}"


def cpu_convolutions(results: Results) -> str:
    """A line a layer and pass, and a line a network."""
    if "convolutions" not in results:
        return NOT_MEASURED
    result = results["convolutions"]
    layers = markdown_table(convolutions.layer_table(result["layers"]))
    networks = markdown_table(convolutions.network_table(result["networks"]))
    return f"{layers}\n\n{networks}\n\nBatches of {result['images']} images; {origin(result)}"


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


def origin(result: dict[str, Any]) -> str:
    """Where a table comes from, in one line."""
    facts = result["environment"]
    date = facts["date"][:10]
    return (
        f"{machine(result)}; commit {facts['commit']}, {date}; `{facts['command']}`; "
        f"`benchmarks/results/{result['file']}`"
    )


def machine(result: dict[str, Any]) -> str:
    """What a result was measured on, and with which torch."""
    facts = result["environment"]
    gpu, processor = facts["gpu"], facts["machine"]
    where = f"{gpu['name']}, driver {gpu['driver']}" if gpu else f"{processor['cpu']}, {processor['threads']} threads"
    return f"{where}; torch {facts['versions']['torch']}"


ARCHITECTURE = "90"
PREDICTED_BYTES_PER_SECOND = 0.85 * 4.8e12  # an H200's memory, and the share of it that a copy usually reaches
LAUNCH_SECONDS = 2e-6  # of a kernel in a replayed graph
FILES = ("README.md", "benchmarks/README.md", "benchmarks/NOTES.md")
NOT_MEASURED = "*Not measured yet.*"
AFTER = "ACC'"  # the column of a table with rates of defended networks
DEFENSES = {  # stage of the GPU check -> a record's name there -> what the README calls it
    "d3": {"d3": "D3", "ft": "fine-tuning"},
    "pad_ft": {"paper": "PAD-FT, `paper`", "robust": "PAD-FT, `robust`"},
    "gic": {"ft-sam, calibrated": "FT-SAM on GIC's images", "d3, calibrated": "D3 on GIC's images"},
}

TABLES: dict[str, Callable[[Results], str]] = {
    "demo": demo,
    "digits": digits,
    "cifar10": cifar10,
    "cpu-ops": cpu_ops,
    "gpu-ops": gpu_ops,
    "gpu-defenses": gpu_defenses,
    "gpu-throughput": gpu_throughput,
    "backdoorbench": backdoorbench,
    "kernels": kernels,
    "predictions": predictions,
    "score-advrbd": scores,
    "cpu-convolutions": cpu_convolutions,
}


if __name__ == "__main__":
    sys.exit(main())
