# ruff: noqa: E402  (the path comes first)
"""AdvrBD on scikit-learn's digits, on the CPU: both presets and the ranks to compare with, over attacks and seeds.

    python benchmarks/advrbd_digits.py                        benchmarks/results/advrbd_digits.{json,md}
    python benchmarks/advrbd_digits.py --budget-minutes 10    stops in time; the same command goes on from there

A small network on 8x8 images: what it shows are trends, not the figures of papers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import nn

import bdfast
from bdfast.attacks import PoisonedData
from bdfast.data import DataSplits
from bdfast.defenses import AdvrBDConfig, advrbd
from bdfast.metrics import evaluate
from bdfast.testing.tables import Table, markdown_table, text_table
from bdfast.training import TrainConfig, train_classifier
from benchmarks import environment
from benchmarks.scenario import percent

CPU = torch.device("cpu")
ATTACKS: dict[str, tuple[str, float, int]] = {
    "badnets": ("badnets", 0.1, 0),
    "blended": ("blended", 0.05, 0),
    "wanet": ("wanet", 0.1, 0),
    "tact": ("tact", 0.05, 0),
    "none": ("badnets", 0.0, 0),
    "wanet, target 3": ("wanet", 0.1, 3),
}
"""Name, rate and target class."""

SEEDS = (0, 1)
VARIANTS: dict[str, dict[str, Any]] = {
    "undefended": {},
    "robust": {"preset": "robust"},
    "paper": {"preset": "paper"},
    "oracle": {"preset": "robust", "rank": "oracle", "content_check": False, "recover": False},
    "confidence": {"preset": "paper", "rank": "confidence"},
    "robust, last": {"preset": "robust", "vote": "last"},
    "robust, no check": {"preset": "robust", "content_check": False},
    "robust, no recovery": {"preset": "robust", "recover": False},
}
"""Fields of :meth:`AdvrBDConfig.for_digits`."""


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/advrbd_digits.py", *argv]
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(arguments.threads)
    ends = time.monotonic() + 60 * arguments.budget_minutes
    path: Path = arguments.output
    records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["records"] if path.exists() else []
    head = {"kind": "advrbd_digits", "environment": environment.facts(CPU, command)}
    done = {(record["attack"], record["seed"], record["variant"]) for record in records}
    wanted = itertools.product(arguments.variants, arguments.attacks, arguments.seeds)
    missing = [(attack, seed, variant) for variant, attack, seed in wanted if (attack, seed, variant) not in done]
    while missing and time.monotonic() < ends:
        records.append(judge(*missing.pop(0)))
        write(path, {**head, "complete": not missing, "records": records})
    write(path, {**head, "complete": not missing, "records": records})
    print(text_table(table(records)))
    print(f"\nwrote {path}" + ("; the time is over: the same command goes on from there" if missing else ""))
    return 1 if missing else 0


def poisoned_digits(attack: str, seed: int) -> tuple[DataSplits, PoisonedData]:
    """The data, and the poisoned training set with its trigger; "none" has a trigger to test with alone."""
    name, rate, target = ATTACKS[attack]
    data = bdfast.data.load("digits", seed=0)
    poisoned = bdfast.attacks.poison(*data.train, name, rate=rate or 0.1, target=target, seed=seed)
    if rate == 0:
        images, labels = data.train
        poisoned = replace(poisoned, images=images, labels=labels, is_poisoned=torch.zeros(len(labels)).bool())
    return data, poisoned


def network() -> nn.Module:
    """A new network, of the generator's weights."""
    return bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)


def judge(attack: str, seed: int, variant: str) -> dict[str, Any]:
    """One variant: how good its split is, and the rates of the network that it trains."""
    data, poisoned = poisoned_digits(attack, seed)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    if variant == "undefended":
        model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=seed)
        train_classifier(model, poisoned, TrainConfig.for_digits(seed=seed))
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes without a sample: in the table
            result = advrbd(network, poisoned, AdvrBDConfig.for_digits(seed=seed, **VARIANTS[variant]))
        model, quality = result.model, dict(result.quality or {})
        retention = quality.pop("retention")
        target = str(poisoned.relabel.target)
        found = {
            **quality, "retention": retention, "retention_target": retention[target],
            "retention_min": min(retention.values()), "rounds": result.rounds,
        }  # fmt: skip
    seconds = time.perf_counter() - began
    metrics = evaluate(model, data.test, poisoned.trigger(*data.test))
    return {
        "attack": attack, "seed": seed, "variant": variant, "config": VARIANTS[variant],
        "after": percent(metrics), **found, "seconds": round(seconds, 1),
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> Table:
    """Quality of the split and ACC/ASR, in percent."""
    header = (
        "attack", "seed", "variant", "ACC/ASR", "TPR", "TPR relabelled", "FPR", "leaked", "kept of target",
        "kept of worst", "purity by round", "AUROC",
    )  # fmt: skip
    order = {name: place for place, name in enumerate((*ATTACKS, *VARIANTS))}
    rows = []
    for r in sorted(records, key=lambda r: (order[r["attack"]], r["seed"], order[r["variant"]])):
        names = ("tpr", "tpr_relabelled", "fpr", "leaked", "retention_target", "retention_min")
        cells = [r["leaked"] if n == "leaked" and n in r else _percent(r.get(n)) for n in names]
        rounds = r.get("rounds", [])
        purity = "/".join(str(_percent(record["purity"])) for record in rounds) or "-"
        rows.append(
            (
                r["attack"], r["seed"], r["variant"], f"{r['after']['acc']:.1f}/{r['after']['asr']:.1f}", *cells,
                purity, None if not rounds or rounds[0]["auroc"] is None else round(rounds[0]["auroc"], 2),
            )
        )  # fmt: skip
    return header, rows


def _percent(share: float | None) -> float | None:
    return None if share is None or share != share else round(100 * share, 1)


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON, and the same as a Markdown table beside it."""
    result = {**result, "records": [_finite(record) for record in result["records"]]}
    environment.write(path, result)
    facts = result["environment"]
    text = (
        f"# AdvrBD on digits\n\n{__doc__.splitlines()[0]}\n\n"  # type: ignore[union-attr]
        f"    {facts['command']}\n\n"
        f"{facts['date'][:10]}, commit {facts['commit']}, torch {facts['versions']['torch']}, "
        f"{facts['machine']['cpu']}.\n"
        "ACC/ASR in percent, of the network trained on D_clean (ASR without images of the target class; TaCT: of the\n"
        "source class). TPR/FPR: poisoned/clean samples held to be poisoned; relabelled: of poison whose label is\n"
        "wrong; leaked: poisoned samples in D_clean; kept: clean samples in D_clean, of the target class and of the\n"
        "class that loses most; purity: of what each round adds to D_c; AUROC: of the first scores.\n"
        "Variants are fields of `AdvrBDConfig.for_digits`:\n\n"
        + "".join(f"- {name}: `{options}`\n" for name, options in VARIANTS.items())
        + f"\n{markdown_table(table(result['records']))}\n"
    )
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def _finite(value: Any) -> Any:
    """``value`` with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), default=list(ATTACKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="begin nothing further after this (60)")
    parser.add_argument("--output", type=Path, default=environment.RESULTS / "advrbd_digits.json")
    return parser


if __name__ == "__main__":
    sys.exit(main())
