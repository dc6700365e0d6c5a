"""Which samples each round of AdvrBD presumes clean: those of largest score, over all classes or in each of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.errors import message
from bdfast.ops import largest_scores

LEAST_LEFT = 0.01  # share of the set below which D_u is too small to hold the backdoor


def planned_rounds(samples: int, num_classes: int, config: AdvrBDConfig) -> int:
    """How many of T rounds there are: a round is left out that would leave fewer than max(K, 1 %) samples in D_u.

    Raises:
        ValueError: a round adds less than one sample, or not even the first one fits.

    Example:
        >>> planned_rounds(1400, 10, AdvrBDConfig()), planned_rounds(1400, 10, AdvrBDConfig(gamma=0.3))
        (5, 3)
    """
    if config.gamma * samples < 1:
        got = f"{config.gamma:g} of {samples} samples"
        raise ValueError(message("advrbd", "gamma", "at least one sample a round", got, "raise it, or pass more data"))
    left, rounds = samples, 0
    while rounds < config.rounds:
        left -= round_size(samples, left, config)
        if left < max(num_classes, LEAST_LEFT * samples):
            break
        rounds += 1
    if rounds == 0:
        got = f"{max(left, 0)} of {samples} left after the first round"
        remedy = "lower gamma, or pass more data"
        raise ValueError(message("advrbd", "gamma", f"at least {max(num_classes, 1)} samples in D_u", got, remedy))
    return rounds


def round_size(samples: int, left: int, config: AdvrBDConfig) -> int:
    """Samples that a round adds to D_c: ceil(gamma N), of the original set or of what is left."""
    return min(left, math.ceil(config.gamma * (samples if config.gamma_of == "all" else left)))


def partition(
    scores: Tensor,  # [N]
    labels: Tensor,  # [N]
    in_dc: Tensor,  # [N] bool
    count: int,
    *,
    per_class: bool,
) -> Tensor:
    """Indices of the ``count`` samples outside D_c with the largest scores; NaN is never chosen.

    Args:
        scores: large is presumed clean.
        labels: as given.
        in_dc: what has been chosen before.
        count: how many to choose.
        per_class: choose the same share of each class's samples (of all of them, rounded up) instead.

    Returns:
        int64, ordered by descending score, ties by index; class after class with ``per_class``.

    Example:
        >>> scores, labels = torch.tensor([5.0, 4.0, 3.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> taken = torch.tensor([True, False, False, False])
        >>> partition(scores, labels, taken, 2, per_class=False), partition(scores, labels, taken, 2, per_class=True)
        (tensor([1, 2]), tensor([1, 2]))
    """
    open_scores = torch.where(in_dc, torch.full_like(scores, float("nan")), scores)
    if not per_class:
        return largest_scores(open_scores, count)
    chosen = []
    for c in torch.unique(labels).tolist():
        index = (labels == c).nonzero().flatten()
        share = math.ceil(count * len(index) / len(labels))
        chosen.append(index[largest_scores(open_scores[index], share)])
    return torch.cat(chosen)


def random_scores(
    samples: int,
    seed: int,
    is_poisoned: Tensor | None = None,  # [N] bool
) -> Tensor:
    """Scores of rank="random", or of rank="oracle": below zero for what is poisoned.

    Example:
        >>> scores = random_scores(4, 0, torch.tensor([True, False, True, False]))
        >>> (scores < 0).tolist()
        [True, False, True, False]
    """
    scores = torch.rand(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return scores if is_poisoned is None else torch.where(is_poisoned, scores - 1, scores)


def weighed(
    one: Tensor,  # [N]
    other: Tensor,  # [N]
    labels: Tensor,  # [N]
    weight: float,
) -> Tensor:
    """Mean of a sample's two ranks in its class, 0 for the least score to 1 for the largest; NaN stays.

    Example:
        >>> weighed(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.9, 0.1, 0.5]), torch.zeros(3), 0.75).tolist()
        [0.25, 0.375, 0.875]
    """
    return weight * _ranks(one, labels) + (1 - weight) * _ranks(other, labels)


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    ranks = torch.full(scores.shape, float("nan"), dtype=torch.float32)
    for c in torch.unique(labels).tolist():
        index = ((labels == c) & ~scores.isnan()).nonzero().flatten()
        place = torch.empty(len(index), dtype=torch.float32)
        place[scores[index].argsort(stable=True)] = torch.arange(len(index), dtype=torch.float32)
        ranks[index] = place / max(1, len(index) - 1)
    return ranks
