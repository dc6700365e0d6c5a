"""The arguments of BackdoorBench's defense scripts: names, types, precedence, and what they are called here.

Later wins: the YAML file of the defense, then the command line, then ``--exp_yaml_path``. Flags take ``True``, ``true``
and ``1`` for true and anything else for false.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bdfast.errors import message, optional_import, printable

MAX_YAML_BYTES = 1 << 20


def flag(text: str) -> bool:
    """A flag as the scripts read it.

    Example:
        >>> flag("True"), flag("1"), flag("yes")
        (True, True, False)
    """
    return str(text) in ("True", "true", "1")


ARGUMENTS: tuple[tuple[tuple[str, ...], Any, str], ...] = (
    (("--device",), str, "cuda, cuda:1, cpu; of several GPUs the first is used"),
    (("-pm", "--pin_memory"), flag, "no effect: data is resident"),
    (("-nb", "--non_blocking"), flag, "no effect: data is resident"),
    (("-pf", "--prefetch"), flag, "no effect: data is resident"),
    (("--amp",), flag, "no effect; see --set precision"),
    (("--checkpoint_load",), str, "no effect: a run that was interrupted continues"),
    (("--checkpoint_save",), str, "no effect"),
    (("--log",), str, "no effect: the log is defense/NAME/log"),
    (("--dataset_path",), str, "folder of data sets; DATASET_PATH/DATASET is read unless --data says otherwise"),
    (("--dataset",), str, "name of the base data set"),
    (("--result_file",), str, "the attack: record/RESULT_FILE"),
    (("--epochs",), int, "epochs"),
    (("--batch_size",), int, "images a step"),
    (("--num_workers",), float, "no effect: data is resident"),
    (("--lr",), float, "learning rate"),
    (("--lr_scheduler",), str, "CosineAnnealingLR; others are not offered"),
    (("--steplr_stepsize",), int, "no effect"),
    (("--steplr_gamma",), float, "no effect"),
    (("--steplr_milestones",), str, "no effect"),
    (("--model",), str, "no effect: the record says"),
    (("--client_optimizer",), str, "sgd; others are not offered"),
    (("--sgd_momentum",), float, "momentum"),
    (("--wd",), float, "weight decay"),
    (("--frequency_save",), int, "no effect"),
    (("--random_seed",), int, "seed of the reserve and of the defense"),
    (("--ratio",), float, "share of the training set that is the clean reserve"),
    (("--index",), str, "file of indices of the clean reserve"),
)
DEFAULTS: dict[str, Any] = {"dataset_path": "./data", "random_seed": 0, "ratio": 0.05}
RENAMED = {"sgd_momentum": "momentum", "wd": "weight_decay", "random_seed": "seed"}
_FIXED = {"lr_scheduler": "CosineAnnealingLR", "client_optimizer": "sgd"}
DATASETS = ("cifar10", "cifar100", "gtsrb", "tiny", "celeba", "imagenet", "mnist")
NAMES = tuple(flags[-1].removeprefix("--") for flags, _, _ in ARGUMENTS)


def add_common_arguments(parser: argparse.ArgumentParser, method: str) -> None:
    """The common arguments, ``--yaml_path`` and ``--exp_yaml_path``; None where they are not given."""
    for flags, kind, text in ARGUMENTS:
        parser.add_argument(*flags, type=kind, help=text)
    default = f"./config/defense/{method}/config.yaml"
    parser.add_argument("--yaml_path", help=f"YAML file of settings (default: {default} if it exists)")
    parser.add_argument("--exp_yaml_path", help="YAML file that wins over the command line")


def merge(where: str, method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that hold, from the files and the command line.

    Args:
        where: opens the messages.
        method: name of the defense.
        given: what :func:`add_common_arguments` parsed.

    Raises:
        FileNotFoundError, ValueError: a file that is named and not there, or is no mapping; no ``result_file``; a
            ``ratio`` or an ``index`` of another kind; a scheduler or an optimizer that is not offered.
    """
    default = Path(f"./config/defense/{method}/config.yaml")
    path = given.get("yaml_path") or (default if default.is_file() else None)
    merged = dict(DEFAULTS)
    merged.update(_filled(read_yaml(where, "--yaml_path", Path(path)) if path else {}))
    merged.update(_filled({name: given.get(name) for name in NAMES}))
    if given.get("exp_yaml_path"):
        merged.update(_filled(read_yaml(where, "--exp_yaml_path", Path(given["exp_yaml_path"]))))
    if not isinstance(merged.get("result_file"), str):
        raise ValueError(message(where, "--result_file", "the name of a record", "none", "pass badnet_0_1, say"))
    ratio, index = merged["ratio"], merged.get("index")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
        raise ValueError(message(where, "--ratio", "a share in (0, 1]", repr(ratio), "write 0.05, say"))
    if index is not None and not isinstance(index, str):
        raise ValueError(message(where, "--index", "a file of indices", repr(index), "pass its path"))
    for name, only in _FIXED.items():
        if merged.get(name, only) != only:
            raise ValueError(message(where, f"--{name}", only, repr(merged[name])[:80], "leave it out"))
    return merged


def read_yaml(where: str, argument: str, path: Path) -> dict[str, Any]:
    """A YAML mapping of names to plain values and flat lists of them, which is all that the scripts' files hold.

    Raises:
        FileNotFoundError, ValueError: no such file, too large, damaged, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(message(where, argument, "a YAML file", f"{path}: no such file", "check the path"))
    if path.stat().st_size > MAX_YAML_BYTES:
        got = str(path.stat().st_size)
        raise ValueError(message(where, argument, f"at most {MAX_YAML_BYTES} bytes", got, "pass a file of settings"))
    yaml = optional_import("yaml", extra="cli", purpose="to read the settings of a defense")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except Exception as error:  # the parser has errors of its own; RecursionError too
        line = " ".join(str(error).split())[:160]
        raise ValueError(message(where, argument, "a YAML file", f"{path} ({line})", "correct it")) from error
    content = {} if content is None else content
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        got = f"a {type(content).__name__} in {path}"
        raise ValueError(message(where, argument, "a mapping of names to values", got, "write `name: value` lines"))
    for name, value in content.items():  # a list of lists of lists may be small in the file and endless when shown
        items = value if isinstance(value, list) else (value,)
        if any(isinstance(item, (list, dict, set)) or _is_endless(item) for item in items):
            got = f"more below `{printable(name)}` in {path}"
            raise ValueError(
                message(where, argument, "values and flat lists of them", got, "write `name: value` lines")
            )
    return content


def _is_endless(value: Any) -> bool:
    """A number that is too long to be shown."""
    return isinstance(value, int) and value.bit_length() > 64


def translate(merged: Mapping[str, Any], known: Iterable[str]) -> tuple[dict[str, Any], list[str]]:
    """Settings of ours, and the names in ``merged`` that have no counterpart.

    Args:
        merged: what :func:`merge` returned.
        known: names of the settings of the defense.
    """
    known = set(known)
    settings: dict[str, Any] = {}
    unused = []
    for name, value in merged.items():
        ours = RENAMED.get(name, name)
        if ours in known and name not in ("model", "device", "index", "ratio"):
            settings[ours] = value
        elif name not in NAMES:
            unused.append(printable(name))
    # FT-SAM's scripts let rho follow the learning rate between two bounds, which their files set to one number.
    bounds = [merged[name] for name in ("rho_max", "rho_min") if name in merged]
    if "rho" in known and bounds and bounds[0] == bounds[-1]:
        settings.setdefault("rho", bounds[0])
        unused = [name for name in unused if name not in ("rho_max", "rho_min")]
    if "augment" in known and merged.get("dataset") in DATASETS:
        flip = merged["dataset"] == "cifar10"  # the only set whose images the scripts mirror
        settings.setdefault("augment", {"crop_padding": 4, "flip": flip})
    settings["reserve"] = merged.get("index") or float(merged["ratio"])
    settings["draw"] = "backdoorbench"
    return settings, unused


def _filled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
