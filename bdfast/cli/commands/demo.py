"""``bdfast demo``: the main job from start to finish, on data that comes with scikit-learn."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bdfast import models
from bdfast.attacks import PoisonedData, poison
from bdfast.cli.command import DONE, Command
from bdfast.cli.environment import versions
from bdfast.cli.inputs import choose_device, judge
from bdfast.cli.outputs import ratings, results_folder, table, write_json
from bdfast.data import DataSplits, load, normalization, reserve
from bdfast.defenses import D3Config, FineTuneConfig, d3, fine_tune
from bdfast.errors import MissingExtraError
from bdfast.report import Report, pick_samples, write_png
from bdfast.runtime.progress import Progress
from bdfast.training import TrainConfig, train_classifier

WHERE = "bdfast demo"
NORMALIZE = normalization("digits")
RESERVE = 0.15  # of the training set, held aside before poisoning: 210 images


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--out", default="demo_results", metavar="DIR", help="folder for the results (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seeds everything (%(default)s)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="cpu, cuda, ...; auto: the GPU if there is one"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few epochs only, to see it run; the numbers mean little"
    )


def run(options: argparse.Namespace) -> int:
    """Poison, train, defend, compare; write demo.json and demo.png."""
    device = choose_device(WHERE, options.device)
    with results_folder(WHERE, options.out) as folder, one_thread():
        splits = load("digits")
        poisoned, clean = poison_all_but_reserve(splits, options.seed)
        seconds: dict[str, float] = {}
        networks = {"before": train_victim(splits, poisoned, options, device, seconds)}
        history = defend(networks, clean, options, seconds)
        rates = {label: judge(model, splits, poisoned, NORMALIZE) for label, model in networks.items()}
        write_json(folder / "demo.json", _content(rates, history, seconds, options, device))
        picture = _draw(folder / "demo.png", splits, poisoned, networks, rates, history)
    print("digits, BadNets: a white 3x3 corner on 10 % of the training images, target 0; clean reserve of 210 images\n")
    print(table(rates))
    print(f"\nseconds: {', '.join(f'{name} {value:.1f}' for name, value in seconds.items())}")
    print(f"results: {Path(options.out) / 'demo.json'}{picture or ', ' + str(Path(options.out) / 'demo.png')}")
    return DONE


@contextmanager
def one_thread() -> Iterator[None]:
    """Batches of 8x8 images keep one thread busy at best, and threads that spin on a busy machine cost ten times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def poison_all_but_reserve(splits: DataSplits, seed: int) -> tuple[PoisonedData, tuple[torch.Tensor, torch.Tensor]]:
    """The victim's training set, and clean images that it never sees."""
    images, labels = splits.train
    index = reserve(labels, ratio=RESERVE, seed=seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[index] = False
    poisoned = poison(images[rest], labels[rest], "badnets", rate=0.1, target=0, seed=seed, num_classes=10)
    return poisoned, (images[index], labels[index])


def train_victim(
    splits: DataSplits,
    poisoned: PoisonedData,
    options: argparse.Namespace,
    device: torch.device,
    seconds: dict[str, float],
) -> nn.Module:
    """The backdoored network."""
    config = TrainConfig.for_digits(seed=options.seed, **({"epochs": 2} if options.quick else {}))
    model = models.build("digits_cnn", num_classes=len(splits.class_names), image_size=8, seed=options.seed).to(device)
    start = time.perf_counter()
    train_classifier(model, poisoned, config, Progress("victim"), normalize=NORMALIZE)
    seconds["victim"] = time.perf_counter() - start
    return model


def defend(
    networks: dict[str, nn.Module],
    clean: tuple[torch.Tensor, torch.Tensor],
    options: argparse.Namespace,
    seconds: dict[str, float],
) -> list[dict[str, Any]]:
    """Add the networks that fine-tuning and D3 make of the victim; D3's history."""
    config = D3Config.for_digits(seed=options.seed, **({"epochs": 2} if options.quick else {}))
    same = {name: getattr(config, name) for name in ("epochs", "batch_size", "lr", "augment", "seed")}
    history: list[dict[str, Any]] = []
    steps: tuple[tuple[str, Any, Any], ...] = (
        ("ft", fine_tune, FineTuneConfig(**same)),
        ("d3", d3, config),
    )
    for label, function, its_config in steps:
        start = time.perf_counter()
        result = function(networks["before"], clean, its_config, callback=Progress(label), normalize=NORMALIZE)
        seconds[label] = time.perf_counter() - start
        networks[label], history = result.model, result.history
    return history


def _content(
    rates: Mapping[str, Any],
    history: list[dict[str, Any]],
    seconds: Mapping[str, float],
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    before = rates["before"]
    return {
        "command": f"bdfast demo --seed {options.seed}{' --quick' if options.quick else ''}",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": str(device),
        "versions": versions(),
        "rates": rates,
        "ratings": {label: ratings(before, rates[label]) for label in rates if label != "before"},
        "seconds": seconds,
        "history": history,
    }


def _draw(
    path: Path,
    splits: DataSplits,
    poisoned: PoisonedData,
    networks: Mapping[str, nn.Module],
    rates: Mapping[str, Any],
    history: list[dict[str, Any]],
) -> str | None:
    """Write the picture; what to say where it cannot be drawn."""
    triggered = poisoned.trigger(*splits.test)
    shown = {label: networks[label] for label in ("before", "d3")}
    samples = pick_samples(shown, triggered, splits.class_names, normalize=NORMALIZE)
    title = "D3 on digits: a backdoor, and what is left of it"
    try:
        write_png(Report(title, rates, history, samples=samples), path)
    except MissingExtraError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return " (no picture: matplotlib is missing)"
    return None


COMMAND = Command(
    name="demo",
    summary="the main job from start to finish, on scikit-learn's digits",
    description=(
        "Poison digits with BadNets, train a small victim, detoxify it with D3 and a few clean images, and compare\n"
        "with plain fine-tuning. DIR gets demo.json and demo.png. About half a minute on two cores."
    ),
    example="  bdfast demo\n  bdfast demo --out /tmp/demo --seed 1",
    add_arguments=add_arguments,
    run=run,
)
