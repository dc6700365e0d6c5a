# ruff: noqa: E402  (the path comes first)
"""The papers' tables, made again: their figures and ours side by side.

    python benchmarks/reproduce.py --table d3                       CIFAR-10 (BDFAST_DATA), the paper's network
    python benchmarks/reproduce.py --table pad-ft --data digits     small enough for a CPU
    python benchmarks/reproduce.py --table d3 --attacks badnets blended --seeds 0 1 2 --budget-minutes 9
    python benchmarks/reproduce.py --table gic --seeds 0 1 2        families of data: benchmarks/gic_families.py does it

Cells are ordered so that the most telling come first, and every one is written as soon as it is there: a run that ends,
by its budget or otherwise, goes on where it stopped. Results of several machines go into one table with --merge.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

import bdfast
from bdfast.runtime.precision import Precision
from bdfast.testing import tables as text
from bdfast.training import TrainConfig
from benchmarks import environment, gic_families, scenario
from benchmarks.reproduction.protocols import TABLES, Scale, Table
from benchmarks.scenario import Victim

Record = dict[str, Any]
GIC = "gic"
VICTIMS = ROOT / "build" / "victims"  # kept, so that a run which goes on need not train them again


@dataclass(frozen=True, order=True)
class Cell:
    """What is computed at once: one method on one victim."""

    rate: float
    attack: str
    seed: int
    method: str


def main(argv: list[str] | None = None) -> int:
    """Compute what is missing; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/reproduce.py", *argv]
    arguments = _parser().parse_args(argv)
    if arguments.table == GIC:
        return gic_families.main(gic_arguments(arguments))
    ends = time.monotonic() + 60 * arguments.budget_minutes
    table = TABLES[arguments.table]
    scale = make_scale(arguments)
    path: Path = arguments.output or environment.RESULTS / f"reproduce_{table.name}_{scale.name}.json"
    settings = {"victim_epochs": scale.victim.epochs, "epochs": arguments.epochs, "images": len(scale.data.train[1])}
    records = _read([path, *arguments.merge], settings)
    facts = environment.facts(scale.device, command)
    wanted = list(cells(table, arguments.attacks or table.attacks, arguments.seeds, arguments.rates or table.rates[:1]))

    def write(complete: bool) -> None:
        content = {"kind": "reproduce", "table": table.name, "data": scale.name, "complete": complete}
        environment.write(path, {**content, "settings": settings, "environment": facts, "records": records})
        path.with_suffix(".md").write_text(markdown(table, scale.name, settings, facts, records), encoding="utf-8")

    VICTIMS.mkdir(parents=True, exist_ok=True)
    for (rate, attack, seed), methods in list(todo(wanted, records)):
        if time.monotonic() >= ends:
            break
        victim = scenario.make_victim(table.scenario(scale, attack, rate, seed), scale.device, VICTIMS)
        for method in methods:
            if time.monotonic() >= ends:
                break
            records += compute(table, scale, victim, Cell(rate, attack, seed, method), facts)
            write(complete=False)
    complete = not list(todo(wanted, records))
    write(complete)
    print(text.text_table(side_by_side(table, records)))
    print(f"\nwrote {path}" + ("" if complete else "; the time is over: the same command goes on from there"))
    return 0 if complete else 1


def gic_arguments(arguments: argparse.Namespace) -> list[str]:
    """The same options for benchmarks/gic_families.py, whose table is of families and purifiers.

    Raises:
        SystemExit: several attacks or rates, or results to merge: its files hold one setting each.
    """
    attacks, rates = arguments.attacks or ["badnets"], arguments.rates or [0.1]
    if len(attacks) > 1 or len(rates) > 1 or arguments.merge:
        raise SystemExit(
            "reproduce: `--table gic` expected one attack, one rate and no --merge, got "
            f"{len(attacks)}, {len(rates)} and {len(arguments.merge)}; run it once for each, with another --output"
        )
    digits = arguments.data == "digits"
    if not digits:
        os.environ["BDFAST_DATA"] = arguments.data  # where "cifar10" is looked for
    found = {
        "data": "digits" if digits else "cifar10", "device": arguments.device, "attack": attacks[0], "rate": rates[0],
        "precision": "bf16" if arguments.device == "cuda" else "fp32", "budget-minutes": arguments.budget_minutes,
        "victim-epochs": arguments.victim_epochs, "epochs": arguments.epochs, "output": arguments.output,
        "ratio": None if digits else 0.05,
    }  # fmt: skip
    words = [word for name, value in found.items() if value is not None for word in (f"--{name}", str(value))]
    return [*words, "--seeds", *map(str, arguments.seeds)]


def make_scale(arguments: argparse.Namespace) -> Scale:
    """Data, device and epochs."""
    device = torch.device(arguments.device)
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    short = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    if arguments.data == "digits":
        victim = TrainConfig.for_digits(epochs=arguments.victim_epochs or 20)
        data = bdfast.data.load("digits")
        return Scale("digits", data, device, precision, "digits_cnn", victim, {"augment": "crop", **short})
    victim = TrainConfig(
        epochs=arguments.victim_epochs or scenario.VICTIM_EPOCHS, lr=0.1, schedule="one_cycle", precision=precision,
        channels_last=True,
    )  # fmt: skip
    return Scale("cifar10", bdfast.data.load(arguments.data), device, precision, None, victim, short)


def cells(table: Table, attacks: Sequence[str], seeds: Sequence[int], rates: Sequence[float]) -> Iterator[Cell]:
    """In the order in which they tell most: all attacks with one seed come before the next seed."""
    for rate, seed, attack, method in itertools.product(rates, seeds, attacks, table.methods):
        yield Cell(rate, attack, seed, method)


def todo(wanted: Iterable[Cell], records: Sequence[Record]) -> Iterator[tuple[tuple[float, str, int], list[str]]]:
    """Victims in order, with the methods that have no record yet.

    Example:
        >>> done = [{"rate": 0.1, "attack": "badnets", "seed": 0, "method": "ft"}]
        >>> list(todo([Cell(0.1, "badnets", 0, "ft"), Cell(0.1, "badnets", 0, "d3")], done))
        [((0.1, 'badnets', 0), ['d3'])]
    """
    done = {(r["rate"], r["attack"], r["seed"], r["method"]) for r in records}
    missing = [c for c in wanted if (c.rate, c.attack, c.seed, c.method) not in done]
    for victim, group in itertools.groupby(missing, lambda c: (c.rate, c.attack, c.seed)):
        yield victim, [cell.method for cell in group]


def compute(table: Table, scale: Scale, victim: Victim, cell: Cell, facts: Mapping[str, Any]) -> list[Record]:
    """The rows that one method makes; its time counts for each of them."""
    scenario.synchronize(scale.device)
    began = time.perf_counter()
    outcome = table.methods[cell.method](victim, scale)
    scenario.synchronize(scale.device)
    seconds = time.perf_counter() - began
    head = {"rate": cell.rate, "attack": cell.attack, "seed": cell.seed, "method": cell.method}
    where = {"commit": facts["commit"], "machine": (facts["gpu"] or facts["machine"]).get("name", "CPU")}
    return [
        {**head, "row": row, **scenario.record(victim, row, victim.evaluate(model), scale.reserve, seconds), **where}
        for row, model in outcome.items()
    ]


def side_by_side(table: Table, records: Sequence[Record]) -> text.Table:
    """A line a row of the table: the paper's ACC/ASR/DER, ours as mean and range over seeds."""
    header = ("poison", "attack", "method", "paper, CIFAR-10", "ours ACC", "ASR", "DER", "ASR range", "seeds", "s")
    lines: list[list[text.Cell]] = []
    for rate, attack in itertools.product(table.rates, table.attacks):
        here = [r for r in records if (r["rate"], r["attack"]) == (rate, attack)]
        if not here:
            continue
        lines.append(_line(table, rate, attack, "none", _victims(here)))
        for row in dict.fromkeys(r["row"] for r in here):
            lines.append(_line(table, rate, attack, row, [r for r in here if r["row"] == row]))
    return header, lines


def _victims(records: Sequence[Record]) -> list[Record]:
    by_seed = {r["seed"]: r for r in records}
    return [{**r, "after": r["before"], "der": None, "seconds": r["victim_seconds"]} for r in by_seed.values()]


def _line(table: Table, rate: float, attack: str, row: str, records: Sequence[Record]) -> list[text.Cell]:
    published = table.published.get(rate, {}).get(attack, {}).get(row)
    acc, asr = ([r["after"][name] for r in records] for name in ("acc", "asr"))
    der = [r["der"] for r in records if r["der"] is not None]
    return [
        f"{100 * rate:g} %", attack, row, "" if published is None else "/".join(f"{v:.2f}" for v in published),
        round(statistics.mean(acc), 2), round(statistics.mean(asr), 2), round(statistics.mean(der), 2) if der else None,
        f"{min(asr):.1f} to {max(asr):.1f}", len(records), round(statistics.median(r["seconds"] for r in records), 1),
    ]  # fmt: skip


def markdown(
    table: Table, data: str, settings: Mapping[str, Any], facts: Mapping[str, Any], records: Sequence[Record]
) -> str:
    """The table, and how it was made."""
    return (
        f"# {table.name} on {data}\n\n    {facts['command']}\n\n"
        f"{facts['date'][:10]}, torch {facts['versions']['torch']}; made on "
        f"{', '.join(sorted({r['machine'] for r in records})) or 'nothing yet'}. Percent; ASR without images of the "
        f"target class; DER against the victim of the same run; s: median seconds of the method.\n\n"
        f"What differs from the paper: {table.differs}; victims of {settings['victim_epochs']} epochs on "
        f"{settings['images']} images.\n\n{text.markdown_table(side_by_side(table, records))}\n"
    )


def _read(paths: Sequence[Path], settings: Mapping[str, Any]) -> list[Record]:
    """Records of all files, each cell once, the first file's first.

    Raises:
        SystemExit: a file of other settings.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for path in paths:
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise SystemExit(
                f"reproduce: `{path}` expected a result of {settings}, got {content['settings']}; pass --output"
            )
        for record in content["records"]:
            found.setdefault(tuple(record[k] for k in ("rate", "attack", "seed", "method", "row")), record)
    return list(found.values())


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", required=True, choices=[*TABLES, GIC])
    parser.add_argument("--attacks", nargs="+", help="those of the table")
    parser.add_argument("--rates", nargs="+", type=float, help="of poison (the table's first)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data", default=os.environ.get("BDFAST_DATA", "digits"), help="CIFAR-10, or digits")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--victim-epochs", type=int)
    parser.add_argument("--epochs", type=int, help="of the defenses, in place of the paper's")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="begin nothing further after this (60)")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="FILE", help="results of other runs")
    parser.add_argument("--output", type=Path, help="the result file (of gic: the folder)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
