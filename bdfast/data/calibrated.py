"""A calibrated set on disk: float images that keep every bit, with where they come from.

A folder holds ``images.npy`` (float32 in [0, 1], ``[N, H, W, C]``), ``labels.npy`` (int64), ``ids.npy`` (int64, which
auxiliary image each one was) and ``manifest.json``. The first two, at ``DATASET_DIR/<reserved type>/<result file>``,
are what BackdoorBenchER reads where the reserved type's name contains ``_vp`` (:func:`calibrated_folder`); it takes
floats as they are, without a division by 255. Images are never stored in 8 bits: 1/255 is of the size of a calibration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bdfast.data.dataset import as_tensors
from bdfast.errors import message
from bdfast.files import atomic_write

FORMAT = "bdfast.calibrated/1"
MARK = "_vp"  # in the name of a reserved type that BackdoorBenchER reads as arrays
MAX_MANIFEST = 1 << 20  # bytes
FILES = {"images": "images.npy", "labels": "labels.npy", "ids": "ids.npy"}
MANIFEST = "manifest.json"


class CalibratedSet(NamedTuple):
    """What :func:`load_calibrated` returns."""

    images: Tensor  # [N, C, H, W] float32 in [0, 1]
    labels: Tensor  # [N] int64
    ids: Tensor  # [N] int64
    about: dict[str, Any]


def calibrated_folder(dataset_dir: str | os.PathLike[str], reserved_type: str, result_file: str) -> Path:
    """``dataset_dir/reserved_type/result_file``, where BackdoorBenchER looks for a calibrated set.

    Args:
        dataset_dir: of its data sets.
        reserved_type: name of the auxiliary data; it has to contain ``_vp``.
        result_file: name of the attack that the set was calibrated for.

    Raises:
        ValueError: a name without ``_vp``, or one that is no plain folder name.

    Example:
        >>> calibrated_folder("data/cifar10", "noise_vp", "badnets_0_1").as_posix()
        'data/cifar10/noise_vp/badnets_0_1'
    """
    for argument, name in (("reserved_type", reserved_type), ("result_file", result_file)):
        if not isinstance(name, str) or name in ("", ".", "..") or any(c in name for c in "/\\:\0"):
            expected, remedy = "the name of a folder", "leave separators out"
            raise ValueError(message("calibrated_folder", argument, expected, repr(name), remedy))
    if MARK not in reserved_type:
        expected, remedy = f"a name with {MARK}", f"call it {reserved_type}{MARK}, say"
        raise ValueError(message("calibrated_folder", "reserved_type", expected, repr(reserved_type), remedy))
    return Path(dataset_dir) / reserved_type / result_file


def save_calibrated(
    folder: str | os.PathLike[str],
    images: Tensor,  # [N, C, H, W] float in [0, 1]
    labels: Tensor,  # [N] integer
    ids: Tensor | None = None,  # [N] integer
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a calibrated set; the manifest comes last, with a hash of every array.

    Args:
        folder: made where it is missing.
        images: no bytes.
        labels: one an image.
        ids: which auxiliary image each one was; None is 0 .. N - 1.
        about: what else the manifest is to say, as JSON can hold it.

    Raises:
        TypeError, ValueError: images or labels of another kind.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "noise_vp"
        >>> save_calibrated(place, torch.rand(3, 1, 4, 5), torch.tensor([0, 1, 1]), about={"delta": 0.03})
        >>> found = load_calibrated(place)
        >>> found.images.shape, found.ids.tolist(), found.about
        (torch.Size([3, 1, 4, 5]), [0, 1, 2], {'delta': 0.03})
    """
    images, labels = as_tensors((images, labels), "save_calibrated")
    if not images.is_floating_point():
        expected, remedy = "floats in [0, 1]", "pass the images of GICResult.data: bytes would round a calibration away"
        raise TypeError(message("save_calibrated", "images", expected, str(images.dtype), remedy))
    ids = torch.arange(len(labels)) if ids is None else ids
    if ids.shape != labels.shape or ids.is_floating_point():
        got, remedy = f"{ids.dtype} {list(ids.shape)}", "pass GICResult.ids"
        raise ValueError(message("save_calibrated", "ids", f"integers [{len(labels)}]", got, remedy))
    arrays = {
        "images": np.ascontiguousarray(images.to("cpu", torch.float32).permute(0, 2, 3, 1).numpy()),
        "labels": labels.cpu().numpy(),
        "ids": ids.to("cpu", torch.int64).numpy(),
    }
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / MANIFEST).unlink(missing_ok=True)  # until the new arrays are there, nothing vouches for them
    for name, array in arrays.items():
        with atomic_write(place / FILES[name], "wb") as file:
            # As numpy.save does, whose own way to write to a file forgets what the system said where the disk is full.
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            file.write(array.data)
    manifest = {
        "format": FORMAT,
        "layout": "NHWC",
        "range": [0, 1],
        "arrays": {name: {"shape": a.shape, "dtype": str(a.dtype), "sha256": _hash(a)} for name, a in arrays.items()},
        "about": dict(about or {}),
    }
    with atomic_write(place / MANIFEST) as text:
        json.dump(manifest, text, indent=1, allow_nan=False)


def load_calibrated(folder: str | os.PathLike[str]) -> CalibratedSet:
    """Read a set that :func:`save_calibrated` or BackdoorBenchER's side wrote; ids and manifest may be missing.

    Raises:
        FileNotFoundError: there is no ``images.npy`` or ``labels.npy``.
        ValueError: a damaged file, arrays that the manifest does not vouch for, pixels outside [0, 1].

    Example:
        See :func:`save_calibrated`.
    """
    place = Path(folder)
    for name in ("images", "labels"):
        if not (place / FILES[name]).is_file():
            remedy = "check the path, or run `bdfast defend gic` to its end"
            got = f"no {FILES[name]} in {place}"
            raise FileNotFoundError(message("load_calibrated", "folder", "a calibrated set", got, remedy))
    manifest = _manifest(place)
    images, labels = _array(place, "images", 4, "f", manifest), _array(place, "labels", 1, "iu", manifest)
    present = (place / FILES["ids"]).is_file()
    ids = _array(place, "ids", 1, "iu", manifest) if present else np.arange(len(labels))
    if not len(images) == len(labels) == len(ids):
        got = f"{len(images)} images, {len(labels)} labels, {len(ids)} ids"
        raise ValueError(message("load_calibrated", str(place), "one label and one id an image", got, "make it again"))
    nchw = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))
    pair = as_tensors((nchw, torch.from_numpy(labels.astype(np.int64))), "load_calibrated", str(place))
    about = manifest.get("about", {})
    return CalibratedSet(*pair, torch.from_numpy(ids.astype(np.int64)), about if isinstance(about, dict) else {})


def _array(place: Path, name: str, ndim: int, kinds: str, manifest: dict[str, Any]) -> Any:
    file = place / FILES[name]
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)  # its size is looked at before anything is allocated
        fits = array.ndim == ndim and array.dtype.kind in kinds
    except Exception as error:  # a damaged file can fail in any way
        expected, got = "an array of numpy.save", f"a file that cannot be read ({type(error).__name__})"
        raise ValueError(message("load_calibrated", str(file), expected, got, "make it again")) from error
    if not fits:
        expected, got = f"{ndim} axes of {'floats' if kinds == 'f' else 'integers'}", f"{array.dtype} {array.shape}"
        raise ValueError(message("load_calibrated", str(file), expected, got, "make it again"))
    array = np.array(array)
    if manifest and manifest["arrays"][name]["sha256"] != _hash(array):
        expected, remedy = "the array of its manifest", "make the set again, or remove manifest.json to trust it"
        raise ValueError(message("load_calibrated", str(file), expected, "another one", remedy))
    return array


def _manifest(place: Path) -> dict[str, Any]:
    file = place / MANIFEST
    if not file.is_file():
        return {}
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MAX_MANIFEST else None
        if content["format"] == FORMAT and all(isinstance(content["arrays"][name]["sha256"], str) for name in FILES):
            return dict(content)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(
        message("load_calibrated", str(file), f"a manifest of {FORMAT}", "something else", "make it again")
    )


def _hash(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
