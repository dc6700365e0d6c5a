"""Cases of smallest_per_class, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.smallest_per_class import SELECT, smallest_per_class
from bdfast.testing.draws import seeded
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int],
    classes: int,
    k: int,
    balance: str = "even",
    special: str = "",
    layout: str = "contiguous",
) -> Inputs:
    """Scores and labels.

    ``balance``: "even", "gaps" (every third class is empty), "one" (nearly all in the last class). ``special``: "ties"
    (five different scores), "equal", "zeros" (of both signs), "non-finite".
    """
    generator = seeded(0)
    (n,) = shape
    scores = torch.randn(n, generator=generator)
    labels = torch.randint(classes, (n,), generator=generator)
    if balance == "gaps":
        labels = labels // 3 * 3
    if balance == "one":
        labels[torch.arange(n) % 50 != 0] = classes - 1
    if special == "ties":
        scores = (scores * 1.2).round().clamp(-2, 2)
    if special == "equal":
        scores = torch.full((n,), -0.5)
    if special == "zeros":
        scores = torch.where(scores < 0, -0.0, 0.0)
    if special == "non-finite":
        scores[::3], scores[1::7], scores[2::5] = torch.nan, torch.inf, -torch.inf
    scores, labels = scores.to(device, dtype), labels.to(device)
    if layout == "strided":
        scores, labels = torch.stack((scores, -scores), dim=1)[:, 0], torch.stack((labels, labels), dim=1)[:, 1]
    return {"scores": scores, "labels": labels, "k": k, "num_classes": classes}


def run(inputs: Inputs, backend: str) -> Outputs:
    """The indices, as float64, which holds them exactly."""
    return {"indices": smallest_per_class(**inputs, backend=backend).double()}


def two_sorts(scores: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """Sort by score, then stably by class, and keep the first k of each."""
    by_score = scores.argsort(stable=True)
    order = by_score[labels[by_score].argsort(stable=True)]
    sizes = torch.bincount(labels, minlength=num_classes)
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    return order[(rank < k) & (scores[order] < torch.inf)]


def class_loop(scores: Tensor, labels: Tensor, k: int, num_classes: int) -> Tensor:
    """What users write: a loop over the classes with topk."""
    chosen = []
    for label in range(num_classes):
        indices = (labels == label).nonzero()[:, 0]
        chosen.append(indices[scores[indices].topk(min(k, len(indices)), largest=False).indices])
    return torch.cat(chosen)


def eager(inputs: Inputs) -> Outputs:
    """The indices by two sorts."""
    return {"indices": two_sorts(**inputs).double()}


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One selection."""
    return lambda: smallest_per_class(**inputs, backend=backend)


def bytes_moved(inputs: Inputs) -> int:
    """One read of scores and labels."""
    tensors: list[Tensor] = [inputs["scores"], inputs["labels"]]
    return sum(t.numel() * t.element_size() for t in tensors)


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    return [(SELECT.call, (*inputs.values(), "auto"))]


CASES = (
    Case("cifar10", "PAD-FT: 300 of each class", {"shape": (50_000,), "classes": 10, "k": 300}, benchmark=True),
    Case("imagenet", "many classes", {"shape": (200_000,), "classes": 1000, "k": 30}, benchmark=True),
    Case("empty", "no samples", {"shape": (0,), "classes": 3, "k": 2}, _ALL),
    Case("one-class", "plain k smallest", {"shape": (1000,), "classes": 1, "k": 37}, _ALL),
    Case("k=1", "the smallest of each class", {"shape": (500,), "classes": 9, "k": 1}, _ALL),
    Case("k>n", "every class whole: a sort", {"shape": (300,), "classes": 7, "k": 1000}, _ALL),
    Case("gaps", "classes without samples", {"shape": (700,), "classes": 20, "k": 11, "balance": "gaps"}),
    Case("mostly-padding", "a padded result far larger than N", {"shape": (300,), "classes": 9000, "k": 300}),
    Case("one-large", "one class has nearly all", {"shape": (5000,), "classes": 12, "k": 64, "balance": "one"}),
    Case(
        "ties", "few different scores: the index decides", {"shape": (4099,), "classes": 5, "k": 200, "special": "ties"}
    ),
    Case("equal", "one score: the first k", {"shape": (2000,), "classes": 3, "k": 100, "special": "equal"}, _ALL),
    Case("zeros", "-0.0 equals 0.0", {"shape": (600,), "classes": 4, "k": 50, "special": "zeros"}, _ALL),
    Case(
        "non-finite", "NaN and +inf left out", {"shape": (999,), "classes": 6, "k": 80, "special": "non-finite"}, _ALL
    ),
    Case("strided", "neither input contiguous", {"shape": (400,), "classes": 8, "k": 10, "layout": "strided"}, _ALL),
    Case("chunks", "more samples than one chunk", {"shape": (140_001,), "classes": 3, "k": 5000}),
    Case(
        "past-l2",
        "far past the L2 of a GPU",
        {"shape": (20_000_000,), "classes": 1000, "k": 300},
        benchmark=True,
        large=True,
    ),
)

SUITE = OpSuite(
    name="smallest_per_class",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": lambda inputs: lambda: class_loop(**inputs),
        "eager": lambda inputs: lambda: two_sorts(**inputs),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
