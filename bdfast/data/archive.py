"""Reads the arrays of an .npz file that a stranger may have written.

``.npz`` is a zip of ``.npy`` files. Nothing is ever unpickled, and an array's header is compared with the bytes that
are there before memory is taken: a header may claim terabytes.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from bdfast.errors import message

MAX_ARRAY_BYTES = 64 << 30
# Beyond FREE_BYTES an array may be so many times as large as it is in the file: pixels are 2 to 20 times, zeros 1000.
FREE_BYTES, MAX_EXPANSION = 256 << 20, 100
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy's; the others expand whole blocks at once, without a bound


class Archive:
    """An open .npz file; use it in a ``with`` statement.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no .npz, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ValueError(message("load", str(path), "an .npz file", "no regular file", "check the path"))
        try:
            self._zip = zipfile.ZipFile(path)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # zipfile promises no list of what damaged bytes make it raise
            raise ValueError(
                message("load", str(path), "a whole .npz file", f"{error}", "download or write the file again")
            ) from error
        self.order = tuple(name.removesuffix(".npy") for name in self._zip.namelist() if name.endswith(".npy"))
        self.keys = frozenset(self.order)

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def name(self, key: str) -> str:
        """How messages call an array of this file."""
        return f"{self.path}: {key}"

    def read(self, key: str) -> NDArray[Any]:
        """The array ``key``.

        Raises:
            ValueError: no such key, an array of Python objects (a pickle), or damaged bytes.
        """
        if key not in self.keys:
            raise ValueError(
                message("load", self.name(key), "an array of that name", f"keys {sorted(self.keys)}", "add the array")
            )
        try:
            self._check_header(key)
            with self._zip.open(f"{key}.npy") as file:
                return np.asarray(npy.read_array(file, allow_pickle=False))
        except Exception as error:  # BadZipFile, zlib.error, RuntimeError (encrypted), TokenError (header), ...
            raise ValueError(
                message("load", self.name(key), "a whole array of numbers or text", f"{error}", "write the file again")
            ) from error

    def _check_header(self, key: str) -> None:
        member = self._zip.getinfo(f"{key}.npy")
        if member.compress_type not in METHODS:
            raise ValueError("a compression that numpy does not write")
        with self._zip.open(member) as file:
            version = npy.read_magic(file)
            if version not in {(1, 0), (2, 0)}:
                raise ValueError(f".npy format version {version}")
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("pickled Python objects, which could run code")
        size = math.prod(shape) * dtype.itemsize
        if min(shape, default=0) < 0 or size > min(member.file_size, MAX_ARRAY_BYTES):
            raise ValueError(f"a header of {size} bytes before {member.file_size} bytes of data")
        if dtype.itemsize == 0:
            raise ValueError("items of no bytes, of which a header may claim any number")
        if size > max(FREE_BYTES, MAX_EXPANSION * member.compress_size):
            raise ValueError(f"{size} bytes from {member.compress_size}, a decompression bomb")
