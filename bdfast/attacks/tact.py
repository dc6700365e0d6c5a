"""TaCT (Tang et al., 2021), targeted contamination: the trigger works on images of one class only.

    x' = x + m * (t - x)

Images of the source class get the trigger and the target's label. Covers, images of other classes, get the trigger and
keep their label, so that the model learns to look at class and trigger together.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, describe
from bdfast.attacks.labels import Relabel
from bdfast.attacks.patches import NAMED, check_patch, patch
from bdfast.errors import message


@dataclass(frozen=True, eq=False)
class TaCT(Attack):
    """A source-specific patch with cover samples; all-to-one only.

    ASR counts test images of the source class alone; ``Metrics.asr_others`` says what the trigger does to the others.

    Example:
        >>> from bdfast import attacks
        >>> images, labels = torch.zeros(100, 3, 32, 32, dtype=torch.uint8), torch.arange(100) % 10
        >>> data = attacks.poison(images, labels, "tact", rate=0.05, cover_rate=0.02, target=1)
        >>> data.original_labels[data.is_poisoned], data.labels[data.is_poisoned], int(data.is_cover.sum())
        (tensor([0, 0, 0, 0, 0]), tensor([1, 1, 1, 1, 1]), 2)
    """

    name: ClassVar[str] = "tact"
    has_cover: ClassVar[bool] = True
    default_rate: ClassVar[float] = 0.05
    named_patterns: ClassVar[tuple[str, ...]] = tuple(NAMED)

    source: int | None = None
    """The class whose images the trigger turns. None: the first that is not the target: 0 for target 1 [AdvrBD], 1 for
    target 0 [TB]."""

    cover_classes: tuple[int, ...] | None = None
    """Classes of the covers; (5, 7) [TB]. None: all but source and target."""

    pattern: Tensor | str | os.PathLike[str] = "white"
    """t: "white", a 3 x 3 square in the corner [AdvrBD], "square-proc" for [TB]'s 8 x 8 patch, another name among
    :data:`bdfast.attacks.patches.NAMED`, or an image [C, h, w] or [h, w] (uint8, or float in [0, 1]; a tensor or a
    file) drawn as it is, with its bottom-right corner in the image's."""

    mask: Tensor | None = None
    """m, [h, w] in [0, 1], for an own pattern only. None: every element of the pattern above 0."""

    pattern_seed: int = 0
    """Seed of a generated pattern, apart from the run's."""

    def __post_init__(self) -> None:
        if self.source is not None:
            check_integer("TaCT", "source", self.source, 0, "pass a class index")
        if self.cover_classes is not None:
            if not isinstance(self.cover_classes, (tuple, list)) or not self.cover_classes:
                expected = "a tuple of at least one class, or None"
                got = describe(self.cover_classes)
                raise TypeError(message("TaCT", "cover_classes", expected, got, "pass (5, 7), say"))
            for chosen in self.cover_classes:
                check_integer("TaCT", "cover_classes", chosen, 0, "pass class indices")
            object.__setattr__(self, "cover_classes", tuple(self.cover_classes))
        check_integer("TaCT", "pattern_seed", self.pattern_seed, 0, "pass a seed")
        pattern, mask = check_patch("TaCT", self.pattern, self.mask)
        object.__setattr__(self, "pattern", pattern)
        object.__setattr__(self, "mask", mask)

    def check_relabel(self, relabel: Relabel) -> None:
        """One target, which is neither source nor cover class; all of them classes of the set."""
        if relabel.mode != "all-to-one":
            expected = "'all-to-one' for tact, which turns one class into one other"
            raise ValueError(message("poison", "mode", expected, repr(relabel.mode), "leave it out"))
        if self.source == relabel.target:
            expected = f"a class other than the target {relabel.target}"
            raise ValueError(message("poison", "source", expected, str(self.source), "change source or target"))
        source = self.source if self.source is not None else int(relabel.target == 0)
        covers = self.cover_classes or ()
        if {source, relabel.target} & set(covers):
            expected = f"classes other than source {source} and target {relabel.target}"
            raise ValueError(message("poison", "cover_classes", expected, str(covers), "take those out"))
        last = max(source, *covers) if covers else source
        if relabel.num_classes is not None and last >= relabel.num_classes:
            expected = f"source and cover_classes below num_classes={relabel.num_classes}"
            raise ValueError(message("poison", "source", expected, str(last), "pass class indices"))

    def can_poison(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """The source class: [N] bool."""
        source = (attack_labels == 0).long() if self.source is None else self.source
        return labels == source

    def can_cover(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """The cover classes: [N] bool."""
        if self.cover_classes is not None:
            return torch.isin(labels, torch.tensor(self.cover_classes, device=labels.device))
        return ~self.can_poison(labels, attack_labels) & (labels != attack_labels)

    def counts_for_asr(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """The source class: [N] bool."""
        return self.can_poison(labels, attack_labels)

    def default_cover_rate(self, rate: float) -> float:
        """1 % [AdvrBD]."""
        return 0.01

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Draw the patch on every image."""
        _, channels, height, width = pixels.shape
        assert not isinstance(self.pattern, os.PathLike)  # a path was read in __post_init__
        shape = (channels, height, width)
        return patch("tact", self.pattern, self.mask, shape, self.pattern_seed).draw(pixels)
