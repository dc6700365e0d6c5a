"""A record of BackdoorBench, joined with the data that it was made from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bdfast.attacks import Attack, PoisonedData, Relabel, Rows, TriggeredData
from bdfast.data import check_labels, normalization
from bdfast.errors import message
from bdfast.integrations.backdoorbench.converted import MANIFEST, read_converted
from bdfast.integrations.backdoorbench.stored import Fields, StoredRecord, StoredSet, parse_record
from bdfast.integrations.backdoorbench.weights import architecture, build_network
from bdfast.nn.normalize import normalized
from bdfast.untrusted import Limits, read_artefact

ATTACK_RESULT = "attack_result.pt"
WHERE = "load_record"

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class RecordedAttack(Attack):
    """The attack of a record: known by the images that it left, so that no other image can be triggered."""

    name: ClassVar[str] = "recorded"

    def poison_pixels(self, pixels: Tensor, rows: Rows) -> Tensor:
        expected, remedy = "images that the record holds", "use Record.triggered_test"
        raise ValueError(message("RecordedAttack", "images", expected, f"{len(pixels)} others", remedy))


@dataclass(frozen=True, eq=False)
class Record:
    """An attack that BackdoorBench ran.

    Attributes:
        model: the victim in eval mode; images in [0, 1] to logits, the normalisation inside.
        model_name: BackdoorBench's name of the architecture; :attr:`arch` is ours.
        num_classes: K.
        train: the poisoned training set in its stored order; None where the attack stored none.
        clean_test: ``(images, labels)``, the base data's test set.
        triggered_test: ``(images, attack_labels, original_labels)``, in the stored order; images of the target class
            were left out when it was made. The attack labels are these whatever ``getitem_all_switch`` says.
        normalize: ``(mean, std)`` that BackdoorBench uses with this data set.
        notes: what a report should say about the record.
        stored: the file's own content.
    """

    model: nn.Module
    model_name: str
    num_classes: int
    train: PoisonedData | None
    clean_test: Split
    triggered_test: tuple[Tensor, Tensor, Tensor]
    normalize: tuple[tuple[float, ...], tuple[float, ...]]
    notes: tuple[str, ...]
    stored: StoredRecord

    @property
    def arch(self) -> str:
        """Our name of the architecture."""
        return architecture(self.model_name)

    @property
    def triggered(self) -> TriggeredData:
        """:attr:`triggered_test` in the form of ``PoisonedData.trigger``: every row counts for ASR and RA."""
        images, wanted, original = self.triggered_test
        return TriggeredData(images, wanted, original, torch.ones_like(wanted, dtype=torch.bool))

    def test_sample(self, row: int) -> tuple[Any, ...]:
        """A sample of the triggered test set as BackdoorBench's data set yields it.

        Args:
            row: of :attr:`triggered_test`.

        Returns:
            ``(image, label, index in the base set, flag, original label)``; label and original label trade places
            where ``getitem_all_switch`` says so. Without ``getitem_all``, ``(image, label)``.
        """
        part, (images, wanted, original) = self.stored.test, self.triggered_test
        index, label, true = int(part.order[row]), int(wanted[row]), int(original[row])
        if not part.getitem_all:
            return images[row], label
        if part.getitem_all_switch:
            label, true = true, label
        return images[row], label, index, int(part.flags[index]), true


def is_record(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a record, or like one that :func:`convert` wrote."""
    return any((Path(path) / name).is_file() for name in (ATTACK_RESULT, MANIFEST))


def read_record(
    path: str | os.PathLike[str], *, where: str = "read_record", limits: Limits | None = None
) -> StoredRecord:
    """What a record holds, without the base data. Nothing in it is executed.

    Args:
        path: the folder of a record (with its ``attack_result.pt``), one that :func:`convert` wrote, or the file.
        where: opens the messages.
        limits: what reading may take.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError, LabelRangeError: what is there is refused; the message names file and field.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return read_converted(where, path)
    file = path / ATTACK_RESULT if path.is_dir() else path
    return parse_record(where, file, read_artefact(file, where=where, limits=limits).value)


def load_record(
    folder: str | os.PathLike[str],
    *,
    train: Split,  # images [N, C, H, W], labels [N]
    test: Split,  # images [M, C, H, W], labels [M]
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    limits: Limits | None = None,
) -> Record:
    """Read ``record/<name>/`` (or what :func:`convert` made of it) and join it with the data it was made from.

    A record holds only the images that differ; all others are those of the base data, by index. Nothing in the file is
    executed: see :func:`bdfast.integrations.backdoorbench.read_artefact`.

    Args:
        folder: the record.
        train: ``(images, labels)``, the whole clean training set, in its own order.
        test: likewise the test set.
        normalize: ``(mean, std)`` inside the model; None: what BackdoorBench uses for the record's data set.
        limits: what reading may take.

    Returns:
        :class:`Record`. Of the flagged training samples those with another label than their true one are poisoned.
        Those that keep their label are covers if some of them are of another class than the target: then the attack
        controlled the training (WaNet, Input-aware), its stored set is a snapshot that the victim was not exactly
        trained on, and the notes say so. If all that keep their label are of the target class, they are poisoned too.

    Raises:
        FileNotFoundError: no such record.
        ArtefactError, LabelRangeError: the record is refused; the message names file and field.
        ValueError: the base data is not what the record was made from.
    """
    return join_record(
        folder, read_record(folder, where=WHERE, limits=limits), train=train, test=test, normalize=normalize
    )


def join_record(
    folder: str | os.PathLike[str],
    stored: StoredRecord,
    *,
    train: Split,
    test: Split,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Record:
    """The second half of :func:`load_record`, for what :func:`read_record` has read from ``folder``."""
    fields = Fields(WHERE, Path(folder))
    notes: list[str] = []
    for name, split, part in (("train", train, stored.train), ("test", test, stored.test)):
        if part is not None:
            _check_base(fields, name, split, part, stored)
            notes += _disagreement(name, split[1], part)
    model, renamed = build_network(fields, stored)
    statistics = _normalization(fields, stored, normalize)
    poisoned = None
    if stored.train is None:
        notes.append("the record holds no poisoned training set")
    else:
        poisoned, said = _poisoned(stored.train, train, stored.num_classes)
        notes += said
    return Record(
        model=normalized(model, *statistics).eval(),
        model_name=stored.model_name,
        num_classes=stored.num_classes,
        train=poisoned,
        clean_test=test,
        triggered_test=_join(stored.test, test)[:3],
        normalize=statistics,
        notes=tuple(renamed + notes),
        stored=stored,
    )


def _check_base(fields: Fields, name: str, split: Any, part: StoredSet, stored: StoredRecord) -> None:
    if not isinstance(split, tuple) or len(split) != 2 or not all(isinstance(item, Tensor) for item in split):
        raise TypeError(
            message(WHERE, name, "a tuple (images, labels) of tensors", f"{type(split).__name__}", "pass it")
        )
    images, labels = split
    height, width, channels = stored.image_shape
    if tuple(images.shape[1:]) != (channels, height, width) or len(images) != len(part.flags):
        expected = f"{len(part.flags)} images of {[channels, height, width]}, the {stored.clean_data} of {fields.path}"
        remedy = "pass the whole data set that the attack ran on, in its own order and size"
        raise ValueError(message(WHERE, name, expected, f"{list(images.shape)}", remedy))
    check_labels(labels, stored.num_classes, WHERE)


def _disagreement(name: str, labels: Tensor, part: StoredSet) -> list[str]:
    """Stored true labels against those of the base data: a few may differ, most cannot."""
    wrong = int((labels[part.index].cpu() != part.original_labels).sum())
    if 2 * wrong > len(part.index):
        expected = "the labels that the record was made from"
        got = f"{wrong} others among {len(part.index)} replaced samples"
        raise ValueError(message(WHERE, name, expected, got, "pass the data set in the order of the attack"))
    return [f"{name}: {wrong} stored true labels differ from the base data's"] if wrong else []


def _normalization(
    fields: Fields, stored: StoredRecord, given: tuple[Sequence[float], Sequence[float]] | None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if given is not None:
        return tuple(given[0]), tuple(given[1])
    try:
        return tuple(normalization(stored.clean_data))  # type: ignore[return-value]
    except ValueError as error:
        expected = "a data set whose normalisation is known"
        raise fields.wrong("clean_data", expected, repr(stored.clean_data), "pass normalize=(mean, std)") from error


def _join(part: StoredSet, base: Split) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(images, labels, original labels, flags) of a stored set, in its order and the dtype of the base images."""
    images, labels = base[0].detach().cpu()[part.order], base[1].cpu().to(torch.int64)[part.order]
    originals, flags = labels.clone(), part.flags[part.order]
    rows = flags.nonzero().flatten()
    source = torch.searchsorted(part.index, part.order[rows])
    replaced = part.images[source]
    images[rows] = replaced if images.dtype == torch.uint8 else replaced.to(images.dtype) / 255
    labels[rows], originals[rows] = part.labels[source], part.original_labels[source]
    return images, labels, originals, flags


def _poisoned(part: StoredSet, base: Split, num_classes: int) -> tuple[PoisonedData, list[str]]:
    images, labels, originals, flags = _join(part, base)
    changed, kept = flags & (labels != originals), flags & (labels == originals)
    targets = torch.unique(labels[changed])
    keeps_elsewhere = bool(changed.any()) and (len(targets) > 1 or bool((labels[kept] != targets).any()))
    cover = kept if keeps_elsewhere else torch.zeros_like(kept)
    notes = []
    if bool(cover.any()):
        notes.append(
            f"{int(cover.sum())} of {int(flags.sum())} flagged samples keep their label and count as covers: an attack "
            "that controls training, whose victim saw poison drawn anew every epoch, not exactly this snapshot"
        )
    relabel, said = _relabel(labels[flags & ~cover], originals[flags & ~cover], num_classes)
    data = PoisonedData(
        images=images,
        labels=labels,
        original_labels=originals,
        is_poisoned=flags & ~cover,
        is_cover=cover,
        attack=RecordedAttack(),
        relabel=relabel,
        seed=0,
        quantize=True,
    )
    return data, notes + said


def _relabel(labels: Tensor, originals: Tensor, num_classes: int) -> tuple[Relabel, list[str]]:
    """The rule that the attack labels follow."""
    targets = torch.unique(labels).tolist()
    if len(targets) <= 1:
        return Relabel(target=targets[0] if targets else 0, num_classes=num_classes), []
    if bool((labels == (originals + 1) % num_classes).all()):
        return Relabel("all-to-all", num_classes=num_classes), []
    note = f"attack labels follow neither of the two rules: {len(targets)} targets"
    return Relabel(target=int(labels.mode().values), num_classes=num_classes), [note]
