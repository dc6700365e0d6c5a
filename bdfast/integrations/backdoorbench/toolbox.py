"""backdoor-toolbox's poisoned and clean sets: folder names, reading, writing.

::

    poisoned_train_set/<data set>/<poison set name>/   imgs  labels  poison_indices  [cover_indices]  full_base_...pt
    clean_set/<data set>/clean_split/                  data/<i>.png (or imgs)  clean_labels
    clean_set/<data set>/test_split/                   data/<i>.png (or imgs)  labels

Images are float tensors in [0, 1] there, without the 8 bits of BackdoorBench's PNG files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bdfast.attacks import PoisonedData, Relabel
from bdfast.attacks.checks import check_images
from bdfast.data.decode import decode_all
from bdfast.errors import message
from bdfast.integrations.backdoorbench.record import RecordedAttack
from bdfast.integrations.backdoorbench.stored import MAX_CLASSES, MAX_SAMPLES, Fields
from bdfast.integrations.backdoorbench.torch_save import torch_save
from bdfast.untrusted import ArtefactError, Limits, read_artefact

WITH_ALPHA = ("basic", "blend", "clean_label", "adaptive_blend")  # their names tell alpha and the trigger's file
WITH_COVER = ("TaCT", "WaNet", "adaptive_blend", "adaptive_k_way", "adaptive_patch")
PLAIN = (
    "ISSBA", "SIG", "SleeperAgent", "WB", "badnet", "badnet_all_to_all", "dynamic", "none", "refool", "trojan",
)  # fmt: skip
POISON_TYPES = tuple(sorted({*WITH_ALPHA, *WITH_COVER, *PLAIN}))
IMAGES, LABELS, POISON, COVER = "imgs", "labels", "poison_indices", "cover_indices"


@dataclass(frozen=True, eq=False)
class ToolboxSet:
    """A poisoned training set of backdoor-toolbox.

    Attributes:
        images: [N, 3, H, W] float in [0, 1].
        labels: [N] int64, as the victim sees them.
        poison_indices: int64, ascending.
        cover_indices: int64, ascending; empty where the attack has none.
    """

    images: Tensor
    labels: Tensor
    poison_indices: Tensor
    cover_indices: Tensor

    def with_truth(
        self,
        original_labels: Tensor,  # [N] int64
        num_classes: int,
    ) -> PoisonedData:
        """The set with its true labels, which backdoor-toolbox does not store: those of the clean training set.

        Raises:
            ValueError: another number of labels, or labels that differ where nothing was poisoned.
        """
        where, count = "ToolboxSet.with_truth", len(self.labels)
        if tuple(original_labels.shape) != (count,):
            got = f"{list(original_labels.shape)}"
            raise ValueError(
                message(where, "original_labels", f"[{count}]", got, "pass those of the clean training set")
            )
        poisoned, cover = (_mask(index, count) for index in (self.poison_indices, self.cover_indices))
        differs = (original_labels.cpu() != self.labels) & ~poisoned
        if bool(differs.any()):
            got = f"{int(differs.sum())} others among the clean samples"
            remedy = "pass them in the order of the poisoned set"
            raise ValueError(message(where, "original_labels", "the labels of the clean samples", got, remedy))
        targets = torch.unique(self.labels[poisoned]).tolist()
        relabel = (
            Relabel("all-to-all", num_classes=num_classes)
            if len(targets) > 1
            else Relabel(target=targets[0] if targets else 0, num_classes=num_classes)
        )
        return PoisonedData(
            images=self.images,
            labels=self.labels,
            original_labels=original_labels.cpu().to(torch.int64),
            is_poisoned=poisoned,
            is_cover=cover,
            attack=RecordedAttack(),
            relabel=relabel,
            seed=0,
            quantize=False,
        )


def poison_set_name(
    poison_type: str,
    *,
    rate: float,
    alpha: float = 0.2,
    cover_rate: float = 0.0,
    trigger: str = "",
    poison_seed: int | None = 0,
) -> str:
    """The name of a poisoned set's folder.

    Args:
        poison_type: one of :data:`POISON_TYPES`.
        rate: share of the set that is poisoned.
        alpha: opacity of the trigger, for :data:`WITH_ALPHA`.
        cover_rate: share of the set that are covers, for :data:`WITH_COVER`.
        trigger: file name of the trigger, for :data:`WITH_ALPHA`.
        poison_seed: None leaves it out.

    Raises:
        ValueError: an unknown type, or a trigger that is missing or no file name.

    Example:
        >>> poison_set_name("badnet", rate=0.01)
        'badnet_0.010_poison_seed=0'
        >>> poison_set_name("adaptive_blend", rate=0.003, alpha=0.15, cover_rate=0.003, trigger="hellokitty_32.png")
        'adaptive_blend_0.003_alpha=0.150_cover=0.003_trigger=hellokitty_32.png_poison_seed=0'
    """
    if poison_type not in POISON_TYPES:
        expected = f"one of {', '.join(POISON_TYPES)}"
        raise ValueError(message("poison_set_name", "poison_type", expected, repr(poison_type), "choose one"))
    name = f"{poison_type}_{rate:.3f}"
    if poison_type in WITH_ALPHA:
        name += f"_alpha={alpha:.3f}"
    if poison_type in WITH_COVER:
        name += f"_cover={cover_rate:.3f}"
    if poison_type in WITH_ALPHA:
        if not trigger or "/" in trigger or "\\" in trigger:
            remedy = "pass hellokitty_32.png, say"
            raise ValueError(message("poison_set_name", "trigger", "the name of a file", repr(trigger), remedy))
        name += f"_trigger={trigger}"
    return name if poison_seed is None else f"{name}_poison_seed={poison_seed}"


def model_name(seed: int = 2333) -> str:
    """The file of a victim's weights beside its poisoned set.

    Example:
        >>> model_name()
        'full_base_aug_seed=2333.pt'
    """
    return f"full_base_aug_seed={seed}.pt"


def save_poison_set(folder: str | os.PathLike[str], data: PoisonedData) -> None:
    """Write a poisoned set: ``imgs``, ``labels``, ``poison_indices``, and ``cover_indices`` where there are covers.

    Args:
        folder: made if it is not there; see :func:`poison_set_name`.
        data: uint8 images become floats in [0, 1].
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images = data.images.detach().cpu()
    torch_save(images.float() / 255 if images.dtype == torch.uint8 else images.contiguous(), folder / IMAGES)
    torch_save(data.labels.cpu().clone(), folder / LABELS)
    torch_save(data.poison_indices.tolist(), folder / POISON)
    if len(data.cover_indices):
        torch_save(data.cover_indices.tolist(), folder / COVER)


def load_poison_set(
    folder: str | os.PathLike[str], *, num_classes: int | None = None, limits: Limits | None = None
) -> ToolboxSet:
    """Read a poisoned set, without running anything in its files.

    Args:
        folder: the set.
        num_classes: labels must be below it, if given.
        limits: what reading each file may take.

    Raises:
        FileNotFoundError: a file is missing.
        ArtefactError, LabelRangeError: a file is refused; the message names file and field.
    """
    folder = Path(folder)
    images = _images(folder / IMAGES, "load_poison_set", limits)
    labels = _labels(folder / LABELS, "load_poison_set", len(images), num_classes, limits)
    poison = _indices(folder / POISON, len(images), limits)
    cover = _indices(folder / COVER, len(images), limits) if (folder / COVER).is_file() else torch.empty(0).long()
    both = sorted(set(poison.tolist()) & set(cover.tolist()))
    if both:
        got = f"{both[0]} in both"
        raise _wrong("load_poison_set", folder / COVER, "indices", "indices that are not poisoned", got)
    return ToolboxSet(images, labels, poison, cover)


def load_clean_split(
    folder: str | os.PathLike[str], *, num_classes: int | None = None, limits: Limits | None = None
) -> tuple[Tensor, Tensor]:
    """Read ``clean_split`` or ``test_split``.

    Returns:
        ``(images, labels)``: [N, 3, H, W], uint8 from PNG files, float in [0, 1] from ``imgs``; [N] int64.

    Raises:
        FileNotFoundError: neither form is there.
        ArtefactError, LabelRangeError, ValueError: a file is refused.
    """
    folder, where = Path(folder), "load_clean_split"
    file = folder / ("clean_labels" if (folder / "clean_labels").is_file() else LABELS)
    if (folder / IMAGES).is_file():
        images = _images(folder / IMAGES, where, limits)
        return images, _labels(file, where, len(images), num_classes, limits)
    labels = _labels(file, where, None, num_classes, limits)
    root = Path(os.path.realpath(folder))

    paths = [Path(os.path.realpath(folder / "data" / f"{index}.png")) for index in range(len(labels))]
    for index, path in enumerate(paths):
        if not path.is_relative_to(root) or not path.is_file():
            raise _wrong(where, folder / "data", f"{index}.png", "an image for each label", "none in the folder")
    return decode_all(len(paths), lambda index: paths[index].open("rb"), lambda index: str(paths[index]), None), labels


def _images(file: Path, where: str, limits: Limits | None) -> Tensor:
    value = read_artefact(file, where=where, limits=limits).value
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        got = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise _wrong(where, file, "the tensor", "float images [N, C, H, W]", got)
    try:
        check_images(where, value)
    except ValueError as error:
        raise _wrong(where, file, "the tensor", "images in [0, 1]", str(error).partition(", got ")[2]) from error
    return value


def _labels(file: Path, where: str, count: int | None, num_classes: int | None, limits: Limits | None) -> Tensor:
    fields = Fields(where, file)
    value = read_artefact(file, where=where, limits=limits).value
    labels = fields.integers(value, "labels", -(2**62), 2**62)
    if count is not None and len(labels) != count:
        raise fields.wrong("labels", f"{count}, one for each image", f"{len(labels)}")
    for row in ((labels < 0) | (labels >= (num_classes or MAX_CLASSES))).nonzero().flatten()[:1].tolist():
        fields.label(int(labels[row]), f"labels[{row}]", num_classes or MAX_CLASSES)
    return labels


def _indices(file: Path, count: int, limits: Limits | None) -> Tensor:
    fields = Fields("load_poison_set", file)
    value = read_artefact(file, where="load_poison_set", limits=limits).value
    indices = fields.integers(value, "indices", 0, min(count, MAX_SAMPLES) - 1).sort().values
    if bool((indices.diff() == 0).any()):
        raise fields.wrong("indices", "every index once", "one of them twice")
    return indices


def _wrong(where: str, file: Path, field: str, expected: str, got: str) -> ArtefactError:
    return ArtefactError(where, file, field, "damaged", expected, got, "fetch or make the set again")


def _mask(indices: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[indices] = True
    return mask
