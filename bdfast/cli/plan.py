"""What a command works with: its settings resolved; then data, model and what is known about the attack."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from bdfast.cli.inputs import DataSettings, LoadedModel, ModelSettings, format_normalize
from bdfast.cli.known import Folder, Known, find_folder, load_victim
from bdfast.cli.settings import Given, defaults_for, keys, record, resolve
from bdfast.data import DataSplits


class HasAttackDir(Protocol):
    """Settings of a command that may be given a folder of ``bdfast attack``, or a record."""

    @property
    def attack_dir(self) -> str | None: ...


Settings = TypeVar("Settings", bound=HasAttackDir)


@dataclass(frozen=True)
class Plan(Generic[Settings]):
    """The resolved settings, and the attack's folder if there is one."""

    data: DataSettings
    network: ModelSettings
    settings: Settings
    config: Any  # the dataclass of what the command runs; None where it has none
    folder: Folder | None
    without: Collection[str] = ()  # settings that have no effect here, and are none of the command

    def record(self, command: str) -> dict[str, Any]:
        """What is saved beside the results."""
        return record(command, self.data, self.network, self.settings, self.config, without=self.without)


@dataclass(frozen=True)
class Inputs(Generic[Settings]):
    """What a plan names, loaded."""

    plan: Plan[Settings]  # with what the checkpoint decided
    splits: DataSplits
    victim: LoadedModel
    known: Known


def make_plan(
    where: str,
    settings: type[Settings],
    config: type[Any] | None,
    everything: Sequence[Given],
    *,
    without: Collection[str] = (),
) -> Plan[Settings]:
    """Resolve the settings; options win over what an attack's folder says, and that over the defaults.

    Args:
        where: the command, which opens the messages.
        settings: its own group of settings.
        config: the dataclass of what it runs; None where it has none.
        everything: what was given.
        without: settings of these groups that would have no effect, and are refused.

    Raises:
        FileNotFoundError, TypeError, ValueError: a setting that is refused, or no such folder.
    """
    known = keys([DataSettings, ModelSettings, settings, *([config] if config else [])], without)
    own = resolve(where, settings, everything, known)
    folder = find_folder(where, own.attack_dir, everything)
    if folder is not None:
        everything = [*folder.given(), *everything]
    data = resolve(where, DataSettings, everything, known)
    network = resolve(where, ModelSettings, everything, known)
    chosen = None
    if config is not None:
        defaults = [item for item in defaults_for(data.data, config) if item.key not in without]
        chosen = resolve(where, config, [*defaults, *everything], known)
    return Plan(data, network, own, chosen, folder, without)


def load_inputs(where: str, plan: Plan[Settings]) -> Inputs[Settings]:
    """Load data and model, and say on stderr what is to be said of them.

    Raises:
        FileNotFoundError, ValueError: as :func:`bdfast.cli.known.load_victim`.
    """
    splits = plan.data.load()
    victim, known = load_victim(where, plan.network, splits, plan.data.data, plan.folder)
    network = replace(plan.network, arch=victim.arch, normalize=format_normalize(victim.normalize))
    for text in known.notes:
        print(f"note: {text}", file=sys.stderr)
    return Inputs(replace(plan, network=network), splits, victim, known)
