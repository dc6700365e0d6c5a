"""Files of ``torch.save`` and ``pickle.dump`` from strangers: read by a process of its own, and checked again here.

A pickle is a program. The file is interpreted, never unpickled, by a Python that imports neither torch nor bdfast, with
no input, no environment and bounds on memory, time and output (:mod:`bdfast.untrusted.restricted`).
It leaves a description in JSON and raw bytes; this module turns them into plain values, arrays and tensors. There is no
other way to read such a file here, and no fallback.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bdfast.errors import message, printable
from bdfast.untrusted.restricted.refused import SYSTEM, Form, Kind

T = TypeVar("T")

_HERE = str(Path(__file__).parent)
# The folder goes last: nothing in it may stand in for a module of the standard library.
_START = "import sys; sys.path.append(sys.argv.pop(1)); from restricted.child import main; sys.exit(main(sys.argv[1:]))"
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_WRITERS: dict[Form, str] = {"torch.save": "torch.save", "pickle": "pickle.dump"}
_KINDS = ("code", "damaged", "limit", "unsupported")


class ArtefactError(ValueError):
    """A file that is not read, in three parts.

    Attributes:
        kind: "code": it asks to run something; "damaged": its parts contradict each other; "limit": more than is read;
            "unsupported": harmless perhaps, and not read here.
        field: which part of the file.
    """

    def __init__(self, where: str, path: object, field: str, kind: Kind, expected: str, got: str, remedy: str) -> None:
        super().__init__(message(where, f"{path}: {field}", expected, got, remedy))
        self.kind: Kind = kind
        self.field = field


@dataclass(frozen=True)
class Limits:
    """What reading a file may take.

    Attributes:
        file: bytes of the file.
        pickle: bytes of the pickle in it (images in memory lie there).
        values: numbers, texts and containers, shared ones counted wherever they occur.
        blob: bytes of the arrays and tensors.
        memory: bytes of address space of the process, besides the file's.
        seconds: of processor time, and of the clock.
    """

    file: int = 8 << 30
    pickle: int = 2 << 30
    values: int = 1 << 22
    blob: int = 8 << 30
    memory: int = 8 << 30
    seconds: int = 120


@dataclass(frozen=True)
class RawImage:
    """The pixels of a Pillow image that was saved in memory."""

    pixels: NDArray[np.uint8]  # [H, W, C], C as the mode has


@dataclass(frozen=True)
class Artefact:
    """What a file held.

    Attributes:
        kind: "zip" or "legacy", the two forms of torch.save, or "pickle".
        value: of dicts, lists, tuples, plain values, numpy arrays, tensors on the CPU and :class:`RawImage`.
    """

    kind: str
    value: Any


def read_artefact(
    path: str | os.PathLike[str],
    *,
    where: str = "read_artefact",
    limits: Limits | None = None,
    form: Form = "torch.save",
) -> Artefact:
    """What a file of ``torch.save`` holds, or one of ``pickle.dump``, without running anything in it.

    Args:
        path: the file.
        where: opens the messages.
        limits: what it may take.
        form: "torch.save", or "pickle" for one pickle alone; texts of Python 2 come as ``encoding="latin1"`` has them.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: the file names code, contradicts itself, exceeds a limit or holds what is not read; the message
            names file and field.
        OSError: the file may not be read, or there is no room for what it holds in the folder of temporary files.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save({"labels": np.arange(3)}, f"{folder}/x.pt")
        ...     read_artefact(f"{folder}/x.pt").value
        {'labels': array([0, 1, 2])}
    """
    path, limits = Path(path), limits or Limits()
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(message(where, str(path), f"a file of {_WRITERS[form]}", got, "check the path"))
    with path.open("rb"), tempfile.TemporaryDirectory(prefix="bdfast-read-") as out:  # if we may read it, so may it
        _run(path, Path(out), where, limits, form)
        return _rebuild(path, Path(out), where)


def _run(path: Path, out: Path, where: str, limits: Limits, form: Form) -> None:
    """Start the reader and wait for it."""
    bounds = {**asdict(limits), "memory": limits.memory + path.stat().st_size}
    reader = [sys.executable, "-I", "-S", "-c", _START, _HERE]
    try:
        done = subprocess.run(
            [*reader, str(path.resolve()), str(out), json.dumps(bounds), form],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"SYSTEMROOT": os.environ["SYSTEMROOT"]} if "SYSTEMROOT" in os.environ else {},
            cwd=out,
            timeout=limits.seconds,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        expected, remedy = f"to be read within {limits.seconds} s", "raise the limit if you know the file"
        raise ArtefactError(where, path, "the file", "limit", expected, "more", remedy) from None
    if done.returncode > SYSTEM:
        raise OSError(done.returncode - SYSTEM, os.strerror(done.returncode - SYSTEM), str(out.parent))
    if done.returncode != 0:
        expected, got = "a file that can be read", f"a reader that ended with {done.returncode}"
        raise ArtefactError(where, path, "the file", "damaged", expected, got, "fetch or save the file again")


def _rebuild(path: Path, out: Path, where: str) -> Artefact:
    """The values of a description; one that contradicts itself is not believed, whoever wrote it."""
    description = json.loads((out / "description.json").read_text(encoding="utf-8"))
    if "refused" in description:
        kind, *parts = [printable(str(part)[:400]) for part in description["refused"]]
        assert kind in _KINDS
        field, expected, got, remedy = parts
        raise ArtefactError(where, path, field, kind, expected, got, remedy)  # type: ignore[arg-type]
    size = (out / "blob.bin").stat().st_size
    # In memory, and writable: arrays outlive the folder.
    blob = np.fromfile(out / "blob.bin", dtype=np.uint8) if size else np.empty(0, dtype=np.uint8)
    builder = _Builder(blob, description["storages"])
    try:
        return Artefact(str(description["kind"]), builder.value(description["value"]))
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        got = f"a description that contradicts itself ({str(error)[:160]})"
        raise ArtefactError(where, path, "the file", "damaged", "a sound description", got, "report this") from error


class _Builder:
    """Values that share memory wherever they may: a file that names one array a million times holds one."""

    def __init__(self, blob: NDArray[np.uint8], storages: dict[str, Any]) -> None:
        self.blob = blob
        self.made: dict[tuple[Any, ...], Any] = {}  # what had to be copied out of the blob
        self.storages = {key: self.storage(*storage) for key, storage in storages.items()}

    def span(self, first: int, count: int) -> NDArray[np.uint8]:
        if not 0 <= first <= first + count <= len(self.blob):
            raise ValueError("bytes outside the blob")
        return self.blob[first : first + count]

    def storage(self, dtype: str, first: int, count: int) -> Tensor:
        if dtype not in _DTYPES:
            raise ValueError("an unknown dtype")
        if count == 0:
            return torch.empty(0, dtype=getattr(torch, dtype))
        numbers = torch.from_numpy(self.span(first, count).copy())  # tensors outlive the blob, which holds all images
        return (numbers != 0) if dtype == "bool" else numbers.view(getattr(torch, dtype))

    def value(self, node: Any) -> Any:
        if not isinstance(node, list):
            return node
        kind, *rest = node
        return getattr(self, f"_{kind}")(*rest)

    def _dict(self, *pairs: list[Any]) -> dict[Any, Any]:
        return {key: self.value(item) for key, item in pairs}

    def _list(self, *items: Any) -> list[Any]:
        return [self.value(item) for item in items]

    def _tuple(self, *items: Any) -> tuple[Any, ...]:
        return tuple(self.value(item) for item in items)

    def _float(self, text: str) -> float:
        return float(text)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]  # type: ignore[no-any-return]

    def _bytes(self, first: int, count: int) -> bytes:
        return self.once(("bytes", first, count), self.span(first, count).tobytes)

    def _image(self, mode: str, width: int, height: int, first: int, count: int) -> RawImage:
        raw = self.span(first, count)
        if mode == "1":
            return RawImage(self.once((mode, width, height, first), lambda: _unpacked(raw, width, height)))
        return RawImage(raw.reshape(height, width, -1))

    def _array(self, code: str, shape: list[int], fortran: bool, first: int, count: int) -> NDArray[Any]:
        dtype = np.dtype(code)
        if dtype.kind not in "biuf" or min(shape, default=0) < 0:
            raise ValueError("an array of something else than numbers")
        flat = self.once((code, first, count), lambda: _native(self.span(first, count), dtype))
        return flat.reshape(shape, order="F" if fortran else "C")

    def _tensor(self, key: str, offset: int, size: list[int], stride: list[int]) -> Tensor:
        storage = self.storages[key]
        if len(size) != len(stride) or min([offset, *size, *stride]) < 0 or math.prod(size) > len(storage):
            raise ValueError("a tensor outside its storage")
        return torch.as_strided(storage, size, stride, offset)  # which checks the last element itself


def _native(raw: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers in bytes, in this machine's order; truth values of 0 and 1 alone."""
    return raw != 0 if dtype.kind == "b" else raw.view(dtype).astype(dtype.newbyteorder("="), copy=False)


def _unpacked(raw: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """[H, W, 1] of 0 and 255 from eight pixels a byte."""
    bits = np.unpackbits(raw.reshape(height, -1), axis=1)[:, :width]
    levels: NDArray[np.uint8] = bits * np.uint8(255)
    return levels[:, :, None]
