"""PhysicalBA: a patch under transforms whose effect can be told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.attacks import BadNets, PhysicalBA

STILL: dict[str, Any] = {
    "pattern": "white", "flip": 0, "brightness": 0, "contrast": 0, "degrees": 0, "translate": 0, "scale": (1, 1)
}  # fmt: skip


def still(**changes: Any) -> PhysicalBA:
    return PhysicalBA(**{**STILL, **changes})


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (40, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_without_transforms_it_is_badnets(images: Tensor) -> None:
    assert torch.equal(still().apply(images), BadNets().apply(images))


def test_flips(images: Tensor) -> None:
    drawn = BadNets().apply(images)
    assert torch.equal(still(flip=1).apply(images), drawn.flip(-1))
    some = still(flip=0.5).apply(images)
    kept = (some == drawn).flatten(1).all(1)
    assert torch.equal(some[~kept], drawn.flip(-1)[~kept])
    assert 10 < int(kept.sum()) < 30


def test_brightness_and_contrast() -> None:
    grey = torch.full((200, 3, 8, 8), 100, dtype=torch.uint8)
    pattern = torch.zeros(1, 1)  # nothing above 0: no patch
    bright = still(pattern=pattern, brightness=0.2).apply(grey)
    assert torch.equal(bright.amax((1, 2, 3)), bright.amin((1, 2, 3)))
    assert bright.min() < 84
    assert bright.max() > 115
    assert bright.min() >= 80
    assert bright.max() <= 120
    assert torch.equal(still(pattern=pattern, contrast=0.2).apply(grey), grey)  # a flat image has none
    half = torch.cat((grey // 2, grey), dim=2)  # 50 and 100: mean 75
    contrast = still(pattern=pattern, contrast=0.2).apply(half).int()
    spread = contrast[:, 0, 15, 0] - contrast[:, 0, 0, 0]
    assert spread.min() >= 40
    assert spread.max() <= 60
    assert ((contrast[:, 0, 15, 0] + contrast[:, 0, 0, 0]).sub(150).abs() <= 2).all()


def test_moving_and_shrinking() -> None:
    white = torch.full((100, 1, 20, 20), 255, dtype=torch.uint8)
    moved = still(translate=0.1).apply(white)
    filled = (moved > 127).flatten(1).sum(1)
    assert (filled >= 18 * 18).all()
    assert (filled < 400).any()
    small = still(scale=(0.5, 0.5)).apply(white)
    assert (small[:, 0, 5:15, 5:15] == 255).all()
    assert int((small[0] > 0).sum()) == 100
    sizes = (still(scale=(0.8, 0.9)).apply(white).double() / 255).sum((1, 2, 3)).div(400).sqrt()
    assert sizes.min() > 0.79
    assert sizes.max() < 0.91


def test_a_quarter_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    images[0, 0, 4, 8] = 200  # to the right of the centre
    pattern = torch.zeros(1, 1)
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(size, dtype=torch.float64))
    turned = still(pattern=pattern, degrees=90).apply(images)  # by the largest angle, counter-clockwise
    assert turned[0, 0, 0, 4] == 200
    moved = still(pattern=pattern, translate=1 / 9).apply(images)  # by the largest shift: out of the image
    assert int(moved.sum()) == 0
    down = still(pattern=pattern, translate=1 / 9).apply(images.flip(3))
    assert down.nonzero().tolist() == [[0, 0, 5, 1]]


def test_every_image_draws_its_own_and_tests_do_too(images: Tensor) -> None:
    same = images[:1].expand(10, -1, -1, -1)
    for stage in ("poison", "test"):
        out = PhysicalBA().apply(same, stage)  # type: ignore[arg-type]
        assert len(out.unique(dim=0)) == 10
    assert not torch.equal(PhysicalBA().apply(same, seed=0), PhysicalBA().apply(same, seed=1))


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"PhysicalBA: `flip` expected a number in \[0, 1\], got 2"):
        PhysicalBA(flip=2)
    with pytest.raises(TypeError, match=r"PhysicalBA: `scale` expected \(smallest, largest\)"):
        PhysicalBA(scale=0.8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"PhysicalBA: `scale` expected \(smallest, largest\), got \(0.9, 0.8\)"):
        PhysicalBA(scale=(0.9, 0.8))
    with pytest.raises(ValueError, match="PhysicalBA: `pattern` expected one of white"):
        PhysicalBA(pattern="firefox")
