"""What every attack is made of: a trigger, and a few hooks that say where it goes.

An attack overrides only the hooks in which it differs. Some that need no more than that:

* TaCT: ``check_relabel``, ``can_poison`` and ``counts_for_asr`` (source class), ``can_cover`` (cover classes).
* AdaptiveBlend, AdaptivePatch: ``poison_pixels`` and ``test_pixels`` differ; ``rows`` gives the rank among the
  selected images and a random generator.
* PhysicalBA: ``poison_pixels`` draws its transforms from ``rows.generator``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from bdfast.attacks.checks import check_images
from bdfast.attacks.labels import Relabel
from bdfast.attacks.quantize import check_storable, from_pixels, to_pixels
from bdfast.attacks.seeding import stream
from bdfast.errors import message

Stage = Literal["poison", "cover", "test"]

CHUNK_ELEMENTS = 1 << 24  # 128 MiB of float64 a temporary, whatever the size of the set


class Rows(NamedTuple):
    """Which of the selected images a hook is given: those with ranks start .. start + len(pixels) - 1 of total."""

    start: int
    total: int
    generator: torch.Generator  # CPU; draws go on from one chunk of images to the next


class Attack(ABC):
    """A backdoor trigger. Subclasses are frozen dataclasses (``eq=False``: fields may be tensors).

    ``pixels`` belong to the hook that gets them: it may change them in place.
    """

    name: ClassVar[str]
    clean_label: ClassVar[bool] = False  # poison keeps its label, so only the target class can carry it
    has_cover: ClassVar[bool] = False  # some images carry a trigger and keep their label
    default_rate: ClassVar[float] = 0.1  # n_poison / N
    named_patterns: ClassVar[tuple[str, ...]] = ()  # texts that the field `pattern` may hold; others are paths

    # --- hooks: labels --------------------------------------------------------------------------------------------

    def attack_labels(
        self,
        labels: Tensor,  # [N] int64
        relabel: Relabel,
    ) -> Tensor:
        """What triggered images are to be classified as: [N] int64."""
        return relabel(labels)

    def check_relabel(self, relabel: Relabel) -> None:
        """Raise unless the attack can be run with these labels."""
        if self.clean_label and relabel.mode != "all-to-one":
            expected = f"'all-to-one' for {self.name}, which keeps the labels of what it poisons"
            raise ValueError(message("poison", "mode", expected, repr(relabel.mode), "leave it out"))

    def can_poison(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """Which training images may be poisoned: [N] bool."""
        return labels == attack_labels if self.clean_label else torch.ones_like(labels, dtype=torch.bool)

    def can_cover(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """Which training images may be covers, poisoned ones aside: [N] bool."""
        return torch.ones_like(labels, dtype=torch.bool)

    def counts_for_asr(
        self,
        labels: Tensor,  # [N] int64
        attack_labels: Tensor,  # [N] int64
    ) -> Tensor:
        """Which test images count for ASR: [N] bool."""
        return labels != attack_labels

    # --- hooks: the run and the pixels ------------------------------------------------------------------------------

    def default_cover_rate(self, rate: float) -> float:
        """n_cover / N where the caller names none."""
        return 0.0

    def for_run(self, seed: int) -> Attack:
        """This attack with everything fixed that is drawn once a run."""
        return self

    def trained(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        labels: Tensor,  # [N] int64
        relabel: Relabel,
        seed: int,
    ) -> Attack:
        """This attack with everything fixed that is learnt from the training set."""
        return self

    @abstractmethod
    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Training images with the trigger: [B, C, H, W] float64, not clipped."""

    def cover_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Cover images: [B, C, H, W] float64, not clipped."""
        return self.poison_pixels(pixels, rows)

    def test_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Test images with the trigger: [B, C, H, W] float64, not clipped."""
        return self.poison_pixels(pixels, rows)

    # --- the same for every attack ----------------------------------------------------------------------------------

    def apply(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        stage: Stage = "test",
        *,
        seed: int = 0,
        quantize: bool = True,
    ) -> Tensor:
        """All images with the trigger of one stage, in the dtype and on the device of ``images``.

        Args:
            images: [N, C, H, W], uint8 or float in [0, 1]; any channel count, any height and width.
            stage: "poison" (training), "cover" (training, label kept) or "test".
            seed: of whatever the attack draws, such as WaNet's grids.
            quantize: truncate to whole grey levels, as an 8-bit file would; False keeps fractions (float images only).

        Returns:
            A new tensor [N, C, H, W].

        Raises:
            TypeError, ValueError: images that are not NCHW, uint8 or in [0, 1]; an unknown stage; uint8 images with
                ``quantize=False``.

        Example:
            >>> from bdfast import attacks
            >>> attacks.get("badnets", size=3).apply(torch.zeros(1, 1, 4, 5, dtype=torch.uint8))
            tensor([[[[  0,   0,   0,   0,   0],
                      [  0,   0, 255, 255, 255],
                      [  0,   0, 255, 255, 255],
                      [  0,   0, 255, 255, 255]]]], dtype=torch.uint8)
        """
        where = f"{self.name}.apply"
        check_images(where, images)
        check_storable(where, images.dtype, quantize)
        if stage not in get_args(Stage):
            expected = f"one of {', '.join(get_args(Stage))}"
            raise ValueError(message(where, "stage", expected, repr(stage), "choose one of them"))
        attack = self.for_run(seed)
        transform = {"poison": attack.poison_pixels, "cover": attack.cover_pixels, "test": attack.test_pixels}[stage]
        generator = stream(seed, stage)
        count = len(images)
        out = torch.empty_like(images)
        step = max(1, CHUNK_ELEMENTS // images[:1].numel()) if count else 1
        for start in range(0, count, step):
            pixels = to_pixels(images[start : start + step].detach(), snap=quantize)
            changed = transform(pixels, Rows(start, count, generator))
            out[start : start + step] = from_pixels(changed, images.dtype, quantize)
        return out

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and all(
            _same(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)  # type: ignore[arg-type]
        )

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return hash((type(self), *(tuple(value.shape) if isinstance(value, Tensor) else value for value in values)))


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
