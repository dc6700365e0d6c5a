"""Settings of a command: dataclasses whose fields are options, keys of ``--set`` and keys of config files alike.

Each command has a few groups of them (what to load, a defense's config, ...) in one flat namespace; a key that several
groups have, such as ``seed``, sets it in all. Later settings win: defaults, then what a file of results says, then
``--config``, then the command line in its order. The resolved settings, saved beside the results, are a config file
that repeats the run.
"""

from __future__ import annotations

import argparse
import difflib
import json
import reprlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from bdfast._version import __version__
from bdfast.cli.coerce import coerce, describe
from bdfast.errors import message, optional_import

MAX_CONFIG_BYTES = 1 << 20
_META = ("bdfast", "command")  # what a saved config says besides its settings

Group = TypeVar("Group")


class _Short(reprlib.Repr):
    """Values of a file, which may be too long to be shown: YAML names lists many times, and has long numbers."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"a number of {x.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = 160
_SHORT.maxlevel = 2


@dataclass(frozen=True)
class Given:
    """A setting as it was given.

    Attributes:
        source: how it reads in a message: ``--rate``, ``--set rate``, ``run.yaml: rate``.
        key: name of a field.
        value: text, or what a file held.
    """

    source: str
    key: str
    value: Any


def setting(default: Any, help: str, *, metavar: str | None = None) -> Any:
    """A field of a group of settings that is an option of the command line too."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


def add_settings(parser: argparse.ArgumentParser, *groups: type, without: Collection[str] = ()) -> None:
    """An option for each field made by :func:`setting` but those ``without``, and ``--config`` and ``--set``."""
    for group in groups:
        hints = get_type_hints(group)
        for item in options_of(group):
            if item.name in without:
                continue
            metavar = item.metadata["metavar"] or item.name.upper()
            default = "" if item.default is None else f" (default: {item.default})"
            choices = f": {describe(hints[item.name])}" if get_origin(hints[item.name]) is Literal else ""
            text = item.metadata["help"] + choices + default
            name = f"--{item.name.replace('_', '-')}"
            parser.add_argument(name, action=_Option, dest=item.name, metavar=metavar, help=text)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of settings; the command line wins")
    parser.add_argument(
        "--set", action=_Set, dest="set", metavar="NAME=VALUE", help="one setting; may be repeated, the last one wins"
    )


def options_of(group: type) -> list[Field[Any]]:
    """The fields of ``group`` that are options of the command line."""
    assert is_dataclass(group)
    return [item for item in fields(group) if "help" in item.metadata]


class _Option(argparse.Action):
    """Options and ``--set`` land in one list, so that the last of either wins."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        _append(namespace, Given(str(option), self.dest, values))


class _Set(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        key, equals, value = str(values).partition("=")
        if not equals:
            parser.error(f"--set expected NAME=VALUE, got {values!r}; write --set epochs=10, say")
        _append(namespace, Given(f"--set {key}", key.strip(), value.strip()))


def _append(namespace: argparse.Namespace, given: Given) -> None:
    namespace.given = [*getattr(namespace, "given", []), given]


def given(options: argparse.Namespace, command: str) -> list[Given]:
    """Everything that was given, the config file first."""
    from_file = read_config(Path(options.config), command) if options.config else []
    return [*from_file, *getattr(options, "given", [])]


def read_config(path: Path, command: str) -> list[Given]:
    """The settings in a YAML or JSON file.

    Raises:
        FileNotFoundError, ValueError: no such file; too large, damaged, no mapping, or the settings of another command.
    """
    where = f"bdfast {command}"
    if not path.is_file():
        raise FileNotFoundError(message(where, "--config", "a YAML or JSON file", f"{path}: no such file", "check it"))
    if path.stat().st_size > MAX_CONFIG_BYTES:
        got = f"{path.stat().st_size} bytes in {path}"
        raise ValueError(
            message(where, "--config", f"at most {MAX_CONFIG_BYTES} bytes", got, "pass a file of settings")
        )
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            yaml = optional_import("yaml", extra="cli", purpose="to read YAML (JSON needs nothing)")
            content = yaml.safe_load(text)
    except ImportError:
        raise
    except Exception as error:  # the parsers have errors of their own; RecursionError too
        line = " ".join(str(error).split())[:160]
        raise ValueError(message(where, "--config", "a YAML or JSON file", f"{path} ({line})", "correct it")) from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        got = f"{path} with a {type(content).__name__}"
        raise ValueError(message(where, "--config", "a mapping of names to values", got, "write `name: value` lines"))
    of = content.get("command", command)
    if not isinstance(of, str):
        of = _SHORT.repr(of)
    if of != command:
        remedy = f"run `bdfast {of}` with it, or take out the line `command`"
        raise ValueError(message(where, "--config", f"settings of `{command}`", f"those of `{of}` in {path}", remedy))
    return [Given(f"{path}: {key}", key, value) for key, value in content.items() if key not in _META]


def keys(groups: Iterable[type], without: Collection[str] = ()) -> list[str]:
    """The settings that ``groups`` know, but for those ``without``."""
    return sorted({item.name for group in groups for item in fields(group)} - set(without))  # type: ignore[arg-type]


def resolve(where: str, group: type[Group], settings: Sequence[Given], known: Sequence[str]) -> Group:
    """``group`` with the settings that are its own; the last of each wins.

    Args:
        where: the command, which opens the messages.
        group: a dataclass.
        settings: everything that was given.
        known: the keys of all groups of the command; another key is an error.

    Raises:
        ValueError, TypeError: an unknown key, a value that its field cannot take.
    """
    hints = get_type_hints(group)
    own = {item.name: item for item in fields(group)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for item in settings:
        if item.key not in known:
            near = difflib.get_close_matches(item.key, known, n=3)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"known are: {', '.join(known)}"
            raise ValueError(message(where, item.source, "the name of a setting", repr(item.key), remedy))
        if item.key not in own:
            continue
        try:
            values[item.key] = coerce(item.value, hints[item.key])
        except (ValueError, OverflowError) as error:
            expected = describe(hints[item.key])
            default = own[item.key].default
            remedy = "correct it" if default in (MISSING, None) else f"the default is {default}"
            raise ValueError(message(where, item.source, expected, _SHORT.repr(item.value), remedy)) from error
    return group(**values)


def defaults_for(data: str, group: Any) -> list[Given]:
    """The settings that small digits need, where ``group`` has them (``for_digits``); what is given wins over them."""
    if data != "digits" or not hasattr(group, "for_digits"):
        return []
    plain, digits = group(), group.for_digits()
    changed = [item.name for item in fields(group) if getattr(plain, item.name) != getattr(digits, item.name)]
    return [Given(f"digits: {name}", name, getattr(digits, name)) for name in changed]


def document(group: type, title: str, without: Collection[str] = ()) -> str:
    """The fields of a config with type and default, but for those ``without``, for the end of a help text."""
    hints, default = get_type_hints(group), group()
    shown = [item for item in fields(group) if item.name not in without]  # type: ignore[arg-type]
    width = max(len(item.name) for item in shown)
    lines = []
    for item in shown:
        value = getattr(default, item.name)
        said = "none" if value is None else str(value).lower() if isinstance(value, bool) else value  # as it is typed
        lines.append(f"  {item.name:<{width}} {describe(hints[item.name])} (default: {said})")
    return "\n".join([f"{title}, for --set and --config:", *lines])


def record(command: str, *groups: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The resolved settings, but for those ``without``, as one flat mapping, which ``--config`` reads back."""
    merged: dict[str, Any] = {"bdfast": __version__, "command": command}
    for group in groups:
        merged.update({item.name: getattr(group, item.name) for item in fields(group) if item.name not in without})
    return merged
