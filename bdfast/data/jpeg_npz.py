"""Reads a set of JPEG files packed into one .npz.

==================  =====================  ==============================================
key                 dtype, shape           meaning
==================  =====================  ==============================================
``train_jpeg``      uint8 [bytes]          the files, end to end
``train_offsets``   int64 [N + 1]          image i is ``jpeg[offsets[i]:offsets[i + 1]]``
``train_labels``    any integer [N]        class of image i
``test_...``                               the same three for the test set
``class_names``     unicode [C]            name of class i
==================  =====================  ==============================================
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch

from bdfast.data.archive import Archive
from bdfast.data.dataset import check_labels
from bdfast.data.decode import decode_all
from bdfast.data.splits import MAX_UNNAMED_CLASSES, DataSplits, ReadOptions, Split
from bdfast.errors import message, printable


def read_jpeg_npz(path: Path, options: ReadOptions) -> DataSplits:
    """Read a packed JPEG file; ``options.limit`` keeps (and decodes) the first images only.

    Raises:
        ValueError: a missing key, offsets out of order, labels out of range, or a damaged image.
        MissingExtraError: Pillow is not installed.
    """
    with Archive(path) as archive:
        class_names = read_class_names(archive)
        train = _read_split(archive, "train", len(class_names), options.limit[0], options.image_size)
        test = _read_split(archive, "test", len(class_names), options.limit[1], options.image_size)
    return DataSplits(train, test, class_names)


def read_class_names(archive: Archive) -> tuple[str, ...]:
    """The array ``class_names``, one unicode string a class."""
    names = archive.read("class_names")
    if names.dtype.kind != "U" or names.ndim != 1 or not 1 <= names.size <= MAX_UNNAMED_CLASSES:
        raise ValueError(
            message(
                "load",
                archive.name("class_names"),
                f"unicode strings [C], at most {MAX_UNNAMED_CLASSES}",
                f"{names.dtype} {list(names.shape)}",
                "store numpy.array(names)",
            )
        )
    return tuple(map(printable, names.tolist()))


def _read_split(
    archive: Archive, part: str, num_classes: int, limit: int | None, image_size: tuple[int, int] | None
) -> Split:
    jpeg, offsets, labels = (archive.read(f"{part}_{field}") for field in ("jpeg", "offsets", "labels"))
    if jpeg.dtype != np.uint8 or jpeg.ndim != 1:
        raise ValueError(
            message(
                "load",
                archive.name(f"{part}_jpeg"),
                "uint8 [bytes]",
                f"{jpeg.dtype} {list(jpeg.shape)}",
                "concatenate the JPEG files as bytes",
            )
        )
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise ValueError(
            message(
                "load",
                archive.name(f"{part}_offsets"),
                "integers [N + 1], N >= 1",
                f"{offsets.dtype} {list(offsets.shape)}",
                "store the start of every image and the end of the last",
            )
        )
    offsets = offsets.astype(np.int64)
    not_after = np.flatnonzero(offsets[1:] <= offsets[:-1])
    if offsets[0] != 0 or offsets[-1] != len(jpeg) or len(not_after):
        got = (
            f"{offsets[not_after[0] + 1]} after {offsets[not_after[0]]} at image {not_after[0]}"
            if len(not_after)
            else f"{offsets[0]} to {offsets[-1]}"
        )
        raise ValueError(
            message(
                "load",
                archive.name(f"{part}_offsets"),
                f"increasing offsets from 0 to {len(jpeg)}",
                got,
                "the file is damaged: download or write it again",
            )
        )
    if labels.dtype.kind not in "iu" or labels.shape != (len(offsets) - 1,):
        raise ValueError(
            message(
                "load",
                archive.name(f"{part}_labels"),
                f"integers [{len(offsets) - 1}], one an image",
                f"{labels.dtype} {list(labels.shape)}",
                "store one label an image",
            )
        )
    classes = torch.from_numpy(labels.astype(np.int64))
    check_labels(classes, num_classes, "load", archive.name(f"{part}_labels"))

    count = len(classes) if limit is None else min(limit, len(classes))
    images = decode_all(
        count,
        lambda index: io.BytesIO(jpeg[offsets[index] : offsets[index + 1]].tobytes()),
        lambda index: f"{archive.path}: {part} image {index}",
        image_size,
    )
    return images, classes[:count].clone()
