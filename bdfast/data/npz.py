"""Reads plain .npz files of pixel arrays.

The first of these groups of keys that the file has in full is read:

1. ``x_train, y_train, x_test, y_test``
2. ``train_images, train_labels, test_images, test_labels``
3. ``images, labels``, one set, which is split by seed

and ``class_names`` (unicode ``[C]``) if it is there; the classes are called "0", "1", ... otherwise. Images are
``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` (see :func:`bdfast.data.layout.to_nchw`), uint8 or float in [0, 1]
(returned as float32). Labels are integers ``[N]`` or ``[N, 1]``. Other keys are left alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bdfast.data.archive import Archive
from bdfast.data.dataset import check_images, check_labels
from bdfast.data.jpeg_npz import read_class_names
from bdfast.data.layout import resize, to_nchw
from bdfast.data.splits import DataSplits, ReadOptions, Split, head, numbered_classes, split_fraction
from bdfast.errors import message

SPLIT_KEYS = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
SINGLE_KEYS = ("images", "labels")


def read_npz(path: Path, options: ReadOptions) -> DataSplits:
    """Read a plain .npz file; ``options.limit`` keeps the first images of each part.

    Raises:
        ValueError: none of the groups of keys, arrays of another dtype or shape, pixels outside [0, 1], or damage.
        LabelRangeError: a negative label, or one that ``class_names`` does not name.
    """
    with Archive(path) as archive:
        train, test = _read_splits(archive, options)
        if "class_names" in archive.keys:
            class_names = read_class_names(archive)
        else:
            class_names = numbered_classes(f"{path}: labels", train[1], test[1])
        for part, (_, labels) in (("train", train), ("test", test)):
            check_labels(labels, len(class_names), "load", f"{path}: {part} labels")
    train, test = head(train, options.limit[0]), head(test, options.limit[1])
    return DataSplits(
        (resize(train[0], options.image_size), train[1]), (resize(test[0], options.image_size), test[1]), class_names
    )


def _read_splits(archive: Archive, options: ReadOptions) -> tuple[Split, Split]:
    for x_train, y_train, x_test, y_test in SPLIT_KEYS:
        if archive.keys.issuperset((x_train, y_train, x_test, y_test)):
            return _read_split(archive, x_train, y_train), _read_split(archive, x_test, y_test)
    if archive.keys.issuperset(SINGLE_KEYS):
        images, labels = _read_split(archive, *SINGLE_KEYS)
        train, test = split_fraction(len(labels), options, archive.name("images"))
        return (images[train], labels[train]), (images[test], labels[test])
    groups = " or ".join(str(list(keys)) for keys in (*SPLIT_KEYS, SINGLE_KEYS))
    raise ValueError(
        message("load", str(archive.path), f"the keys {groups}", str(sorted(archive.keys)), "rename the arrays")
    )


def _read_split(archive: Archive, images_key: str, labels_key: str) -> Split:
    pixels, classes = archive.read(images_key), archive.read(labels_key)
    if pixels.dtype != np.uint8 and pixels.dtype.kind != "f":
        raise ValueError(
            message(
                "load",
                archive.name(images_key),
                "uint8 0..255 or float in [0, 1]",
                str(pixels.dtype),
                "convert the pixels, for example with .astype('uint8')",
            )
        )
    if classes.dtype.kind not in "iu" or classes.shape not in {(len(pixels),), (len(pixels), 1)}:
        raise ValueError(
            message(
                "load",
                archive.name(labels_key),
                f"integers [{len(pixels)}], one an image",
                f"{classes.dtype} {list(classes.shape)}",
                "store one label an image",
            )
        )
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float32)
    images = to_nchw(torch.from_numpy(np.ascontiguousarray(pixels)), "load", archive.name(images_key)).contiguous()
    check_images(images, "load", archive.name(images_key))
    return images, torch.from_numpy(classes.reshape(-1).astype(np.int64))
