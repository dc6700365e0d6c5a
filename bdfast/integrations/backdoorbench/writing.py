"""Records and results that BackdoorBench's own scripts read.

``attack_result.pt`` holds exactly the eight keys of its loader. The images lie beside it, in
``bd_train_dataset/<true label>/<index>.png`` and ``bd_test_dataset/...``, or in the file (``in_memory``). The loader
needs ``record`` in the folder's path and ``data`` in ``data_path``.
"""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bdfast.attacks import PoisonedData, TriggeredData
from bdfast.data import write_index
from bdfast.errors import message, optional_import
from bdfast.files import atomic_write, refuse_links
from bdfast.integrations.backdoorbench.metrics_file import write_metrics
from bdfast.integrations.backdoorbench.record import ATTACK_RESULT
from bdfast.integrations.backdoorbench.stored import StoredRecord, StoredSet
from bdfast.integrations.backdoorbench.torch_save import torch_save
from bdfast.integrations.backdoorbench.weights import benchmark_name

DEFENSE_RESULT = "defense_result.pt"
CLIPS, BOUND = "clips.", ".bound"  # around the name of a site, in the state dict of a clipped model


def save_record(
    folder: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    *,
    model_name: str,
    num_classes: int,
    clean_data: str,
    train: PoisonedData | None,
    test: TriggeredData,
    data_path: str = "./data",
    in_memory: bool = False,
) -> StoredRecord:
    """Write an attack as ``record/<name>/``.

    Args:
        folder: made if it is not there; an older record in it is replaced.
        model: the victim, or its state dict.
        model_name: BackdoorBench's name or ours; an architecture that BackdoorBench has is written by its own name.
        num_classes: K.
        clean_data: name of the base data set, such as ``cifar10``.
        train: the poisoned training set, in the order of the base data; poisoned samples and covers are flagged.
        test: the whole triggered test set; rows that are not eligible (of the target class) are left out.
        data_path: where the benchmark finds the base data.
        in_memory: keep the images in the file, as Pillow images, in place of PNG files.

    Returns:
        What was written.

    Raises:
        ValueError: images with fractions of a grey level, which no 8-bit file holds; a link in ``folder``, where images
            are to go.
    """
    state = model.state_dict() if isinstance(model, nn.Module) else model
    record = StoredRecord(
        model_name=benchmark_name(model_name),
        num_classes=num_classes,
        state={key: value.detach().cpu().clone() for key, value in state.items()},
        image_shape=(test.images.shape[2], test.images.shape[3], test.images.shape[1]),
        clean_data=clean_data,
        train=None if train is None else _train_set(train),
        test=_test_set(test),
        data_path=data_path,
    )
    write_record(folder, record, in_memory=in_memory)
    return record


def write_record(folder: str | os.PathLike[str], record: StoredRecord, *, in_memory: bool = False) -> None:
    """Write a stored record as ``record/<name>/``: images first, ``attack_result.pt`` last.

    Raises:
        ValueError: a path that BackdoorBench's loader does not take; a link in ``folder``, where images are to go.
    """
    folder = Path(folder)
    if "data" not in record.data_path:
        remedy = "pass a path such as ./data/cifar10"
        raise ValueError(
            message("write_record", "data_path", "a path with `data` in it", repr(record.data_path), remedy)
        )
    folder.mkdir(parents=True, exist_ok=True)
    height, width, channels = record.image_shape
    content = {
        "model_name": record.model_name,
        "num_classes": record.num_classes,
        "model": OrderedDict((key, value.detach().cpu().clone()) for key, value in record.state.items()),
        "data_path": record.data_path,
        "img_size": (height, width, channels),
        "clean_data": record.clean_data,
        "bd_train": None if record.train is None else _set_state(folder, record.train, "bd_train_dataset", in_memory),
        "bd_test": _set_state(folder, record.test, "bd_test_dataset", in_memory),
    }
    info = {"model": record.model_name, "dataset": record.clean_data, "num_classes": record.num_classes}
    torch_save({**info, "img_size": (height, width, channels)}, folder / "info.pickle")
    if record.train is not None:
        torch_save(record.train.flags.numpy().astype(np.int64), folder / "train_poison_index_list.pickle")
    torch_save(content, folder / ATTACK_RESULT)


def write_defense_result(
    folder: str | os.PathLike[str],
    method: str,
    model: nn.Module | Mapping[str, Tensor],
    *,
    model_name: str,
    num_classes: int,
    history: Sequence[Mapping[str, Any]] = (),
    index: Tensor | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a defended model as ``record/<name>/defense/<method>/``.

    Args:
        folder: of the record.
        method: lower-case name of the defense, such as ``d3``.
        model: the network, or its state dict. What ``clip_activations`` adds goes under ``bdfast``, beside the plain
            network's weights.
        model_name: BackdoorBench's name or ours.
        num_classes: K.
        history: rows of ``<method>_df.csv``, fractions in [0, 1].
        index: [n] indices of the clean samples that were used, for ``log/index.txt``.
        extra: more for the nested ``bdfast`` entry, of plain values.

    Returns:
        The folder of the defense.

    Warns:
        UserWarning: a clipped model, whose bounds the benchmark's own evaluation ignores.

    Raises:
        ValueError: a method whose name is no folder; a link in the record, where files are to go.
    """
    if not method or not method.replace("-", "").replace("_", "").isalnum() or method != method.lower():
        remedy = "pass d3 or pad-ft, say"
        raise ValueError(message("write_defense_result", "method", "a lower-case name", repr(method), remedy))
    state = model.state_dict() if isinstance(model, nn.Module) else model
    bounds = {key: value for key, value in state.items() if key.startswith(CLIPS) and key.endswith(BOUND)}
    own: dict[str, Any] = dict(extra or {})
    if bounds:
        own["bounds"] = {key[len(CLIPS) : -len(BOUND)]: value.detach().cpu().clone() for key, value in bounds.items()}
        warnings.warn(
            f"write_defense_result: {len(bounds)} activation bounds are kept under `bdfast`; BackdoorBench's own "
            "evaluation builds the plain network and ignores them",
            stacklevel=2,
        )
    out = Path(folder) / "defense" / method
    for place in (out / "log", out / "checkpoint"):
        refuse_links("write_defense_result", folder, place)
        place.mkdir(parents=True, exist_ok=True)
    if index is not None:
        write_index(out / "log" / "index.txt", index)
    if history:
        write_metrics(out, method, history)
    content: dict[str, Any] = {
        "model_name": benchmark_name(model_name),
        "num_classes": num_classes,
        "model": OrderedDict((key, value.detach().cpu().clone()) for key, value in state.items() if key not in bounds),
    }
    torch_save({**content, "bdfast": own} if own else content, out / DEFENSE_RESULT)
    return out


def _train_set(data: PoisonedData) -> StoredSet:
    flags = (data.is_poisoned | data.is_cover).cpu()
    index = flags.nonzero().flatten()
    return StoredSet(
        order=torch.arange(len(flags)),
        flags=flags,
        index=index,
        images=_grey_levels("train", data.images[flags.to(data.images.device)]),
        labels=data.labels.cpu()[index],
        original_labels=data.original_labels.cpu()[index],
    )


def _test_set(data: TriggeredData) -> StoredSet:
    index = data.eligible.cpu().nonzero().flatten()
    return StoredSet(
        order=index,
        flags=data.eligible.cpu().clone(),
        index=index,
        images=_grey_levels("test", data.images[data.eligible.to(data.images.device)]),
        labels=data.labels.cpu()[index],
        original_labels=data.original_labels.cpu()[index],
    )


def _grey_levels(argument: str, images: Tensor) -> Tensor:
    """uint8 of images that 8 bits hold exactly."""
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images
    levels = (images * 255).round().to(torch.uint8)
    if not torch.equal(levels.to(images.dtype) / 255, images):
        expected, remedy = "images of whole grey levels", "poison with quantize=True, or from uint8 images"
        raise ValueError(message("save_record", argument, expected, "fractions of them", remedy))
    return levels


def _from_record(folder: Path) -> str:
    """The folder as the benchmark names it, which runs beside ``record/``; also ``record/<group>/<name>``."""
    parts = folder.absolute().parts
    start = max((place for place, part in enumerate(parts[:-1]) if part == "record"), default=len(parts) - 2)
    return "/".join(parts[max(start, 0) :])


def _set_state(folder: Path, part: StoredSet, name: str, in_memory: bool) -> dict[str, Any]:
    """The state of a poisoned data set, with its images where they belong."""
    base = None if in_memory else f"./{_from_record(folder)}/{name}"
    pillow = optional_import("PIL.Image", extra="data", purpose="to write the images of a record")
    entries: dict[int, Any] = {}
    places: set[Path] = set()
    rows = zip(part.index.tolist(), part.images, part.labels.tolist(), part.original_labels.tolist(), strict=True)
    for index, pixels, label, original in rows:
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        image = pillow.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
        if in_memory:
            entries[index] = (image, label, original)
            continue
        place = folder / name / str(original)
        if place not in places:
            refuse_links("write_record", folder, place)
            place.mkdir(parents=True, exist_ok=True)
            places.add(place)
        # No sync: thousands would take minutes, and no reader looks here before attack_result.pt.
        with atomic_write(place / f"{index}.png", "wb", sync=False) as file:
            image.save(file, format="PNG")
        entries[index] = {"path": f"{base}/{original}/{index}.png", "other_info": [label, original]}
    return {
        "bd_data_container": {"save_folder_path": base, "data_dict": entries, "save_file_format": ".png"},
        "getitem_all": part.getitem_all,
        "getitem_all_switch": part.getitem_all_switch,
        "original_index_array": part.order.numpy().copy(),
        "poison_indicator": part.flags.numpy().astype(np.int64),
        "save_folder_path": base,
    }
