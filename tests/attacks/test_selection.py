from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.attacks import BadNets, WaNet, poison
from bdfast.attacks.selection import select


def images_of(labels: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 300),
    rate=st.floats(0, 1),
    cover_rate=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_and_disjoint(count: int, rate: float, cover_rate: float, seed: int) -> None:
    labels = torch.arange(count) % 7
    wanted = torch.zeros_like(labels)
    n_poison, n_cover = round(rate * count), int(cover_rate * count)
    if n_poison + n_cover > count:
        with pytest.raises(ValueError, match="cover_rate"):
            select(WaNet(), labels, wanted, rate=rate, cover_rate=cover_rate, seed=seed)
        return
    chosen = select(WaNet(), labels, wanted, rate=rate, cover_rate=cover_rate, seed=seed)
    both = torch.cat(chosen).tolist()
    assert (len(chosen.poison), len(chosen.cover)) == (n_poison, n_cover)
    assert len(set(both)) == len(both)
    assert all(0 <= index < count for index in both)
    for part in chosen:
        assert part.tolist() == sorted(part.tolist())


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=80), target=st.integers(0, 4), rate=st.floats(0, 1))
def test_clean_label_draws_from_the_target_class_or_says_how_much_there_is(
    labels: list[int], target: int, rate: float
) -> None:
    y = torch.tensor(labels)
    available, wanted = labels.count(target), round(rate * len(labels))
    if wanted > available:
        with pytest.raises(ValueError, match=rf"at most {available}/{len(labels)} = .*\({wanted} images\)"):
            poison(images_of(y), y, "sig", rate=rate, target=target, num_classes=5)
        return
    data = poison(images_of(y), y, "sig", rate=rate, target=target, num_classes=5)
    assert int(data.is_poisoned.sum()) == wanted
    assert torch.equal(data.labels, y)
    assert (y[data.is_poisoned] == target).all()


def test_the_largest_rate_that_the_error_names_is_accepted() -> None:
    y = torch.tensor([0] * 139 + [1] * 1261)
    with pytest.raises(ValueError, match="139/1400") as caught:
        poison(images_of(y), y, "sig", rate=0.1)
    largest = float(str(caught.value).split("= ")[1].split(",")[0])
    assert int(poison(images_of(y), y, "sig", rate=largest).is_poisoned.sum()) == 139


def test_a_default_rate_takes_what_there_is() -> None:
    y = torch.tensor([0] * 5 + [1] * 95)
    assert int(poison(images_of(y), y, "sig").is_poisoned.sum()) == 5
    assert int(poison(images_of(y), y, "badnets").is_poisoned.sum()) == 10
    wanet = poison(images_of(y), y, "wanet", rate=0.5)
    assert (int(wanet.is_poisoned.sum()), int(wanet.is_cover.sum())) == (50, 50)
    wanet = poison(images_of(y), y, "wanet")
    assert (int(wanet.is_poisoned.sum()), int(wanet.is_cover.sum())) == (10, 20)


def test_dirty_label_poison_is_uniform_over_the_set() -> None:
    """Each index is drawn about equally often, the target class included."""
    y = torch.arange(20) % 2
    counts = torch.zeros(20)
    for seed in range(400):
        chosen = select(BadNets(), y, torch.zeros_like(y), rate=0.25, cover_rate=None, seed=seed)
        counts[chosen.poison] += 1
    assert counts.sum() == 400 * 5
    assert 60 < counts.min() <= counts.max() < 140  # mean 100, standard deviation 8.7


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), float("inf")])
def test_rates_outside_the_unit_interval_are_refused(rate: float) -> None:
    y = torch.arange(10)
    with pytest.raises(ValueError, match=r"poison: `rate` expected a number in \[0, 1\]"):
        poison(images_of(y), y, "badnets", rate=rate)
    with pytest.raises(ValueError, match="`cover_rate` expected a number"):
        poison(images_of(y), y, "wanet", cover_rate=rate)


def test_rates_of_another_type_are_refused() -> None:
    y = torch.arange(10)
    with pytest.raises(TypeError, match="`rate` expected a number"):
        poison(images_of(y), y, "badnets", rate="10%")  # type: ignore[arg-type]


def test_covers_need_an_attack_that_has_them() -> None:
    y = torch.arange(10)
    with pytest.raises(ValueError, match="badnets, which has no cover samples"):
        poison(images_of(y), y, "badnets", cover_rate=0.1)
    assert not poison(images_of(y), y, "badnets", cover_rate=0.0).is_cover.any()
