"""Reads the binary versions of CIFAR-10 and CIFAR-100, as their authors publish them.

A record is the label byte (CIFAR-100: coarse label, then fine label) and 3 x 32 x 32 pixel bytes, channels first.
The fine labels of CIFAR-100 are the classes. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bdfast.data.dataset import check_labels
from bdfast.data.layout import resize
from bdfast.data.splits import DataSplits, ReadOptions, Split
from bdfast.errors import message

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32
CIFAR10_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-bin", "cifar-100-binary"


def find_cifar_binary(folder: Path) -> Path | None:
    """The folder of binary files: ``folder`` itself or the sub-folder that the authors' archive unpacks to."""
    for place in (folder, folder / CIFAR10_FOLDER, folder / CIFAR100_FOLDER):
        if batches_of(place, ".bin") or (place / "train.bin").is_file():
            return place
    return None


def read_cifar_binary(folder: Path, options: ReadOptions) -> DataSplits:
    """Read ``data_batch_*.bin`` and ``test_batch.bin``, or ``train.bin`` and ``test.bin`` (CIFAR-100).

    Raises:
        FileNotFoundError: a batch or the test file is missing.
        ValueError: a file is no whole number of records.
        LabelRangeError: a label byte that is no class.
    """
    batches = batches_of(folder, ".bin")
    if batches:
        train, test, names, label_bytes, num_classes = batches, "test_batch.bin", "batches.meta.txt", 1, 10
    else:
        train, test, names = [folder / "train.bin"], "test.bin", "fine_label_names.txt"
        label_bytes, num_classes = 2, 100
    check_complete(folder, ".bin", len(batches), test, "binary")
    class_names = _class_names(folder / names, num_classes)
    return DataSplits(
        _read_split(train, label_bytes, num_classes, options.limit[0], options.image_size),
        _read_split([folder / test], label_bytes, num_classes, options.limit[1], options.image_size),
        class_names,
    )


def batches_of(folder: Path, suffix: str) -> list[Path]:
    """``data_batch_1<suffix>``, ``data_batch_2<suffix>``, ... in the order of their numbers."""
    pattern = re.compile(rf"data_batch_(\d{{1,4}}){re.escape(suffix)}")
    numbered = ((pattern.fullmatch(path.name), path) for path in folder.glob(f"data_batch_*{suffix}"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def check_complete(folder: Path, suffix: str, batches: int, test: str, version: str) -> None:
    """Raise FileNotFoundError unless batches 1 to ``batches`` and the test file are there."""
    names = [*(f"data_batch_{number}{suffix}" for number in range(1, batches + 1)), test]
    missing = next((folder / name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        expected = f"all files of the {version} version"
        raise FileNotFoundError(message("load", str(missing), expected, "no such file", "unpack the archive again"))


def _read_split(
    paths: Sequence[Path], label_bytes: int, num_classes: int, limit: int | None, image_size: tuple[int, int] | None
) -> Split:
    record = label_bytes + PIXELS
    parts: list[torch.Tensor] = []
    for path in paths:
        size = path.stat().st_size
        if size == 0 or size % record:
            raise ValueError(
                message(
                    "load",
                    str(path),
                    f"a whole number of records of {record} bytes",
                    f"{size} bytes",
                    "the file is truncated: unpack the archive again",
                )
            )
        records = torch.from_numpy(np.fromfile(path, dtype=np.uint8, count=size)).view(-1, record)
        check_labels(records[:, label_bytes - 1].long(), num_classes, "load", f"{path}: labels")
        parts.append(records)
    records = torch.cat(parts)[:limit]
    images = records[:, label_bytes:].reshape(-1, *SHAPE)
    return resize(images.contiguous(), image_size), records[:, label_bytes - 1].long()


def _class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """One name a line; the numbers themselves if the file does not come with the batches."""
    if not path.is_file():
        return tuple(str(label) for label in range(num_classes))
    names = tuple(
        line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
    )
    if len(names) != num_classes:
        raise ValueError(
            message("load", str(path), f"{num_classes} class names", str(len(names)), "unpack the archive again")
        )
    return names
