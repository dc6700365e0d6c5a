"""AdaptiveBlend and AdaptivePatch: partial triggers in training, more of them at test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdfast.attacks import AdaptiveBlend, AdaptivePatch, PoisonedData, poison

from .conftest import make_set

WHITE = torch.ones(1, 1)


def test_blend_in_half_of_the_tiles() -> None:
    black = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
    attack = AdaptiveBlend(pattern=WHITE, alpha=0.2)
    for stage in ("poison", "cover"):
        tiles = attack.apply(black, stage).unflatten(3, (4, 8)).unflatten(2, (4, 8))  # type: ignore[arg-type]
        assert torch.equal(tiles.amax((3, 5)), tiles.amin((3, 5)))  # whole tiles
        shown = tiles[:, 0, :, 0, :, 0].flatten(1)
        assert set(shown.unique().tolist()) == {0, 51}
        assert ((shown == 51).sum(1) == 8).all()
        assert len(shown.unique(dim=0)) > 40  # every image draws its own
    assert (attack.apply(black) == 51).all()


def test_blend_options() -> None:
    black = torch.zeros(1, 1, 6, 9, dtype=torch.uint8)
    assert (AdaptiveBlend(pattern=WHITE, alpha=1, mask_rate=0).apply(black, "poison") == 255).all()
    assert (AdaptiveBlend(pattern=WHITE, alpha=1, mask_rate=1).apply(black, "poison") == 0).all()
    quarter = AdaptiveBlend(pattern=WHITE, alpha=1, tiles=4, mask_rate=0.75).apply(black, "poison")
    assert int((quarter == 255).sum()) in (3 * 5, 3 * 4)  # columns 0..4 and 5..8
    assert (AdaptiveBlend(pattern=WHITE, alpha=0.4, test_alpha=None).apply(black) == 102).all()
    assert (AdaptiveBlend(pattern=WHITE).apply(black) == 51).all()
    assert AdaptiveBlend(pattern=WHITE, mask_rate=0).apply(black, "poison").max() == 38  # 0.15 * 255 = 38.25


def test_patches_are_split_by_rank() -> None:
    images, labels = make_set(400)
    data = poison(images, labels, "adaptive_patch", rate=0.05, cover_rate=0.02, target=1, seed=1)
    assert (len(data.poison_indices), len(data.cover_indices)) == (20, 8)
    assert (data.labels[data.is_poisoned] == 1).all()
    assert torch.equal(data.labels[data.is_cover], labels[data.is_cover])
    grey = torch.full((400, 3, 32, 32), 100, dtype=torch.uint8)
    data = poison(grey, labels, "adaptive_patch", rate=0.05, cover_rate=0.02, target=1, seed=1)
    for chosen in (data.is_poisoned, data.is_cover):
        changed = (data.images[chosen] != 100).any(1)
        boxes = []
        for image in changed:
            rows, columns = image.nonzero().unbind(1)
            boxes.append((rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()))
        count = len(boxes) // 4
        assert boxes == [
            box for box in ((27, 31, 27, 31), (1, 13, 18, 30), (0, 31, 0, 31), (21, 28, 21, 28)) for _ in range(count)
        ]
    checker = data.images[data.is_poisoned][10, 0, :3, :3]
    assert checker.tolist() == [[50, 50, 177], [50, 177, 50], [177, 50, 177]]  # half way to 0 and to 255


def test_patches_at_test() -> None:
    grey = torch.full((1, 1, 32, 32), 100, dtype=torch.uint8)
    out = AdaptivePatch().apply(grey)[0, 0]
    assert out[:3, :3].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert out[29:, 29:].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]  # drawn over the corner
    assert (out[27:, 27:] != 100).sum() == 25
    assert (out[3:27] == 100).all()
    logos = AdaptivePatch(pattern="logos-proc", test_patches=(0, 1, 2, 3)).apply(grey)[0, 0] != 100
    quarters = logos.unflatten(1, (2, 16)).unflatten(0, (2, 16)).sum((1, 3))
    assert (quarters > 100).all()


def test_own_images() -> None:
    stack = torch.zeros(2, 1, 4, 4)
    stack[0, 0, 0, 0] = stack[1, 0, 3, 3] = 1.0
    attack = AdaptivePatch(pattern=stack, alphas=(0.5, 1.0), test_patches=(0, 1))
    out = attack.apply(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "poison")
    assert out.nonzero().tolist() == [[0, c, 0, 0] for c in range(3)] + [[1, c, 3, 3] for c in range(3)]
    assert out[0, 0, 0, 0] == 127
    masked = AdaptivePatch(pattern=stack, mask=torch.ones(2, 4, 4), alphas=(1.0, 1.0), test_patches=(1,))
    assert masked.apply(torch.full((1, 1, 4, 4), 9, dtype=torch.uint8)).sum() == 255
    with pytest.raises(ValueError, match="adaptive_patch: `pattern` expected images of 5 x 4"):
        attack.apply(torch.zeros(1, 1, 5, 4))


def test_archives_keep_own_images(tmp_path: Path) -> None:
    images, labels = make_set(40)
    stack = torch.rand(2, 3, 32, 32)
    attack = AdaptivePatch(pattern=stack, mask=torch.rand(2, 32, 32), alphas=(0.5, 1.0), test_patches=(1,))
    poison(images, labels, attack).save(tmp_path / "x.npz")
    assert PoisonedData.load(tmp_path / "x.npz").attack == attack


def test_errors() -> None:
    with pytest.raises(ValueError, match="AdaptiveBlend: `tiles` expected a square number, got 8"):
        AdaptiveBlend(tiles=8)
    with pytest.raises(ValueError, match="AdaptiveBlend: `mask_rate`"):
        AdaptiveBlend(mask_rate=1.5)
    with pytest.raises(ValueError, match="AdaptiveBlend: `alpha`"):
        AdaptiveBlend(alpha=2)
    with pytest.raises(ValueError, match="AdaptivePatch: `pattern` expected one of four-proc, logos-proc"):
        AdaptivePatch(pattern="four")
    with pytest.raises(ValueError, match="AdaptivePatch: `alphas` expected 4 opacities, one a patch, got 2"):
        AdaptivePatch(alphas=(0.5, 0.5))
    with pytest.raises(TypeError, match="AdaptivePatch: `test_patches` expected a tuple"):
        AdaptivePatch(test_patches=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="AdaptivePatch: `test_patches` expected indices below 4, got 4"):
        AdaptivePatch(test_patches=(4,))
    with pytest.raises(ValueError, match=r"AdaptivePatch: `pattern` expected images \[k, C, H, W\]"):
        AdaptivePatch(pattern=torch.ones(3, 4, 4), alphas=(1.0,))
    with pytest.raises(ValueError, match=r"AdaptivePatch: `mask` expected a mask for each image, \[1, 4, 4\]"):
        AdaptivePatch(pattern=torch.ones(1, 3, 4, 4), mask=torch.ones(1, 5, 4), alphas=(1.0,), test_patches=(0,))
    with pytest.raises(ValueError, match="AdaptivePatch: `mask` expected None with named patches"):
        AdaptivePatch(mask=torch.ones(4, 32, 32))
