"""``bdfast score``: how suspicious each training sample looks to a network."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bdfast.attacks import PoisonedData
from bdfast.cli.command import DONE, Command, exit_codes
from bdfast.cli.environment import versions
from bdfast.cli.inputs import CONFIG_FILE, DataSettings, LoadedModel, ModelSettings
from bdfast.cli.outputs import results_folder, write_json
from bdfast.cli.plan import Plan, load_inputs, make_plan
from bdfast.cli.reporting import check_report, make_report
from bdfast.cli.scorers import SCORERS, Scorer
from bdfast.cli.settings import add_settings, document, given, setting
from bdfast.cli.state import make_state_folder, note_of_foreign_state, state_folder
from bdfast.files import refuse_links
from bdfast.report import ClassHistograms, Curves, Histogram, Panel, Report
from bdfast.runtime.plain_json import plain
from bdfast.runtime.progress import Progress
from bdfast.runtime.ranks import Ranks, torchrun
from bdfast.runtime.score_table import ScoreTable

KEPT = "unfinished.scores"
"""The chunks that are finished, while a run goes on; the same command continues from them."""

_A_DAY = 24 * 60.0  # minutes; ranks wait for the slowest one's last chunk, and torchrun ends all if one fails


@dataclass(frozen=True)
class ScoreSettings:
    """What is scored."""

    attack_dir: str | None = setting(None, "folder of `bdfast attack`, or a record: its victim and its poisoned data")
    verify: int = setting(0, "samples to score again by a plain loop in float32, and to compare; 0 for none")
    report: Literal["html", "png", "none"] = setting("html", "picture of the scores")


@dataclass(frozen=True)
class Job:
    """The model, and the training set that it is asked about."""

    plan: Plan[ScoreSettings]
    victim: LoadedModel
    data: PoisonedData | tuple[Tensor, Tensor]
    class_names: Sequence[str]

    @property
    def is_poisoned(self) -> Tensor | None:
        """bool ``[N]``, where it is known."""
        return self.data.is_poisoned if isinstance(self.data, PoisonedData) else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command of its own for each kind of score."""
    kinds = parser.add_subparsers(title="scores", metavar="SCORE", required=True, dest="score")
    for scorer in SCORERS:
        one = kinds.add_parser(
            scorer.name,
            help=scorer.summary,
            description=f"Score the training set: {scorer.summary}.",
            epilog=f"{document(scorer.config, f'settings of {scorer.name}', scorer.without)}\n\n{exit_codes()}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_settings(one, ModelSettings, DataSettings, ScoreSettings, without=scorer.without)
        one.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
        one.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        one.set_defaults(chosen=scorer)


def run(options: argparse.Namespace) -> int:
    """Load, score, and write everything at the end; under torchrun every process takes its part."""
    scorer: Scorer = options.chosen
    where = f"bdfast score {scorer.name}"
    settings = given(options, f"score {scorer.name}")
    plan = make_plan(where, ScoreSettings, scorer.config, settings, without=scorer.without)
    check_report(plan.settings.report)
    with torchrun(_A_DAY) as ranks:
        foreign = None if plan.folder is None else plan.folder.path
        if foreign is not None:
            refuse_links(where, foreign, options.out)
        state = state_folder(options.out, foreign)
        if ranks.rank > 0:  # scores with rank 0, which writes the results
            if state != Path(options.out):
                make_state_folder(where, state)
            score(scorer, load_job(where, plan), state, ranks)
            return DONE
        return _run(where, scorer, plan, Path(options.out), state, ranks)


def _run(where: str, scorer: Scorer, plan: Plan[ScoreSettings], out: Path, state: Path, ranks: Ranks) -> int:
    if note := note_of_foreign_state(out, state, (KEPT,)):
        print(f"note: {note}", file=sys.stderr)
    with results_folder(where, out, kept=(state / KEPT,)) as folder:
        job = load_job(where, plan)
        began = time.perf_counter()
        table = score(scorer, job, state, ranks)
        seconds = time.perf_counter() - began
        summary = summarise(scorer, job, table)
        if plan.settings.verify > 0 and scorer.parity is not None:
            summary["verify"] = plain(_verify(scorer, job, table))
        resolved = job.plan.record(f"score {scorer.name}")
        table.save(folder / "scores.csv")
        write_json(folder / CONFIG_FILE, resolved)
        write_json(folder / "summary.json", {**summary, "seconds": seconds})
        note = make_report(plan.settings.report, folder, _report(scorer, job, table, resolved, seconds))
    print("\n".join(f"{name:<24} {_text(value)}" for name, value in summary.items()))
    print(f"\nresults in {out}" + (f"\n{note}" if note else ""))
    return DONE


def load_job(where: str, plan: Plan[ScoreSettings]) -> Job:
    """The model, and the data that it is asked about."""
    inputs = load_inputs(where, plan)
    data = inputs.splits.train if inputs.known.poisoned is None else inputs.known.poisoned
    return Job(inputs.plan, inputs.victim, data, inputs.splits.class_names)


def score(scorer: Scorer, job: Job, state: Path, ranks: Ranks) -> ScoreTable:
    """The scores of all samples, which every rank gets; chunks that are finished lie in ``state`` meanwhile."""
    table: ScoreTable = scorer.function(
        job.victim.model,
        job.data,
        job.plan.config,
        callback=Progress(scorer.name) if ranks.rank == 0 else None,
        normalize=job.victim.normalize,
        checkpoint=state / KEPT,
        distributed=True,
    )
    return table


def summarise(scorer: Scorer, job: Job, table: ScoreTable) -> dict[str, Any]:
    """Counts, and how well the scores tell poisoned from clean samples where that is known."""
    finite = table.scores[table.scores.isfinite()]
    levels = finite.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist() if len(finite) else []
    summary: dict[str, Any] = {"samples": len(table), "quarantined": len(table.quarantined), "quantiles": levels}
    if "halved" in table.columns:
        summary["halved"] = int(table.columns["halved"].sum())
    if "selected" in table.columns:
        summary |= _selection(table, job.is_poisoned)
    if job.is_poisoned is not None:
        poisoned = job.is_poisoned[table.ids]
        summary["poisoned"] = int(poisoned.sum())
        summary["auroc"] = _towards(scorer.suspicious, table.auroc(poisoned))
        if "confidence" in table.columns:  # the plain alternative: poisoned samples are what a network is surest of
            summary["auroc of confidence"] = ScoreTable(table.ids, table.columns["confidence"]).auroc(poisoned)
    return summary


def _selection(table: ScoreTable, is_poisoned: Tensor | None) -> dict[str, Any]:
    """How many samples would be trusted and suspected, and the clean share of the trusted ones of each class."""
    selected, labels = table.columns["selected"], table.columns["label"]
    found: dict[str, Any] = {"selected": int(selected.sum()), "suspects": int(table.columns["suspect"].sum())}
    if is_poisoned is not None:
        clean = ~is_poisoned[table.ids]
        classes = sorted(set(labels[selected].tolist()))
        found["purity"] = {str(c): float(clean[selected & (labels == c)].double().mean()) for c in classes}
    return found


def _towards(suspicious: str, auroc: float) -> float:
    return auroc if suspicious == "large" else 1 - auroc


def _verify(scorer: Scorer, job: Job, table: ScoreTable) -> Any:
    assert scorer.parity is not None
    return scorer.parity(
        job.victim.model, job.data, table, job.plan.config, samples=job.plan.settings.verify,
        normalize=job.victim.normalize,
    )  # fmt: skip


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report(scorer: Scorer, job: Job, table: ScoreTable, resolved: dict[str, Any], seconds: float) -> Report:
    groups = {"all samples": table.scores}
    panels: list[Panel] = []
    if job.is_poisoned is not None and bool(job.is_poisoned.any()):
        poisoned = job.is_poisoned[table.ids]
        groups = {"clean": table.scores[~poisoned], "poisoned": table.scores[poisoned]}
        sign = 1 if scorer.suspicious == "large" else -1
        curve = {scorer.name: roc(sign * table.scores, poisoned)}
        panels.append(Curves("ROC", "clean samples flagged", "poisoned samples flagged", curve, diagonal=True))
    panels.insert(0, Histogram(f"Scores: {scorer.suspicious} is suspicious", scorer.label, groups))
    if "selected" in table.columns:
        panels.insert(0, _by_class(scorer, job, table))
    return Report(
        title=f"{scorer.name} scores of {job.victim.arch}, {job.plan.data.data}",
        settings=plain(resolved),
        timings={"score": seconds},
        versions=versions(),
        panels=panels,
    )


def _by_class(scorer: Scorer, job: Job, table: ScoreTable) -> ClassHistograms:
    known = job.is_poisoned is not None
    bad = job.is_poisoned[table.ids] if job.is_poisoned is not None else table.columns["suspect"]
    selected, labels = table.columns["selected"], table.columns["label"]
    groups = {"selected": selected, "others": ~selected & ~bad, "poisoned" if known else "suspect": bad}
    shown = {name: group for name, group in groups.items() if group.any()}
    return ClassHistograms("Scores by class", scorer.label, table.scores, labels, shown, job.class_names)


def roc(
    suspicion: Tensor,  # [N]
    positive: Tensor,  # [N] bool
    points: int = 400,
) -> tuple[list[float], list[float]]:
    """False and true positive rate as the threshold falls, at no more than so many points; NaN is left out.

    Example:
        >>> roc(torch.tensor([0.9, 0.5, 0.1]), torch.tensor([True, False, False]))
        ([0.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 1.0])
    """
    known = ~suspicion.isnan()
    suspicion, positive = suspicion[known], positive[known]
    order = suspicion.argsort(descending=True)
    values = suspicion[order]
    hits = torch.stack((~positive[order], positive[order])).double().cumsum(1)
    rates = hits / hits[:, -1:].clamp_min(1)
    last = torch.cat((values[1:] != values[:-1], torch.tensor([True])))[: len(values)]  # of samples of equal score
    rates = torch.cat((torch.zeros(2, 1, dtype=torch.double), rates[:, last]), dim=1)
    kept = torch.linspace(0, rates.shape[1] - 1, min(points, rates.shape[1])).round().long()
    return rates[0, kept].tolist(), rates[1, kept].tolist()


COMMAND = Command(
    name="score",
    summary="score every training sample by how suspicious it looks",
    description=(
        "Score the training set with a network. DIR gets scores.csv, summary.json, config.json and a report, all at\n"
        "the end; if scoring is interrupted, the same command continues it. Under torchrun all processes share the\n"
        "work, to the same scores. 'bdfast score SCORE --help' lists the settings of a score."
    ),
    example=(
        "  bdfast score advrbd --attack-dir runs/badnets --verify 256 --out runs/scores\n"
        "  torchrun --nproc-per-node 4 -m bdfast score advrbd --attack-dir runs/badnets --out runs/scores"
    ),
    add_arguments=add_arguments,
    run=run,
)
