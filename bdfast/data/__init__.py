"""Data sets in memory: reading, checking, and the small clean set.

==========================  =========================================================================
name                        what it does
==========================  =========================================================================
:func:`load`                read a data set by name, path or object
:func:`as_tensors`          bring whatever a defense is given to ``(images, labels)``
:func:`check_labels`        labels in range, or an error that names the first one outside
:func:`reserve`             draw a small clean set
:func:`auxiliary`           what a defender may hold instead: unseen, blurred, rotated, ... images
:func:`auxiliary_split`     what the victim is trained on, and what is kept from it
:func:`shift`               the changes behind :func:`auxiliary`, for images of one's own
:func:`save_calibrated`     keep a set that GIC calibrated, and :func:`load_calibrated` it back
:func:`read_index`          the indices of such a set from a file, and :func:`write_index` back
:func:`normalization`       mean and standard deviation of the common data sets
==========================  =========================================================================
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from bdfast.data.archive import Archive
from bdfast.data.calibrated import CalibratedSet, calibrated_folder, load_calibrated, save_calibrated
from bdfast.data.cifar_binary import find_cifar_binary, read_cifar_binary
from bdfast.data.cifar_python import find_cifar_python, read_cifar_python
from bdfast.data.dataset import as_tensors, check_labels, read_dataset
from bdfast.data.digits import read_digits
from bdfast.data.families import FAMILIES, Family, auxiliary, auxiliary_split, shift
from bdfast.data.image_folder import is_image_folder, read_image_folder, unpacked
from bdfast.data.jpeg_npz import read_jpeg_npz
from bdfast.data.normalization import Normalization, normalization
from bdfast.data.npz import read_npz
from bdfast.data.reserve import read_index, reserve, write_index
from bdfast.data.splits import DataSplits, ReadOptions, Split, read_options
from bdfast.errors import message

__all__ = [
    "FAMILIES",
    "CalibratedSet",
    "DataSplits",
    "Family",
    "Normalization",
    "Split",
    "as_tensors",
    "auxiliary",
    "auxiliary_split",
    "calibrated_folder",
    "check_labels",
    "load",
    "load_calibrated",
    "normalization",
    "read_index",
    "reserve",
    "save_calibrated",
    "shift",
    "write_index",
]

DATA_VARIABLE = "BDFAST_DATA"  # the environment variable that says where CIFAR-10 lies: a file or a folder


def load(
    source: object = "digits",
    *,
    limit: Sequence[int | None] | None = None,
    seed: int = 0,
    image_size: int | Sequence[int] | None = None,
    test_fraction: float = 0.2,
) -> DataSplits:
    """Read a data set into memory.

    Args:
        source: one of

            - ``"digits"``: scikit-learn's bundled 8x8 digits, 1,400 training and 397 test images drawn by ``seed``;
            - ``"cifar10"``: CIFAR-10 in the file or folder that the environment variable ``BDFAST_DATA`` names;
            - a path: an ``.npz`` of JPEG files (:mod:`bdfast.data.jpeg_npz`) or of arrays (:mod:`bdfast.data.npz`), a
              folder of images (:mod:`bdfast.data.image_folder`), of CIFAR's binary files
              (:mod:`bdfast.data.cifar_binary`) or of its Python files, which torchvision downloads
              (:mod:`bdfast.data.cifar_python`: interpreted in a process of its own, never unpickled);
            - a map-style data set (torchvision's, for one), or anything else that :func:`as_tensors` takes, or a pair
              ``(train, test)`` of them.

        limit: ``(n_train, n_test)``, the most images to keep; None in place of either keeps all. The first images are
            kept; folders of images, which list one class after the other, give the first of every class.
        seed: seed of the split, for sources that do not come with a test set.
        image_size: side, or (height, width), in pixels to resize to (bilinear, antialiased). Without it all images must
            have one size.
        test_fraction: share of the images that becomes the test set, for sources that do not come with one.

    Returns:
        ``(train, test, class_names)``; train and test are ``(images, labels)``, uint8 ``[N, C, H, W]`` (float32 in
        [0, 1] where an .npz holds floats; a data set object's own float dtype) and int64 ``[N]``.

    Warns:
        UserWarning: ``limit`` left a class without a training image.

    Raises:
        FileNotFoundError: nothing lies at the path, or ``BDFAST_DATA`` is not set.
        ValueError: damaged or contradictory files; a pickle that refers to code.
        LabelRangeError: a label that is no class.
        MissingExtraError: scikit-learn (digits) or Pillow (JPEG, PNG) is not installed.

    Example:
        >>> train, test, class_names = load("digits", limit=(200, 50))
        >>> train[0].shape, train[0].dtype, test[1].shape, len(class_names)
        (torch.Size([200, 1, 8, 8]), torch.uint8, torch.Size([50]), 10)
    """
    options = read_options(limit, seed, image_size, test_fraction)
    if isinstance(source, str) and source == "digits":
        splits = read_digits(options)
    elif isinstance(source, str) and source == "cifar10":
        splits = _read_cifar10(options)
    elif isinstance(source, (str, os.PathLike)):
        splits = _read_path(Path(source), options)
    else:
        splits = read_dataset(source, options)
    _check_splits(splits, options)
    return splits


def _read_cifar10(options: ReadOptions) -> DataSplits:
    place = os.environ.get(DATA_VARIABLE)
    if not place:
        raise FileNotFoundError(
            message(
                "load",
                DATA_VARIABLE,
                "the file or folder that holds CIFAR-10",
                "an unset variable",
                f"set {DATA_VARIABLE}, or load the bundled 'digits'",
            )
        )
    # A shared data folder may hold more than one set: what is called cifar10 comes first.
    named = sorted(Path(place).glob("cifar10*.npz")) if Path(place).is_dir() else []
    splits = _read_path(named[0] if len(named) == 1 else Path(place), options)
    if len(splits.class_names) != 10:
        raise ValueError(
            message(
                "load",
                DATA_VARIABLE,
                "CIFAR-10 with its 10 classes",
                f"{len(splits.class_names)} classes in {place}",
                "correct the variable, or pass the path itself to load",
            )
        )
    return splits


def _read_path(path: Path, options: ReadOptions) -> DataSplits:
    """The reader for what lies at ``path``; of a folder, CIFAR's files before images before a single .npz."""
    if not path.exists():
        raise FileNotFoundError(
            message(
                "load", str(path), "'digits', 'cifar10' or a path", "no such file", "check the spelling and the path"
            )
        )
    if path.is_dir():
        binary = find_cifar_binary(path)
        if binary is not None:
            return read_cifar_binary(binary, options)
        pickled = find_cifar_python(path)
        if pickled is not None:
            return read_cifar_python(pickled, options)
        path = unpacked(path)
        if is_image_folder(path):
            return read_image_folder(path, options)
        archives = sorted(path.glob("*.npz"))
        if len(archives) != 1:
            raise ValueError(
                message(
                    "load",
                    str(path),
                    "a folder of images, of CIFAR's own files or of one .npz",
                    f"{len(archives)} .npz files and none of the others",
                    "pass the file itself",
                )
            )
        path = archives[0]
    if path.suffix != ".npz":
        raise ValueError(
            message("load", str(path), "an .npz file or a folder", f"a {path.suffix or 'nameless'} file", "convert it")
        )
    with Archive(path) as archive:
        is_jpeg = any(key.endswith("_jpeg") for key in archive.keys)
    return read_jpeg_npz(path, options) if is_jpeg else read_npz(path, options)


def _check_splits(splits: DataSplits, options: ReadOptions) -> None:
    """Train and test are of one form, and ``limit`` has left no class out."""
    train, test = splits.train[0], splits.test[0]
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise ValueError(
            message(
                "load",
                "source",
                f"test images like the training images, {train.dtype} {list(train.shape[1:])}",
                f"{test.dtype} {list(test.shape[1:])}",
                "pass image_size= for one size; convert the images for one dtype and channel count",
            )
        )
    if options.limit[0] is not None and options.limit[0] >= len(splits.class_names):
        present = set(splits.train[1].tolist())
        absent = [name for label, name in enumerate(splits.class_names) if label not in present]
        if absent:
            warnings.warn(f"load: limit={options.limit} leaves no training image of class {absent[:10]}", stacklevel=3)
