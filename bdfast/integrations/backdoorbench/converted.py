"""A record as files that cannot run anything: safetensors, JSON and raw pixels.

::

    model.safetensors   the weights, under our names where the architecture is known
    images.bin          the stored images, uint8, one after the other: training set first, then test set
    manifest.json       everything else, without a path, with the SHA-256 of the source and of both files
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdfast.errors import LabelRangeError, message
from bdfast.files import atomic_write
from bdfast.integrations.backdoorbench.stored import (
    MAX_CLASSES,
    MAX_SAMPLES,
    Fields,
    StoredRecord,
    StoredSet,
    image_shape,
    parse_state,
)
from bdfast.runtime.checkpoints import load_state, save_state
from bdfast.untrusted import ArtefactError, Limits

FORMAT = "bdfast.backdoorbench/1"
MANIFEST, MODEL, IMAGES = "manifest.json", "model.safetensors", "images.bin"
MAX_MANIFEST_BYTES = 1 << 28


def sha256(path: Path) -> str:
    """Of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def write_converted(
    folder: str | os.PathLike[str], record: StoredRecord, *, source: tuple[str, str], notes: list[str]
) -> None:
    """Write a record into a folder that exists; the manifest comes last, so that a broken run leaves no record.

    Args:
        folder: where to.
        record: what to write.
        source: name and SHA-256 of the file that it was read from.
        notes: kept for the reader.
    """
    folder = Path(folder)
    metadata = {"model_name": record.model_name, "num_classes": record.num_classes}
    save_state(folder / MODEL, record.state, metadata)
    sets: dict[str, Any] = {}
    first = 0
    with atomic_write(folder / IMAGES, "wb") as file:
        for name, part in (("train", record.train), ("test", record.test)):
            sets[name] = None if part is None else {**_set_to_json(part), "first_image": first}
            if part is not None:
                file.write(part.images.contiguous().numpy().tobytes())
                first += len(part.images)
    manifest = {
        "format": FORMAT,
        "source": {"name": source[0], "sha256": source[1]},
        **metadata,
        "clean_data": record.clean_data,
        "img_size": list(record.image_shape),
        "files": {name: sha256(folder / name) for name in (MODEL, IMAGES)},
        **sets,
        "notes": notes,
    }
    with atomic_write(folder / MANIFEST) as text:
        json.dump(manifest, text)


def read_converted(where: str, folder: Path) -> StoredRecord:
    """What :func:`write_converted` wrote; checked like any other file.

    Raises:
        ArtefactError, LabelRangeError: a file is missing, was changed or contradicts the manifest.
    """
    path = folder / MANIFEST
    fields = Fields(where, path)
    manifest = _read_manifest(fields)
    num_classes = fields.integer(manifest.get("num_classes"), "num_classes", 1, MAX_CLASSES)
    shape = image_shape(fields, manifest.get("img_size"))
    sets = _sets_without_images(fields, folder / IMAGES, manifest, num_classes, shape)
    _check_hashes(fields, folder, manifest)  # of no more bytes than the manifest speaks of
    pixels = torch.from_numpy(np.fromfile(folder / IMAGES, dtype=np.uint8)).reshape(-1, shape[2], shape[0], shape[1])
    for name, part in sets.items():
        first = manifest[name]["first_image"]
        sets[name] = replace(part, images=pixels[first : first + len(part.index)].clone())
    return StoredRecord(
        model_name=fields.text(manifest.get("model_name"), "model_name"),
        num_classes=num_classes,
        state=parse_state(fields, load_state(folder / MODEL).state),
        image_shape=shape,
        clean_data=fields.text(manifest.get("clean_data"), "clean_data"),
        train=sets.get("train"),
        test=sets["test"],
    )


def _sets_without_images(
    fields: Fields, file: Path, manifest: dict[str, Any], num_classes: int, shape: tuple[int, int, int]
) -> dict[str, StoredSet]:
    """Both sets, checked against the size of the images' file before a byte of it is read."""
    _must_be_there(fields, file)
    size, of_one = file.stat().st_size, math.prod(shape)
    if size % of_one:
        raise fields.wrong("img_size", f"whole images of {shape}", f"{size} bytes in {IMAGES}")
    images = torch.empty(size // of_one, shape[2], shape[0], shape[1], dtype=torch.uint8, device="meta")
    names = [name for name in ("train", "test") if name == "test" or manifest.get("train") is not None]
    sets = {name: _set_from_json(fields, manifest.get(name), name, images, num_classes) for name in names}
    count = sum(len(part.index) for part in sets.values())
    if count != len(images):
        expected, got = f"the {count} images that {MANIFEST} speaks of", f"{len(images)}"
        raise ArtefactError(fields.where, file, "size", "damaged", expected, got, "convert it again")
    return sets


def _check_hashes(fields: Fields, folder: Path, manifest: dict[str, Any]) -> None:
    files = fields.mapping(manifest.get("files"), "files", (MODEL, IMAGES))
    for path in (folder / MODEL, folder / IMAGES):
        _must_be_there(fields, path)
        if path.stat().st_size > Limits.file:
            expected, remedy = f"at most {Limits.file} bytes", "convert the weights alone"
            raise ArtefactError(fields.where, path, "size", "limit", expected, str(path.stat().st_size), remedy)
        if sha256(path) != files[path.name]:
            expected = str(files[path.name])[:80]
            raise ArtefactError(fields.where, path, "SHA-256", "damaged", expected, "another", "convert it again")


def _must_be_there(fields: Fields, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(message(fields.where, str(path), "a file of the record", "none", "convert it again"))


def _read_manifest(fields: Fields) -> dict[str, Any]:
    if fields.path.stat().st_size > MAX_MANIFEST_BYTES:
        raise fields.wrong("the file", f"at most {MAX_MANIFEST_BYTES} bytes", str(fields.path.stat().st_size))
    try:
        manifest = json.loads(fields.path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise fields.wrong("the file", "JSON", " ".join(str(error).split())[:160]) from error
    manifest = fields.mapping(manifest, "the file")
    if manifest.get("format") != FORMAT:
        raise fields.wrong("format", FORMAT, ascii(manifest.get("format"))[:80], "convert the record again")
    return manifest


def _set_to_json(part: StoredSet) -> dict[str, Any]:
    size = len(part.flags)
    whole = torch.equal(part.order, torch.arange(size))
    return {
        "size": size,
        "order": None if whole else part.order.tolist(),
        "flagged": part.flags.nonzero().flatten().tolist(),
        "index": part.index.tolist(),
        "labels": part.labels.tolist(),
        "original_labels": part.original_labels.tolist(),
        "getitem_all": part.getitem_all,
        "getitem_all_switch": part.getitem_all_switch,
    }


def _set_from_json(fields: Fields, value: Any, name: str, images: Tensor, num_classes: int) -> StoredSet:
    content = fields.mapping(value, name, ("size", "order", "flagged", "index", "labels", "original_labels"))
    size = fields.integer(content["size"], f"{name}.size", 0, MAX_SAMPLES)
    order = content["order"]
    flagged = _integers(fields, content["flagged"], f"{name}.flagged", size - 1)
    index = _integers(fields, content["index"], f"{name}.index", size - 1)
    if len(index) > 1 and bool((index.diff() <= 0).any()):
        raise fields.wrong(f"{name}.index", "ascending indices", "others")
    first = fields.integer(content.get("first_image"), f"{name}.first_image", 0, len(images))
    if first + len(index) > len(images):
        raise fields.wrong(f"{name}.index", f"an image for each of {len(index)}", f"{len(images) - first}")
    flags = torch.zeros(size, dtype=torch.bool)
    flags[flagged] = True
    part = StoredSet(
        order=torch.arange(size) if order is None else _integers(fields, order, f"{name}.order", size - 1),
        flags=flags,
        index=index,
        images=images[first : first + len(index)].clone(),
        labels=_labels(fields, content["labels"], f"{name}.labels", len(index), num_classes),
        original_labels=_labels(fields, content["original_labels"], f"{name}.original_labels", len(index), num_classes),
        getitem_all=fields.flag(content.get("getitem_all"), f"{name}.getitem_all"),
        getitem_all_switch=fields.flag(content.get("getitem_all_switch"), f"{name}.getitem_all_switch"),
    )
    absent = ~torch.isin(part.order[flags[part.order]], index)
    if bool(absent.any()):
        raise fields.wrong(f"{name}.index", "an image for each flagged sample", f"none for {int(absent.sum())}")
    return part


def _integers(fields: Fields, value: Any, field: str, most: int) -> Tensor:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item <= most for item in value):
        raise fields.wrong(field, f"a list of integers in [0, {most}]", "something else")
    return torch.tensor(value, dtype=torch.int64)


def _labels(fields: Fields, value: Any, field: str, count: int, num_classes: int) -> Tensor:
    labels = _integers(fields, value, field, 2**62)
    if len(labels) != count:
        raise fields.wrong(field, f"{count} labels", f"{len(labels)}")
    if count and int(labels.max()) >= num_classes:
        expected, remedy = f"classes in [0, {num_classes})", "convert the record again"
        raise LabelRangeError(
            message(fields.where, f"{fields.path}: {field}", expected, str(int(labels.max())), remedy)
        )
    return labels
