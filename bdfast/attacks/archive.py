"""PoisonedData as a file: an uncompressed ``.npz`` of arrays and one JSON header, no pickle.

What a user opens is not trusted: members must be those that we write, stored uncompressed (so that no size exceeds
the file's), with dtypes from a short list and shapes that agree, and the header is data, not code.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bdfast.attacks.base import Attack
from bdfast.attacks.checks import check_images, check_labels, describe
from bdfast.attacks.labels import Relabel
from bdfast.attacks.poisoned import PoisonedData
from bdfast.attacks.registry import get, names
from bdfast.errors import message
from bdfast.files import atomic_write

FORMAT = "bdfast.poisoned/1"
ARRAYS = ("images", "labels", "original_labels", "is_poisoned", "is_cover")
OPTION = "option."  # prefix of the attack's tensor options
DTYPES = ("uint8", "int64", "bool", "float16", "float32", "float64")

Array = npt.NDArray[Any]


def write(data: PoisonedData, path: str | os.PathLike[str]) -> None:
    """Write beside ``path``, then replace it, so that a broken run leaves no half file."""
    if data.attack.name not in names() or get(data.attack.name).__class__ is not data.attack.__class__:
        expected = f"an attack among {', '.join(names())}"
        got = type(data.attack).__name__
        raise TypeError(message("PoisonedData.save", "attack", expected, got, "save its arrays with numpy.savez"))
    arrays = {name: _array(getattr(data, name)) for name in ARRAYS}
    options: dict[str, Any] = {}
    for field in fields(data.attack):  # type: ignore[arg-type]
        value = getattr(data.attack, field.name)
        if isinstance(value, Tensor):
            arrays[OPTION + field.name] = _array(value)
        else:
            options[field.name] = value
    header = {
        "format": FORMAT,
        "attack": data.attack.name,
        "options": options,
        "relabel": asdict(data.relabel),
        "seed": data.seed,
        "quantize": data.quantize,
    }
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    with atomic_write(path, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def read(path: str | os.PathLike[str]) -> PoisonedData:
    """Read and check what :func:`write` wrote."""
    file = Path(path)
    if not file.is_file():
        expected = "a file that PoisonedData.save wrote"
        raise FileNotFoundError(message("PoisonedData.load", "path", expected, repr(str(file)), "check the path"))
    try:
        arrays = _read_arrays(file)
        return _rebuild(arrays)
    except PermissionError:
        raise
    except Exception as error:  # zipfile, NumPy and json promise no list of what damage makes them raise
        expected, got = "a file that PoisonedData.save wrote", f"{file} ({error})"
        raise ValueError(message("PoisonedData.load", "path", expected, got, "save it again")) from error


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        expected = "images of a dtype that NumPy has"
        raise TypeError(message("PoisonedData.save", "images", expected, describe(tensor), "use uint8 or float32"))
    return np.asarray(tensor.numpy())


def _read_arrays(file: Path) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > file.stat().st_size:
            raise ValueError("members that together exceed the file")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays or not (name in ARRAYS or name == "header" or name.startswith(OPTION)):
                raise ValueError(f"an unexpected member {member.filename!r:.80}")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"member {name} is compressed")
            arrays[name] = _read_member(archive, member)
    missing = [name for name in (*ARRAYS, "header") if name not in arrays]
    if missing:
        raise ValueError(f"no {', '.join(missing)}")
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    """One array, read only after its header agrees with the bytes that follow."""
    with archive.open(member) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{member.filename} is of an unknown version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
        if dtype.name not in DTYPES or fortran or dtype.byteorder == ">":
            raise ValueError(f"{member.filename} has dtype {dtype}")
        body = stream.read()
    size = dtype.itemsize
    for extent in shape:  # Python integers: no overflow
        size *= extent
    if size != len(body) or any(extent < 0 for extent in shape):
        raise ValueError(f"{member.filename} holds {len(body)} bytes, not the {size} of {list(shape)}")
    return np.frombuffer(bytearray(body), dtype=dtype).reshape(shape)


def _rebuild(arrays: dict[str, Array]) -> PoisonedData:
    header = json.loads(bytes(arrays["header"]).decode())
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']!r:.40}")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name != "header"}
    options = {name.removeprefix(OPTION): tensors.pop(name) for name in list(tensors) if name.startswith(OPTION)}
    relabel = Relabel(**header["relabel"])
    _check_arrays(tensors, relabel)
    return PoisonedData(
        **tensors,
        attack=_rebuild_attack(header["attack"], {**header["options"], **options}),
        relabel=relabel,
        seed=int(header["seed"]),
        quantize=bool(header["quantize"]),
    )


def _rebuild_attack(name: str, options: dict[str, Any]) -> Attack:
    pattern = options.get("pattern")
    if name in names() and isinstance(pattern, str) and pattern not in get(name).named_patterns:
        raise ValueError("a file path for a pattern")  # a file must not make us open others
    return get(name, **options)


def _check_arrays(tensors: dict[str, Tensor], relabel: Relabel) -> None:
    images = tensors["images"]
    check_images("PoisonedData.load", images)
    for name in ("labels", "original_labels"):
        check_labels("PoisonedData.load", tensors[name], len(images), relabel.num_classes)
    for name in ("is_poisoned", "is_cover"):
        if tensors[name].dtype != torch.bool or tensors[name].shape != (len(images),):
            raise ValueError(f"{name} is {describe(tensors[name])}")
    if bool((tensors["is_poisoned"] & tensors["is_cover"]).any()):
        raise ValueError("samples that are poisoned and covers at once")
