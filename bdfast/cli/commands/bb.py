"""``bdfast bb``: a defense with the arguments of BackdoorBench's scripts, on its record folders."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from bdfast.cli.command import Command, exit_codes
from bdfast.cli.commands.defend import DefendSettings, defend, without
from bdfast.cli.defenses import DEFENSES, Defense
from bdfast.cli.settings import Given
from bdfast.errors import message
from bdfast.integrations.backdoorbench.arguments import add_common_arguments, merge, translate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each defense."""
    kinds = parser.add_subparsers(title="defenses", metavar="DEFENSE", required=True, dest="defense")
    for defense in DEFENSES:
        one = kinds.add_parser(defense.name, help=defense.summary, epilog=exit_codes(), allow_abbrev=False)
        add_common_arguments(one, defense.name)
        one.add_argument("--data", metavar="DATA", help="the base data, in place of DATASET_PATH/DATASET")
        one.add_argument("--limit", metavar="N,M", help="most base images, if the record was made from the first ones")
        one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the defense")
        one.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        one.set_defaults(chosen=defense)


def run(options: argparse.Namespace) -> int:
    """Translate the arguments, then run ``bdfast defend`` into the record."""
    defense: Defense = options.chosen
    where = f"bdfast bb {defense.name}"
    merged = merge(where, defense.name, vars(options))
    given = settings(where, defense, merged, options)
    return defend(where, defense, given, out=None, into_record=True)


def settings(where: str, defense: Defense, merged: Mapping[str, Any], options: argparse.Namespace) -> list[Given]:
    """The arguments as settings of ``bdfast defend``."""
    known = [item.name for item in (*fields(DefendSettings), *fields(defense.config))]  # type: ignore[arg-type]
    translated, unused = translate(merged, known)
    for name in without(defense):
        translated.pop(name, None)
    if "reserve" in without(defense):
        unused += [name for name in ("ratio", "index") if getattr(options, name) is not None]
    if unused:
        print(f"note: not used by {defense.name}: {', '.join(sorted(unused))}", file=sys.stderr)
    translated |= {
        "attack_dir": record(where, merged["result_file"]),
        "data": options.data or base_data(merged),
        "limit": options.limit,
        "device": device(str(merged.get("device", "auto"))),
        "report": "none",
    }
    given = [Given(f"--{name}", name, value) for name, value in translated.items() if value is not None]
    for item in options.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(message(where, "--set", "NAME=VALUE", repr(item), "write --set lam=0.5, say"))
        given.append(Given(f"--set {name}", name.strip(), value.strip()))
    return given


def record(where: str, result_file: str) -> str:
    """The record's folder: below ``record/``, or the path itself."""
    for path in (Path("record") / result_file, Path(result_file)):
        if path.is_dir():
            return os.fspath(path)
    got = f"no folder record/{result_file} in {Path.cwd()}"
    raise FileNotFoundError(message(where, "--result_file", "the name of a record", got, "start it beside record/"))


def base_data(merged: Mapping[str, Any]) -> str | None:
    """``DATASET_PATH/DATASET`` if it is there, else the name of the data set, else what the record says."""
    dataset = merged.get("dataset")
    if dataset is None:
        return None
    path = Path(str(merged["dataset_path"])) / str(dataset)
    return os.fspath(path) if path.exists() else str(dataset)


def device(name: str) -> str:
    """The first of several GPUs, and the processor where there is none."""
    first = name.partition(",")[0]
    if first.startswith("cuda") and not torch.cuda.is_available():
        print("note: no GPU is visible, the processor takes its place", file=sys.stderr)
        return "cpu"
    if first != name:
        print(f"note: {first} alone is used", file=sys.stderr)
    return first


COMMAND = Command(
    name="bb",
    summary="a defense with the arguments of BackdoorBench's scripts",
    description=(
        "Run a defense on record/RESULT_FILE with the arguments and files of BackdoorBench's scripts, and leave\n"
        "defense/NAME/ in the record as they do. YAML < command line < --exp_yaml_path. The settings of a defense\n"
        "('bdfast defend NAME --help') may stand in the YAML files too."
    ),
    example=(
        "  bdfast bb ft --result_file badnet_0_1 --yaml_path ./config/defense/ft/cifar10.yaml --dataset cifar10\n"
        "  bdfast bb d3 --result_file badnet_0_1 --dataset cifar10 --data /data/cifar10.npz --ratio 0.05"
    ),
    add_arguments=add_arguments,
    run=run,
)
