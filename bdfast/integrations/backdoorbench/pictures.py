"""Images of a record: pixels that were saved in memory, or PNG files below the record's folder and nowhere else."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bdfast.data.decode import MAX_SET_BYTES, pil_to_chw
from bdfast.errors import optional_import
from bdfast.untrusted import ArtefactError, RawImage

__all__ = ["MAX_SET_BYTES", "MAX_SIDE", "Picture", "decode"]

MAX_SIDE = 4096  # pixels
MAX_FILE_BYTES = 256 << 20
FOLDERS = ("bd_train_dataset", "bd_test_dataset", "cross_test_dataset")
_REMEDY = "fetch or save the record again"


@dataclass(frozen=True)
class Picture:
    """Where an image comes from.

    Attributes:
        field: its place in the file, for messages.
        source: a :class:`RawImage`, or the path that was written when the attack ran.
        folder: what the file says the images lie in, such as ``./record/name/bd_train_dataset``.
    """

    field: str
    source: Any
    folder: str


def decode(where: str, file: Path, pictures: Sequence[Picture], shape: tuple[int, int, int]) -> Tensor:
    """The images as uint8 [m, C, H, W].

    Args:
        where: the function that messages name.
        file: ``attack_result.pt``; paths are taken relative to its folder, wherever the attack ran.
        pictures: the images.
        shape: (height, width, channels) that each must have.

    Raises:
        ArtefactError: an image is missing, damaged, of another shape, or outside the folder.
    """
    height, width, channels = shape
    images = torch.empty(len(pictures), channels, height, width, dtype=torch.uint8)
    root = Path(os.path.realpath(file.parent))
    for row, picture in enumerate(pictures):
        if isinstance(picture.source, RawImage):
            pixels = _raw(picture.source)
        elif isinstance(picture.source, str):
            pixels = _from_disk(where, file, root, picture, shape)
        else:
            got = f"a {type(picture.source).__name__}"
            raise _wrong(where, file, picture, "a Pillow image or a path", got)
        if tuple(pixels.shape) != (channels, height, width):
            expected = f"an image of {height} x {width} with {channels} channels, as img_size says"
            raise _wrong(where, file, picture, expected, f"{pixels.shape[1]} x {pixels.shape[2]} with {len(pixels)}")
        images[row] = pixels
    return images


def _wrong(where: str, file: Path, picture: Picture, expected: str, got: str, remedy: str = _REMEDY) -> ArtefactError:
    return ArtefactError(where, file, picture.field, "damaged", expected, got, remedy)


def _raw(image: RawImage) -> Tensor:
    """Transparency is dropped, as it is of files."""
    pixels = image.pixels[:, :, : {2: 1, 4: 3}.get(image.pixels.shape[2], image.pixels.shape[2])]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _from_disk(where: str, file: Path, root: Path, picture: Picture, shape: tuple[int, int, int]) -> Tensor:
    pillow = optional_import("PIL.Image", extra="data", purpose="to decode the images of a record")
    try:
        with _open(where, file, root, picture) as stream:
            image = pillow.open(stream, formats=("PNG",))
            if image.size != (shape[1], shape[0]):  # known from the header, before a pixel is decoded
                expected = f"an image of {shape[0]} x {shape[1]}, as img_size says"
                raise _wrong(where, file, picture, expected, f"{image.height} x {image.width}")
            image.load()
    except ArtefactError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, pillow.DecompressionBombError) as error:
        raise _wrong(where, file, picture, "a whole PNG file", " ".join(str(error).split())[:160]) from error
    return pil_to_chw(image, where, f"{file}: {picture.field}")


def _open(where: str, file: Path, root: Path, picture: Picture) -> BinaryIO:
    """Open an image below ``root``: no other folder, no link that leads out, nothing but a regular file."""
    parts = _tail(picture)
    if parts is None:
        expected = f"a path in {', '.join(FOLDERS)}"
        raise _wrong(where, file, picture, expected, ascii(picture.source[:160]))
    path = root.joinpath(*parts)
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise _wrong(where, file, picture, "an image below the record's folder", "a link that leads out of it")
    try:
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        remedy = "keep the image folders beside attack_result.pt"
        raise _wrong(where, file, picture, "an image on disk", f"no file {'/'.join(parts)}", remedy) from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
        os.close(handle)
        raise _wrong(where, file, picture, f"a file of at most {MAX_FILE_BYTES} bytes", "something else")
    return os.fdopen(handle, "rb")


def _tail(picture: Picture) -> list[str] | None:
    """The part of a path that starts with the folder of images; None for what no attack writes."""
    parts = picture.source.replace("\\", "/").split("/")
    names = {*FOLDERS, picture.folder.replace("\\", "/").rstrip("/").rpartition("/")[2]} - {"", ".", ".."}
    starts = [place for place, part in enumerate(parts[:-1]) if part in names]
    if not starts:
        return None
    tail = parts[starts[-1] :]
    plain = all(part not in ("", ".", "..") and part.isprintable() and ":" not in part for part in tail)
    return tail if plain and len(tail) <= 8 and tail[-1].endswith(".png") else None
