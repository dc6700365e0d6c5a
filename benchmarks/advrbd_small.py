# ruff: noqa: E402  (the path comes first)
"""AdvrBD on small data, on the CPU: both presets and the ranks to compare with, over attacks and seeds.

    python benchmarks/advrbd_small.py                        benchmarks/results/advrbd_digits.{json,md}
    python benchmarks/advrbd_small.py --data FILE            advrbd_cifar10_subset: 4,000 images of CIFAR-10
    python benchmarks/advrbd_small.py --data FILE --images 12000                  advrbd_cifar10_subset_12000
    python benchmarks/advrbd_small.py --budget-minutes 10    stops in time; the same command goes on from there

Small networks on few images: what it shows are trends, not the figures of papers.
"""

from __future__ import annotations

import functools
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
from torch import nn

from bdfast.attacks import PoisonedData
from bdfast.defenses import AdvrBDConfig, AdvrBDResult, advrbd
from bdfast.defenses.advrbd.quality import auroc
from bdfast.metrics import evaluate
from bdfast.runtime.resident import Augment
from bdfast.testing.tables import Table
from bdfast.training import train_classifier
from benchmarks import study
from benchmarks.scenario import percent
from benchmarks.study import Cell, Record, Study, in_percent

DIGITS_ATTACKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "badnets": ("badnets", 0.1, {}),
    "blended": ("blended", 0.05, {}),
    "wanet": ("wanet", 0.1, {}),
    "tact": ("tact", 0.05, {}),
    "none": ("badnets", 0.0, {}),
    "wanet, target 3": ("wanet", 0.1, {"target": 3}),
}
CIFAR10_ATTACKS: dict[str, tuple[str, float, dict[str, Any]]] = {
    "badnets": ("badnets", 0.1, {"size": 6}),
    "blended": ("blended", 0.1, {"alpha": 0.35}),
    "wanet": ("wanet", 0.1, {"s": 6.0, "cover_rate": 0.05}),
    "tact": ("tact", 0.05, {"pattern": torch.ones(6, 6)}),
    "none": ("badnets", 0.0, {"size": 6}),
}
"""Name -> attack, rate, options; on CIFAR-10 triggers larger than usual, since so few images teach no small one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "undefended": {},
    "undefended, clean data": {},
    "robust": {"preset": "robust"},
    "robust, with KL": {"preset": "robust", "content_with": "kl"},
    "paper": {"preset": "paper"},
    "oracle": {"preset": "robust", "rank": "oracle", "content_check": False, "vote": "majority", "looks": 0},
    "confidence": {"preset": "paper", "rank": "confidence"},
    "robust, majority": {"preset": "robust", "vote": "majority"},
    "robust, no check": {"preset": "robust", "content_check": False},
    "robust, no looks": {"preset": "robust", "vote": "majority", "looks": 0},
}
"""Fields of :meth:`AdvrBDConfig.for_digits`."""


NOTES = """ACC/ASR in percent, of the network trained on D_clean (ASR without images of the target class; TaCT: of the
source class). TPR/FPR: poisoned/clean samples held to be poisoned; relabelled: of poison whose label is
wrong; leaked: poisoned samples in D_clean; kept: clean samples in D_clean, of the target class and of the
class that loses most; purity: of what each round adds to D_c; AUROC: of the first scores; recognised: share of all
samples with a content margin above 0, and content AUROC: of those margins in the target class; s: seconds, of a
machine that does other things, too."""


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/advrbd_small.py", *argv]
    options = study.parser(__doc__, VARIANTS).parse_args(argv)
    return made(options.data, options.images).run(options, command)


def made(path: str | None, images: int = study.SUBSET) -> Study:
    """The study of digits, or of CIFAR-10 where a file is given."""
    data = study.DIGITS if path is None else study.cifar10_subset(path, images)
    attacks = DIGITS_ATTACKS if path is None else CIFAR10_ATTACKS
    config = AdvrBDConfig.for_digits if path is None else subset_config
    title = f"AdvrBD on {data.name.replace('_', ' ')}"
    return Study("advrbd", title, data, attacks, VARIANTS, config, NOTES, judge, table, cells)


def cells(attacks: list[str], seeds: list[int], variants: list[str]) -> Iterator[Cell]:
    """All attacks by one seed and variant, then the next one: the most telling ones first.

    Example:
        >>> list(cells(["badnets", "tact"], [0, 1], ["robust"]))[:3]
        [('badnets', 0, 'robust'), ('tact', 0, 'robust'), ('badnets', 1, 'robust')]
    """
    return ((attack, seed, variant) for seed in seeds for variant in variants for attack in attacks)


def subset_config(**changes: Any) -> AdvrBDConfig:
    """A victim's 12 epochs; fewer networks, patches and rounds than by default, so that a run is minutes of one core.

    Fewer rounds take longer steps: with truly clean samples, three at a rate of 0.03 find 97 % of a BadNets poison.
    """
    fewer: dict[str, Any] = {"content_networks": 5, "rounds": 3, "enhance_epochs": 2, "enhance_lr": 0.03}
    fewer |= {} if changes.get("preset") == "paper" else {"patches": 4}
    training = {"warm_up_epochs": 12, "epochs": 12, "lr": 0.1, "augment": Augment(2, flip=False)}
    return AdvrBDConfig(**{**training, **fewer, **changes})


@functools.lru_cache(maxsize=1)
def never_poisoned(of: Study, seed: int) -> nn.Module:
    """A network of the clean training set, the same under every attack: the reference."""
    model = of.data.build(seed)
    train_classifier(model, of.data.load().train, of.data.training(seed))
    return model


def judge(of: Study, cell: Cell) -> Record:
    """One variant: how good its split is, and the rates of the network that it trains."""
    attack, seed, variant = cell
    data, poisoned = of.poisoned(attack, seed)
    began = time.perf_counter()
    found: Record = {}
    if variant == "undefended, clean data":
        model = never_poisoned(of, seed)
    elif variant == "undefended":
        model = of.data.build(seed)
        train_classifier(model, poisoned, of.data.training(seed))
    else:
        config = of.config(seed=seed, **VARIANTS[variant])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes without a sample: in the table
            result = advrbd(lambda: of.data.build(None), poisoned, config)
        model, quality = result.model, dict(result.quality or {})
        retention = quality.pop("retention")
        target = str(poisoned.relabel.target)
        found = {
            **quality, "retention": retention, "retention_target": retention[target],
            "retention_min": min(retention.values()), "rounds": result.rounds, **told_by_content(result, poisoned),
        }  # fmt: skip
    seconds = time.perf_counter() - began
    metrics = evaluate(model, data.test, poisoned.trigger(*data.test))
    return {
        "attack": attack, "seed": seed, "variant": variant, "config": VARIANTS[variant],
        "after": percent(metrics), **found, "seconds": round(seconds, 1),
    }  # fmt: skip


def told_by_content(result: AdvrBDResult, poisoned: PoisonedData) -> Record:
    """Share of the samples that networks recognise which never saw their class, and how that ranks the target class."""
    if result.content is None:
        return {}
    target = poisoned.labels == poisoned.relabel.target
    return {
        "recognised": float((result.content > 0).double().mean()),
        "content_auroc": auroc(result.content[target], poisoned.is_poisoned[target]),
    }


def table(records: list[Record]) -> Table:
    """Quality of the split and ACC/ASR, in percent."""
    header = (
        "attack", "seed", "variant", "ACC/ASR", "TPR", "TPR relabelled", "FPR", "leaked", "kept of target",
        "kept of worst", "purity by round", "AUROC", "recognised", "content AUROC", "s",
    )  # fmt: skip
    rows = []
    for r in records:
        names = ("tpr", "tpr_relabelled", "fpr", "leaked", "retention_target", "retention_min")
        cells = [r["leaked"] if n == "leaked" and n in r else in_percent(r.get(n)) for n in names]
        rounds = r.get("rounds", [])
        purity = "/".join(str(in_percent(record["purity"])) for record in rounds) or "-"
        rates = f"{r['after']['acc']:.1f}/{r['after']['asr']:.1f}"
        ranked = _rounded(rounds[0]["auroc"]) if rounds else None
        content = (in_percent(r.get("recognised")), _rounded(r.get("content_auroc")))
        rows.append((r["attack"], r["seed"], r["variant"], rates, *cells, purity, ranked, *content, r["seconds"]))
    return header, rows


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 2)


if __name__ == "__main__":
    sys.exit(main())
