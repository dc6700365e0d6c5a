"""TaCT: the trigger of one class, covers of others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdfast.attacks import PoisonedData, TaCT, get, poison

from .conftest import make_set


def test_source_is_poisoned_and_others_cover() -> None:
    images, labels = make_set(1000)
    data = poison(images, labels, "tact", rate=0.05, cover_rate=0.01, target=1, seed=3)
    assert len(data.poison_indices) == 50
    assert len(data.cover_indices) == 10
    assert (labels[data.is_poisoned] == 0).all()
    assert (data.labels[data.is_poisoned] == 1).all()
    assert torch.isin(labels[data.is_cover], torch.arange(2, 10)).all()
    assert torch.equal(data.labels[data.is_cover], labels[data.is_cover])
    touched = data.is_poisoned | data.is_cover
    assert (data.images[touched][:, :, 29:, 29:] == 255).all()
    assert torch.equal(data.images[touched][:, :, :29], images[touched][:, :, :29])
    assert torch.equal(data.images[~touched], images[~touched])


def test_defaults_are_the_papers() -> None:
    images, labels = make_set(1000)
    data = poison(images, labels, "tact", target=1)
    assert (len(data.poison_indices), len(data.cover_indices)) == (50, 10)
    assert (labels[poison(images, labels, "tact").is_poisoned] == 1).all()  # target 0: source 1


def test_trigger_counts_the_source_alone() -> None:
    images, labels = make_set(40)
    triggered = poison(images, labels, "tact", target=1, cover_classes=[5, 7], cover_rate=0.1).trigger(images, labels)
    assert torch.equal(triggered.eligible, labels == 0)
    assert (triggered.labels == 1).all()
    assert (triggered.images[:, :, 29:, 29:] == 255).all()  # on all images: others show whether it is specific
    chosen = poison(images, labels, "tact", target=1, source=4, cover_classes=[5, 7], cover_rate=0.1)
    assert torch.isin(labels[chosen.is_cover], torch.tensor([5, 7])).all()
    assert torch.equal(chosen.trigger(images, labels).eligible, labels == 4)


def test_archives_keep_classes_and_patch(tmp_path: Path) -> None:
    images, labels = make_set(40)
    attack = TaCT(source=2, cover_classes=(5, 7), pattern=torch.ones(3, 2, 4), mask=torch.full((2, 4), 0.5))
    poison(images, labels, attack, target=1).save(tmp_path / "x.npz")
    assert PoisonedData.load(tmp_path / "x.npz").attack == attack


def test_patterns() -> None:
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    square = TaCT(pattern="square-proc").apply(black)[0]
    assert square.amax(0).nonzero().amin(0).tolist() == [21, 21]
    assert square.amax(0).nonzero().amax(0).tolist() == [28, 28]
    doubled = TaCT(pattern="square-proc").apply(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))[0]
    assert torch.equal(doubled[:, ::2, ::2], square)
    assert torch.equal(doubled[:, 1::2, 1::2], square)
    corner = TaCT(pattern="corner-proc").apply(black)[0].amax(0).nonzero()
    assert (corner.amin(0).tolist(), corner.amax(0).tolist()) == ([27, 27], [31, 31])
    own = TaCT(pattern=torch.tensor([[0.0, 1.0]]), mask=torch.tensor([[1.0, 0.5]])).apply(black + 100)[0, 0, 31, 30:]
    assert own.tolist() == [0, 177]  # 100 + 0.5 * (255 - 100) = 177.5
    checkers = TaCT(pattern="checker-corners").apply(black + 9)[0, 0]
    for rows in (slice(0, 3), slice(29, 32)):
        for columns in (slice(0, 3), slice(29, 32)):
            assert checkers[rows, columns].tolist() == [[0, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert (checkers[3:29] == 9).all()


@pytest.mark.parametrize(
    ("name", "corner"),
    [
        ("logo-proc", (True, True)),
        ("logo-proc-top-right", (False, True)),
        ("logo-proc-top-left", (False, False)),
        ("logo-proc-bottom-left", (True, False)),
    ],
)
def test_the_logo_is_a_disc_of_13_pixels(name: str, corner: tuple[bool, bool]) -> None:
    drawn = TaCT(pattern=name).apply(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))[0].amax(0)
    low, high = drawn.nonzero().amin(0), drawn.nonzero().amax(0)
    assert (high - low + 1).tolist() == [13, 13]
    assert low.tolist() == [18 if far else 1 for far in corner]
    assert drawn[low[0], low[1]] == 0  # a corner of the disc's box
    assert drawn[low[0] + 6, low[1] + 1] > 100


def test_errors(tmp_path: Path) -> None:
    images, labels = make_set(100)
    with pytest.raises(ValueError, match=r"poison: `source` expected a class other than the target 1, got 1"):
        poison(images, labels, "tact", target=1, source=1)
    with pytest.raises(ValueError, match=r"poison: `cover_classes` expected classes other than source 0 and target 1"):
        poison(images, labels, "tact", target=1, cover_classes=(0, 5))
    with pytest.raises(ValueError, match="poison: `mode` expected 'all-to-one' for tact"):
        poison(images, labels, "tact", mode="all-to-all")
    with pytest.raises(ValueError, match=r"`source` expected source and cover_classes below num_classes=10, got 12"):
        poison(images, labels, "tact", cover_classes=(12,), num_classes=10)
    with pytest.raises(
        ValueError, match=r"`rate` expected at most 10/100 = 0.1, since 10 of 100 images can be poisoned"
    ):
        poison(images, labels, "tact", rate=0.2)
    with pytest.raises(ValueError, match=r"`cover_rate` expected at most 20/100 = 0.2"):
        poison(images, labels, "tact", cover_classes=(5, 7), cover_rate=0.5)
    with pytest.raises(ValueError, match="TaCT: `source` expected an integer of at least 0"):
        TaCT(source=-1)
    with pytest.raises(TypeError, match="TaCT: `cover_classes` expected a tuple"):
        TaCT(cover_classes=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="TaCT: `pattern` expected one of white, checker"):
        TaCT(pattern="whit")
    with pytest.raises(FileNotFoundError, match="TaCT: `pattern`"):
        TaCT(pattern=tmp_path / "no.png")
    with pytest.raises(ValueError, match="TaCT: `mask` expected None with a named pattern"):
        TaCT(mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"TaCT: `mask` expected the pattern's height and width \[2, 2\]"):
        TaCT(pattern=torch.ones(2, 2), mask=torch.ones(3, 3))
    with pytest.raises(ValueError, match="tact: `pattern` expected a patch within the 2 x 2 images, got 3 x 3 pixels"):
        get("tact").apply(torch.zeros(1, 1, 2, 2))
