"""What ``attack_result.pt`` says, checked: a state dict, and which samples of the base data were replaced by what.

The file holds only what differs from the base data: ``data_dict`` maps an index of the base set to an image, its label
and its original label; ``original_index_array`` lists the samples in order; ``poison_indicator`` flags, over the whole
base set, those that are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdfast.errors import LabelRangeError, message, printable
from bdfast.integrations.backdoorbench.pictures import MAX_SET_BYTES, MAX_SIDE, Picture, decode
from bdfast.untrusted import ArtefactError

KEYS = ("model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test")
SET_KEYS = (
    "bd_data_container", "getitem_all", "getitem_all_switch", "original_index_array", "poison_indicator",
    "save_folder_path",
)  # fmt: skip
MAX_CLASSES = 100_000
MAX_SAMPLES = 1 << 26
MAX_SHARING = 8  # how often tensors may name the same bytes: tied weights do so a few times


@dataclass(frozen=True, eq=False)
class StoredSet:
    """A poisoned set as it is stored: the base set, and what replaces some of it.

    Attributes:
        order: [n] int64, samples of the base set in the order of this set (``original_index_array``).
        flags: [N] bool over the base set (``poison_indicator``).
        index: [m] int64, ascending: which base samples there is a replacement for.
        images: [m, C, H, W] uint8, the replacements.
        labels: [m] int64, their labels.
        original_labels: [m] int64, their true labels.
        getitem_all: samples are five-tuples (image, label, index, flag, original label); else (image, label).
        getitem_all_switch: label and original label trade places in them, which is how RA is measured.
    """

    order: Tensor
    flags: Tensor
    index: Tensor
    images: Tensor
    labels: Tensor
    original_labels: Tensor
    getitem_all: bool = True
    getitem_all_switch: bool = False


@dataclass(frozen=True, eq=False)
class StoredRecord:
    """The content of ``attack_result.pt``.

    Attributes:
        model_name: BackdoorBench's name of the architecture.
        num_classes: K.
        state: weights on the CPU, as they are named in the file.
        image_shape: (height, width, channels).
        clean_data: name of the base data set.
        train: the poisoned training set; None where none was stored.
        test: the triggered test set.
        data_path: where the base data lay.
    """

    model_name: str
    num_classes: int
    state: dict[str, Tensor]
    image_shape: tuple[int, int, int]
    clean_data: str
    train: StoredSet | None
    test: StoredSet
    data_path: str = "./data"


class Fields:
    """Takes values out of a file, or says which field is wrong.

    Args:
        where: the function that messages name.
        path: the file.
    """

    def __init__(self, where: str, path: Path) -> None:
        self.where, self.path = where, path

    def wrong(
        self, field: str, expected: str, got: str, remedy: str = "fetch or save the record again"
    ) -> ArtefactError:
        """An error that names the field."""
        return ArtefactError(self.where, self.path, printable(field[:400]), "damaged", expected, got[:400], remedy)

    def mapping(self, value: Any, field: str, keys: Sequence[str] = ()) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self.wrong(field, "a dict", _kind(value))
        for key in keys:
            if key not in value:
                raise self.wrong(f"{field}.{key}".lstrip("."), "a value", "none")
        return value

    def text(self, value: Any, field: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 1024 or not value.isprintable():
            raise self.wrong(field, "a short text", _kind(value))
        return value

    def integer(self, value: Any, field: str, least: int, most: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.wrong(field, f"an integer in [{least}, {most}]", _kind(value))
        return value

    def flag(self, value: Any, field: str) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(field, "True or False", _kind(value))
        return value

    def label(self, value: Any, field: str, num_classes: int) -> int:
        if isinstance(value, (Tensor, np.ndarray)) and tuple(value.shape) == ():  # CelebA's labels are tensors
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, "a class", _kind(value))
        if not 0 <= value < num_classes:
            expected, remedy = f"a class in [0, {num_classes})", "fetch or save the record again"
            raise LabelRangeError(message(self.where, f"{self.path}: {field}", expected, str(value), remedy))
        return value

    def integers(self, value: Any, field: str, least: int, most: int) -> Tensor:
        """[n] int64 from an array, a tensor or a list; whole floats count as integers."""
        plain = value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
        if isinstance(value, (list, tuple)):  # an array named in it a thousand times would be copied each time
            for item in value:
                if not isinstance(item, (int, float)):
                    raise self.wrong(field, "one axis of integers", f"a list with {_kind(item)} in it")
        array = np.asarray(plain)
        if array.dtype.kind not in "biuf" or array.ndim != 1 or len(array) > MAX_SAMPLES:
            raise self.wrong(field, f"one axis of at most {MAX_SAMPLES} integers", f"{array.dtype} {list(array.shape)}")
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int64)
        outside = np.flatnonzero((whole != array) | (whole < least) | (whole > most))
        if len(outside):
            expected = f"integers in [{least}, {most}]"
            raise self.wrong(f"{field}[{outside[0]}]", expected, str(array[outside[0]]))
        return torch.from_numpy(whole)


def parse_record(where: str, path: Path, value: Any) -> StoredRecord:
    """Check the value of ``attack_result.pt``; images on disk are read from the folder that it lies in.

    Raises:
        ArtefactError, LabelRangeError: a field is missing, of another kind or out of its range; an image is missing,
            damaged or elsewhere. The message names the field, and the index of an image.
    """
    fields = Fields(where, path)
    content = fields.mapping(value, "the whole value", KEYS)
    num_classes = fields.integer(content["num_classes"], "num_classes", 1, MAX_CLASSES)
    shape = image_shape(fields, content["img_size"])
    train = content["bd_train"]
    return StoredRecord(
        model_name=fields.text(content["model_name"], "model_name"),
        num_classes=num_classes,
        state=parse_state(fields, content["model"]),
        image_shape=shape,
        clean_data=fields.text(content["clean_data"], "clean_data"),
        train=None if train is None else _parse_set(fields, train, "bd_train", num_classes, shape),
        test=_parse_set(fields, content["bd_test"], "bd_test", num_classes, shape),
        data_path=fields.text(content["data_path"], "data_path"),
    )


def parse_state(fields: Fields, value: Any) -> dict[str, Tensor]:
    """Finite dense tensors by name."""
    state = fields.mapping(value, "model")
    if not state:
        raise fields.wrong("model", "tensors by name", "none")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise fields.wrong(f"model.{key}", "a tensor with a name", _kind(tensor))
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.values()}.values())
    declared = sum(t.numel() * t.itemsize for t in state.values())
    if declared > MAX_SHARING * held:  # views of one storage, each of which would be checked and copied
        expected = f"at most {MAX_SHARING} times the {held} bytes of its storages"
        raise fields.wrong("model", expected, f"{declared} bytes in {len(state)} tensors")
    for key, tensor in state.items():
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            got = f"{bad} NaN or infinite of {tensor.numel()}"
            raise fields.wrong(f"model.{key}", "finite weights", got, "train the model again")
    return state


def image_shape(fields: Fields, value: Any) -> tuple[int, int, int]:
    """(height, width, channels)."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise fields.wrong("img_size", "(height, width, channels)", _kind(value))
    height, width = (fields.integer(side, "img_size", 1, MAX_SIDE) for side in value[:2])
    channels = fields.integer(value[2], "img_size", 1, 3)
    if channels == 2:
        raise fields.wrong("img_size", "1 or 3 channels", "2")
    return height, width, channels


def _parse_set(fields: Fields, value: Any, name: str, num_classes: int, shape: tuple[int, int, int]) -> StoredSet:
    state = fields.mapping(value, name, SET_KEYS)
    flags = fields.integers(state["poison_indicator"], f"{name}.poison_indicator", 0, 1).bool()
    size = len(flags)
    order = fields.integers(state["original_index_array"], f"{name}.original_index_array", 0, size - 1)
    if len(order) > size:
        raise fields.wrong(f"{name}.original_index_array", f"at most {size} samples", f"{len(order)}")
    where = f"{name}.bd_data_container"
    container = fields.mapping(state["bd_data_container"], where, ("data_dict", "save_folder_path"))
    entries = fields.mapping(container["data_dict"], f"{where}.data_dict")
    field = f"{name}.data_dict"
    for key in entries:
        fields.integer(key, f"{field} key", 0, size - 1)
    missing = [i for i in order[flags[order]].tolist() if i not in entries]
    if missing:
        raise fields.wrong(f"{field}[{missing[0]}]", "an image for each flagged sample", f"none for {len(missing)}")
    height, width, channels = shape
    if len(entries) * height * width * channels > MAX_SET_BYTES:
        raise fields.wrong("img_size", f"at most {MAX_SET_BYTES} bytes of images", f"{len(entries)} of {shape}")
    keys = sorted(entries)
    pictures, labels, originals = [], [], []
    for key in keys:
        picture, label, original = _entry(fields, entries[key], f"{field}[{key}]", container["save_folder_path"])
        pictures.append(picture)
        labels.append(fields.label(label, f"{field}[{key}] label", num_classes))
        originals.append(fields.label(original, f"{field}[{key}] original label", num_classes))
    return StoredSet(
        order=order,
        flags=flags,
        index=torch.tensor(keys, dtype=torch.int64),
        images=decode(fields.where, fields.path, pictures, shape),
        labels=torch.tensor(labels, dtype=torch.int64),
        original_labels=torch.tensor(originals, dtype=torch.int64),
        getitem_all=fields.flag(state["getitem_all"], f"{name}.getitem_all"),
        getitem_all_switch=fields.flag(state["getitem_all_switch"], f"{name}.getitem_all_switch"),
    )


def _entry(fields: Fields, entry: Any, field: str, folder: Any) -> tuple[Picture, Any, Any]:
    """(image, label, original label) of one replacement, in either form."""
    if isinstance(entry, Mapping):
        entry = fields.mapping(entry, field, ("path", "other_info"))
        others = entry["other_info"]
        source: Any = fields.text(entry["path"], f"{field}.path")
    else:
        others, source = (entry[1:], entry[0]) if isinstance(entry, (tuple, list)) and entry else ((), None)
    if not isinstance(others, (tuple, list)) or len(others) != 2:
        raise fields.wrong(field, "(image, label, original label)", _kind(entry))
    return Picture(field, source, folder if isinstance(folder, str) else ""), others[0], others[1]


def _kind(value: Any) -> str:
    """What came, in a few words."""
    return repr(value) if isinstance(value, (int, float, bool)) else f"a {type(value).__name__}"
