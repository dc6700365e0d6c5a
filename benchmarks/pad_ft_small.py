# ruff: noqa: E402  (the path comes first)
"""PAD-FT on small data, on the CPU: what each departure from the paper brings, over attacks and seeds.

    python benchmarks/pad_ft_small.py                        benchmarks/results/pad_ft_digits.{json,md}
    python benchmarks/pad_ft_small.py --data FILE            pad_ft_cifar10_subset: 4,000 images of CIFAR-10
    python benchmarks/pad_ft_small.py --budget-minutes 10    stops in time; the same command goes on from there

Small networks on few images: what it shows are trends, not the figures of papers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import Tensor, nn

import bdfast
from bdfast.attacks import PoisonedData
from bdfast.data import DataSplits
from bdfast.defenses import PadFTConfig, pad_ft
from bdfast.runtime.resident import Augment
from bdfast.testing.tables import Table, markdown_table, text_table
from bdfast.training import TrainConfig, train_classifier
from benchmarks import environment
from benchmarks.scenario import Scenario, Victim, percent
from benchmarks.small_resnet import small_resnet

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Study:
    """Data, a network, attacks that it learns, and PAD-FT's options there.

    Attributes:
        name: of the result file.
        load: the data.
        architecture, training: of the victims; ``training(seed)``.
        attacks: name -> (attack, poison rate, its options).
        config: from fields to the config.
    """

    name: str
    load: Callable[[], DataSplits]
    build: Callable[[int], nn.Module]
    training: Callable[[int], TrainConfig]
    attacks: Mapping[str, tuple[str, float, Mapping[str, Any]]]
    config: Callable[..., PadFTConfig]


DIGITS = Study(
    "digits",
    lambda: bdfast.data.load("digits", seed=0),
    lambda seed: bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=seed),
    lambda seed: TrainConfig.for_digits(seed=seed),
    {
        "badnets": ("badnets", 0.1, {}),
        "blended": ("blended", 0.05, {}),
        "none": ("badnets", 0.0, {}),
        "wanet": ("wanet", 0.1, {}),
        "badnets-3": ("badnets", 0.03, {}),
    },
    PadFTConfig.for_digits,
)


def cifar10_subset(path: str) -> Study:
    """4,000 training images, with triggers that so few images teach."""
    return Study(
        "cifar10_subset",
        lambda: bdfast.data.load(path, limit=(4000, 2000)),
        small_resnet,
        lambda seed: TrainConfig(epochs=12, lr=0.1, augment=Augment(2, flip=False), seed=seed),
        {
            "badnets": ("badnets", 0.1, {"size": 6}),
            "blended": ("blended", 0.1, {"alpha": 0.35}),
            "wanet": ("wanet", 0.1, {}),
            "sig": ("sig", 0.1, {}),
        },
        subset_config,
    )


def subset_config(**changes: Any) -> PadFTConfig:
    """The paper's sites are found by names that this network does not have: those are its counterparts."""
    stages = {"sites": ["model.2", "model.3.relu2", "model.4.relu2"]} if changes.get("preset") == "paper" else {}
    return PadFTConfig.for_cifar10(**{"k": 100, **stages, **changes})


SEEDS = (0, 1)
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


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/pad_ft_small.py", *argv]
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    ends = time.monotonic() + 60 * arguments.budget_minutes
    study = DIGITS if arguments.data is None else cifar10_subset(arguments.data)
    path: Path = arguments.output or environment.RESULTS / f"pad_ft_{study.name}.json"
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    head = {"kind": f"pad_ft_{study.name}", "environment": environment.facts(CPU, command)}
    complete = True
    for (attack, seed), missing in todo(
        arguments.attacks or list(study.attacks), arguments.seeds, arguments.variants, records
    ):
        victim = None
        for variant in missing:
            if time.monotonic() >= ends:
                complete = False
                break
            victim = victim or make(study, attack, seed)
            records.append(judge(study, victim, attack, variant))
            write(study, path, {**head, "complete": False, "records": records})
    write(study, path, {**head, "complete": complete, "records": records})
    print(text_table(table(study, records)))
    print(f"\nwrote {path}" + ("" if complete else "; the time is over: the same command goes on from there"))
    return 0 if complete else 1


def todo(
    attacks: list[str], seeds: list[int], variants: list[str], records: list[dict[str, Any]]
) -> Iterator[tuple[tuple[str, int], list[str]]]:
    """For every victim (attack, seed) the variants that have no record yet.

    Example:
        >>> list(todo(["badnets"], [0], ["paper", "robust"], [{"attack": "badnets", "seed": 0, "variant": "paper"}]))
        [(('badnets', 0), ['robust'])]
    """
    done = {(record["attack"], record["seed"], record["variant"]) for record in records}
    for attack, seed in itertools.product(attacks, seeds):
        yield (attack, seed), [variant for variant in variants if (attack, seed, variant) not in done]


def make(study: Study, attack: str, seed: int) -> Victim:
    """A network trained on the poisoned set; "none" is trained on the clean one."""
    name, rate, options = study.attacks[attack]
    data, training = study.load(), study.training(seed)
    case = Scenario(data, study.name, "", name, rate, training, seed, options)
    poisoned = bdfast.attacks.poison(*data.train, name, **{"rate": rate or 0.1, "seed": seed, **options})
    if rate == 0:
        poisoned = _without_poison(poisoned, data.train)
    model = study.build(seed)
    train_classifier(model, poisoned, training)
    before = bdfast.metrics.evaluate(model, data.test, poisoned.trigger(*data.test))
    return Victim(case, model, poisoned, before, 0.0)


def _without_poison(poisoned: PoisonedData, train: tuple[Tensor, Tensor]) -> PoisonedData:
    """The clean training set, with a trigger to test with."""
    return replace(poisoned, images=train[0], labels=train[1], is_poisoned=torch.zeros_like(poisoned.is_poisoned))


def judge(study: Study, victim: Victim, attack: str, variant: str) -> dict[str, Any]:
    """One variant: what step 1 chose, and the rates after steps 2 (PAD) and 3 (PAD-FT)."""
    options = dict(VARIANTS[variant])
    oracle = _true_clean(victim.poisoned, victim.scenario.seed) if options.pop("oracle", False) else None
    config = study.config(seed=victim.scenario.seed, **options)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # clipping that loses accuracy: in the table
        result = pad_ft(victim.model, victim.poisoned, config, trusted=oracle)
    seconds = time.perf_counter() - began
    assert result.purity is not None
    truth = victim.poisoned.is_poisoned[result.suspects]
    return {
        "attack": attack,
        "rate": study.attacks[attack][1],
        "seed": victim.scenario.seed,
        "variant": variant,
        "config": VARIANTS[variant],
        "selected": len(result.selected),
        "target_purity": _percent(result.purity["0"]),
        "total_purity": _percent(result.purity["total"]),
        "suspects": len(result.suspects),
        "suspects_poisoned": _percent(float(truth.float().mean())) if len(truth) else None,
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


def _percent(share: float) -> float | None:
    return None if share != share else round(100 * share, 1)


def table(study: Study, records: list[dict[str, Any]]) -> Table:
    """ACC/ASR in percent before, after PAD and after PAD-FT, and how clean step 1 was."""
    header = ("attack", "seed", "variant", "target purity", "suspects", "poisoned", "before", "PAD", "PAD-FT", "s")
    ordered = sorted(
        records, key=lambda r: (list(study.attacks).index(r["attack"]), r["seed"], list(VARIANTS).index(r["variant"]))
    )
    rows = [
        (
            f"{r['attack']} {100 * r['rate']:g} %", r["seed"], r["variant"], r["target_purity"], r["suspects"],
            r["suspects_poisoned"], *(f"{r[w]['acc']:.1f}/{r[w]['asr']:.1f}" for w in ("before", "pad", "pad_ft")),
            r["seconds"],
        )
        for r in ordered
    ]  # fmt: skip
    return header, rows


def write(study: Study, path: Path, result: dict[str, Any]) -> None:
    """JSON, and the same as a Markdown table beside it."""
    environment.write(path, result)
    facts = result["environment"]
    text = (
        f"# PAD-FT on {study.name.replace('_', ' ')}\n\n{__doc__.splitlines()[0]}\n\n"  # type: ignore[union-attr]
        f"    {facts['command']}\n\n"
        f"{facts['date'][:10]}, commit {facts['commit']}, torch {facts['versions']['torch']}, "
        f"{facts['machine']['cpu']}.\n"
        "ACC/ASR in percent (ASR without images of the target class, 0); purity: clean share of the samples\n"
        "selected in the target class; poisoned: share of the suspects that are.\n"
        "Variants are fields of the config:\n\n"
        + "".join(f"- {name}: `{options}`\n" for name, options in VARIANTS.items())
        + f"\n{markdown_table(table(study, result['records']))}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="CIFAR-10, of which a part is taken (digits)")
    parser.add_argument("--attacks", nargs="+", help="of the data's (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="begin nothing further after this (60)")
    parser.add_argument("--output", type=Path, help="the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
