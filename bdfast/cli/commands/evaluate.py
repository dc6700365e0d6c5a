"""``bdfast evaluate``: the rates of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from bdfast.cli.command import DONE, Command
from bdfast.cli.inputs import DataSettings, ModelSettings, judge
from bdfast.cli.known import load_victim
from bdfast.cli.outputs import ratings, table, to_json, write_json
from bdfast.cli.plan import Plan, make_plan
from bdfast.cli.settings import Given, add_settings, given, setting
from bdfast.data import DataSplits
from bdfast.metrics import Metrics

WHERE = "bdfast evaluate"


@dataclass(frozen=True)
class EvaluateSettings:
    """What is compared."""

    attack_dir: str | None = setting(
        None, "folder of `bdfast attack`, or a record: its data and trigger, its victim by default"
    )
    before: str | None = setting(None, "checkpoint before a defense, for DER and RIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_settings(parser, ModelSettings, DataSettings, EvaluateSettings)
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--out", metavar="FILE", help="write the JSON to a file, too")


def run(options: argparse.Namespace) -> int:
    """Load, evaluate, print."""
    rates = evaluate_all(given(options, "evaluate"))
    content: dict[str, object] = dict(rates)
    if "before" in rates:
        content.update(ratings(rates["before"], rates["model"]))
    if options.out:
        write_json(Path(options.out), content)
    print(to_json(content) if options.json else table(rates, extended=True))
    return DONE


def evaluate_all(settings: list[Given]) -> Mapping[str, Metrics]:
    """The rates of the model, after those of the one before if there is one."""
    plan = make_plan(WHERE, EvaluateSettings, None, settings)
    splits = plan.data.load()
    rates = {}
    if plan.settings.before is not None:
        rates["before"] = _rates(replace(plan.network, model=plan.settings.before), plan, splits)
    rates["model"] = _rates(plan.network, plan, splits)
    return rates


def _rates(network: ModelSettings, plan: Plan[EvaluateSettings], splits: DataSplits) -> Metrics:
    loaded, known = load_victim(WHERE, network, splits, plan.data.data, plan.folder)
    return judge(loaded.model, splits, known.triggered, loaded.normalize)


COMMAND = Command(
    name="evaluate",
    summary="accuracy and attack success of a checkpoint",
    description=(
        "Measure a checkpoint on a test set. With --attack-dir the trigger is known, and ASR and RA with it, over\n"
        "images of other classes than the target. ASR+target counts all triggered images, ACC-target leaves out the\n"
        "target class."
    ),
    example=(
        "  bdfast evaluate --model runs/d3/model.safetensors --attack-dir runs/badnets\n"
        "  bdfast evaluate --model record/badnet_0_1 --data cifar10\n"
        "  bdfast evaluate --model after.pt --before before.pt --arch resnet18 --data photos/ --json"
    ),
    add_arguments=add_arguments,
    run=run,
)
