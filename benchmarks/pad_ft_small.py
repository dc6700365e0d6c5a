# ruff: noqa: E402  (the path comes first)
"""PAD-FT on small data, on the CPU: what each departure from the paper brings, over attacks and seeds.

    python benchmarks/pad_ft_small.py                        benchmarks/results/pad_ft_digits.{json,md}
    python benchmarks/pad_ft_small.py --data FILE            pad_ft_cifar10_subset: 4,000 images of CIFAR-10
    python benchmarks/pad_ft_small.py --budget-minutes 10    stops in time; the same command goes on from there

Small networks on few images: what it shows are trends, not the figures of papers.
"""

from __future__ import annotations

import functools
import itertools
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor

import bdfast
from bdfast.attacks import PoisonedData
from bdfast.defenses import PadFTConfig, pad_ft
from bdfast.testing.tables import Table
from bdfast.training import train_classifier
from benchmarks import study
from benchmarks.scenario import Scenario, Victim, percent
from benchmarks.study import Cell, Record, Study, in_percent

DIGITS_ATTACKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "badnets": ("badnets", 0.1, {}),
    "blended": ("blended", 0.05, {}),
    "none": ("badnets", 0.0, {}),
    "wanet": ("wanet", 0.1, {}),
    "badnets-3": ("badnets", 0.03, {}),
}
CIFAR10_ATTACKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "badnets": ("badnets", 0.1, {"size": 6}),
    "blended": ("blended", 0.1, {"alpha": 0.35}),
    "wanet": ("wanet", 0.1, {"s": 6.0, "cover_rate": 0.05}),
    "sig": ("sig", 0.1, {}),
    "none": ("badnets", 0.0, {"size": 6}),
}
"""Name -> attack, rate, options; on CIFAR-10 triggers larger than usual, since so few images teach no small one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"preset": "paper"},
    "paper, k 30": {"preset": "paper", "k": 30, "clip_batch_size": 200},
    "paper, trim 0.5": {"preset": "paper", "trim": 0.5, "k": 30},
    "paper, true clean": {"preset": "paper", "oracle": True},
    "paper + split": {"preset": "paper", "split": "spread"},
    "robust without suspects": {"preset": "robust", "suspect_weight": 0},
    "robust without suspects, true clean": {"preset": "robust", "suspect_weight": 0, "oracle": True},
    "robust, step 3 alone": {"preset": "robust", "clip_epochs": 0},
    "robust, gamma 1": {"preset": "robust", "suspect_weight": 1},
    "robust, gamma 5": {"preset": "robust", "suspect_weight": 5},
    "robust, lam 0.02, factor 1.2": {"preset": "robust", "lam": 0.02, "lam_factor": 1.2},
    "robust": {"preset": "robust"},
}
"""Fields of :meth:`PadFTConfig.for_digits`; ``oracle``: 100 truly clean samples a class in place of step 1."""


NOTES = """ACC/ASR in percent (ASR without images of the target class, 0); purity: clean share of the samples
selected in the target class; poisoned: share of the suspects that are."""


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/pad_ft_small.py", *argv]
    options = study.parser(__doc__, VARIANTS).parse_args(argv)
    return made(options.data, options.images).run(options, command)


def made(path: str | None, images: int = study.SUBSET) -> Study:
    """The study of digits, or of CIFAR-10 where a file is given."""
    data = study.DIGITS if path is None else study.cifar10_subset(path, images)
    attacks = DIGITS_ATTACKS if path is None else CIFAR10_ATTACKS
    config = PadFTConfig.for_digits if path is None else subset_config
    title = f"PAD-FT on {data.name.replace('_', ' ')}"
    return Study("pad_ft", title, data, attacks, VARIANTS, config, NOTES, judge, table, cells)


def cells(attacks: list[str], seeds: list[int], variants: list[str]) -> Iterator[Cell]:
    """All variants of a victim, then the next one.

    Example:
        >>> list(cells(["badnets", "sig"], [0], ["paper", "robust"]))[1:3]
        [('badnets', 0, 'robust'), ('sig', 0, 'paper')]
    """
    return itertools.product(attacks, seeds, variants)


def subset_config(**changes: Any) -> PadFTConfig:
    """The paper's sites are found by names that this network does not have: those are its counterparts."""
    stages = {"sites": ["model.2", "model.3.relu2", "model.4.relu2"]} if changes.get("preset") == "paper" else {}
    return PadFTConfig.for_cifar10(**{"k": 100, **stages, **changes})


@functools.lru_cache(maxsize=1)
def make(of: Study, attack: str, seed: int) -> Victim:
    """A network trained on the poisoned set."""
    name, rate, options = of.attacks[attack]
    training = of.data.training(seed)
    data, poisoned = of.poisoned(attack, seed)
    case = Scenario(data, of.data.name, "", name, rate, training, seed, options)
    model = of.data.build(seed)
    train_classifier(model, poisoned, training)
    before = bdfast.metrics.evaluate(model, data.test, poisoned.trigger(*data.test))
    return Victim(case, model, poisoned, before, 0.0)


def judge(of: Study, cell: Cell) -> Record:
    """One variant: what step 1 chose, and the rates after steps 2 (PAD) and 3 (PAD-FT)."""
    attack, seed, variant = cell
    victim = make(of, attack, seed)
    options = dict(VARIANTS[variant])
    oracle = _true_clean(victim.poisoned, seed) if options.pop("oracle", False) else None
    config = of.config(seed=seed, **options)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clipping that loses accuracy: in the table
        result = pad_ft(victim.model, victim.poisoned, config, trusted=oracle)
    seconds = time.perf_counter() - began
    assert result.purity is not None
    truth = victim.poisoned.is_poisoned[result.suspects]
    return {
        "attack": attack,
        "rate": of.attacks[attack][1],
        "seed": seed,
        "variant": variant,
        "config": VARIANTS[variant],
        "selected": len(result.selected),
        "target_purity": in_percent(result.purity["0"]),
        "total_purity": in_percent(result.purity["total"]),
        "suspects": len(result.suspects),
        "suspects_poisoned": in_percent(float(truth.float().mean())) if len(truth) else None,
        "split": result.split,
        "before": percent(victim.metrics),
        "pad": percent(victim.evaluate(result.pad_model())),
        "pad_ft": percent(victim.evaluate(result.model)),
        "seconds": round(seconds, 1),
    }


def _true_clean(poisoned: PoisonedData, seed: int) -> Tensor:
    """100 clean samples a class, drawn by the seed."""
    order = torch.randperm(len(poisoned.labels), generator=torch.Generator().manual_seed(seed))
    order = order[~poisoned.is_poisoned[order]]
    return torch.cat([order[poisoned.labels[order] == c][:100] for c in range(10)])


def table(records: list[Record]) -> Table:
    """ACC/ASR in percent before, after PAD and after PAD-FT, and how clean step 1 was."""
    header = ("attack", "seed", "variant", "target purity", "suspects", "poisoned", "before", "PAD", "PAD-FT", "s")
    rows = [
        (
            f"{r['attack']} {100 * r['rate']:g} %", r["seed"], r["variant"], r["target_purity"], r["suspects"],
            r["suspects_poisoned"], *(f"{r[w]['acc']:.1f}/{r[w]['asr']:.1f}" for w in ("before", "pad", "pad_ft")),
            r["seconds"],
        )
        for r in records
    ]  # fmt: skip
    return header, rows


if __name__ == "__main__":
    sys.exit(main())
