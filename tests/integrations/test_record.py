"""Records of BackdoorBench: written, read, converted; and what is wrong with one is said by file and field."""

from __future__ import annotations

import json
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
from bdfast.attacks import PoisonedData
from bdfast.errors import LabelRangeError
from bdfast.integrations.backdoorbench import (
    ArtefactError,
    Record,
    convert,
    load_record,
    read_record,
    save_record,
    write_record,
)
from bdfast.integrations.backdoorbench.converted import sha256
from tests.integrations.conftest import Attack


def load(folder: Path, attack: Attack) -> Record:
    return load_record(folder, train=attack.train, test=attack.test)


def assert_same(record: Record, attack: Attack, poisoned: PoisonedData | None = None) -> None:
    """Images, labels, flags and weights, bit for bit."""
    poisoned = poisoned or attack.poisoned
    assert record.train is not None
    for name in ("images", "labels", "original_labels", "is_poisoned", "is_cover"):
        assert torch.equal(getattr(record.train, name), getattr(poisoned, name)), name
    eligible = attack.triggered.eligible
    for ours, theirs in zip(record.triggered_test, attack.triggered[:3], strict=True):
        assert torch.equal(ours, theirs[eligible])
    weights = record.model.state_dict()
    for key, value in attack.model.state_dict().items():
        assert torch.equal(weights[key], value), key


@pytest.mark.parametrize("fixture", ["record_folder", "record_in_memory"])
def test_round_trip(fixture: str, attack: Attack, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(fixture)
    record = load(folder, attack)
    assert_same(record, attack)
    assert (record.model_name, record.num_classes, record.notes) == ("digits_cnn", 10, ())
    assert record.train is not None
    assert record.train.relabel.target == 3
    assert not record.model.training

    assert convert(folder, tmp_path / "out") == []
    assert_same(load(tmp_path / "out", attack), attack)
    assert str(folder) not in (tmp_path / "out" / "manifest.json").read_text()
    # What was converted can be written as a record again, in the other form.
    write_record(tmp_path / "record" / "x", read_record(tmp_path / "out"), in_memory=fixture == "record_folder")
    assert_same(load(tmp_path / "record" / "x", attack), attack)


def test_normalisation_is_inside(record_folder: Path, attack: Attack) -> None:
    record = load(record_folder, attack)
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
    assert_same(load(tmp_path / "elsewhere", attack), attack)


def saved_as(tmp_path: Path, attack: Attack, poisoned: PoisonedData | None, triggered: Any = None) -> Record:
    save_record(
        tmp_path / "record", attack.model, model_name="digits_cnn", num_classes=10, clean_data="digits",
        train=poisoned, test=triggered or attack.triggered,
    )  # fmt: skip
    return load(tmp_path / "record", attack)


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


def test_no_training_set(attack: Attack, tmp_path: Path) -> None:
    record = saved_as(tmp_path, attack, None)
    assert record.train is None
    assert record.notes == ("the record holds no poisoned training set",)
    convert(tmp_path / "record", tmp_path / "out")
    assert load(tmp_path / "out", attack).train is None


def test_a_recorded_trigger_is_no_formula(record_folder: Path, attack: Attack) -> None:
    record = load(record_folder, attack)
    assert record.train is not None
    with pytest.raises(ValueError, match=r"RecordedAttack: .* use Record\.triggered_test"):
        record.train.trigger(*attack.test)


@pytest.mark.parametrize("switch", [False, True])
def test_getitem_all_switch(switch: bool, attack: Attack, record_in_memory: Path, tmp_path: Path) -> None:
    """The switch trades label and original label in the tuples of samples; what they are does not change."""
    stored = read_record(record_in_memory)
    write_record(tmp_path / "record", replace(stored, test=replace(stored.test, getitem_all_switch=switch)))
    record = load(tmp_path / "record", attack)
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
    assert len(load(tmp_path / "record", attack).test_sample(0)) == 2


# --- weights --------------------------------------------------------------------------------------------------------


def with_weights(tmp_path: Path, record: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    stored = read_record(record)
    write_record(tmp_path / "record", replace(stored, state=change(stored.state)), in_memory=True)
    return tmp_path / "record"


def test_module_prefix(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    folder = with_weights(tmp_path, record_in_memory, lambda s: {f"module.{key}": value for key, value in s.items()})
    record = load(folder, attack)
    assert record.notes == ()
    assert_same(record, attack)


def test_names_by_position(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    folder = with_weights(tmp_path, record_in_memory, lambda s: {f"w{i}": v for i, v in enumerate(s.values())})
    record = load(folder, attack)
    assert "renamed by position" in record.notes[0]
    assert "w0 -> conv1.weight" in record.notes[0]
    assert_same(record, attack)
    assert "renamed by position" in convert(folder, tmp_path / "out")[0]
    assert_same(load(tmp_path / "out", attack), attack)


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
        load(folder, attack)


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
            load(tmp_path / "record", attack)
        assert str(caught.value).isprintable()
    renamed = {f"\x1b[2J{key}": value for key, value in stored.state.items()}
    write_record(tmp_path / "record", replace(stored, state=renamed), in_memory=True)
    assert load(tmp_path / "record", attack).notes[0].isprintable()


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
        load(tmp_path / "record", attack)
    notes = convert(tmp_path / "record", tmp_path / "out")
    assert "the weights keep their names" in notes[0]
    assert read_record(tmp_path / "out").state.keys() == stored.state.keys()


# --- base data ------------------------------------------------------------------------------------------------------


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


# --- broken records -------------------------------------------------------------------------------------------------


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


# --- converted records ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["images.bin", "model.safetensors"])
def test_converted_files_are_hashed(file: str, record_in_memory: Path, tmp_path: Path) -> None:
    convert(record_in_memory, tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[-1] ^= 1
    (tmp_path / file).write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=f"{file}: SHA-256` expected [0-9a-f]{{64}}, got another"):
        read_record(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"format": "other/1"}, "format"),
        ({"num_classes": 3}, "train.labels"),
        ({"img_size": [8, 9, 1]}, "img_size"),
        ({"test": None}, "test"),
        ({"train": {"size": 2**40}}, "train"),
        ({"train": {"flagged": [-1]}}, "train.flagged"),
        ({"train": {"flagged": [True]}}, "train.flagged"),
        ({"train": {"index": [1, 0]}}, "train.index"),
        ({"train": {"index": []}}, "train"),
        ({"train": {"first_image": 10**9}}, "train.first_image"),
        ({"train": {"labels": [0]}}, "train.labels"),
        ({"train": {"order": ["0"]}}, "train.order"),
    ],
    ids=str,
)
def test_broken_manifest(change: dict[str, Any], field: str, record_in_memory: Path, tmp_path: Path) -> None:
    convert(record_in_memory, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for key, value in change.items():
        manifest[key] = {**manifest[key], **value} if isinstance(value, dict) else value
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError) as caught:
        read_record(tmp_path)
    assert f"manifest.json: {field}" in str(caught.value)


@pytest.mark.parametrize(("file", "says"), [("images.bin", "the 74 images that"), ("model.safetensors", "at most")])
def test_files_that_pretend_to_be_large_are_not_read(
    file: str, says: str, record_in_memory: Path, tmp_path: Path
) -> None:
    """A hole in a file costs nothing on disk; hashing 100 GiB of it would take ten minutes."""
    convert(record_in_memory, tmp_path)
    with (tmp_path / file).open("r+b") as stream:
        stream.truncate(100 << 30)
    with pytest.raises(ArtefactError, match=rf"{file}: size` expected .*{says}"):
        read_record(tmp_path)


def test_broken_json(record_in_memory: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ArtefactError, match=r"the file` expected JSON"):
        read_record(tmp_path)


# --- converting other files -----------------------------------------------------------------------------------------


def test_convert_a_checkpoint(tmp_path: Path) -> None:
    from bdfast.runtime.checkpoints import load_state

    content = {"module.a": torch.ones(2), "module.b": torch.zeros(1)}
    torch.save({"model": content, "epoch": 3, "rng": torch.zeros(1)}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", tmp_path / "out") == ["left out, being no plain values: rng"]
    checkpoint = load_state(tmp_path / "out" / "model.safetensors")
    assert list(checkpoint.state) == ["a", "b"]
    assert checkpoint.metadata == {"epoch": 3}


def test_unsafe_pickle_needs_the_hash(record_in_memory: Path, attack: Attack, tmp_path: Path) -> None:
    file = record_in_memory / "attack_result.pt"
    with pytest.raises(ValueError, match="`unsafe_pickle` expected the file's SHA-256"):
        convert(file, tmp_path / "out", unsafe_pickle="0" * 64)
    assert not (tmp_path / "out").exists()
    convert(file, tmp_path / "out", unsafe_pickle=sha256(file))
    assert_same(load(tmp_path / "out", attack), attack)


def test_unsafe_pickle_runs_what_the_user_vouches_for(tmp_path: Path) -> None:
    from tests.integrations.hostile import Gadget

    torch.save({"model": {"a": torch.ones(1)}, "x": Gadget(Path.touch, tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(ArtefactError, match="may run code"):
        convert(tmp_path / "x.pt", tmp_path / "out")
    assert not (tmp_path / "canary").exists()
    convert(tmp_path / "x.pt", tmp_path / "out", unsafe_pickle=sha256(tmp_path / "x.pt"))
    assert (tmp_path / "canary").exists()


# --- what is written ------------------------------------------------------------------------------------------------


def test_attack_result_as_the_benchmark_reads_it(record_folder: Path, attack: Attack) -> None:
    """Exactly its eight keys, its types, and pictures where its data container looks for them."""
    content = torch.load(record_folder / "attack_result.pt", weights_only=False)
    assert list(content) == [
        "model_name", "num_classes", "model", "data_path", "img_size", "clean_data", "bd_train", "bd_test",
    ]  # fmt: skip
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


def test_fractions_of_grey_levels_are_refused(attack: Attack, tmp_path: Path) -> None:
    images, labels = attack.train[0].float() / 255, attack.train[1]
    poisoned = attacks.poison(images, labels, "blended", rate=0.1, quantize=False, num_classes=10)
    with pytest.raises(ValueError, match="`train` expected images of whole grey levels"):
        saved_as(tmp_path, attack, poisoned)


def test_data_path(record_in_memory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`data_path` expected a path with `data` in it"):
        write_record(tmp_path, replace(read_record(record_in_memory), data_path="./images"))
