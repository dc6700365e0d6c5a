"""The parts of AdvrBD against values worked out by hand."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bdfast.defenses import AdvrBDConfig
from bdfast.defenses.advrbd.content import (
    ContentView,
    RandomErasing,
    _alike,
    content_margins,
    dealt,
    tells_classes,
)
from bdfast.defenses.advrbd.contrast import contrast, halves
from bdfast.defenses.advrbd.identification import identify, misclassified_by, recovered
from bdfast.defenses.advrbd.partition import partition, planned_rounds, random_scores, round_size, weighed
from bdfast.defenses.advrbd.quality import auroc, split_quality

NAN = float("nan")


def paper(**options: object) -> AdvrBDConfig:
    return AdvrBDConfig(**options)  # type: ignore[arg-type]


# --- partition -------------------------------------------------------------------------------------------------------


def test_the_largest_scores_that_are_left_are_chosen_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([1.0, 7.0, 7.0, 9.0, 0.0])
    taken = torch.tensor([False, False, False, True, False])
    labels = torch.zeros(5, dtype=torch.int64)
    assert partition(scores, labels, taken, 2, per_class=False).tolist() == [1, 2]


def test_nan_is_never_chosen() -> None:
    scores = torch.tensor([NAN, 1.0, NAN])
    assert partition(scores, torch.zeros(3).long(), torch.zeros(3).bool(), 3, per_class=False).tolist() == [1]


def test_every_class_gives_the_same_share() -> None:
    labels = torch.tensor([0] * 4 + [1] * 8)
    scores = torch.arange(12.0)
    chosen = partition(scores, labels, torch.zeros(12).bool(), 3, per_class=True)
    assert chosen.tolist() == [3, 11, 10]  # ceil(3 * 4 / 12) and ceil(3 * 8 / 12)


@given(st.integers(20, 400), st.integers(2, 10), st.floats(0.01, 0.9), st.integers(1, 30))
def test_planned_rounds_leave_enough_in_d_u(samples: int, classes: int, gamma: float, rounds: int) -> None:
    config = paper(gamma=gamma, rounds=rounds)
    try:
        planned = planned_rounds(samples, classes, config)
    except ValueError:
        first = samples - math.ceil(gamma * samples)
        assert gamma * samples < 1 or first < max(classes, 0.01 * samples)
        return
    assert 1 <= planned <= rounds
    assert samples - planned * math.ceil(gamma * samples) >= max(classes, 0.01 * samples)


def test_gamma_may_be_of_what_remains() -> None:
    assert round_size(100, 40, paper(gamma=0.5, gamma_of="remaining")) == 20
    assert round_size(100, 40, paper(gamma=0.5)) == 40
    assert planned_rounds(64, 4, paper(gamma=0.5, gamma_of="remaining", rounds=9)) == 4  # 32, 16, 8, 4


def test_a_round_has_to_add_a_sample() -> None:
    with pytest.raises(ValueError, match=r"advrbd: `gamma` expected at least one sample a round, got 0\.05 of 10"):
        planned_rounds(10, 2, paper())


def test_the_oracle_ranks_poison_below_everything() -> None:
    poisoned = torch.arange(50) % 5 == 0
    scores = random_scores(50, 3, poisoned)
    assert torch.equal(scores < 0, poisoned)
    assert torch.equal(scores[~poisoned], random_scores(50, 3)[~poisoned])


def test_ranks_in_a_class_are_weighed_and_nan_stays() -> None:
    one, other = torch.tensor([1.0, 2.0, 3.0, NAN, 5.0, 4.0]), torch.tensor([4.0, 3.0, 2.0, 9.0, 8.0, 7.0])
    ranks = weighed(one, other, torch.tensor([0, 0, 0, 0, 1, 1]), 0.75)
    expected = torch.tensor([0.25 * 2 / 3, 0.75 / 2 + 0.25 / 3, 0.75, NAN, 1.0, 0.0])  # of four by the other score
    torch.testing.assert_close(ranks, expected, equal_nan=True)


# --- identification --------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 0, 0, 1, 1, 1])
IN_DC = torch.tensor([True, False, False, True, False, False])
WRONG = torch.tensor([False, True, False, True, False, False])
SCORES = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])


def test_d_clean_is_d_c_and_what_is_misclassified() -> None:
    assert identify(WRONG, LABELS, IN_DC, SCORES).tolist() == [True, True, False, True, False, False]
    assert identify(WRONG, LABELS, IN_DC, SCORES, keep_dc=False).tolist() == [False, True, False, True, False, False]


def test_a_class_is_filled_up_by_score() -> None:
    clean = identify(WRONG, LABELS, IN_DC, SCORES, min_per_class=2)
    assert clean.tolist() == [True, True, False, True, True, False]


def test_the_largest_scores_of_a_class_are_kept_whatever_else_is_clean() -> None:
    clean = identify(WRONG, LABELS, IN_DC, SCORES.flip(0), min_per_class=2)
    assert clean.tolist() == [True, True, True, True, True, True]


def test_content_has_the_last_word() -> None:
    content = torch.tensor([1.0, -1.0, 1.0, NAN, 1.0, 1.0])
    assert identify(WRONG, LABELS, IN_DC, SCORES, content=content).tolist() == [True, *[False] * 5]


def test_without_a_misclassified_sample_only_d_c_is_clean() -> None:
    with pytest.warns(UserWarning, match="misclassifies nothing"):
        clean = identify(torch.zeros(6).bool(), LABELS, IN_DC, SCORES)
    assert torch.equal(clean, IN_DC)


def test_half_of_the_votes_are_not_enough() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    networks = [torch.tensor([1, 1, -1]), torch.tensor([1, 0, 1])]
    assert misclassified_by(networks, labels, "majority").tolist() == [True, False, False]
    assert misclassified_by(networks, labels, "last").tolist() == [True, False, True]
    assert misclassified_by([*networks, torch.tensor([0, 2, 2])], labels, "majority").tolist() == [True, True, True]
    assert misclassified_by([*networks, torch.tensor([1, 2, 2])], labels, "all").tolist() == [True, False, False]


def test_suspects_come_back_that_no_density_ratio_tells_apart() -> None:
    clean = torch.tensor([True, False, False, False, False])
    ratios = torch.tensor([NAN, -0.1, 0.0, NAN, -3.0])
    assert recovered(clean, ratios).tolist() == [True, True, False, False, True]
    content = torch.tensor([-1.0, 1.0, 1.0, 1.0, NAN])
    assert recovered(clean, ratios, content).tolist() == [True, True, False, False, False]


# --- contrast --------------------------------------------------------------------------------------------------------


def test_suspects_are_dealt_into_halves_anew_at_every_look() -> None:
    suspected = torch.arange(101) % 2 == 0  # 51
    one, other = halves(suspected, 0, 0)
    assert (int(one.sum()), int(other.sum())) == (26, 25)
    assert torch.equal(one | other, suspected)
    assert not bool((one & other).any())
    again, another, of_seed = (halves(suspected, seed, look)[0] for seed, look in ((0, 0), (0, 1), (1, 0)))
    assert torch.equal(one, again)
    assert not torch.equal(one, another)
    assert not torch.equal(one, of_seed)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_the_contrast_is_least_at_the_log_density_ratio(weight: float) -> None:
    """A feature with four values, which 1, 2, 3 and 4 of ten suspects have and 4, 3, 2 and 1 of ten clean samples."""
    suspects, clean = torch.tensor([1, 2, 3, 4]), torch.tensor([4, 3, 2, 1])
    x = torch.cat([torch.arange(4).repeat_interleave(n) for n in (suspects, clean)])
    z = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    objective = contrast(AdvrBDConfig(look_weight=weight), "look").objective
    labels = torch.ones(20, dtype=torch.int64)

    def loss() -> torch.Tensor:
        value, _ = objective(torch.stack((torch.zeros(20, dtype=torch.float64), z[x]), 1), labels, 10)
        return value

    (gradient,) = torch.autograd.grad(loss(), z)
    assert bool((gradient.abs() > 1e-3).any())
    with torch.no_grad():
        z.copy_((suspects.double() / clean).log() - math.log(weight))
    (gradient,) = torch.autograd.grad(loss(), z)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


# --- content ---------------------------------------------------------------------------------------------------------


def _view() -> tuple[ContentView, torch.Tensor, torch.Tensor]:
    """Three classes around (0,0), (10,0), (0,10); class 2 was left out, and 5 of its 15 samples lie in class 0."""
    g = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 15)
    centers = torch.tensor([[0.0, 0.0]] * 20 + [[10.0, 0.0]] * 20 + [[0.0, 10.0]] * 10 + [[0.0, 0.0]] * 5)
    features = centers + 0.3 * torch.randn(55, 2, generator=g)
    familiar = (centers[:, 1] < 5).float()
    logits = torch.stack((5 * familiar, 4 * familiar, torch.full((55,), 100.0)), 1)
    return ContentView(features, logits), labels, familiar.bool()


def test_samples_that_lie_in_another_class_get_a_margin_below_0() -> None:
    view, labels, familiar = _view()
    margins = content_margins(view, labels, [2], seeds=0.2, shrinkage=0.1)
    assert bool(margins[:40].isnan().all())
    assert torch.equal(margins[40:] < 0, familiar[40:])


def test_seeds_by_their_neighbours_where_energy_misleads() -> None:
    view, labels, familiar = _view()
    misled = view._replace(logits=torch.where(familiar[:, None], -view.logits, view.logits))  # poison is what is new
    by_energy = content_margins(misled, labels, [2], seeds=0.2, shrinkage=0.1, seeding="energy")
    by_neighbours = content_margins(misled, labels, [2], seeds=0.2, shrinkage=0.1, seeding="neighbors")
    by_both = content_margins(misled, labels, [2], seeds=0.2, shrinkage=0.1)
    assert bool((by_energy[40:][familiar[40:]] > 0).any())
    assert bool((by_energy[40:][~familiar[40:]] < 0).all())
    assert torch.equal(by_neighbours[40:] < 0, familiar[40:])
    assert torch.equal(by_both[40:] < 0, familiar[40:])
    alike = _alike(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]]), torch.tensor([0, 0, 0, 1]),
                   torch.tensor([0, 3]), torch.tensor([0, 1, 2, 3]), 2)  # fmt: skip
    assert alike.tolist() == [0.5, 0.0]  # of 0: its like and the other one; of 3: twice the other label


def test_one_margin_by_hand() -> None:
    """Two other classes at -1 and 1 with a pooled deviation of 1; the seed of class 2 is at 5."""
    x = torch.tensor([[-2.0], [0.0], [0.0], [2.0], [5.0], [5.0]])
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    view = ContentView(x, torch.zeros(6, 3))
    margins = content_margins(view, labels, [2], seeds=0.5, shrinkage=0.0)
    assert math.isclose(margins[4].item(), 0.5 * (5 - 1) ** 2, rel_tol=1e-4)  # nearest other mean: 1


def test_samples_that_are_not_finite_have_no_margin_and_no_influence() -> None:
    view, labels, _ = _view()
    plain = content_margins(view, labels, [2], seeds=0.2, shrinkage=0.1)
    features = torch.cat((view.features, torch.tensor([[NAN, 0.0]])))
    more = ContentView(features, torch.cat((view.logits, torch.zeros(1, 3))))
    margins = content_margins(more, torch.cat((labels, torch.tensor([2]))), [2], seeds=0.2, shrinkage=0.1)
    assert math.isnan(margins[-1].item())
    torch.testing.assert_close(margins[40:-1], plain[40:])


def test_content_that_recognises_few_samples_is_announced() -> None:
    with pytest.warns(UserWarning, match="recognise 25 % of its samples"):
        assert not tells_classes(torch.tensor([1.0, -1.0, 0.0, NAN]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tells_classes(torch.tensor([1.0, -1.0, 2.0, NAN]))  # half of them


@given(st.integers(2, 120), st.integers(2, 12))
def test_every_class_is_left_out_once(classes: int, networks: int) -> None:
    groups = dealt(classes, networks)
    assert sorted(c for group in groups for c in group) == list(range(classes))
    assert len(groups) == min(classes, networks)


def test_erased_rectangles_leave_the_rest_alone() -> None:
    net = RandomErasing(nn.Identity(), share=1.0).train()
    images = torch.full((200, 3, 8, 8), 2.0)  # no fill is 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        changed = (net(images) != 2).any(1)
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert int(rows.min()) >= 1
    assert max(int(rows.max()), int(columns.max())) <= 5
    assert torch.equal(changed.flatten(1).sum(1), rows * columns)  # full rectangles


# --- quality ---------------------------------------------------------------------------------------------------------


def test_quality_counts_poison_whose_label_is_wrong_apart() -> None:
    clean = torch.tensor([True, True, False, True, False])
    labels = torch.tensor([0, 0, 0, 1, 1])
    poisoned = torch.tensor([False, True, True, False, False])
    quality = split_quality(clean, labels, poisoned, torch.tensor([0, 0, 2, 1, 1]))
    assert quality == {
        "tpr": 0.5, "fpr": 1 / 3, "leaked": 1, "retention": {"0": 1.0, "1": 0.5}, "tpr_relabelled": 1.0,
        "leaked_relabelled": 0,
    }  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_ordered_pairs(pairs: list[tuple[int, bool]]) -> None:
    scores, poisoned = torch.tensor([float(s) for s, _ in pairs]), torch.tensor([p for _, p in pairs])
    clean, bad = scores[~poisoned].tolist(), scores[poisoned].tolist()
    value = auroc(scores, poisoned)
    if not clean or not bad:
        assert math.isnan(value)
        return
    wins = sum((c > b) + 0.5 * (c == b) for c in clean for b in bad)
    assert math.isclose(value, wins / (len(clean) * len(bad)))
