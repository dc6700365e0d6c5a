"""Records that are broken or hostile: what is wrong is said by file and field."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast.integrations.backdoorbench import (
    ArtefactError,
    read_record,
)
from tests.integrations.conftest import Attack


def broken(content: dict[str, Any], path: str, value: Any) -> None:
    *steps, last = path.split("/")
    for step in steps:
        content = content[int(step) if step.isdigit() else step]
    key = int(last) if last.isdigit() else last
    if value is KeyError:
        del content[key]
    elif isinstance(content, tuple):
        raise TypeError
    else:
        content[key] = value


IMAGE = Image.new("L", (8, 8))
BROKEN: dict[str, tuple[str, Any, str]] = {
    "no model_name": ("model_name", KeyError, "model_name"),
    "model_name of bytes": ("model_name", b"x", "model_name"),
    "escape codes in model_name": ("model_name", "\x1b[2J", "model_name"),
    "no classes": ("num_classes", 0, "num_classes"),
    "a billion classes": ("num_classes", 10**9, "num_classes"),
    "classes of text": ("num_classes", "10", "num_classes"),
    "no weights": ("model", {}, "model"),
    "weights of text": ("model/conv1.weight", "x", "model.conv1.weight"),
    "huge images": ("img_size", (1 << 30, 8, 1), "img_size"),
    "two sides": ("img_size", (8, 8), "img_size"),
    "two channels": ("img_size", (8, 8, 2), "img_size"),
    "no test set": ("bd_test", None, "bd_test"),
    "list for a set": ("bd_train", [], "bd_train"),
    "no flags": ("bd_train/poison_indicator", KeyError, "bd_train.poison_indicator"),
    "flag of 2": ("bd_train/poison_indicator", np.full(120, 2), "poison_indicator[0]"),
    "flags in a square": ("bd_train/poison_indicator", np.zeros((12, 10)), "poison_indicator"),
    "NaN as a flag": ("bd_train/poison_indicator", np.full(120, np.nan), "poison_indicator[0]"),
    "flags in half precision": ("bd_train/poison_indicator", torch.full((120,), 0.5).bfloat16(), "poison_indicator[0]"),
    "flags of several lengths": ("bd_train/poison_indicator", [[1], [1, 0]], "bd_train.poison_indicator"),
    "one array for many flags": ("bd_train/poison_indicator", [np.zeros(1 << 20)] * 100_000, "poison_indicator"),
    "flags and None": ("bd_train/poison_indicator", [1, None], "bd_train.poison_indicator"),
    "flags too short": ("bd_train/poison_indicator", np.zeros(7, int), "original_index_array[7]"),
    "negative index": ("bd_test/original_index_array", np.array([-1]), "original_index_array[0]"),
    "index beyond the set": ("bd_test/original_index_array", np.array([60]), "original_index_array[0]"),
    "half an index": ("bd_test/original_index_array", np.array([0.5]), "original_index_array[0]"),
    "order longer than the set": ("bd_test/original_index_array", np.zeros(61, int), "original_index_array"),
    "flag without an image": ("bd_train/bd_data_container/data_dict/{first}", KeyError, "bd_train.data_dict[{first}]"),
    "image beyond the set": ("bd_train/bd_data_container/data_dict/5000", (IMAGE, 0, 0), "data_dict key"),
    "label out of range": ("bd_train/bd_data_container/data_dict/{first}", (IMAGE, 10, 0), "[{first}] label"),
    "negative true label": ("bd_train/bd_data_container/data_dict/{first}", (IMAGE, 0, -1), "[{first}] original label"),
    "label of text": ("bd_train/bd_data_container/data_dict/{first}", (IMAGE, "0", 0), "[{first}] label"),
    "two values": ("bd_train/bd_data_container/data_dict/{first}", (IMAGE, 0), "data_dict[{first}]"),
    "no image": ("bd_train/bd_data_container/data_dict/{first}", (5, 0, 0), "data_dict[{first}]"),
    "image too large": (
        "bd_train/bd_data_container/data_dict/{first}", (Image.new("L", (9, 8)), 0, 0), "data_dict[{first}]",
    ),
    "image in colour": (
        "bd_train/bd_data_container/data_dict/{first}", (Image.new("RGB", (8, 8)), 0, 0), "data_dict[{first}]",
    ),
    "switch of text": ("bd_test/getitem_all_switch", "yes", "bd_test.getitem_all_switch"),
    "path that climbs": ("bd_train/bd_data_container/data_dict/{first}", "../../secret.png", "data_dict[{first}]"),
    "path that climbs inside": ("bd_train/bd_data_container/data_dict/{first}",
                                "./bd_train_dataset/../../secret.png", "data_dict[{first}]"),
    "absolute path": ("bd_train/bd_data_container/data_dict/{first}", "/etc/passwd", "data_dict[{first}]"),
    "no picture": ("bd_train/bd_data_container/data_dict/{first}",
                   "x/bd_train_dataset/../attack_result.pt", "data_dict[{first}]"),
    "missing picture": ("bd_train/bd_data_container/data_dict/{first}",
                        "bd_train_dataset/0/x.png", "data_dict[{first}]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record(name: str, record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    path, value, field = BROKEN[name]
    first = int(attack.poisoned.poison_indices[0])
    if isinstance(value, str) and "data_dict" in path:
        value = {"path": value, "other_info": [3, 0]}
    content = torch.load(record_in_memory / "attack_result.pt", weights_only=False)
    broken(content, path.format(first=first), value)
    torch.save(content, tmp_path / "attack_result.pt")
    (tmp_path.parent / "secret.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError) as caught:
        read_record(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"read_record: `{tmp_path / 'attack_result.pt'}: ")
    assert field.format(first=first) in text
    assert " expected " in text
    assert ", got " in text
    assert text.isprintable()


@pytest.fixture
def copy(record_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(record_folder, tmp_path / "record")
    return tmp_path / "record"


def one_picture(folder: Path) -> tuple[Path, str]:
    path = sorted((folder / "bd_train_dataset").glob("*/*.png"))[0]
    return path, rf"bd_train\.data_dict\[{path.stem}\]"


def test_missing_picture(copy: Path) -> None:
    path, field = one_picture(copy)
    path.unlink()
    with pytest.raises(ArtefactError, match=field + r"` expected an image on disk, got no file bd_train_dataset/"):
        read_record(copy)


def test_link_that_leads_out(copy: Path) -> None:
    path, field = one_picture(copy)
    path.rename(copy.parent / "outside.png")
    path.symlink_to(copy.parent / "outside.png")
    with pytest.raises(ArtefactError, match=field + r".*a link that leads out"):
        read_record(copy)


def test_folder_link_that_leads_out(copy: Path) -> None:
    (copy / "bd_train_dataset").rename(copy.parent / "outside")
    (copy / "bd_train_dataset").symlink_to(copy.parent / "outside")
    with pytest.raises(ArtefactError, match=r"a link that leads out"):
        read_record(copy)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "a whole PNG file"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 40, "a whole PNG file"),
        (b"%!PS-Adobe", "a whole PNG file"),
    ],
)
def test_damaged_picture(data: bytes, says: str, copy: Path) -> None:
    path, field = one_picture(copy)
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match=f"{field}.*{says}"):
        read_record(copy)


def test_picture_that_declares_too_much(copy: Path) -> None:
    path, field = one_picture(copy)
    data = bytearray(path.read_bytes())
    data[16:24] = (60_000).to_bytes(4, "big") * 2  # IHDR
    path.write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=field):
        read_record(copy)
