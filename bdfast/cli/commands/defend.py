"""``bdfast defend``: run a defense on a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bdfast.cli.command import DONE, Command
from bdfast.cli.defenses import DEFENSES, Defense
from bdfast.cli.environment import versions
from bdfast.cli.inputs import (
    CONFIG_FILE,
    MODEL_FILE,
    AttackFolder,
    DataSettings,
    LoadedModel,
    ModelSettings,
    clean_reserve,
    format_normalize,
    judge,
    load_model,
    read_attack_folder,
)
from bdfast.cli.outputs import (
    RESUME_FILE,
    epoch_rows,
    plain,
    ratings,
    results_folder,
    table,
    write_csv,
    write_json,
)
from bdfast.cli.reporting import check_report, make_report
from bdfast.cli.settings import Given, add_settings, document, given, keys, record, resolve, setting
from bdfast.data import DataSplits
from bdfast.errors import message, optional_import
from bdfast.files import atomic_write
from bdfast.metrics import Metrics
from bdfast.report import Report, pick_samples
from bdfast.runtime.checkpoints import save_state
from bdfast.runtime.progress import Progress


@dataclass(frozen=True)
class DefendSettings:
    """What the defender holds."""

    attack_dir: str | None = setting(None, "folder of `bdfast attack`: its victim, data and trigger")
    reserve: int | float | str = setting(0.05, "clean training images: a share, a count, or a file of indices")
    seed: int = setting(0, "seeds the draw of the reserve and the defense")
    report: Literal["html", "png", "none"] = setting("html", "report of what changed")


@dataclass(frozen=True)
class Job:
    """Everything that a defense may need."""

    data: DataSettings
    model_settings: ModelSettings
    settings: DefendSettings
    config: Any
    folder: AttackFolder | None
    splits: DataSplits
    victim: LoadedModel


PROVIDERS: dict[str, Callable[[Job], Any]] = {
    "model": lambda job: job.victim.model,
    "reserve": lambda job: clean_reserve(job.splits, job.settings.reserve, job.settings.seed),
}
"""What a defense can ask for by name (``Defense.needs``)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each defense."""
    kinds = parser.add_subparsers(title="defenses", metavar="DEFENSE", required=True, dest="defense")
    for defense in DEFENSES:
        one = kinds.add_parser(
            defense.name,
            help=defense.summary,
            description=f"Run {defense.name}: {defense.summary}.",
            epilog=document(defense.config, f"settings of {defense.name}"),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_settings(one, ModelSettings, DataSettings, DefendSettings)
        one.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
        one.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        one.set_defaults(chosen=defense)


def run(options: argparse.Namespace) -> int:
    """Load, defend, evaluate before and after, and write everything at the end."""
    defense: Defense = options.chosen
    where = f"bdfast defend {defense.name}"
    settings, config, rest = resolve_all(where, defense, options)
    check_report(settings.report)
    optional_import("safetensors", extra="cli", purpose="to write model.safetensors")
    with results_folder(where, options.out) as folder:
        job = prepare(where, settings, config, rest)
        before = judge(job.victim.model, job.splits, _trigger(job), job.victim.normalize)
        result = apply(defense, job, Path(options.out) / RESUME_FILE)
        after = judge(result.model, job.splits, _trigger(job), job.victim.normalize)
        resolved = record(f"defend {defense.name}", job.data, job.model_settings, settings, config)
        write_results(folder, job, result, before, after, resolved)
        names = {"before": before, defense.name: after}
        note = make_report(settings.report, folder, _report(defense, job, result, names, resolved))
    print(table(names))
    print(f"\nresults in {options.out}" + (f"\n{note}" if note else ""))
    return DONE


def resolve_all(where: str, defense: Defense, options: argparse.Namespace) -> tuple[DefendSettings, Any, list[Given]]:
    """The settings of the command and of the defense, and all that was given, for those of data and model."""
    everything = given(options, where.removeprefix("bdfast "))
    known = keys([DataSettings, ModelSettings, DefendSettings, defense.config])
    settings = resolve(where, DefendSettings, everything, known)
    config: Any = resolve(where, defense.config, everything, known)
    return settings, config, [item for item in everything if item.key in keys([DataSettings, ModelSettings])]


def prepare(where: str, settings: DefendSettings, config: Any, given: Sequence[Given]) -> Job:
    """Load what was named; what an attack's folder says comes first, so that options win over it."""
    folder = None
    if settings.attack_dir is not None:
        folder = read_attack_folder(where, Path(settings.attack_dir))
        given = [*folder.data_settings(), Given("--attack-dir", "model", folder.model), *given]
    known = keys([DataSettings, ModelSettings])
    data = resolve(where, DataSettings, given, known)
    network = resolve(where, ModelSettings, given, known)
    if network.model is None:
        raise ValueError(message(where, "--model", "a checkpoint", "none", "pass --model FILE or --attack-dir DIR"))
    splits = data.load()
    victim = load_model(where, network, splits, data.data)
    network = replace(network, arch=victim.arch, normalize=format_normalize(victim.normalize))
    print(
        f"{network.model}: {victim.arch}, images normalised with {network.normalize}; data: {data.data}",
        file=sys.stderr,
    )
    return Job(data, network, settings, config, folder, splits, victim)


def apply(defense: Defense, job: Job, resume: Path) -> Any:
    """Run the defense on what it needs."""
    if resume.exists():
        print(f"continuing from {resume}", file=sys.stderr)
    return defense.function(
        *(PROVIDERS[need](job) for need in defense.needs),
        job.config,
        callback=Progress(defense.name),
        normalize=job.victim.normalize,
        checkpoint=resume,
    )


def write_results(
    folder: Path, job: Job, result: Any, before: Metrics, after: Metrics, resolved: dict[str, Any]
) -> None:
    """Model, settings, rates, and the history as JSON and as CSV."""
    save_state(folder / MODEL_FILE, result.model.state_dict(), job.victim.metadata)
    write_json(folder / CONFIG_FILE, resolved)
    write_json(folder / "metrics.json", {"before": before, "after": after, **ratings(before, after)})
    write_csv(folder / "results.csv", epoch_rows(result.history, before, after))
    with atomic_write(folder / "result.json") as file:
        file.write(result.to_json() + "\n")


def _trigger(job: Job) -> Any:
    return None if job.folder is None else job.folder.poisoned


def _report(defense: Defense, job: Job, result: Any, rates: dict[str, Metrics], resolved: dict[str, Any]) -> Report:
    samples = None
    if job.folder is not None:
        networks: dict[str, nn.Module] = {"before": job.victim.model, defense.name: result.model}
        triggered = job.folder.poisoned.trigger(*job.splits.test)
        samples = pick_samples(networks, triggered, job.splits.class_names, normalize=job.victim.normalize)
    return Report(
        title=f"{defense.name} on {job.victim.arch}, {job.data.data}",
        rates=rates,
        history=result.history,
        settings=plain(resolved),
        timings=result.timings,
        versions=versions(),
        samples=samples,
    )


COMMAND = Command(
    name="defend",
    summary="run a defense on a checkpoint",
    description=(
        "Run a defense on a checkpoint. DIR gets model.safetensors, config.json, metrics.json, result.json,\n"
        "results.csv and a report, all at the end; if training is interrupted, the same command continues it.\n"
        "'bdfast defend DEFENSE --help' lists the settings of a defense."
    ),
    example=(
        "  bdfast defend d3 --attack-dir runs/badnets --reserve 0.1 --out runs/d3\n"
        "  bdfast defend d3 --model net.pt --arch resnet18 --data photos/ --reserve 500 --set lam=0.5 --out runs/d3"
    ),
    add_arguments=add_arguments,
    run=run,
)
