"""backdoor-toolbox's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bdfast import attacks
from bdfast.errors import LabelRangeError
from bdfast.integrations.backdoorbench import ArtefactError
from bdfast.integrations.backdoorbench.toolbox import (
    POISON_TYPES,
    load_clean_split,
    load_poison_set,
    model_name,
    poison_set_name,
    save_poison_set,
)
from tests.integrations.conftest import Attack
from tests.untrusted.hostile import Gadget

NAMES = {
    "ISSBA": "ISSBA_0.020_poison_seed=0",
    "SIG": "SIG_0.020_poison_seed=0",
    "SleeperAgent": "SleeperAgent_0.020_poison_seed=0",
    "TaCT": "TaCT_0.020_cover=0.010_poison_seed=0",
    "WB": "WB_0.020_poison_seed=0",
    "WaNet": "WaNet_0.020_cover=0.010_poison_seed=0",
    "adaptive_blend": "adaptive_blend_0.020_alpha=0.150_cover=0.010_trigger=kitty.png_poison_seed=0",
    "adaptive_k_way": "adaptive_k_way_0.020_cover=0.010_poison_seed=0",
    "adaptive_patch": "adaptive_patch_0.020_cover=0.010_poison_seed=0",
    "badnet": "badnet_0.020_poison_seed=0",
    "badnet_all_to_all": "badnet_all_to_all_0.020_poison_seed=0",
    "basic": "basic_0.020_alpha=0.150_trigger=kitty.png_poison_seed=0",
    "blend": "blend_0.020_alpha=0.150_trigger=kitty.png_poison_seed=0",
    "clean_label": "clean_label_0.020_alpha=0.150_trigger=kitty.png_poison_seed=0",
    "dynamic": "dynamic_0.020_poison_seed=0",
    "none": "none_0.020_poison_seed=0",
    "refool": "refool_0.020_poison_seed=0",
    "trojan": "trojan_0.020_poison_seed=0",
}


@pytest.mark.parametrize("poison_type", POISON_TYPES)
def test_names(poison_type: str) -> None:
    options: dict[str, Any] = {"rate": 0.02, "alpha": 0.15, "cover_rate": 0.01, "trigger": "kitty.png"}
    assert poison_set_name(poison_type, **options) == NAMES[poison_type]
    assert poison_set_name(poison_type, **options, poison_seed=None) == NAMES[poison_type].removesuffix(
        "_poison_seed=0"
    )


def test_name_errors() -> None:
    with pytest.raises(ValueError, match="`poison_type` expected one of ISSBA, SIG"):
        poison_set_name("badnets", rate=0.1)
    for trigger in ("", "../x.png"):
        with pytest.raises(ValueError, match="`trigger` expected the name of a file"):
            poison_set_name("blend", rate=0.1, trigger=trigger)
    assert model_name(7) == "full_base_aug_seed=7.pt"


@pytest.mark.parametrize("name", ["badnets", "wanet"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_round_trip(name: str, dtype: torch.dtype, attack: Attack, tmp_path: Path) -> None:
    images, labels = attack.train
    images = images if dtype == torch.uint8 else images.float() / 255
    data = attacks.poison(images, labels, name, rate=0.1, target=3, num_classes=10, quantize=dtype == torch.uint8)
    save_poison_set(tmp_path / "set", data)
    read = load_poison_set(tmp_path / "set", num_classes=10)
    assert torch.equal(read.images, data.images.float() / (255 if dtype == torch.uint8 else 1))
    assert torch.equal(read.poison_indices, data.poison_indices)
    assert torch.equal(read.cover_indices, data.cover_indices)
    again = read.with_truth(labels, 10)
    for field in ("labels", "original_labels", "is_poisoned", "is_cover"):
        assert torch.equal(getattr(again, field), getattr(data, field)), field
    assert again.relabel.target == 3
    # What is written are the types that backdoor-toolbox loads.
    assert type(torch.load(tmp_path / "set" / "poison_indices", weights_only=True)) is list
    assert torch.load(tmp_path / "set" / "imgs", weights_only=True).dtype == torch.float32


def test_truth_must_agree(attack: Attack, tmp_path: Path) -> None:
    save_poison_set(tmp_path, attack.poisoned)
    read = load_poison_set(tmp_path)
    with pytest.raises(ValueError, match=r"`original_labels` expected \[120\]"):
        read.with_truth(attack.train[1][:5], 10)
    with pytest.raises(ValueError, match="`original_labels` expected the labels of the clean samples"):
        read.with_truth(attack.train[1].flip(0), 10)


@pytest.mark.parametrize(
    ("file", "value", "says"),
    [
        ("imgs", torch.zeros(120, 64), r"imgs: the tensor` expected float images"),
        ("imgs", torch.zeros(120, 1, 8, 8, dtype=torch.uint8), r"imgs: the tensor` expected float images"),
        ("imgs", torch.full((120, 1, 8, 8), 1.5), r"imgs: the tensor` expected images in \[0, 1\]"),
        ("imgs", torch.full((120, 1, 8, 8), float("nan")), r"imgs: the tensor` expected images in \[0, 1\]"),
        ("imgs", [1, 2], r"imgs: the tensor` expected float images"),
        ("labels", torch.zeros(7).long(), r"labels: labels` expected 120, one for each image"),
        ("labels", torch.full((120,), 0.5), r"labels: labels\[0\]` expected integers"),
        ("poison_indices", [120], r"poison_indices: indices\[0\]` expected integers in \[0, 119\]"),
        ("poison_indices", [3, 3], r"poison_indices: indices` expected every index once"),
        ("poison_indices", {"a": 1}, r"poison_indices: indices` expected one axis"),
        ("cover_indices", "POISON", r"cover_indices: indices` expected indices that are not poisoned"),
        ("poison_indices", "GADGET", "may run code"),
    ],
)
def test_broken_sets(file: str, value: Any, says: str, attack: Attack, tmp_path: Path) -> None:
    save_poison_set(tmp_path, attack.poisoned)
    if isinstance(value, str):
        canary = tmp_path / "canary"
        value = attack.poisoned.poison_indices.tolist()[:1] if value == "POISON" else Gadget(Path.touch, canary)
    torch.save(value, tmp_path / file)
    with pytest.raises(ArtefactError, match=says):
        load_poison_set(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_labels_out_of_range(attack: Attack, tmp_path: Path) -> None:
    save_poison_set(tmp_path, attack.poisoned)
    with pytest.raises(LabelRangeError, match=r"labels\[\d+\]` expected a class in \[0, 5\)"):
        load_poison_set(tmp_path, num_classes=5)
    with pytest.raises(FileNotFoundError, match="imgs"):
        load_poison_set(tmp_path / "nowhere")


@pytest.mark.parametrize("form", ["pictures", "imgs"])
def test_clean_split(form: str, attack: Attack, tmp_path: Path) -> None:
    images, labels = attack.train[0][:6], attack.train[1][:6]
    if form == "imgs":
        torch.save(images.float() / 255, tmp_path / "imgs")
        torch.save(labels, tmp_path / "labels")
        assert torch.equal(load_clean_split(tmp_path)[0], images.float() / 255)
        return
    (tmp_path / "data").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{index}.png")
    torch.save(labels, tmp_path / "clean_labels")
    read = load_clean_split(tmp_path, num_classes=10)
    assert torch.equal(read[0], images)
    assert torch.equal(read[1], labels)
    (tmp_path / "data" / "5.png").unlink()
    with pytest.raises(ArtefactError, match=r"5\.png` expected an image for each label"):
        load_clean_split(tmp_path)
