"""Poison a training set, and trigger test sets the same way."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bdfast.attacks.base import Attack
from bdfast.attacks.checks import check_images, check_integer, check_labels, describe
from bdfast.attacks.labels import Mode, Relabel
from bdfast.attacks.quantize import check_storable
from bdfast.attacks.registry import get, names
from bdfast.attacks.selection import select
from bdfast.errors import LabelRangeError, message
from bdfast.runtime.plain_numbers import plain_number


class TriggeredData(NamedTuple):
    """Test images that all carry the trigger."""

    images: Tensor  # [N, C, H, W], dtype of the clean ones
    labels: Tensor  # [N] int64, what the attacker wants
    original_labels: Tensor  # [N] int64, what is true
    eligible: Tensor  # [N] bool, which rows count for ASR and RA


@dataclass(frozen=True, eq=False)
class PoisonedData:
    """A poisoned training set; what :func:`poison` returns."""

    images: Tensor  # [N, C, H, W], dtype and device of the clean ones
    labels: Tensor  # [N] int64, as the victim sees them
    original_labels: Tensor  # [N] int64
    is_poisoned: Tensor  # [N] bool: carries the trigger and the attack label
    is_cover: Tensor  # [N] bool: carries a trigger and keeps its label
    attack: Attack  # with everything fixed that was drawn for this run
    relabel: Relabel
    seed: int
    quantize: bool

    @property
    def poison_indices(self) -> Tensor:
        """Poisoned samples: int64, sorted ascending."""
        return self.is_poisoned.nonzero().flatten()

    @property
    def cover_indices(self) -> Tensor:
        """Cover samples: int64, sorted ascending."""
        return self.is_cover.nonzero().flatten()

    def trigger(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        labels: Tensor,  # [N] integer
    ) -> TriggeredData:
        """All of a test set with the test-time trigger.

        Args:
            images: [N, C, H, W], uint8 or float in [0, 1]; C, H, W as in training.
            labels: [N], true classes.

        Returns:
            ``(images, labels, original_labels, eligible)``: every image in its order, the labels the attacker wants,
            the true ones, and which rows count for ASR: those whose true class is not the attack label already.

        Raises:
            TypeError, ValueError: images or labels of another kind or shape than stated.
            LabelRangeError: a label outside the classes.

        Example:
            >>> images, labels = torch.zeros(20, 1, 8, 8), torch.arange(20) % 4
            >>> triggered = poison(images, labels, "badnets", target=1).trigger(images[:4], labels[:4])
            >>> triggered.labels, triggered.eligible
            (tensor([1, 1, 1, 1]), tensor([ True, False,  True,  True]))
        """
        where = "PoisonedData.trigger"
        check_images(where, images)
        check_labels(where, labels, len(images), self.relabel.num_classes)
        if images.shape[1:] != self.images.shape[1:]:
            expected = f"images of {list(self.images.shape[1:])}, as in training"
            raise ValueError(message(where, "images", expected, describe(images), "resize or convert them first"))
        check_storable(where, images.dtype, self.quantize)
        original = labels.to(torch.int64)
        wanted = self.attack.attack_labels(original, self.relabel)
        changed = self.attack.apply(images, "test", seed=self.seed, quantize=self.quantize)
        return TriggeredData(changed, wanted, original, self.attack.counts_for_asr(original, wanted))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an uncompressed ``.npz`` without pickle, from which :meth:`load` restores everything.

        Raises:
            TypeError: an attack that is not among :func:`bdfast.attacks.names`, or images NumPy has no dtype for.
        """
        from bdfast.attacks.archive import write  # archive needs this module

        write(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> PoisonedData:
        """Read what :meth:`save` wrote, on the CPU. The file is checked and never unpickled.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that :meth:`save` did not write.
        """
        from bdfast.attacks.archive import read

        return read(path)


def poison(
    images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
    labels: Tensor,  # [N] integer
    attack: str | Attack,
    *,
    rate: float | None = None,
    target: int = 0,
    seed: int = 0,
    cover_rate: float | None = None,
    quantize: bool = True,
    num_classes: int | None = None,
    mode: Mode = "all-to-one",
    **options: Any,
) -> PoisonedData:
    """Poison a training set.

    ``round(rate * N)`` images get the trigger and the attack label, ``int(cover_rate * N)`` others a trigger and keep
    their label (rates are of the whole set, as BackdoorBench counts). All other images come back bit for bit. The same
    seed gives the same result on every device; the global random state is not touched.

    Args:
        images: [N, C, H, W], uint8 or float in [0, 1]; any channel count, any height and width.
        labels: [N], classes.
        attack: a name among :func:`bdfast.attacks.names`, or an attack object.
        rate: fraction of the set to poison, met exactly or refused. None: the attack's own (0.1 [BB]), or as much as
            the set can supply (clean-label attacks draw from the target class alone).
        target: attack label of all-to-one.
        seed: of the selection and of what an attack draws once a run or for each cover.
        cover_rate: fraction of the set to use as covers. None: the attack's own (WaNet: twice the rate [BB]).
        quantize: touched images hold whole grey levels, as an 8-bit file would: clipped, then truncated. False keeps
            fractions (float images only).
        num_classes: K; labels and target must be below it. None: the highest label + 1, and at least 2, for the target;
            labels that come later, to trigger, are not limited by it.
        mode: "all-to-one" (y' = target) or "all-to-all" (y' = (y + 1) mod K).
        **options: fields of the named attack, such as ``alpha=0.1``.

    Raises:
        TypeError, ValueError: an argument of another kind or range than stated; a rate that the set cannot supply.
        LabelRangeError: labels or target outside the classes.

    Example:
        >>> images = torch.zeros(50, 3, 32, 32, dtype=torch.uint8)
        >>> data = poison(images, torch.arange(50) % 10, "badnets", rate=0.1, target=1, seed=0)
        >>> len(data.poison_indices), data.labels[data.is_poisoned]
        (5, tensor([1, 1, 1, 1, 1]))
        >>> data.images[data.is_poisoned][0, 0, 28:, 28:]
        tensor([[  0,   0,   0,   0],
                [  0, 255, 255, 255],
                [  0, 255, 255, 255],
                [  0, 255, 255, 255]], dtype=torch.uint8)
    """
    attack = _resolve(attack, options)
    rate, cover_rate = plain_number(rate), plain_number(cover_rate)
    target, seed, num_classes = plain_number(target), plain_number(seed), plain_number(num_classes)
    check_images("poison", images)
    check_labels("poison", labels, len(images), num_classes)
    check_integer("poison", "seed", seed, 0, "pass a seed")
    check_storable("poison", images.dtype, quantize)
    original = labels.to(torch.int64)
    if num_classes is None:
        num_classes = _check_target(target, original, mode)
    relabel = Relabel(mode, target, num_classes)
    attack.check_relabel(relabel)
    wanted = attack.attack_labels(original, relabel)
    selection = select(attack, original, wanted, rate=rate, cover_rate=cover_rate, seed=seed)

    attack = attack.for_run(seed).trained(images, original, relabel, seed)
    is_poisoned, is_cover = (_mask(indices, original) for indices in selection)
    poisoned = images.detach().clone()
    for stage, chosen in (("poison", is_poisoned), ("cover", is_cover)):
        rows = chosen.to(images.device)
        poisoned[rows] = attack.apply(images[rows], stage, seed=seed, quantize=quantize)  # type: ignore[arg-type]
    return PoisonedData(
        images=poisoned,
        labels=torch.where(is_poisoned, wanted, original),
        original_labels=original.clone(),
        is_poisoned=is_poisoned,
        is_cover=is_cover,
        attack=attack,
        relabel=relabel,
        seed=seed,
        quantize=quantize,
    )


def _check_target(target: int, labels: Tensor, mode: Mode) -> int | None:
    """K as the labels tell it, where the caller does not, for all-to-all; all-to-one has its target below it."""
    classes = int(labels.max()) + 1 if len(labels) else 0
    if mode == "all-to-all":
        return max(classes, 1)
    check_integer("poison", "target", target, 0, "pass a class index")
    if len(labels) and target >= max(classes, 2):  # nobody trains a classifier of a single class
        got, remedy = f"{target}, above the highest label, {classes - 1}", "correct it, or pass num_classes"
        raise LabelRangeError(message("poison", "target", "a class of the labels", got, remedy))
    return None


def _resolve(attack: str | Attack, options: dict[str, Any]) -> Attack:
    if isinstance(attack, str):
        return get(attack, **options)
    if not isinstance(attack, Attack):
        expected = f"one of {', '.join(names())}, or an Attack object"
        raise TypeError(message("poison", "attack", expected, describe(attack), "pass a name"))
    if options:
        expected, remedy = "no options beside an attack object", "set them on the object"
        raise TypeError(message("poison", "attack", expected, ", ".join(options), remedy))
    return attack


def _mask(indices: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[indices.to(mask.device)] = True
    return mask
