"""Step 1: which samples are trusted, and which suspected."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from bdfast.defenses.pad_ft.scores import Scores
from bdfast.defenses.pad_ft.selection import class_spread, purity, select, split_class


def scores_of(margins: list[float], labels: list[int]) -> Scores:
    return Scores(
        torch.tensor(margins), torch.tensor(labels), torch.zeros(len(labels)).int(), torch.zeros(len(labels), 0)
    )


def test_the_k_smallest_margins_of_each_class() -> None:
    scores = scores_of([3.0, 1.0, 2.0, 0.5, -1.0, 0.5], [0, 0, 0, 1, 1, 1])
    picked = select(scores, 2, k=2, trim=0.0, ratio=None)
    assert picked.selected.tolist() == [1, 2, 4, 3]  # ties to the lower index
    assert len(picked.suspects) == 0
    assert picked.spread == []
    assert picked.split == []


def test_short_and_empty_classes_and_rows_that_are_not_finite() -> None:
    inf = math.inf
    scores = scores_of([3.0, inf, 2.0, inf], [0, 0, 2, 2])
    assert scores.nonfinite == 2
    assert select(scores, 4, k=2, trim=0.0, ratio=None).selected.tolist() == [0, 2]


def test_trim_passes_over_the_lowest() -> None:
    scores = scores_of([float(v) for v in range(10)] + [math.inf], [0] * 11)
    assert select(scores, 1, k=3, trim=0.25, ratio=None).selected.tolist() == [2, 3, 4]  # floor(0.25 * 10) = 2


def planted(loose: float, gap: float) -> tuple[Scores, Tensor]:
    """Four classes of 60 samples in 8 dimensions; 30 of class 2 are poisoned: apart, with margins lower by ``gap``."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat_interleave(60)
    sketch = torch.randn(240, 8, generator=g) + 4 * torch.nn.functional.one_hot(labels, 8)
    margins = -5 + torch.randn(240, generator=g)
    poisoned = torch.zeros(240, dtype=torch.bool)
    poisoned[120:150] = True
    sketch[poisoned] = 5 + loose * torch.randn(30, 8, generator=g)
    margins[poisoned] -= gap
    return Scores(margins, labels, torch.arange(240).int() % 4, sketch), poisoned


@pytest.mark.parametrize("gap", [5.0, -2.0])  # poison of lower loss than the rest, and of higher
def test_a_looser_mode_is_suspected_whatever_its_loss(gap: float) -> None:
    scores, poisoned = planted(loose=2.0, gap=gap)
    picked = select(scores, 4, k=20, trim=0.0, ratio=1.45, gap=1.3, diversity=0.45)
    assert [record["class"] for record in picked.split] == [2]
    assert picked.suspects.tolist() == poisoned.nonzero().flatten().tolist()
    assert purity(picked.selected, scores.labels, poisoned, 4)["2"] == 1.0
    assert torch.bincount(scores.labels[picked.selected]).tolist() == [20, 20, 20, 20]
    suspected, trusted = picked.split[0]["variance"]
    assert suspected > 2 * trusted


def test_modes_of_one_loss_are_not_told_apart() -> None:
    """A class of two styles: it scatters, but nothing in it is easier than the rest."""
    scores, _ = planted(loose=2.0, gap=0.0)
    picked = select(scores, 4, k=20, trim=0.0, ratio=1.45, gap=1.3, diversity=0.45)
    assert picked.spread[2] > 1.45
    assert picked.split == []
    assert len(picked.suspects) == 0


def test_a_mode_next_to_one_other_class_is_a_style() -> None:
    scores, poisoned = planted(loose=2.0, gap=2.0)
    style = replace(scores, runner_up=torch.where(poisoned, 3, scores.runner_up).int())
    pick = partial(select, num_classes=4, k=20, trim=0.0, ratio=1.45, gap=1.3, clear_gap=4.0, diversity=0.45)
    assert len(pick(scores).split) == 1
    assert pick(style).split == []


def test_a_mode_of_much_lower_loss_is_suspected_whatever_its_second_classes() -> None:
    """A strong blend: the true class is not the second one any more."""
    scores, poisoned = planted(loose=2.0, gap=5.0)
    blend = replace(scores, runner_up=torch.where(poisoned, 3, scores.runner_up).int())
    picked = select(blend, 4, k=20, trim=0.0, ratio=1.45, gap=1.3, clear_gap=2.5, diversity=0.45)
    assert picked.suspects.tolist() == poisoned.nonzero().flatten().tolist()


def test_between_modes_of_one_width_the_loss_decides() -> None:
    scores, poisoned = planted(loose=1.0, gap=5.0)
    picked = select(scores, 4, k=20, trim=0.0, ratio=1.45, gap=1.3, diversity=0.45)
    assert picked.suspects.tolist() == poisoned.nonzero().flatten().tolist()
    suspected, trusted = picked.split[0]["margin"]
    assert suspected < trusted - 3


def test_without_a_class_that_stands_out_the_lowest_losses_stay() -> None:
    scores, _ = planted(loose=1.0, gap=5.0)
    g = torch.Generator().manual_seed(3)
    sketch = torch.randn(240, 8, generator=g)
    calm = replace(scores, sketch=sketch)
    picked = select(calm, 4, k=20, trim=0.0, ratio=1.45, gap=1.3, diversity=0.45)
    plain = select(calm, 4, k=20, trim=0.0, ratio=None)
    assert max(picked.spread) < 1.45
    assert torch.equal(picked.selected, plain.selected)
    assert len(picked.suspects) == 0


def test_class_spread_ignores_small_classes_and_rows_that_are_not_finite() -> None:
    scores, _ = planted(loose=1.0, gap=0.0)
    spread = class_spread(scores, 5)
    assert math.isnan(spread[4])
    margins = scores.margins.clone()
    margins[:50] = math.inf  # leaves 10 of class 0
    assert math.isnan(class_spread(replace(scores, margins=margins), 4)[0])


def test_identical_features_do_not_divide_by_zero() -> None:
    suspects, record = split_class(torch.ones(20, 3), torch.zeros(20), 0.0)
    assert suspects.dtype == torch.bool
    assert record["whole"] == 0.0
    labels = torch.arange(40) % 2
    same = Scores(torch.zeros(40), labels, labels.int(), torch.ones(40, 3))
    assert all(math.isnan(v) for v in class_spread(same, 2))


def test_the_split_does_not_depend_on_the_order_of_samples() -> None:
    scores, _ = planted(loose=2.0, gap=5.0)
    index = (scores.labels == 2).nonzero().flatten()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    straight, _ = split_class(scores.sketch[index], scores.margins[index], 1.0)
    shuffled, _ = split_class(scores.sketch[index[order]], scores.margins[index[order]], 1.0)
    assert torch.equal(straight[order], shuffled)


def test_purity_of_nothing_is_nan() -> None:
    found = purity(torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([True, False]), 2)
    assert found["0"] == 0.0
    assert math.isnan(found["1"])
    assert found["total"] == 0.0
