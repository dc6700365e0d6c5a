"""Reads folders of images, one sub-folder a class.

Two layouts::

    root/train/<class>/*.png + root/test/<class>/*.png     (``val`` serves as ``test``)
    root/<class>/*.png                                     one set, which is split by seed

``root`` may hold nothing but the folder that an archive unpacks to. Of ``test`` and ``val`` the one with the classes of
``train`` is taken: Tiny ImageNet's ``test`` has no labels.

Classes and files are in the order of their names, numbers in the order of their value: class "10" is label 10 when the
folders are called 0, 1, ..., and not 2 as it would be by spelling. Images may lie deeper in a class folder.

``root`` may be a symbolic link. Below it links to folders are refused, and so are links to files that lead out of it: a
folder from a stranger names no other files of this machine.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import BinaryIO

import torch

from bdfast.data.decode import SUFFIXES, decode_all
from bdfast.data.splits import DataSplits, ReadOptions, Split, split_fraction
from bdfast.errors import message, printable


def is_image_folder(folder: Path) -> bool:
    """Whether ``folder`` has a ``train`` folder, or a sub-folder with an image."""
    if (folder / "train").is_dir() or any(True for child in _children(folder) for _ in _find_images(child)):
        return True
    links = any(path.is_symlink() for path in _folders(folder))  # perhaps to images: the reader says why not
    return links and not any(folder.glob("*.npz"))


def unpacked(folder: Path) -> Path:
    """``folder``, or its only sub-folder if that has a ``train`` folder, such as ``tiny-imagenet-200``."""
    children = [] if (folder / "train").is_dir() else _children(folder)
    return children[0] if len(children) == 1 and (children[0] / "train").is_dir() else folder


def read_image_folder(root: Path, options: ReadOptions) -> DataSplits:
    """Read a folder of images; gray images give one channel, and three if any image has colour.

    ``options.limit`` keeps the first images of every class, as evenly as the classes allow: folders list one class
    after the other, so that the first images of all would be of one class.

    Raises:
        FileNotFoundError: ``train`` without ``test`` or ``val``.
        ValueError: an empty class folder, classes that differ between train and test, mixed sizes, a damaged image, a
            link to a folder, a link to a file elsewhere.
        MissingExtraError: Pillow is not installed.
    """
    _refuse_links(root / name for name in ("train", "test", "val") if (root / name).is_dir())
    if not (root / "train").is_dir():
        spelled = {child.name.lower(): child.name for child in _children(root)}
        if "train" in spelled and ("test" in spelled or "val" in spelled):  # GTSRB's own folders, for one
            got, remedy = f"`{spelled['train']}`", "put the images into train/<class>/ and test/<class>/"
            raise ValueError(message("load", str(root), "a folder `train`, or a folder a class", got, remedy))
        class_names, files = _list_classes(root)
        flat = [(path, label) for label, paths in enumerate(files) for path in paths]
        train, test = ([flat[index] for index in part] for part in split_fraction(len(flat), options, str(root)))
        train, test = train[: options.limit[0]], test[: options.limit[1]]
    else:
        test_roots = [root / name for name in ("test", "val") if (root / name).is_dir()]
        if not test_roots:
            raise FileNotFoundError(
                message("load", str(root), "a folder `test` (or `val`) beside `train`", "none", "add the test images")
            )
        class_names, train_files = _list_classes(root / "train")
        own = {child.name for child in _children(root / "train")}
        test_root = next((r for r in test_roots if {child.name for child in _children(r)} == own), test_roots[0])
        test_names, test_files = _list_classes(test_root)
        if test_names != class_names:
            odd = sorted(set(class_names) ^ set(test_names))
            raise ValueError(
                message("load", str(test_root), "the classes of `train`", f"{odd} in one only", "add or remove them")
            )
        train, test = _take(train_files, options.limit[0]), _take(test_files, options.limit[1])
    return DataSplits(_decode(root, train, options), _decode(root, test, options), class_names)


def _list_classes(folder: Path) -> tuple[tuple[str, ...], list[list[Path]]]:
    """Class names and the image files of each."""
    _refuse_links(_folders(folder))
    children = _children(folder)
    files = [_images(child) for child in children]
    if not children or not all(files):
        empty = str(folder) if not children else str(children[[len(paths) for paths in files].index(0)])
        raise ValueError(
            message(
                "load",
                empty,
                f"images ({', '.join(SUFFIXES)})" if children else "a folder a class",
                "an empty class folder" if children else "no folders",
                "add images or remove the folder",
            )
        )
    return tuple(printable(child.name) for child in children), files


def _take(files: Sequence[Sequence[Path]], limit: int | None) -> list[tuple[Path, int]]:
    """(path, label) of ``limit`` images, dealt out one a class in turn, then put back in class order."""
    labelled = [[(path, label) for path in paths] for label, paths in enumerate(files)]
    in_turn = [item for item in chain.from_iterable(zip_longest(*labelled)) if item is not None]
    return sorted(in_turn[:limit], key=lambda item: item[1])  # stable: files keep their order in a class


def _decode(root: Path, items: Sequence[tuple[Path, int]], options: ReadOptions) -> Split:
    real = Path(os.path.realpath(root))
    images = decode_all(
        len(items), lambda index: _open(real, items[index][0]), lambda index: str(items[index][0]), options.image_size
    )
    return images, torch.tensor([label for _, label in items], dtype=torch.int64)


def _open(root: Path, path: Path) -> BinaryIO:
    """A file inside ``root``, and nothing that would be waited for, such as a pipe."""
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
        raise ValueError("a link that leads out of the folder")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError("no regular file")
    return os.fdopen(handle, "rb")


def _children(folder: Path) -> list[Path]:
    return sorted((path for path in _folders(folder) if not path.is_symlink()), key=_by_name)


def _folders(folder: Path) -> list[Path]:
    """Sub-folders that are not hidden, and links to folders."""
    return [path for path in folder.iterdir() if path.name[0] != "." and path.is_dir()]


def _refuse_links(folders: Iterable[Path]) -> None:
    link = next((folder for folder in folders if folder.is_symlink()), None)
    if link is not None:
        remedy = "put the folder itself there, or pass the one that it leads to"
        raise ValueError(message("load", str(link), "a folder", "a link to one, which is not followed", remedy))


def _images(folder: Path) -> list[Path]:
    return sorted(_find_images(folder, refuse_links=True), key=_by_name)


def _find_images(folder: Path, *, refuse_links: bool = False) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        if refuse_links:
            _refuse_links(Path(place, name) for name in folders if name[0] != ".")
        for name in names:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and name[0] != ".":
                yield path


def _by_name(path: Path) -> tuple[bool, int, str]:
    """Numbers first, by value; then names, by spelling."""
    number = path.stem.isascii() and path.stem.isdigit()
    return not number, int(path.stem) if number else 0, str(path)
