"""``bdfast defend``: run a defense on a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from bdfast import models
from bdfast.attacks import PoisonedData
from bdfast.cli.command import DONE, Command, exit_codes
from bdfast.cli.defenses import DEFENSES, Defense
from bdfast.cli.environment import versions
from bdfast.cli.inputs import (
    CONDITIONS,
    CONFIG_FILE,
    MODEL_FILE,
    DataSettings,
    ModelSettings,
    auxiliary_set,
    judge,
    reserve_index,
)
from bdfast.cli.known import Folder, RecordFolder
from bdfast.cli.outputs import (
    RESUME_FILE,
    epoch_rows,
    ratings,
    record_rows,
    results_folder,
    table,
    write_csv,
    write_json,
)
from bdfast.cli.plan import Inputs, Plan, load_inputs, make_plan
from bdfast.cli.reporting import check_report, make_report
from bdfast.cli.settings import Given, add_settings, document, given, setting
from bdfast.cli.state import note_of_foreign_state, state_folder
from bdfast.errors import message, optional_import
from bdfast.files import atomic_write, refuse_links
from bdfast.integrations.backdoorbench import write_defense_result
from bdfast.metrics import Metrics
from bdfast.report import Report, pick_samples
from bdfast.runtime.checkpoints import save_state
from bdfast.runtime.guard import model_device
from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Progress


@dataclass(frozen=True)
class DefendSettings:
    """What the defender holds."""

    attack_dir: str | None = setting(
        None, "folder of `bdfast attack`, or a record of BackdoorBench: its victim, data and trigger"
    )
    reserve: int | float | str = setting(0.05, "clean training images: a share, a count, or a file of indices")
    draw: Literal["permutation", "backdoorbench"] = setting("permutation", "how the reserve is drawn")
    auxiliary: str | None = setting(
        None,
        f"what to hold in their place: the same images in another condition ({', '.join(CONDITIONS)}), another data "
        "set (an .npz file or a folder; --reserve says how much of it), or a folder of `bdfast defend gic`",
    )
    seed: int = setting(0, "seeds the defense, and the draw of the reserve where it takes one")
    report: Literal["html", "png", "none"] = setting("html", "report of what changed")


@dataclass(frozen=True)
class Job(Inputs[DefendSettings]):
    """Everything that a defense may need."""

    @property
    def poisoned(self) -> PoisonedData | None:
        """The poisoned set, where an attack's folder is known."""
        return self.known.poisoned

    @property
    def reserve(self) -> Tensor:
        """Indices of the clean training images that the defender holds."""
        settings = self.plan.settings
        return reserve_index(self.splits, settings.reserve, settings.seed, settings.draw)

    @property
    def clean(self) -> tuple[Tensor, Tensor]:
        """The reserve, or what the defender holds in its place."""
        settings = self.plan.settings
        if settings.auxiliary is not None:
            return auxiliary_set(self.splits, self.reserve, settings.auxiliary, settings.seed, settings.reserve)
        images, labels = self.splits.train
        return images[self.reserve], labels[self.reserve]

    @property
    def training_set(self) -> PoisonedData | tuple[Tensor, Tensor]:
        """What the victim was trained on: the poisoned set, else the data as it is, which may hold anything."""
        return self.splits.train if self.poisoned is None else self.poisoned

    def fresh_network(self) -> nn.Module:
        """A new network of the victim's architecture, where the victim is."""
        images, name = self.splits.train[0], self.victim.arch.replace("preactresnet", "preact_resnet")
        model = models.build(
            name, num_classes=len(self.splits.class_names), image_size=(images.shape[2], images.shape[3]),
            channels=images.shape[1],
        )  # fmt: skip
        return model.to(model_device(self.victim.model))

    def judge(self, model: nn.Module) -> Metrics:
        """The rates of ``model``, which expects its images as the victim does."""
        return judge(model, self.splits, self.known.triggered, self.victim.normalize)


PROVIDERS: dict[str, Callable[[Job], Any]] = {
    "model": lambda job: job.victim.model,
    "factory": lambda job: job.fresh_network,
    "reserve": lambda job: job.clean,
    "poisoned": lambda job: job.training_set,
}
"""What a defense can ask for by name (``Defense.needs``)."""

CLEAN_IMAGES = ("reserve", "draw", "auxiliary")
"""Settings that choose clean images: none of a defense that takes no such images."""


def without(defense: Defense) -> tuple[str, ...]:
    """Settings that would have no effect on a defense."""
    return () if "reserve" in defense.needs else CLEAN_IMAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each defense."""
    kinds = parser.add_subparsers(title="defenses", metavar="DEFENSE", required=True, dest="defense")
    for defense in DEFENSES:
        one = kinds.add_parser(
            defense.name,
            help=defense.summary,
            description=f"Run {defense.name}: {defense.summary}.",
            epilog=f"{document(defense.config, f'settings of {defense.name}')}\n\n{exit_codes()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_settings(one, ModelSettings, DataSettings, DefendSettings, without=without(defense))
        one.add_argument("--out", metavar="DIR", help="folder for the results; required without --record")
        one.add_argument(
            "--record",
            action="store_true",
            help="write defense_result.pt and its tables into the record's defense/NAME, which is --out by default",
        )
        one.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        one.set_defaults(chosen=defense)


def run(options: argparse.Namespace) -> int:
    """Run the defense that was named."""
    defense: Defense = options.chosen
    settings = given(options, f"defend {defense.name}")
    return defend(f"bdfast defend {defense.name}", defense, settings, out=options.out, into_record=options.record)


def defend(where: str, defense: Defense, settings: Sequence[Given], *, out: str | None, into_record: bool) -> int:
    """Load, defend, evaluate before and after, and write everything at the end."""
    optional_import("safetensors", extra="cli", purpose="to write model.safetensors")
    chosen = make_plan(where, DefendSettings, defense.config, settings, without=without(defense))
    check_report(chosen.settings.report)
    target = None
    if into_record:
        target = record_path(where, chosen.folder)
        out = out or str(target / "defense" / defense.name)
    if out is None:
        raise ValueError(message(where, "--out", "a folder for the results", "none", "pass --out DIR"))
    foreign = None if chosen.folder is None else chosen.folder.path
    if foreign is not None:
        refuse_links(where, foreign, out)
    state = state_folder(out, foreign)
    if note := note_of_foreign_state(out, state, defense.keeps):
        print(f"note: {note}", file=sys.stderr)
    with results_folder(where, out, kept=[state / name for name in defense.keeps]) as folder:
        job = load_job(where, chosen)
        if defense.save is not None:
            text, note = _make_data(defense, job, state / RESUME_FILE, folder)
        else:
            before = job.judge(job.victim.model)
            result = apply(defense, job, state / RESUME_FILE)
            after = job.judge(result.model)
            resolved = job.plan.record(f"defend {defense.name}")
            write_results(folder, job, result, before, after, resolved)
            rates = {"before": before, defense.name: after}
            text = table(rates)
            note = make_report(chosen.settings.report, folder, _report(defense, job, result, rates, resolved))
    if target is not None and defense.save is None:
        try:
            write_into_record(target, defense, job, result, after)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"the results are in {out}, those of the record are not complete") from interrupt
    print(text)
    print(f"\nresults in {out}" + (f"\n{note}" if note else ""))
    return DONE


def _make_data(defense: Defense, job: Job, resume: Path, folder: Path) -> tuple[str, str | None]:
    """Of a defense that makes data and no model: the data, settings and a report without rates; what to say of them."""
    result = apply(defense, job, resume)
    resolved = job.plan.record(f"defend {defense.name}")
    assert defense.save is not None
    defense.save(folder, result)
    write_json(folder / CONFIG_FILE, resolved)
    with atomic_write(folder / "result.json") as file:
        file.write(result.to_json() + "\n")
    report = Report(
        title=f"{defense.name} for {job.victim.arch}, {job.plan.data.data}",
        settings=plain(resolved),
        timings=result.timings,
        versions=versions(),
        panels=defense.panels(result, job.training_set, job.splits.class_names),
    )
    return defense.describe(result), make_report(job.plan.settings.report, folder, report)


def load_job(where: str, plan: Plan[DefendSettings]) -> Job:
    """Load data and model, and say what they are."""
    inputs = load_inputs(where, plan)
    job = Job(inputs.plan, inputs.splits, inputs.victim, inputs.known)
    network = job.plan.network
    about = f"{job.victim.arch}, images normalised with {network.normalize}; data: {job.plan.data.data}"
    print(f"{network.model}: {about}", file=sys.stderr)
    return job


def apply(defense: Defense, job: Job, resume: Path) -> Any:
    """Run the defense on what it needs."""
    for path in map(resume.with_name, defense.keeps):
        if path.exists():
            print(f"continuing from {path}", file=sys.stderr)
    return defense.function(
        *(PROVIDERS[need](job) for need in defense.needs),
        job.plan.config,
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


def record_path(where: str, folder: Folder | None) -> Path:
    """The folder of the record that results go into."""
    if not isinstance(folder, RecordFolder):
        expected = "a record of BackdoorBench to write into"
        raise ValueError(message(where, "--record", expected, "none", "pass --attack-dir record/NAME"))
    return folder.path


def write_into_record(target: Path, defense: Defense, job: Job, result: Any, after: Metrics) -> None:
    """``defense/NAME/`` as BackdoorBench's scripts leave it."""
    write_defense_result(
        target,
        defense.name,
        result.model,
        model_name=job.victim.arch,
        num_classes=len(job.splits.class_names),
        history=record_rows(result.history, after),
        index=job.reserve if "reserve" in defense.needs else None,
    )


def _report(defense: Defense, job: Job, result: Any, rates: dict[str, Metrics], resolved: dict[str, Any]) -> Report:
    samples = None
    if job.known.triggered is not None:
        networks: dict[str, nn.Module] = {"before": job.victim.model, defense.name: result.model}
        samples = pick_samples(networks, job.known.triggered, job.splits.class_names, normalize=job.victim.normalize)
    return Report(
        title=f"{defense.name} on {job.victim.arch}, {job.plan.data.data}",
        rates=rates,
        history=result.history,
        settings=plain(resolved),
        timings=result.timings,
        versions=versions(),
        samples=samples,
        panels=defense.panels(result, job.training_set, job.splits.class_names),
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
