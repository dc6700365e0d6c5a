"""``bdfast attack``: poison a data set and train a victim on it."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bdfast import models
from bdfast.attacks import PoisonedData, get, poison, preset
from bdfast.attacks import names as attack_names
from bdfast.attacks.presets import PRESETS
from bdfast.cli.command import DONE, Command
from bdfast.cli.inputs import (
    CONFIG_FILE,
    MODEL_FILE,
    POISONED_FILE,
    DataSettings,
    choose_device,
    format_normalize,
    judge,
    parse_normalize,
)
from bdfast.cli.outputs import RESUME_FILE, epoch_rows, results_folder, table, write_csv, write_json
from bdfast.cli.settings import Given, add_settings, defaults_for, document, given, keys, record, resolve, setting
from bdfast.data import DataSplits
from bdfast.errors import message, optional_import
from bdfast.runtime.checkpoints import save_state
from bdfast.runtime.progress import Progress
from bdfast.runtime.ranks import Ranks, torchrun
from bdfast.training import TrainConfig, TrainResult, train_classifier

WHERE = "bdfast attack"


@dataclass(frozen=True)
class AttackSettings:
    """Which attack, on which network."""

    attack: str = setting("badnets", f"one of {', '.join(attack_names())}")
    preset: str | None = setting(None, f"settings of a paper, which others given here override: {', '.join(PRESETS)}")
    rate: float | None = setting(None, "share of the training set to poison; none: the attack's own")
    cover_rate: float | None = setting(None, "share that carries a trigger and keeps its label; none: the attack's own")
    target: int = setting(0, "class that triggered images are to be classified as")
    mode: Literal["all-to-one", "all-to-all"] = setting("all-to-one", "which classes become which")
    model: str | None = setting(None, "architecture of the victim; none: digits_cnn for digits, else preact_resnet18")
    normalize: str = setting("auto", "'none', the name of a data set, or MEAN/STD; auto: that of --data")
    seed: int = setting(0, "seeds poisoning, initial weights and training")
    device: str = setting("auto", "cpu, cuda, cuda:1, ...; auto: the GPU if there is one")


@dataclass(frozen=True)
class Plan:
    """The resolved settings."""

    data: DataSettings
    attack: AttackSettings
    options: Any  # the attack's own dataclass
    train: TrainConfig
    files: dict[str, str]  # options that were read from files, and which

    def record(self) -> dict[str, Any]:
        """As saved."""
        return {**record("attack", self.data, self.attack, self.options, self.train), **self.files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_settings(parser, DataSettings, AttackSettings)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.epilog = "\n\n".join([parser.epilog or "", document(TrainConfig, "settings of the training")])


def plan(options: argparse.Namespace) -> Plan:
    """Resolve the settings: those of the attack depend on its name."""
    settings = given(options, "attack")
    base = keys([DataSettings, AttackSettings, TrainConfig])
    # Which attack it is decides which further keys are known; so this first look lets all of them pass.
    choice = resolve(WHERE, AttackSettings, [item for item in settings if item.key in base], base)
    kind = type(get(choice.attack))
    known = keys([DataSettings, AttackSettings, TrainConfig, kind])
    if choice.preset is not None:
        chosen = preset(choice.preset, choice.attack)
        settings = [*(Given(f"--preset {choice.preset}", key, value) for key, value in chosen.items()), *settings]
        choice = resolve(WHERE, AttackSettings, settings, known)
    data = resolve(WHERE, DataSettings, settings, known)
    if data.data not in ("digits", "cifar10"):
        data = replace(data, data=os.path.abspath(data.data))  # for --attack-dir, which may be used from elsewhere
    is_digits = data.data == "digits"
    attack = replace(
        choice,
        attack=kind.name,
        model=choice.model or ("digits_cnn" if is_digits else "preact_resnet18"),
        rate=choice.rate if choice.rate is not None else kind.default_rate,
        normalize=format_normalize(parse_normalize(WHERE, choice.normalize, data.data)),
    )
    train = resolve(WHERE, TrainConfig, [*defaults_for(data.data, TrainConfig), *settings], known)
    own = resolve(WHERE, kind, settings, known)
    read = {item.key: item.value for item in settings if isinstance(getattr(own, item.key, None), Tensor)}
    return Plan(data, attack, own, train, {key: os.path.abspath(path) for key, path in read.items()})


def run(options: argparse.Namespace) -> int:
    """Poison, train, evaluate, and write everything at the end."""
    chosen = plan(options)
    optional_import("safetensors", extra="cli", purpose="to write model.safetensors")
    with torchrun() as ranks:
        if ranks.rank > 0:  # trains with rank 0, which writes the results
            splits = chosen.data.load()
            train_victim(chosen, splits, make_poison(chosen, splits), Path(options.out) / RESUME_FILE)
            return DONE
        return _run(options, chosen)


def _run(options: argparse.Namespace, chosen: Plan) -> int:
    with results_folder(WHERE, options.out, kept=(Path(options.out) / RESUME_FILE,)) as folder:
        splits = chosen.data.load()
        poisoned = make_poison(chosen, splits)
        model, result = train_victim(chosen, splits, poisoned, Path(options.out) / RESUME_FILE)
        metrics = judge(model, splits, poisoned, parse_normalize(WHERE, chosen.attack.normalize, chosen.data.data))
        metadata = {
            "model_name": chosen.attack.model,
            "num_classes": len(splits.class_names),
            "normalize": chosen.attack.normalize,
        }
        save_state(folder / MODEL_FILE, model.state_dict(), metadata)
        poisoned.save(folder / POISONED_FILE)
        write_json(folder / CONFIG_FILE, chosen.record())
        write_json(folder / "metrics.json", metrics)
        write_csv(folder / "results.csv", epoch_rows(result.history, None, metrics))
    print(table({"victim": metrics}, extended=True))
    print(
        f"\n{len(poisoned.poison_indices)} of {len(poisoned.labels)} training images poisoned; results in {options.out}"
    )
    return DONE


def make_poison(chosen: Plan, splits: DataSplits) -> PoisonedData:
    """The poisoned training set."""
    settings, images, labels = chosen.attack, *splits.train
    return poison(
        images, labels, chosen.options, rate=settings.rate, target=settings.target, seed=settings.seed,
        cover_rate=settings.cover_rate, num_classes=len(splits.class_names), mode=settings.mode,
    )  # fmt: skip


def train_victim(
    chosen: Plan, splits: DataSplits, poisoned: PoisonedData, resume: Path
) -> tuple[nn.Module, TrainResult]:
    """The trained victim, and its history."""
    settings, images = chosen.attack, splits.train[0]
    if settings.model is None:
        raise ValueError(message(WHERE, "--model", "an architecture", "none", f"one of {', '.join(models.names())}"))
    size = (images.shape[2], images.shape[3])
    model = models.build(
        settings.model, num_classes=len(splits.class_names), image_size=size, channels=images.shape[1],
        seed=settings.seed,
    ).to(choose_device(WHERE, settings.device))  # fmt: skip
    normalize = parse_normalize(WHERE, settings.normalize, chosen.data.data)
    if resume.exists() and Ranks.joined().rank == 0:
        print(f"continuing from {resume}", file=sys.stderr)
    result = train_classifier(model, poisoned, chosen.train, Progress("victim"), normalize=normalize, checkpoint=resume)
    return result.model, result


COMMAND = Command(
    name="attack",
    summary="poison a data set and train a victim on it",
    description=(
        "Poison a training set, train a victim on it and measure it. DIR gets model.safetensors, poisoned.npz,\n"
        "config.json, metrics.json and results.csv, all at the end; if training is interrupted, the same\n"
        "command continues it. Under torchrun all processes train one victim."
    ),
    example=(
        "  bdfast attack --data digits --attack badnets --rate 0.1 --target 0 --out runs/badnets\n"
        "  bdfast attack --data cifar10 --attack blended --set alpha=0.1 --set epochs=50 --out runs/blended"
    ),
    add_arguments=add_arguments,
    run=run,
)
