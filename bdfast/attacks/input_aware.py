"""Input-aware (Nguyen and Tran, 2020): each image gets a pattern of its own, which works on no other.

    x' = x + (G(x) - x) * T(M(x)),    T(u) = tanh(20 u - 10) / (2 + 1e-7) + 0.5

G draws the pattern, M says where it shows. Covers ("cross" samples) carry the pattern of another image,
``x + (G(z) - x) * T(M(z))``, and keep their label. Both generators are trained when a set is poisoned, on some of its
images and against a small classifier C that is thrown away:

1. M alone:           lambda_mask * mean(relu(T(M(x)) - density)) + ||x - z|| / (||T(M(x)) - T(M(z))|| + 1e-7)
2. G and C together:  CE(C(batch)) + ||x - z|| / (||G(x) - G(z)|| + 1e-7)
   where the first ``train_ratio`` of the batch is poisoned, as many are cross samples, and the rest is clean.

The paper trains the victim itself in step 2, over all its epochs. Here the generators are fixed first and the victim
meets a poisoned set like any other, so that every defense and trainer can take it; C is a small network, and the steps
are few. Training is on the CPU whatever the device of the images: a seed gives the same trigger everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bdfast.attacks.base import Attack, Rows
from bdfast.attacks.checks import check_integer, check_number, describe
from bdfast.attacks.generators import Generator, show, train_generators
from bdfast.attacks.labels import Relabel
from bdfast.attacks.patterns import check_pattern
from bdfast.attacks.quantize import LEVELS, to_pixels
from bdfast.attacks.seeding import stream
from bdfast.errors import message

DONORS = 64  # images whose patterns the covers carry
IMAGES = 64  # at a time through the generators


@dataclass(frozen=True, eq=False)
class InputAware(Attack):
    """A pattern and a mask that two generators make of each image.

    Example:
        >>> from bdfast import attacks
        >>> images, labels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
        >>> data = attacks.poison(images, labels, "input_aware", rate=0.1, mask_epochs=1, generator_epochs=1)
        >>> int(data.is_poisoned.sum()), int(data.is_cover.sum()), data.attack.weights is None
        (6, 6, False)
    """

    name: ClassVar[str] = "input_aware"
    has_cover: ClassVar[bool] = True

    density: float = 0.032
    """Share of the mask that costs nothing, in [0, 1]; 0.032 [BB]."""

    lambda_mask: float = 100.0
    """Weight of the mask's size at 32 x 32, in proportion to the pixels elsewhere, so that as many of them show; 100
    [BB]."""

    mask_epochs: int = 5
    """Passes of step 1; 25 [BB]."""

    generator_epochs: int = 10
    """Passes of step 2; those of the victim [BB]."""

    generator_lr: float = 0.01
    """Adam's for M and G, betas (0.5, 0.9), and SGD's for C; 0.01 [BB]."""

    generator_batch: int = 128
    """Samples a step; 128 [BB]."""

    train_ratio: float = 0.1
    """Share of a batch of step 2 that is poisoned, in (0, 0.5]; at least one sample; the run's rate [BB]."""

    train_samples: int = 5000
    """At most so many images train the generators; all [BB]."""

    weights: Tensor | None = None
    """Of G, then of M, as one vector. None: not trained yet; :func:`bdfast.attacks.poison` does it."""

    donors: Tensor | None = None
    """Images whose patterns covers carry, [D, C, H, W]. None: not chosen yet."""

    def __post_init__(self) -> None:
        check_number("InputAware", "density", self.density, 0.0, 1.0, "pass the share of the image")
        check_number("InputAware", "lambda_mask", self.lambda_mask, 0.0, 1e6, "pass a weight")
        check_number("InputAware", "generator_lr", self.generator_lr, 0.0, 1.0, "pass a learning rate")
        check_number("InputAware", "train_ratio", self.train_ratio, 0.0, 0.5, "pass the poisoned share of a batch")
        for name, least in (("mask_epochs", 0), ("generator_epochs", 0), ("generator_batch", 2), ("train_samples", 2)):
            check_integer("InputAware", name, getattr(self, name), least, "correct it")
        if (self.weights is None) != (self.donors is None):
            expected = "weights and donors of a trained attack, or neither"
            got = "one of them"
            raise ValueError(message("InputAware", "weights", expected, got, "leave both out: poison trains"))
        if self.weights is None or self.donors is None:
            return
        if not isinstance(self.donors, Tensor) or self.donors.ndim != 4 or len(self.donors) == 0:
            expected = "images [D, C, H, W]"
            raise ValueError(message("InputAware", "donors", expected, describe(self.donors), "train again"))
        check_pattern("InputAware", "donors", self.donors.flatten(0, 1))
        count = sum(p.numel() for p in self._empty(self.donors.shape[1]).parameters())
        if (
            not isinstance(self.weights, Tensor)
            or self.weights.shape != (count,)
            or not self.weights.is_floating_point()
            or not bool(self.weights.isfinite().all())
        ):
            expected = f"{count} finite floats for {self.donors.shape[1]} channels"
            raise ValueError(message("InputAware", "weights", expected, describe(self.weights), "train again"))

    def default_cover_rate(self, rate: float) -> float:
        """As many cross samples as poisoned ones [BB]."""
        return rate

    def trained(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        labels: Tensor,  # [N] int64
        relabel: Relabel,
        seed: int,
    ) -> InputAware:
        """With generators trained on (some of) these images, unless it has some."""
        if self.weights is not None:
            return self
        order = torch.randperm(len(images), generator=stream(seed, "input-aware samples"))
        chosen = order[: self.train_samples].to(images.device)
        x = (to_pixels(images[chosen]) / LEVELS).float().cpu()
        y = labels[chosen].cpu()
        wanted = self.attack_labels(y, relabel)
        with torch.inference_mode(False), torch.enable_grad():
            pair = train_generators(self, x.clone(), y.clone(), wanted.clone(), seed)
        donors = images[chosen[:DONORS]].detach().cpu().clone() if len(x) else torch.zeros(1, *images.shape[1:])
        return replace(self, weights=parameters_to_vector(pair.parameters()).detach().clone(), donors=donors)

    def poison_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """Each image's own pattern."""
        return self._show(pixels, pixels)

    def cover_pixels(
        self,
        pixels: Tensor,  # [B, C, H, W] float64 in [0, 255]
        rows: Rows,
    ) -> Tensor:
        """The pattern of a donor, drawn for each image."""
        donors = self._require(pixels.shape[1:])[1]
        chosen = torch.rand(len(pixels), generator=rows.generator, dtype=torch.float64) * len(donors)
        return self._show(pixels, to_pixels(donors, snap=True)[chosen.long()].to(pixels.device))

    def _require(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        if self.weights is None or self.donors is None:
            expected, remedy = "trained generators", "poison a training set, and take the attack of the result"
            raise ValueError(message("input_aware", "weights", expected, "None", remedy))
        if self.donors.shape[1:] != shape:
            expected = f"images of {list(self.donors.shape[1:])}, which it was trained on"
            raise ValueError(
                message("input_aware", "images", expected, str(list(shape)), "resize them, or train again")
            )
        return self.weights, self.donors

    @torch.no_grad()
    def _show(
        self,
        pixels: Tensor,  # [B, C, H, W]
        givers: Tensor,  # [B, C, H, W], whose patterns
    ) -> Tensor:
        """In float64, so that no grey level depends on the size of a batch."""
        weights, _ = self._require(pixels.shape[1:])
        pair = self._empty(pixels.shape[1]).to_empty(device=pixels.device).double()
        vector_to_parameters(weights.to(pixels.device, torch.float64), pair.parameters())
        out = torch.empty_like(pixels)
        for start in range(0, len(pixels), IMAGES):
            part = slice(start, start + IMAGES)
            out[part] = LEVELS * show(pair, pixels[part] / LEVELS, givers[part] / LEVELS)
        return out

    @staticmethod
    def _empty(channels: int) -> nn.ModuleList:
        """G and M without values."""
        with torch.device("meta"):
            return nn.ModuleList([Generator(channels, channels), Generator(channels, 1)])
