"""Which samples an attack touches: exact counts, drawn uniformly without replacement.

``round(rate * N)`` images are poisoned and ``int(cover_rate * N)`` are covers, both of the whole set of N images (as
BackdoorBench counts), disjoint, and sorted ascending.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bdfast.attacks.base import Attack
from bdfast.attacks.checks import check_number
from bdfast.attacks.seeding import stream
from bdfast.errors import message


class Selection(NamedTuple):
    """Sample indices on the CPU, int64, sorted ascending, disjoint."""

    poison: Tensor  # [P]
    cover: Tensor  # [Q]


def select(
    attack: Attack,
    labels: Tensor,  # [N] int64
    attack_labels: Tensor,  # [N] int64
    *,
    rate: float | None,
    cover_rate: float | None,
    seed: int,
) -> Selection:
    """Draw the images to poison and the covers.

    A rate that the caller names is met exactly or refused. The attack's own default is lowered where the set cannot
    supply it: 10 % of a set whose target class holds 8 % of the images gives a clean-label attack all of those.

    Raises:
        TypeError, ValueError: a rate that is no number in [0, 1], or that the set cannot supply.
    """
    count = len(labels)
    may_poison = attack.can_poison(labels, attack_labels).cpu().nonzero().flatten()
    may_cover = attack.can_cover(labels, attack_labels).cpu()
    if rate is None:
        n_poison = min(round(attack.default_rate * count), len(may_poison))
        rate = n_poison / count if count else 0.0
    else:
        check_number("poison", "rate", rate, 0.0, 1.0, "pass the fraction of the whole set to poison")
        n_poison = round(rate * count)
        _check_supply("rate", rate, n_poison, len(may_poison), count, f"can be poisoned by {attack.name}")
    _check_cover_rate(attack, cover_rate)
    generator = stream(seed, "select")
    poison = _draw(may_poison, n_poison, generator)
    may_cover[poison] = False
    covers = may_cover.nonzero().flatten()
    if cover_rate is None:
        n_cover = min(int(attack.default_cover_rate(rate) * count), len(covers))
    else:
        n_cover = int(cover_rate * count)
        _check_supply("cover_rate", cover_rate, n_cover, len(covers), count, f"are left as covers of {attack.name}")
    return Selection(poison, _draw(covers, n_cover, generator))


def _draw(candidates: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return candidates[torch.randperm(len(candidates), generator=generator)[:count]].sort().values


def _check_cover_rate(attack: Attack, cover_rate: float | None) -> None:
    if cover_rate is None:
        return
    check_number("poison", "cover_rate", cover_rate, 0.0, 1.0, "pass the fraction of the whole set to use as covers")
    if cover_rate > 0 and not attack.has_cover:
        expected = f"None or 0 for {attack.name}, which has no cover samples"
        raise ValueError(message("poison", "cover_rate", expected, repr(cover_rate), "leave it out"))


def _check_supply(argument: str, rate: float, wanted: int, available: int, count: int, which: str) -> None:
    if wanted > available:
        largest = f"{available}/{count} = {available / count:.8g}"
        expected = f"at most {largest}, since {available} of {count} images {which}"
        got = f"{rate!r} ({wanted} images)"
        raise ValueError(message("poison", argument, expected, got, f"lower {argument}"))
