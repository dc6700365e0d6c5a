"""Masked PGD: the maximum where it is known, patches and bounds, and what happens without a gradient."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from bdfast.attacks import MaskedPGD, masked_pgd
from bdfast.errors import LabelRangeError
from bdfast.ops import kl_divergence, patch_centers
from bdfast.runtime import FrozenModel


class Linear(nn.Module):
    """Two classes, logits (w x, -w x): the steepest way is sign(w) in every pixel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        z = (x * self.weight).flatten(1).sum(1)
        return torch.stack((z, -z), 1)


def batch(n: int = 6) -> tuple[FrozenModel, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 8, generator=generator)
    x = 0.3 + 0.4 * torch.rand(n, 3, 8, 8, generator=generator)
    return FrozenModel(Linear(weight)), x, weight


def inside(ids: Tensor, radius: int, size: int, seed: int, round: int) -> Tensor:
    """bool [N, 1, H, W]"""
    centers = patch_centers(ids, size, size, seed=seed, round=round)
    at = torch.arange(size)
    rows = (at[None] - centers[:, :1]).abs() <= radius
    columns = (at[None] - centers[:, 1:]).abs() <= radius
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def test_cross_entropy_reaches_the_corner_of_the_ball_inside_the_patch() -> None:
    frozen, x, weight = batch()
    ids, labels = torch.arange(6) + 40, torch.zeros(6, dtype=torch.int64)
    found = masked_pgd(frozen, x, ids, radius=1, steps=20, step_size=0.02, eps=0.1, objective="ce", labels=labels)
    mask = inside(ids, 1, 8, 0, 0)
    # Class 0 falls fastest along -sign(w); 20 steps of 0.02 cross the ball whatever the start.
    torch.testing.assert_close(found, torch.where(mask, x - 0.1 * weight.sign(), x))
    assert torch.equal(found.masked_select(~mask), x.masked_select(~mask))
    up = masked_pgd(
        frozen, x, ids, radius=1, steps=20, step_size=0.02, eps=0.1, objective="ce", labels=labels, direction="descend"
    )
    torch.testing.assert_close(up, torch.where(mask, x + 0.1 * weight.sign(), x))


def test_kl_ends_at_a_corner_on_the_side_of_its_start() -> None:
    frozen, x, weight = batch()
    found = masked_pgd(frozen, x, radius=None, steps=20, step_size=0.02, eps=0.1)
    side = ((found - x) * weight).flatten(1).sum(1).sign()[:, None, None, None]
    torch.testing.assert_close(found, x + 0.1 * weight.sign() * side)
    divergence = kl_divergence(frozen.logits(x), frozen.logits(found))
    assert (divergence > 0).all()


def test_patch_and_start_depend_on_seed_round_and_id_alone() -> None:
    frozen, x, _ = batch()
    ids = torch.arange(6) * 7
    options = {"radius": 2, "steps": 2}
    all_at_once = masked_pgd(frozen, x, ids, seed=3, **options)
    order = torch.tensor([4, 1, 5])
    torch.testing.assert_close(masked_pgd(frozen, x[order], ids[order], seed=3, **options), all_at_once[order])
    for other in ({"seed": 4}, {"seed": 3, "round": 1}):
        assert not torch.equal(masked_pgd(frozen, x, ids, **other, **options), all_at_once)  # type: ignore[arg-type]


def test_pixels_stay_in_their_range_by_channel() -> None:
    frozen, x, _ = batch()
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.5])
    lower, upper = (0 - mean) / std, (1 - mean) / std
    normalised = (x.round() - mean[:, None, None]) / std[:, None, None]  # 0 and 1
    found = masked_pgd(
        frozen, normalised, radius=None, eps=0.1 / std, step_size=0.05 / std, lower=lower, upper=upper
    )  # fmt: skip
    pixels = found * std[:, None, None] + mean[:, None, None]
    assert -1e-6 < float(pixels.min()) < float(pixels.max()) < 1 + 1e-6
    assert float((pixels - x.round()).abs().max()) == pytest.approx(0.1, abs=1e-5)


def test_a_saturated_prediction_keeps_its_random_start() -> None:
    """exp(-2000) is 0 in float32, and so is q - p."""
    _, x, _ = batch()
    frozen = FrozenModel(Linear(torch.full((3, 8, 8), 100.0)))
    start = masked_pgd(frozen, x, radius=None, steps=1, step_size=1e-12)
    assert torch.equal(masked_pgd(frozen, x, radius=None, steps=3), start)
    assert not torch.equal(start, x)


def test_nan_gradients_move_nothing_and_stay_with_their_sample() -> None:
    frozen, x, _ = batch()
    bad = x.clone()
    bad[2, 0, 0, 0] = torch.nan
    found = masked_pgd(frozen, bad, radius=1, seed=1)
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], masked_pgd(frozen, x, radius=1, seed=1)[others])


def test_channels_last_gives_the_same() -> None:
    frozen, x, _ = batch()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(masked_pgd(frozen, last, radius=2), masked_pgd(frozen, x, radius=2))


def test_arguments() -> None:
    frozen, x, _ = batch()
    with pytest.raises(ValueError, match=r"masked_pgd: `objective` expected kl or ce, got 'l2'"):
        masked_pgd(frozen, x, radius=1, objective="l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masked_pgd: `direction` expected ascend or descend"):
        masked_pgd(frozen, x, radius=1, direction="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"masked_pgd: `steps` expected a whole number, at least 1, got 0"):
        MaskedPGD(frozen, radius=1, steps=0)
    with pytest.raises(ValueError, match=r'masked_pgd: `labels` expected labels \[N\] for objective="ce", got None'):
        masked_pgd(frozen, x, radius=1, objective="ce")
    with pytest.raises(LabelRangeError, match="masked_pgd: `labels` expected classes from 0 and below num_classes="):
        masked_pgd(frozen, x, radius=1, objective="ce", labels=torch.full((len(x),), 99))
    with pytest.raises(TypeError, match="masked_pgd: `frozen` expected a FrozenModel, got Flatten; enter `with Froz"):
        masked_pgd(nn.Flatten(), x, radius=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "kind", "pattern"),
    [
        ({"radius": -1}, ValueError, r"`radius` expected an integer >= 0 or None, got -1"),
        ({"radius": 1.5}, TypeError, r"`radius` expected an integer or None, got float"),
        ({"eps": -1}, ValueError, r"`eps` expected a finite number >= 0, got -1"),
        ({"eps": torch.ones(2)}, ValueError, r"`eps` expected a number or a tensor \[3\], got shape \[2\]"),
        ({"step_size": "a", "direction": "descend"}, TypeError, r"`step_size` expected a number or a tensor \[C\]"),
        ({"step_size": torch.ones(2)}, ValueError, r"`step_size` expected a number or a tensor \[3\]"),
        ({"lower": 2}, ValueError, r"`lower` expected a number <= upper, 1.0, got 2"),
        ({"upper": None}, TypeError, r"`upper` expected a number or a tensor \[C\], got NoneType"),
        ({"ids": [0, 1]}, TypeError, r"`ids` expected a tensor \[N\], got list"),
        ({"ids": torch.arange(5)}, ValueError, r"`ids` expected one id an image, \[6\], got \[5\]"),
        ({"ids": torch.arange(6.0)}, TypeError, r"`ids` expected int64 sample ids, got torch.float32"),
        ({"seed": 1.5}, TypeError, r"`seed` expected an integer, got float"),
        ({"round": 2**63}, ValueError, r"`round` expected an integer of 64 bits"),
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"`x` expected shape \[N, C, H, W\], got \[3, 8, 8\]"),
        ({"x": None}, TypeError, r"`x` expected a tensor \[N, C, H, W\], got NoneType"),
    ],
)
def test_arguments_are_called_what_the_caller_calls_them(
    options: dict[str, object], kind: type[Exception], pattern: str
) -> None:
    frozen, x, _ = batch()
    with pytest.raises(kind, match="^masked_pgd: " + pattern):
        masked_pgd(frozen, **{"x": x, "radius": 1, **options})  # type: ignore[arg-type]


def test_a_target_that_does_not_fit() -> None:
    frozen, x, _ = batch()
    ids = torch.arange(len(x))
    with pytest.raises(ValueError, match=r"^masked_pgd: `target` expected logits \[6, K\], floating point, got torch"):
        MaskedPGD(frozen, radius=1)(x, ids, torch.zeros(6, dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match=r"^masked_pgd: `target` expected labels \[6\], int64, got torch.float32"):
        MaskedPGD(frozen, radius=1, objective="ce")(x, ids, torch.zeros(6, 2), seed=0)


def test_an_attack_goes_with_its_last_name() -> None:
    """A cycle would keep its graph, and the memory of a batch's activations, until the next collection."""
    with FrozenModel(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))) as frozen:
        attack = MaskedPGD(frozen, radius=None)
        attack(torch.rand(2, 1, 4, 4), torch.arange(2), frozen.logits(torch.rand(2, 1, 4, 4)), seed=0)
        gone = weakref.ref(attack._loop)
        gc.disable()
        try:
            del attack
            assert gone() is None
        finally:
            gc.enable()
