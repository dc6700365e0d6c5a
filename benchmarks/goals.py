"""The speeds that were aimed at on the CPU, as ratios within one run, with glibc's default allocator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple


class Goal(NamedTuple):
    """``baseline`` takes at least ``at_least`` times as long as bdfast."""

    op: str
    case: str
    baseline: str
    at_least: float


CPU_GOALS = (
    Goal("projected_sgd_step_", "4096x4096", "usual", 5.0),
    Goal("projected_sgd_step_", "4096x4096", "eager", 1.3),
    Goal("projected_sgd_step_", "4096x4096", "compile", 1.0),
    Goal("projected_sgd_step_", "d3-cifar10", "usual", 8.0),
    Goal("projected_sgd_step_", "d3-cifar10", "compile", 1.0),
    Goal("hinge_cross_entropy", "imagenet", "eager", 3.0),
    Goal("hinge_cross_entropy", "d3-cifar10", "eager", 2.5),
    Goal("bounded_ascent_cross_entropy", "advrbd-cifar10", "eager", 1.5),
    Goal("kl_divergence", "imagenet", "eager", 8.0),
    Goal("kl_divergence", "imagenet", "compile", 1.3),
    Goal("kl_divergence", "cifar10", "compile", 5.0),
    Goal("sce_margin", "imagenet", "usual", 30.0),
    Goal("sce_margin", "imagenet", "compile", 1.3),
    Goal("sce_margin", "cifar10", "compile", 5.0),
    Goal("histogram_entropy", "layer", "usual", 20.0),
    Goal("smallest_per_class", "imagenet", "usual", 20.0),
    Goal("smallest_per_class", "imagenet", "eager", 3.0),
    Goal("masked_pgd_step_", "cifar10", "eager", 4.0),
    Goal("masked_pgd_step_", "cifar10", "compile", 1.5),
    Goal("batch_norm_clipped_relu", "stem-forward", "compile", 1.0),
    Goal("batch_norm_clipped_relu", "stem", "compile", 1.2),
)


def verdicts(records: Sequence[Mapping[str, Any]], goals: Sequence[Goal] = CPU_GOALS) -> Iterator[tuple[Goal, float]]:
    """Every goal that ``records`` (float32) speak of, with the ratio measured.

    Example:
        >>> goal = Goal("op", "case", "eager", 2.0)
        >>> record = {"op": "op", "case": "case", "dtype": "float32", "ratios": {"eager": 2.5}}
        >>> [ratio >= goal.at_least for goal, ratio in verdicts([record], [goal])]
        [True]
    """
    for goal in goals:
        for record in records:
            if (record["op"], record["case"], record["dtype"]) == (goal.op, goal.case, "float32"):
                ratio = record.get("ratios", {}).get(goal.baseline)
                if ratio is not None:
                    yield goal, ratio
