"""Reads the Python versions of CIFAR-10 and CIFAR-100, as their authors publish them and torchvision downloads them.

A batch is a pickled dict of Python 2: ``data``, uint8 ``[N, 3072]``, channels first, and ``labels``, a list of N
(CIFAR-100: ``coarse_labels``, and ``fine_labels``, which are the classes). Files that Python 3 has written again are
read, too. None is unpickled: :mod:`bdfast.untrusted` reads them, and what is not exactly such a dict is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bdfast.data.cifar_binary import PIXELS, SHAPE, batches_of, check_complete
from bdfast.data.dataset import check_labels
from bdfast.data.layout import resize
from bdfast.data.splits import DataSplits, ReadOptions, Split, head
from bdfast.errors import message
from bdfast.untrusted import Limits, read_artefact

CIFAR10_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-py", "cifar-100-python"
REMEDY = "unpack the archive again"
# The largest file, CIFAR-100's training set, takes 155 MB, and a quarter of a million values with its file names.
LIMITS = Limits(file=1 << 30, pickle=1 << 30, blob=1 << 30, memory=4 << 30)
MAX_NAME = 256  # letters


class _Version(NamedTuple):
    """What the files of a data set are called, and the keys in them; others have no meaning here."""

    num_classes: int
    test: str
    labels: str
    others: tuple[str, ...]
    meta: str
    names: str
    other_names: tuple[str, ...]


CIFAR10 = _Version(
    10, "test_batch", "labels", ("batch_label", "filenames"),
    "batches.meta", "label_names", ("num_cases_per_batch", "num_vis"),
)  # fmt: skip
CIFAR100 = _Version(
    100, "test", "fine_labels", ("coarse_labels", "batch_label", "filenames"),
    "meta", "fine_label_names", ("coarse_label_names",),
)  # fmt: skip


def find_cifar_python(folder: Path) -> Path | None:
    """The folder of pickled batches: ``folder`` itself or the sub-folder that the authors' archive unpacks to."""
    for place in (folder, folder / CIFAR10_FOLDER, folder / CIFAR100_FOLDER):
        if batches_of(place, "") or ((place / "train").is_file() and (place / "meta").is_file()):
            return place
    return None


def read_cifar_python(folder: Path, options: ReadOptions) -> DataSplits:
    """Read ``data_batch_*`` and ``test_batch``, or ``train`` and ``test`` (CIFAR-100).

    Raises:
        FileNotFoundError: a batch or the test file is missing.
        ValueError: a file holds something else than such a dict; :class:`bdfast.untrusted.ArtefactError`, which is one,
            where it refers to code or is damaged.
        LabelRangeError: a label that is no class.
    """
    batches = batches_of(folder, "")
    version = CIFAR10 if batches else CIFAR100
    check_complete(folder, "", len(batches), version.test, "Python")
    class_names = _class_names(folder / version.meta, version)
    train = _read_split(batches or [folder / "train"], version, options.limit[0], options.image_size)
    test = _read_split([folder / version.test], version, options.limit[1], options.image_size)
    return DataSplits(train, test, class_names)


def _read_split(
    paths: Sequence[Path], version: _Version, limit: int | None, image_size: tuple[int, int] | None
) -> Split:
    parts = [_batch(path, version) for path in paths]
    rows, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    rows, labels = head((rows, labels), limit)
    return resize(rows.reshape(-1, *SHAPE), image_size), labels


def _batch(path: Path, version: _Version) -> Split:
    """Rows uint8 [N, 3072] and labels int64 [N] of a file."""
    labels = version.labels
    content = _dict(path, ("data", labels), version.others)
    data, classes = content["data"], content[labels]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != PIXELS:
        got = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else f"a {type(data).__name__}"
        raise _wrong(path, "data", f"a uint8 array [N, {PIXELS}]", got)
    if not isinstance(classes, list) or any(type(label) is not int for label in classes):
        raise _wrong(path, labels, "a list of integers", "something else")
    if len(classes) != len(data) or not classes:
        got = f"{len(classes)} for {len(data)} images"
        raise _wrong(path, labels, "a label for each image, and at least one", got)
    targets = torch.tensor(classes, dtype=torch.int64)
    check_labels(targets, version.num_classes, "load", f"{path}: {labels}")
    return torch.from_numpy(data), targets


def _class_names(path: Path, version: _Version) -> tuple[str, ...]:
    """The names in ``path``; the numbers themselves if it does not come with the batches."""
    key, num_classes = version.names, version.num_classes
    if not path.is_file():
        return tuple(str(label) for label in range(num_classes))
    names = _dict(path, (key,), version.other_names)[key]
    if not isinstance(names, list) or not all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in names):
        raise _wrong(path, key, f"a list of names of 1 to {MAX_NAME} letters", "something else")
    if len(names) != num_classes:
        raise _wrong(path, key, f"{num_classes} class names", str(len(names)))
    return tuple(names)


def _dict(path: Path, needed: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """What a file holds: a dict with the keys ``needed``, and perhaps ``others``."""
    content = read_artefact(path, where="load", limits=LIMITS, form="pickle").value
    if not isinstance(content, dict):
        raise _wrong(path, "the whole value", "a dict", f"a {type(content).__name__}")
    for key in needed:
        if key not in content:
            raise _wrong(path, key, "a value", "none")
    strange = next((key for key in content if key not in needed and key not in others), None)
    if strange is not None:
        raise _wrong(path, "its keys", " and ".join(needed) + f", and perhaps {', '.join(others)}", f"{strange!r:.80}")
    return content


def _wrong(path: Path, field: str, expected: str, got: str) -> ValueError:
    return ValueError(message("load", f"{path}: {field}", expected, got, REMEDY))
