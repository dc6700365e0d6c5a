"""Auxiliary families: splits, and every change against a formula of its own."""

from __future__ import annotations

import colorsys
import math

import pytest
import torch
from torch import Tensor

from bdfast import data
from bdfast.data import FAMILIES, auxiliary, auxiliary_split, families, shift

CHANGED = [family for family in FAMILIES if family not in ("seen", "unseen")]


def pictures(count: int = 6, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=g)


def test_split_is_balanced_complete_and_seeded() -> None:
    labels = torch.tensor([0] * 40 + [1] * 60)
    train, reserved = auxiliary_split(labels, ratio=0.05, seed=3)
    assert torch.cat((train, reserved)).sort().values.tolist() == list(range(100))
    assert torch.bincount(labels[reserved]).tolist() == [2, 3]
    assert torch.equal(auxiliary_split(labels, ratio=0.05, seed=3)[1], reserved)
    assert not torch.equal(auxiliary_split(labels, ratio=0.05, seed=4)[1], reserved)


def test_seen_is_of_the_training_part_and_the_others_of_the_reserve() -> None:
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    labels = torch.arange(200) % 2
    train, reserved = auxiliary_split(labels, ratio=0.1)
    for family in ("seen", "unseen"):
        picked, given = auxiliary((images, labels), family, ratio=0.1)
        index = picked[:, 0, 0, 0].long()
        assert torch.equal(labels[index], given)
        assert torch.bincount(given).tolist() == [10, 10]
        assert set(index.tolist()) <= set((train if family == "seen" else reserved).tolist())
        assert len(set(index.tolist())) == 20


def test_class_too_small_for_the_share_is_named() -> None:
    labels = torch.tensor([0] * 50 + [7] * 3)
    with pytest.warns(UserWarning, match=r"no sample of class \[7\] was drawn"):
        auxiliary_split(labels, ratio=0.1)


@pytest.mark.parametrize("family", CHANGED)
@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 6, 10), (4, 5, 5), (1, 1, 3)])
def test_every_family_keeps_form_and_repeats_itself(family: families.Family, shape: tuple[int, int, int]) -> None:
    images = pictures(5, *shape)
    kept = images.clone()
    changed = shift(images, family, seed=1)
    assert changed.shape == images.shape
    assert changed.dtype == torch.uint8
    assert torch.equal(images, kept)
    assert torch.equal(shift(images, family, seed=1), changed)
    if shape != (1, 1, 3):
        assert not torch.equal(changed, images)
        assert not torch.equal(shift(images, family, seed=2), changed)
    assert torch.equal(shift(images.float() / 255, family, seed=1), changed)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    for family in FAMILIES:
        shift(pictures(), family)
    assert torch.equal(torch.get_rng_state(), before)


def test_unseen_is_untouched_and_floats_are_truncated() -> None:
    assert torch.equal(shift(pictures(), "unseen"), pictures())
    assert shift(torch.full((1, 1, 2, 2), 0.999), "unseen").unique().tolist() == [254]
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(shift(every.float() / 255, "unseen"), every)


def test_brightness_scales_every_pixel_of_an_image_alike() -> None:
    images = torch.full((500, 1, 2, 2), 100, dtype=torch.uint8)
    levels = shift(images, "brightness").flatten(1)
    assert bool((levels == levels[:, :1]).all())
    assert 50 <= int(levels.min()) <= 55
    assert 145 <= int(levels.max()) <= 150


def test_contrast_keeps_the_mean_and_scales_differences() -> None:
    images = torch.tensor([100, 140], dtype=torch.uint8).view(1, 1, 1, 2).expand(300, 1, 1, 2)
    low, high = shift(images, "contrast").flatten(1).float().unbind(1)
    assert bool(((low + high - 240).abs() <= 2).all())
    assert 20 <= float((high - low).min()) <= 24
    assert 56 <= float((high - low).max()) <= 60


def test_hue_is_that_of_colorsys() -> None:
    x = torch.rand(40, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    x[0] = 0.5  # gray
    turn = torch.linspace(-0.5, 0.5, 40)
    for before, after, t in zip(x.flatten(1), families._hue(x, turn).flatten(1), turn, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before.tolist())
        assert after.tolist() == pytest.approx(colorsys.hsv_to_rgb((h + float(t)) % 1, s, v), abs=1e-5)


def test_saturation_moves_away_from_luma() -> None:
    x = torch.tensor([0.8, 0.4, 0.2]).view(1, 3, 1, 1)
    gray = 0.2989 * 0.8 + 0.587 * 0.4 + 0.114 * 0.2
    expected = [gray + 0.5 * (c - gray) for c in (0.8, 0.4, 0.2)]
    assert families._saturation(x, torch.tensor([0.5])).flatten().tolist() == pytest.approx(expected)


def test_colour_of_gray_images_is_brightness_and_contrast() -> None:
    flat = torch.full((100, 1, 3, 3), 100, dtype=torch.uint8)  # contrast leaves it
    changed = shift(flat, "colour")
    assert bool((changed == changed[:, :, :1, :1]).all())
    assert 50 <= int(changed.min()) < int(changed.max()) <= 150


def test_blur_is_the_three_tap_gaussian() -> None:
    impulse = torch.zeros(1, 1, 5, 5)
    impulse[..., 2, 2] = 1.0
    side = math.exp(-0.5 / 0.8**2)
    taps = torch.tensor([side, 1, side]) / (1 + 2 * side)
    blurred = families._blur(impulse, torch.tensor([0.8]))
    torch.testing.assert_close(blurred[0, 0, 1:4, 1:4], taps[:, None] * taps)
    assert float(blurred.sum()) == pytest.approx(1.0)
    corner = torch.zeros(1, 1, 3, 3)
    corner[..., 0, 0] = 1.0  # reflected about the edge, it comes in once only
    assert float(families._blur(corner, torch.tensor([0.8]))[0, 0, 0, 0]) == pytest.approx(float(taps[1] ** 2))


def test_rotation_by_right_angles_permutes_pixels() -> None:
    x = torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for degrees, turns in ((0.0, 0), (90.0, 1), (180.0, 2), (-90.0, -1)):
        assert torch.equal(families._rotate(x, torch.tensor([degrees])), torch.rot90(x, turns, (2, 3)))
    wide = torch.rand(1, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(families._rotate(wide, torch.tensor([180.0])), wide.flip(2, 3))
    turned = families._rotate(wide, torch.tensor([90.0]))
    assert torch.equal(turned[..., :, 1:5], torch.rot90(wide[..., 1:5], 1, (2, 3)))
    assert float(turned[..., 0].abs().sum() + turned[..., 5].abs().sum()) == 0.0


def test_rotation_angles_and_noise_are_as_wide_as_stated() -> None:
    gray = torch.full((200, 1, 8, 8), 128, dtype=torch.uint8)
    noisy = shift(gray, "noise").float() / 255
    assert float(noisy.std()) == pytest.approx(0.1, abs=0.005)
    corners = shift(gray, "rotation")[:, 0, 0, 0] == 0
    assert 0.5 < float(corners.float().mean()) < 1.0


def test_wrong_arguments() -> None:
    images, labels = pictures(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shift: `family` expected one of seen, unseen, .* got 'fog'"):
        shift(images, "fog")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="auxiliary: `family` expected one of"):
        auxiliary((images, labels), "fog")  # type: ignore[arg-type]
    for ratio in (0, 1.0, True, "0.1"):
        with pytest.raises(ValueError, match=r"auxiliary_split: `ratio` expected a number in \(0, 1\)"):
            auxiliary_split(labels, ratio=ratio)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reserve: `ratio` expected at least one sample drawn"):
        auxiliary_split(labels, ratio=0.1)
    with pytest.raises(TypeError, match="expected uint8 or float"):
        shift(images.int(), "blur")


def test_digits_come_in_every_family() -> None:
    train_set, _, _ = data.load("digits", limit=(400, 1))
    for family in FAMILIES:
        images, labels = auxiliary(train_set, family, ratio=0.1, device="cpu")
        assert len(images) == len(labels) > 30
