"""A study of one defense on small data, on the CPU: variants over attacks and seeds, cell by cell.

Shared by the scripts that make one: the data sets with a network that learns them, what is poisoned, and a result file
(JSON, and the same as a Markdown table beside it) that the next call goes on from.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bdfast
from bdfast.attacks import PoisonedData
from bdfast.data import DataSplits
from bdfast.runtime.resident import Augment
from bdfast.testing.tables import Table, markdown_table, text_table
from bdfast.training import TrainConfig
from benchmarks import environment
from benchmarks.small_resnet import small_resnet

Record = dict[str, Any]
Cell = tuple[str, int, str]
"""Attack, seed, variant."""

SEEDS = (0, 1)


@dataclass(frozen=True)
class SmallData:
    """A data set of a few thousand images, and a network that learns it.

    Attributes:
        name: in result files.
        load: the data.
        build: the network, with initial weights of a seed, or of the global generator.
        training: of a victim; ``training(seed)``.
    """

    name: str
    load: Callable[[], DataSplits]
    build: Callable[[int | None], nn.Module]
    training: Callable[[int], TrainConfig]


DIGITS = SmallData(
    "digits",
    lambda: bdfast.data.load("digits", seed=0),
    lambda seed: bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=seed),
    lambda seed: TrainConfig.for_digits(seed=seed),
)


SUBSET = 4000
"""Training images of CIFAR-10 that a study takes where it is not told how many."""


def cifar10_subset(path: str, images: int = SUBSET) -> SmallData:
    """So many training and 2,000 test images of CIFAR-10; the name of another number than usual says how many."""
    return SmallData(
        "cifar10_subset" if images == SUBSET else f"cifar10_subset_{images}",
        lambda: bdfast.data.load(path, limit=(images, 2000)),
        small_resnet,
        lambda seed: TrainConfig(epochs=12, lr=0.1, augment=Augment(2, flip=False), seed=seed),
    )


@dataclass(frozen=True, eq=False)
class Study:
    """One defense on one data set.

    Attributes:
        defense: its name in result files.
        title: of the table.
        data: what is poisoned.
        attacks: name -> (attack, poison rate, its options); those of rate 0 leave the set clean.
        variants: name -> what sets it apart.
        config: from fields to the defense's config.
        notes: what the columns are, for the head of the table.
        judge: measures a cell.
        table: of records in the order of cells.
        cells: all combinations, in the order that they are measured in.
    """

    defense: str
    title: str
    data: SmallData
    attacks: Mapping[str, tuple[str, float, Mapping[str, Any]]]
    variants: Mapping[str, Mapping[str, Any]]
    config: Callable[..., Any]
    notes: str
    judge: Callable[[Study, Cell], Record]
    table: Callable[[list[Record]], Table]
    cells: Callable[[list[str], list[int], list[str]], Iterable[Cell]]

    @property
    def name(self) -> str:
        """Kind of the result, and the name of its file."""
        return f"{self.defense}_{self.data.name}"

    def poisoned(self, attack: str, seed: int) -> tuple[DataSplits, PoisonedData]:
        """The data, and the training set as poisoned; of rate 0 it is clean, with a trigger to test with."""
        name, rate, options = self.attacks[attack]
        data = self.data.load()
        poisoned = bdfast.attacks.poison(*data.train, name, **{"rate": rate or 0.1, "seed": seed, **options})
        return data, poisoned if rate else without_poison(poisoned, data)

    def run(self, options: argparse.Namespace, command: list[str]) -> int:
        """Measure what is not in the result file yet; 0 when all that was asked for is there, 1 when time ran out."""
        attacks = options.attacks or list(self.attacks)
        if unknown := set(attacks) - set(self.attacks):
            raise SystemExit(f"--attacks: expected some of {', '.join(self.attacks)}, got {', '.join(sorted(unknown))}")
        torch.set_num_threads(options.threads)
        ends = time.monotonic() + 60 * options.budget_minutes
        path: Path = options.output or environment.RESULTS / f"{self.name}.json"
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        records: list[Record] = known.get("records", [])
        facts = environment.facts(torch.device("cpu"), command)
        earlier = known.get("commands", [known["environment"]["command"]] if known else [])
        head = {"kind": self.name, "environment": facts, "commands": list(dict.fromkeys([*earlier, facts["command"]]))}
        asked = self.cells(attacks, options.seeds, options.variants)
        missing = remaining(asked, records)
        while missing and time.monotonic() < ends:
            records.append({**finite(self.judge(self, missing.pop(0))), "commit": facts["commit"]})
            self.write(path, {**head, "complete": not missing, "records": records})
        self.write(path, {**head, "complete": not missing, "records": records})
        print(text_table(self.table(self.ordered(records))))
        print(f"\nwrote {path}" + ("; the time is over: the same command goes on from there" if missing else ""))
        return 1 if missing else 0

    def ordered(self, records: list[Record]) -> list[Record]:
        """By attack, seed and variant, as they are listed."""
        attacks, variants = list(self.attacks), list(self.variants)
        return sorted(records, key=lambda r: (attacks.index(r["attack"]), r["seed"], variants.index(r["variant"])))

    def write(self, path: Path, result: dict[str, Any]) -> None:
        """JSON, and the same as a Markdown table beside it."""
        environment.write(path, result)
        path.with_suffix(".md").write_text(self.markdown(result), encoding="utf-8")

    def markdown(self, result: dict[str, Any]) -> str:
        """Where it comes from, what the columns are, the table."""
        facts = result["environment"]
        commands = "".join(f"    {command}\n" for command in result["commands"])
        commits = ", ".join(dict.fromkeys(record.get("commit", facts["commit"]) for record in result["records"]))
        partial = "" if result["complete"] else "**Partial**: some of the cells asked for are not measured yet.\n\n"
        attacks = "".join(
            f"- {name}: {attack} {100 * rate:g} %{', ' if options else ''}{_listed(options)}\n" if rate else
            f"- {name}: no poison, tested with the trigger of {attack}\n"
            for name, (attack, rate, options) in self.attacks.items()
        )  # fmt: skip
        variants = "".join(f"- {name}: `{_listed(options)}`\n" for name, options in self.variants.items() if options)
        return (
            f"# {self.title}\n\n{commands}\n{facts['date'][:10]}, commit {commits}, "
            f"torch {facts['versions']['torch']}, {facts['machine']['cpu']}.\n\n{partial}"
            f"{self.notes}\n\nAttacks:\n\n{attacks}\nVariants, fields of the config:\n\n{variants}\n"
            f"{markdown_table(self.table(self.ordered(result['records'])))}\n"
        )


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_brief(value)}" for name, value in options.items())


def _brief(value: Any) -> str:
    return f"[{', '.join(map(str, value.shape))}]" if isinstance(value, torch.Tensor) else repr(value)


def remaining(cells: Iterable[Cell], records: Iterable[Record]) -> list[Cell]:
    """Cells without a record.

    Example:
        >>> remaining([("sig", 0, "a"), ("sig", 1, "a")], [{"attack": "sig", "seed": 0, "variant": "a"}])
        [('sig', 1, 'a')]
    """
    done = {(record["attack"], record["seed"], record["variant"]) for record in records}
    return [cell for cell in cells if cell not in done]


def without_poison(poisoned: PoisonedData, data: DataSplits) -> PoisonedData:
    """The clean training set in place of the poisoned one."""
    images, labels = data.train
    nothing = torch.zeros(len(labels), dtype=torch.bool)
    return replace(poisoned, images=images, labels=labels, is_poisoned=nothing, is_cover=nothing)


def finite(value: Any) -> Any:
    """``value`` with None for NaN, which JSON does not know.

    Example:
        >>> finite({"rates": [0.5, float("nan")]})
        {'rates': [0.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def in_percent(share: float | None) -> float | None:
    """One digit after the point; None stays, and NaN becomes None.

    Example:
        >>> in_percent(0.12345), in_percent(float("nan"))
        (12.3, None)
    """
    return None if share is None or share != share else round(100 * share, 1)


def parser(doc: str | None, variants: Iterable[str]) -> argparse.ArgumentParser:
    """Options that every study has; ``doc`` is the script's."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(variants)
    made.add_argument("--data", metavar="FILE", help="CIFAR-10, of which a part is taken (digits)")
    made.add_argument("--images", type=int, default=SUBSET, help=f"training images of that part ({SUBSET})")
    made.add_argument("--attacks", nargs="+", help="of the data's (all)")
    made.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    made.add_argument("--variants", nargs="+", choices=names, default=names)
    made.add_argument("--threads", type=int, default=1, help="of torch (1)")
    made.add_argument("--budget-minutes", type=float, default=60.0, help="begin nothing further after this (60)")
    made.add_argument("--output", type=Path, help="the result file")
    return made
