# ruff: noqa: E402  (the path comes first)
"""Purifiers with auxiliary data of eight families, with and without GIC: which data purify, and whether GIC helps.

    python benchmarks/gic_families.py                            digits, CPU: benchmarks/results/gic_families/digits.*
    python benchmarks/gic_families.py --data cifar10 --device cuda --precision bf16 --victim-epochs 30 --epochs 100
    python benchmarks/gic_families.py --delta 0.0628 --output D  another radius, into another folder

Every victim is poisoned by BadNets and trained without the reserved part of the training set
(bdfast.data.auxiliary_split); each family's set is as large as that part. A record is one (seed, family, purifier, GIC
or not). What is finished is kept: the same command goes on from there. Whatever comes out is what the table says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: the folder of this script is on the path, and the one above it is needed
    sys.path[0] = str(ROOT)

import torch
from torch import nn

import bdfast
from bdfast.data import FAMILIES, DataSplits
from bdfast.defenses import D3Config, FineTuneConfig, FTSAMConfig, GICConfig, GICResult, d3, fine_tune, ft_sam, gic
from bdfast.testing.tables import text_table
from bdfast.training import TrainConfig
from benchmarks import environment, scenario
from benchmarks.gic_tables import WITH, WITHOUT, summary, table, verdict, write_tables
from benchmarks.scenario import Scenario, Split, Victim

FOLDER = environment.RESULTS / "gic_families"
PURIFIERS = ("ft", "ft-sam", "d3")
SETTINGS = (
    "data", "attack", "rate", "seeds", "families", "purifiers", "ratio", "victim_epochs", "epochs", "precision",
)  # fmt: skip
Key = tuple[int, str, str, str]  # seed, family, purifier, with or without


def main(argv: list[str] | None = None) -> int:
    """Measure what is not in the result file yet; 0 when the table is complete, 1 when the time ran out before."""
    options = _parser().parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore", UserWarning)  # small families may lack a class; the table shows what that costs
    ends = time.monotonic() + 60 * options.budget_minutes
    device = torch.device(options.device)
    folder = options.output or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.data}.json"
    settings = {name: getattr(options, name) for name in SETTINGS}
    config = GICConfig(delta=options.delta, w_bn=options.w_bn, steps=options.steps, mix=options.mix, mode=options.mode)
    settings["gic"] = json.loads(json.dumps(vars(config)))
    result = _read(path, settings) or {"kind": "gic_families", "settings": settings, "records": [], "calibrations": []}
    result["environment"] = environment.facts(
        device, sys.argv if argv is None else ["benchmarks/gic_families.py", *argv]
    )
    for seed in options.seeds:
        missing = list(todo(settings, result["records"], seed))
        if not missing or time.monotonic() >= ends:
            continue
        experiment = Experiment(settings, config, seed, device)
        for key in missing:
            if time.monotonic() >= ends:
                break
            result["records"].append(experiment.judge(key))
            result["calibrations"] += experiment.new_calibrations()
            environment.write(path, result)
    complete = not any(True for seed in options.seeds for _ in todo(settings, result["records"], seed))
    result["complete"], result["summary"] = complete, summary(result["records"])
    environment.write(path, result)
    if result["records"]:
        write_tables(path, result)
        print(text_table(table(result["records"])), f"\n\n{verdict(result['summary'])}")
    print(f"\nwrote {path}" + ("" if complete else "; the time is over: the same command goes on from there"))
    return 0 if complete else 1


def todo(settings: dict[str, Any], records: list[dict[str, Any]], seed: int) -> Iterator[Key]:
    """What a seed lacks.

    Example:
        >>> settings = {"families": ["blur"], "purifiers": ["ft"]}
        >>> list(todo(settings, [{"seed": 0, "family": "blur", "purifier": "ft", "data": "without"}], 0))
        [(0, 'blur', 'ft', 'GIC')]
    """
    done = {(r["seed"], r["family"], r["purifier"], r["data"]) for r in records}
    for key in itertools.product([seed], settings["families"], [WITHOUT, WITH], settings["purifiers"]):
        ordered = (key[0], key[1], key[3], key[2])
        if ordered not in done:
            yield ordered


class Experiment:
    """One seed's victim; sets are calibrated as they are asked for."""

    def __init__(self, settings: dict[str, Any], config: GICConfig, seed: int, device: torch.device) -> None:
        self._settings, self._config, self._seed = settings, config, seed
        self._splits = bdfast.data.load(settings["data"], seed=seed)
        self.victim = make_victim(settings, self._splits, seed, device)
        self._calibrated: dict[str, GICResult] = {}
        self._fresh: list[dict[str, Any]] = []

    def judge(self, key: Key) -> dict[str, Any]:
        """The record of one purification."""
        seed, family, purifier, data = key
        auxiliary = bdfast.data.auxiliary(self._splits.train, family, ratio=self._settings["ratio"], seed=seed)  # type: ignore[arg-type]
        if data == WITH:
            auxiliary = self._calibrate(family, auxiliary).data
        began = time.perf_counter()
        model = purify(purifier, self._settings, seed, self.victim.model, auxiliary)
        scenario.synchronize(next(model.parameters()).device)
        line = scenario.record(
            self.victim, purifier, self.victim.evaluate(model), len(auxiliary[1]), time.perf_counter() - began
        )
        return {
            "seed": seed, "family": family, "purifier": purifier, "data": data,
            "before": line["before"], "after": line["after"], "der": line["der"], "seconds": line["seconds"],
        }  # fmt: skip

    def _calibrate(self, family: str, auxiliary: Split) -> GICResult:
        if family not in self._calibrated:
            made = gic(self.victim.model, auxiliary, self._config)
            self._calibrated[family] = made
            imprint = made.imprint
            self._fresh.append(
                {
                    "seed": self._seed,
                    "family": family,
                    "images": made.counts["images"],
                    "loss": [round(x, 5) for x in imprint.loss],
                    "accuracy": [round(x, 4) for x in imprint.accuracy],
                    "drift": round(imprint.drift, 5),
                    "drifted": imprint.drifted,
                    "transfer": [round(x, 4) for x in imprint.transfer],
                    "seconds": round(sum(made.timings.values()), 2),
                }
            )
        return self._calibrated[family]

    def new_calibrations(self) -> list[dict[str, Any]]:
        """Records of the sets calibrated since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh


def make_victim(settings: dict[str, Any], splits: DataSplits, seed: int, device: torch.device) -> Victim:
    """Trained on what is not reserved."""
    train, _ = bdfast.data.auxiliary_split(splits.train[1], ratio=settings["ratio"], seed=seed)
    part = DataSplits((splits.train[0][train], splits.train[1][train]), splits.test, splits.class_names)
    epochs = settings["victim_epochs"]
    if settings["data"] == "digits":
        name, network, training = "digits", "digits_cnn", TrainConfig.for_digits(epochs=epochs, seed=seed)
    else:
        name, network = "cifar10", "preact_resnet18"
        training = TrainConfig(
            epochs=epochs, lr=0.1, schedule="one_cycle", precision=settings["precision"], channels_last=True, seed=seed
        )
    return scenario.make_victim(
        Scenario(part, name, network, settings["attack"], settings["rate"], training, seed), device
    )


def purify(name: str, settings: dict[str, Any], seed: int, model: nn.Module, data: Split) -> nn.Module:
    """The purifiers' defaults on CIFAR-10; on digits batches of 32 and no mirror images, rho 4 for FT-SAM."""
    options: dict[str, Any] = {"epochs": settings["epochs"], "seed": seed, "precision": settings["precision"]}
    small = settings["data"] == "digits"
    ft = FineTuneConfig(**options, **({"batch_size": 32, "augment": "crop"} if small else {}))
    sam = FTSAMConfig.for_digits(**options) if small else FTSAMConfig(**options)
    far = D3Config.for_digits(**options) if small else D3Config(**options)
    run: dict[str, Callable[[], nn.Module]] = {
        "ft": lambda: fine_tune(model, data, ft).model,
        "ft-sam": lambda: ft_sam(model, data, sam).model,
        "d3": lambda: d3(model, data, far).model,
    }
    return run[name]()


def _read(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An unfinished result of the same settings."""
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["settings"] != settings:
        raise SystemExit(f"gic_families: {path} is of other settings, {result['settings']}; pass --output")
    return result


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits or cifar10 (found through BDFAST_DATA)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU (1): figures repeat for the same number")
    parser.add_argument("--attack", default="badnets")
    parser.add_argument("--rate", type=float, default=0.1, help="share of poisoned images (0.1)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--purifiers", nargs="+", choices=PURIFIERS, default=list(PURIFIERS))
    parser.add_argument("--ratio", type=float, default=0.1, help="reserved share of the training set (0.1; 0.05 usual)")
    parser.add_argument("--victim-epochs", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=20, help="of the purifiers (20)")
    parser.add_argument("--mode", choices=("sample", "prompt", "network"), default="sample", help="of GIC")
    parser.add_argument("--delta", type=float, default=8 / 255, help="of GIC (8/255)")
    parser.add_argument("--w-bn", type=float, default=0.0, help="of GIC (0)")
    parser.add_argument("--steps", type=int, default=20, help="of GIC (20)")
    parser.add_argument("--mix", type=float, default=0.0, help="of GIC (0)")
    parser.add_argument("--budget-minutes", type=float, default=60.0, help="begin nothing after this (60)")
    parser.add_argument("--output", type=Path, help="another folder for the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
