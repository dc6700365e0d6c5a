# ruff: noqa: E402  (the path comes first)
"""D3 and fine-tuning on scikit-learn's digits, on the CPU: two attacks, three seeds, three sizes of the clean reserve.

    python benchmarks/digits_defenses.py                        benchmarks/results/digits_<commit>.json
    python benchmarks/digits_defenses.py --budget-minutes 10    stops in time; the same command goes on from there

A small network on 8x8 images: what it shows are trends, not the figures of papers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch

import bdfast
from bdfast.defenses import D3Config, FineTuneConfig, d3, fine_tune
from bdfast.testing.tables import text_table
from bdfast.training import TrainConfig
from benchmarks import environment, scenario
from benchmarks.scenario import Scenario, Victim

CPU = torch.device("cpu")
RATES = {"badnets": 0.1, "blended": 0.05}
SEEDS = (0, 1, 2)
RESERVES = (70, 140, 280)


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    command = sys.argv if argv is None else ["benchmarks/digits_defenses.py", *argv]
    arguments = _parser().parse_args(argv)
    ends = time.monotonic() + 60 * arguments.budget_minutes
    facts = environment.facts(CPU, command)
    path = arguments.output or environment.RESULTS / f"digits_{facts['commit']}.json"
    settings = {name: getattr(arguments, name) for name in ("attacks", "seeds", "reserves", "victim_epochs", "epochs")}
    empty: dict[str, Any] = {
        "kind": "digits",
        "complete": False,
        "environment": facts,
        "settings": settings,
        "records": [],
    }
    result = _read(path, settings) or empty
    for victim_key, missing in todo(settings, result["records"]):
        if not missing:
            continue
        if time.monotonic() >= ends:
            break
        victim = make_victim(*victim_key, arguments.victim_epochs)
        for reserve in missing:
            result["records"] += judge(victim, reserve, arguments.epochs)
            environment.write(path, result)
    complete = not any(missing for _, missing in todo(settings, result["records"]))
    environment.write(path, {**result, "complete": complete})
    print(text_table(scenario.table(result["records"])))
    print(f"\nwrote {path}" + ("" if complete else "; the time is over: the same command goes on from there"))
    return 0 if complete else 1


def todo(settings: dict[str, Any], records: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, int], list[int]]]:
    """For every victim (attack, seed) the sizes of the reserve that have no records yet.

    Example:
        >>> settings = {"attacks": ["badnets"], "seeds": [0], "reserves": [70, 140]}
        >>> list(todo(settings, [{"attack": "badnets", "seed": 0, "reserve": 70}]))
        [(('badnets', 0), [140])]
    """
    done = {(record["attack"], record["seed"], record["reserve"]) for record in records}
    for seed, attack in itertools.product(settings["seeds"], settings["attacks"]):
        yield (attack, seed), [reserve for reserve in settings["reserves"] if (attack, seed, reserve) not in done]


def make_victim(attack: str, seed: int, epochs: int) -> Victim:
    """98 % of clean digits and nearly all triggered ones, with 20 epochs."""
    data = bdfast.data.load("digits", seed=seed)
    training = TrainConfig.for_digits(epochs=epochs, seed=seed)
    return scenario.make_victim(Scenario(data, "digits", "digits_cnn", attack, RATES[attack], training, seed), CPU)


def judge(victim: Victim, reserve: int, epochs: int) -> list[dict[str, Any]]:
    """Both defenses, in the settings of their papers but for flips: digits have no mirror images."""
    seed = victim.scenario.seed
    ours = D3Config(epochs=epochs, augment="crop", seed=seed)
    baseline = FineTuneConfig(epochs=epochs, augment="crop", seed=seed)
    return scenario.judge(
        victim,
        {
            "ft": lambda model, clean: fine_tune(model, clean, baseline).model,
            "d3": lambda model, clean: d3(model, clean, ours).model,
        },
        reserve,
    )


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An unfinished result of the same settings."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        raise SystemExit(
            f"digits_defenses: `{path}` expected a result of {settings}, got {result['settings']}; pass --output"
        )
    return result


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attacks", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--reserves", nargs="+", type=int, default=list(RESERVES), help="clean images of the defender")
    parser.add_argument("--victim-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=100, help="of both defenses (100)")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="begin no further victim after this (60)")
    parser.add_argument("--output", type=Path, help="the result file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
