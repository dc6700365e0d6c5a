"""Records of BackdoorBench: written, read, converted; and what is wrong with one is said by file and field."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bdfast import attacks, models
from bdfast.errors import LabelRangeError
from bdfast.integrations.backdoorbench import (
    ArtefactError,
    convert,
    load_record,
    read_record,
    save_record,
    write_record,
)
from tests.integrations.conftest import Attack, assert_same, joined, saved_as


@pytest.mark.parametrize("fixture", ["record_folder", "record_in_memory"])
def test_round_trip(fixture: str, attack: Attack, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(fixture)
    record = joined(folder, attack)
    assert_same(record, attack)
    assert (record.model_name, record.num_classes, record.notes) == ("digits_cnn", 10, ())
    assert record.train is not None
    assert record.train.relabel.target == 3
    assert not record.model.training

    assert convert(folder, tmp_path / "out") == []
    assert_same(joined(tmp_path / "out", attack), attack)
    assert str(folder) not in (tmp_path / "out" / "manifest.json").read_text()
    # What was converted can be written as a record again, in the other form.
    write_record(tmp_path / "record" / "x", read_record(tmp_path / "out"), in_memory=fixture == "record_folder")
    assert_same(joined(tmp_path / "record" / "x", attack), attack)


def test_normalisation_is_inside(record_folder: Path, attack: Attack) -> None:
    record = joined(record_folder, attack)
    images = attack.test[0][:4].float() / 255
    with torch.no_grad():
        expected = attack.model((images - 0.3053) / 0.3759)
        assert torch.allclose(record.model(images), expected, atol=1e-5)


def test_float_base_data(record_folder: Path, attack: Attack) -> None:
    train, test = ((images.float() / 255, labels) for images, labels in (attack.train, attack.test))
    record = load_record(record_folder, train=train, test=test)
    assert record.train is not None
    assert torch.equal(record.train.images, attack.poisoned.images.float() / 255)


def test_moved_and_renamed(record_folder: Path, attack: Attack, tmp_path: Path) -> None:
    shutil.copytree(record_folder, tmp_path / "elsewhere")
    assert_same(joined(tmp_path / "elsewhere", attack), attack)


def test_clean_label_poison_is_poison(attack: Attack, tmp_path: Path) -> None:
    poisoned = attacks.poison(*attack.train, "sig", rate=0.05, target=2, seed=0, num_classes=10)
    record = saved_as(tmp_path, attack, poisoned)
    assert_same(record, attack, poisoned)
    assert record.train is not None
    assert record.train.relabel.target == 2


def test_all_to_all(attack: Attack, tmp_path: Path) -> None:
    poisoned = attacks.poison(*attack.train, "badnets", rate=0.2, seed=0, num_classes=10, mode="all-to-all")
    record = saved_as(tmp_path, attack, poisoned)
    assert_same(record, attack, poisoned)
    assert record.train is not None
    assert record.train.relabel.mode == "all-to-all"


def test_covers_are_told_from_poison(attack: Attack, tmp_path: Path) -> None:
    poisoned = attacks.poison(*attack.train, "wanet", rate=0.1, target=3, seed=0, num_classes=10)
    record = saved_as(tmp_path, attack, poisoned)
    assert record.train is not None
    flagged = poisoned.is_poisoned | poisoned.is_cover
    changed = flagged & (poisoned.labels != poisoned.original_labels)
    assert torch.equal(record.train.is_poisoned, changed)
    assert torch.equal(record.train.is_cover, flagged & ~changed)
    assert any("not exactly this snapshot" in note for note in record.notes)


def test_labels_that_are_tensors(attack: Attack, record_in_memory: Path, tmp_path: Path) -> None:
    content = torch.load(
        record_in_memory / "attack_result.pt", weights_only=False
    )  # as the benchmark's CelebA gives them
    for part in ("bd_train", "bd_test"):
        entries = content[part]["bd_data_container"]["data_dict"]
        entries |= {key: (image, torch.tensor(a), torch.tensor(b)) for key, (image, a, b) in entries.items()}
    torch.save(content, tmp_path / "attack_result.pt")
    assert torch.equal(read_record(tmp_path).test.labels, read_record(record_in_memory).test.labels)


def test_no_training_set(attack: Attack, tmp_path: Path) -> None:
    record = saved_as(tmp_path, attack, None)
    assert record.train is None
    assert record.notes == ("the record holds no poisoned training set",)
    convert(tmp_path / "record", tmp_path / "out")
    assert joined(tmp_path / "out", attack).train is None


def test_a_recorded_trigger_is_no_formula(record_folder: Path, attack: Attack) -> None:
    record = joined(record_folder, attack)
    assert record.train is not None
    with pytest.raises(ValueError, match=r"RecordedAttack: .* use Record\.triggered_test"):
        record.train.trigger(*attack.test)


@pytest.mark.parametrize("switch", [False, True])
def test_getitem_all_switch(switch: bool, attack: Attack, record_in_memory: Path, tmp_path: Path) -> None:
    """The switch trades label and original label in the tuples of samples; what they are does not change."""
    stored = read_record(record_in_memory)
    write_record(tmp_path / "record", replace(stored, test=replace(stored.test, getitem_all_switch=switch)))
    record = joined(tmp_path / "record", attack)
    assert record.stored.test.getitem_all_switch is switch
    assert_same(record, attack)
    image, label, index, flag, original = record.test_sample(0)
    eligible = attack.triggered.eligible.nonzero().flatten()
    true = int(attack.test[1][eligible[0]])
    assert (label, original) == ((true, 3) if switch else (3, true))
    assert (index, flag) == (int(eligible[0]), 1)
    assert torch.equal(image, record.triggered_test[0][0])


def test_two_tuples(attack: Attack, record_in_memory: Path, tmp_path: Path) -> None:
    stored = read_record(record_in_memory)
    write_record(tmp_path / "record", replace(stored, test=replace(stored.test, getitem_all=False)))
    assert len(joined(tmp_path / "record", attack).test_sample(0)) == 2


# --- weights ---------------------------------------------------------------------------------------------------------


def with_weights(tmp_path: Path, record: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    stored = read_record(record)
    write_record(tmp_path / "record", replace(stored, state=change(stored.state)), in_memory=True)
    return tmp_path / "record"


def test_module_prefix(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    folder = with_weights(tmp_path, record_in_memory, lambda s: {f"module.{key}": value for key, value in s.items()})
    record = joined(folder, attack)
    assert record.notes == ()
    assert_same(record, attack)


def test_names_by_position(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    folder = with_weights(tmp_path, record_in_memory, lambda s: {f"w{i}": v for i, v in enumerate(s.values())})
    record = joined(folder, attack)
    assert "renamed by position" in record.notes[0]
    assert "w0 -> conv1.weight" in record.notes[0]
    assert_same(record, attack)
    assert "renamed by position" in convert(folder, tmp_path / "out")[0]
    assert_same(joined(tmp_path / "out", attack), attack)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: dict(list(s.items())[1:]), "missing conv1.weight"),
        (lambda s: {f"w{i}": v for i, v in enumerate(reversed(s.values()))}, "missing"),
        (lambda s: {**s, "linear.weight": s["linear.weight"][:4]}, r"linear\.weight is \[4, "),
        (lambda s: {**s, "linear.bias": s["linear.bias"] * float("nan")}, r"model\.linear\.bias.*10 NaN"),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Any]], dict[str, Any]],
    says: str,
    record_in_memory: Path,
    attack: Attack,
    tmp_path: Path,
) -> None:
    folder = with_weights(tmp_path, record_in_memory, change)
    with pytest.raises(ArtefactError, match=says):
        joined(folder, attack)


def test_views_of_one_storage_are_not_copied_out(record_in_memory: Path, tmp_path: Path) -> None:
    """Each would be checked and copied: a small file would keep its reader busy for hours."""
    content = torch.load(record_in_memory / "attack_result.pt", weights_only=False)
    shared = torch.zeros(1 << 12)
    content["model"] |= {f"view{i}": shared for i in range(200)}
    torch.save(content, tmp_path / "attack_result.pt")
    with pytest.raises(ArtefactError, match=r"model` expected at most 8 times the \d+ bytes of its storages, got \d+"):
        read_record(tmp_path)


def test_messages_hold_nothing_that_a_terminal_obeys(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    stored = read_record(record_in_memory)
    for change in ({"\x1b[2J": torch.full((1,), float("nan"))}, {"\x1b[2J": torch.ones(1)}, {"\u202e": torch.ones(1)}):
        write_record(tmp_path / "record", replace(stored, state={**stored.state, **change}), in_memory=True)
        with pytest.raises(ArtefactError) as caught:
            joined(tmp_path / "record", attack)
        assert str(caught.value).isprintable()
    renamed = {f"\x1b[2J{key}": value for key, value in stored.state.items()}
    write_record(tmp_path / "record", replace(stored, state=renamed), in_memory=True)
    assert joined(tmp_path / "record", attack).notes[0].isprintable()


@pytest.mark.parametrize(
    ("name", "arch", "options"),
    [
        ("preactresnet18", "preact_resnet18", {}),
        ("resnet18", "resnet18", {"stem": "imagenet"}),
        ("mobilenet_v2", "mobilenet_v2", {}),
    ],
)
def test_architectures(name: str, arch: str, options: dict[str, Any], record_in_memory: Path, tmp_path: Path) -> None:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(6)
    poisoned = attacks.poison(images, labels, "badnets", rate=0.5, target=0, num_classes=10)
    model = models.build(arch, num_classes=10, seed=0, **options).eval()
    save_record(
        tmp_path / "record", model, model_name=arch, num_classes=10, clean_data="cifar10",
        train=poisoned, test=poisoned.trigger(images, labels), in_memory=True,
    )  # fmt: skip
    assert read_record(tmp_path / "record").model_name == name
    record = load_record(tmp_path / "record", train=(images, labels), test=(images, labels))
    assert record.arch == arch
    assert record.normalize[0] == (0.4914, 0.4822, 0.4465)
    mean, std = (torch.tensor(part).reshape(3, 1, 1) for part in record.normalize)
    with torch.no_grad():
        x = images / 255
        assert torch.allclose(record.model(x), model((x - mean) / std), atol=1e-4)


def test_unknown_architecture(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    stored = read_record(record_in_memory)
    write_record(tmp_path / "record", replace(stored, model_name="our_net"), in_memory=True)
    with pytest.raises(ArtefactError, match=r"model_name.*our_net"):
        joined(tmp_path / "record", attack)
    notes = convert(tmp_path / "record", tmp_path / "out")
    assert "the weights keep their names" in notes[0]
    assert read_record(tmp_path / "out").state.keys() == stored.state.keys()


# --- base data -------------------------------------------------------------------------------------------------------


def test_other_base_data(record_folder: Path, attack: Attack) -> None:
    images, labels = attack.train
    with pytest.raises(ValueError, match=r"`train` expected 120 images of \[1, 8, 8\], the digits"):
        load_record(record_folder, train=(images[:-1], labels[:-1]), test=attack.test)
    with pytest.raises(ValueError, match=r"`train` expected the labels that the record was made from"):
        load_record(record_folder, train=(images.flip(0), labels.flip(0)), test=attack.test)
    with pytest.raises(TypeError, match="`test` expected a tuple"):
        load_record(record_folder, train=attack.train, test=images)  # type: ignore[arg-type]
    with pytest.raises(LabelRangeError):
        load_record(record_folder, train=(images, labels + 9), test=attack.test)
    with pytest.raises(FileNotFoundError, match=r"attack_result\.pt"):
        load_record(record_folder / "bd_test_dataset", train=attack.train, test=attack.test)


# --- what is written -------------------------------------------------------------------------------------------------


def test_attack_result_as_the_benchmark_reads_it(record_folder: Path, attack: Attack) -> None:
    """Exactly its eight keys, its types, and pictures where its data container looks for them."""
    content = torch.load(record_folder / "attack_result.pt", weights_only=False)
    assert list(content) == [
        "model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test",
    ]  # fmt: skip
    assert content["img_size"] == (*attack.train[0].shape[2:], attack.train[0].shape[1])
    state = content["bd_train"]
    assert set(state) == {
        "bd_data_container", "getitem_all", "getitem_all_switch", "original_index_array", "poison_indicator",
        "save_folder_path",
    }  # fmt: skip
    assert isinstance(state["original_index_array"], np.ndarray)
    assert state["poison_indicator"].tolist() == attack.poisoned.is_poisoned.long().tolist()
    index, entry = next(iter(state["bd_data_container"]["data_dict"].items()))
    label, original = entry["other_info"]
    assert entry["path"] == f"./record/badnet_0_1/bd_train_dataset/{original}/{index}.png"
    assert (label, original) == (3, int(attack.train[1][index]))
    pixels = np.asarray(Image.open(record_folder.parent.parent / entry["path"]))
    assert np.array_equal(pixels, attack.poisoned.images[index, 0].numpy())
    flags = torch.load(record_folder / "train_poison_index_list.pickle", weights_only=False)
    assert np.array_equal(flags, state["poison_indicator"])
    assert torch.load(record_folder / "info.pickle", weights_only=True)["dataset"] == "digits"
    assert content["bd_test"]["original_index_array"].tolist() == attack.triggered.eligible.nonzero().flatten().tolist()


def test_a_record_in_a_group_is_named_from_record_on(attack: Attack, tmp_path: Path) -> None:
    folder = attack.save(tmp_path / "record" / "group" / "badnet_0_1")
    container = torch.load(folder / "attack_result.pt", weights_only=False)["bd_test"]["bd_data_container"]
    assert container["save_folder_path"] == "./record/group/badnet_0_1/bd_test_dataset"
    assert_same(joined(folder, attack), attack)


def test_fractions_of_grey_levels_are_refused(attack: Attack, tmp_path: Path) -> None:
    images, labels = attack.train[0].float() / 255, attack.train[1]
    poisoned = attacks.poison(images, labels, "blended", rate=0.1, quantize=False, num_classes=10)
    with pytest.raises(ValueError, match="`train` expected images of whole grey levels"):
        saved_as(tmp_path, attack, poisoned)


def test_data_path(record_in_memory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data_path` expected a path with `data` in it"):
        write_record(tmp_path, replace(read_record(record_in_memory), data_path="./images"))
