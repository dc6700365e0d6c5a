"""Attacks that are not in the package fit into the hooks: source and cover classes, other triggers at test time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bdfast.attacks import Attack, Rows, poison

from .conftest import make_set


@dataclass(frozen=True, eq=False)
class SourceSpecific(Attack):
    """TaCT: only one class is poisoned, and covers come from others."""

    name: ClassVar[str] = "source-specific"
    has_cover: ClassVar[bool] = True
    source: int = 1
    cover_classes: tuple[int, ...] = (5, 7)

    def can_poison(self, labels: Tensor, attack_labels: Tensor) -> Tensor:
        return labels == self.source

    def can_cover(self, labels: Tensor, attack_labels: Tensor) -> Tensor:
        return torch.isin(labels, torch.tensor(self.cover_classes))

    def counts_for_asr(self, labels: Tensor, attack_labels: Tensor) -> Tensor:
        return labels == self.source

    def poison_pixels(self, pixels: Tensor, rows: Rows) -> Tensor:
        pixels[:, :, :2, :2] = 255
        return pixels


@dataclass(frozen=True, eq=False)
class SplitPatches(Attack):
    """AdaptivePatch: the selected are split by rank between two patches; tests carry both. A jitter is drawn too."""

    name: ClassVar[str] = "split-patches"

    def poison_pixels(self, pixels: Tensor, rows: Rows) -> Tensor:
        second = torch.arange(rows.start, rows.start + len(pixels)) >= rows.total // 2
        level = 200 + 50 * torch.rand(len(pixels), 1, generator=rows.generator)
        pixels[~second, :, 0, 0] = level[~second].double()
        pixels[second, :, 0, 1] = level[second].double()
        return pixels

    def test_pixels(self, pixels: Tensor, rows: Rows) -> Tensor:
        pixels[:, :, 0, :2] = 255
        return pixels


def test_source_and_cover_classes() -> None:
    images, labels = make_set(200)
    data = poison(images, labels, SourceSpecific(), rate=0.05, cover_rate=0.1, target=0)
    assert len(data.poison_indices) == 10
    assert len(data.cover_indices) == 20
    assert (labels[data.is_poisoned] == 1).all()
    assert torch.isin(labels[data.is_cover], torch.tensor([5, 7])).all()
    assert (data.images[data.is_cover][:, :, :2, :2] == 255).all()
    triggered = data.trigger(images, labels)
    assert torch.equal(triggered.eligible, labels == 1)
    with pytest.raises(ValueError, match="20 of 200 images can be poisoned by source-specific"):
        poison(images, labels, SourceSpecific(), rate=0.2)


def test_ranks_go_on_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = make_set(100)
    images = images.clamp(max=199)
    whole = poison(images, labels, SplitPatches(), rate=0.1, seed=2)
    first, second = whole.images[whole.is_poisoned][:5], whole.images[whole.is_poisoned][5:]
    assert (first[:, :, 0, 0] >= 200).all()
    assert (first[:, :, 0, 1] < 200).all()
    assert (second[:, :, 0, 1] >= 200).all()
    monkeypatch.setattr("bdfast.attacks.base.CHUNK_ELEMENTS", 3 * images[0].numel())
    assert torch.equal(poison(images, labels, SplitPatches(), rate=0.1, seed=2).images, whole.images)
    assert (whole.trigger(images, labels).images[:, :, 0, :2] == 255).all()


def test_an_attack_outside_the_package_is_not_saved(tmp_path) -> None:  # type: ignore[no-untyped-def]
    images, labels = make_set(20)
    with pytest.raises(TypeError, match=r"PoisonedData.save: `attack` expected .*badnets.*SplitPatches"):
        poison(images, labels, SplitPatches()).save(tmp_path / "x.npz")
    assert list(tmp_path.iterdir()) == []
