from __future__ import annotations

import collections
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.runtime.checkpoints import load_into, load_state, save_state
from tests.untrusted import hostile

STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0]), "a.n": torch.tensor(7)}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        assert torch.equal(got[key], value), key


class RunsCode:
    """Unpickled with the ordinary reader, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


class Declares:
    """A tensor of any size over a storage of three numbers."""

    def __init__(self, size: int, stride: int = 1) -> None:
        numbers = torch.ones(3)
        storage = torch.storage.TypedStorage(
            wrap_storage=numbers.untyped_storage(), dtype=numbers.dtype, _internal=True
        )
        self.arguments = (storage, 0, (size,), (stride,), False, collections.OrderedDict())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "model_state_dict", "net"])
def test_reads_the_forms_that_training_scripts_write(tmp_path: Path, legacy: bool, wrapper: str | None) -> None:
    rest = {"model_name": "preactresnet18", "num_classes": 10}
    content = STATE if wrapper is None else {**rest, wrapper: STATE}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    checkpoint = load_state(tmp_path / "x.pt")
    assert_same(checkpoint.state, STATE)
    assert checkpoint.metadata == ({} if wrapper is None else rest)


def test_parameters_become_plain_tensors(tmp_path: Path) -> None:
    torch.save({"w": nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    value = load_state(str(tmp_path / "x.pt")).state["w"]
    assert type(value) is Tensor
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["module.a", "module.b"], ["a", "b"]),
        (["_orig_mod.module.a"], ["a"]),
        (["module.module.a", "module.module.b"], ["a", "b"]),
        (["module.a", "n_averaged"], ["module.a", "n_averaged"]),  # AveragedModel: part of the name
    ],
)
def test_prefixes_are_taken_off_where_all_names_have_them(tmp_path: Path, keys: list[str], expected: list[str]) -> None:
    torch.save({key: torch.ones(1) for key in keys}, tmp_path / "x.pt")
    assert list(load_state(tmp_path / "x.pt").state) == expected


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / "x.pt"
    torch.save({"model": STATE, "note": RunsCode(marker)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"x\.pt.*refers to `\w+\.mkdir`, which may run code.*save model\.state_dict"):
        load_state(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the marker would have been made
    assert marker.is_dir()


def test_a_whole_module_is_refused_without_advice_to_run_it(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"refers to `torch\.nn\.modules\.linear\.Linear`") as caught:
        load_state(tmp_path / "x.pt")
    assert caught.value.__suppress_context__
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_declared_sizes_are_checked_before_memory_is_taken(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    for declared in (Declares(2**40), Declares(2**40, stride=0)):
        torch.save({"w": declared}, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=r"x\.pt.*(at most \d+ bytes, got 4398046511104;|wrong byte size)"):
            load_state(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_above_the_limit_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_state(path, {"w": torch.ones(1000)})
    with pytest.raises(ValueError, match="at most 4000 bytes"):
        load_state(path, max_bytes=4000)
    assert load_state(path, max_bytes=path.stat().st_size).state["w"].sum() == 1000


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    with pytest.raises(ValueError, match=r"bomb\.pt.*compressed zip archive"):
        load_state(tmp_path / "bomb.pt")


def item(key: str, value: bytes) -> bytes:
    return hostile.text(key) + value + b"s"


def called(path: str, *arguments: bytes) -> bytes:
    return hostile.name(path) + b"(" + b"".join(arguments) + b"tR"


WEIGHT = hostile.tensor((4,), (1,))
ORDERED = called("collections.OrderedDict")
CONSTRUCTOR = hostile.name("collections.OrderedDict")
HEX = called(
    "_codecs.encode", called("_codecs.encode", hostile.text("ab"), hostile.text("latin1")), hostile.text("hex")
)


@pytest.mark.parametrize(
    ("body", "got"),
    [
        (b"}" + item("w", WEIGHT) + item("x", called("builtins.bytearray", hostile.integer(1 << 40))), "bytearray"),
        (b"}" + item("w", WEIGHT) + item("x", HEX), "type bytes"),
        (b"}" + item("w", called("torch.Tensor", b"K\x05")), "without numbers in the file under `w`"),
        (b"}" + item("w", called("torch.FloatTensor", hostile.integer(1 << 32))), "without numbers in the file"),
        (b"}" + item("w", hostile.tensor((1 << 28,), (0,))), "tensors of 1073741824 bytes in a file of"),
    ],
    ids=["bytearray", "codec", "uninitialised", "uninitialised, large", "one number many times"],
)
def test_a_few_bytes_do_not_become_many(tmp_path: Path, body: bytes, got: str) -> None:
    (tmp_path / "x.pt").write_bytes(hostile.pt(hostile.PROTO + body + b".", {"0": bytes(16)}))
    with pytest.raises(ValueError, match=rf"load_state: `.*x\.pt` expected weights .*{got}"):
        load_state(tmp_path / "x.pt")


@pytest.mark.parametrize("method", ["get", "items", "keys", "detach", "untyped_storage"])
@pytest.mark.parametrize("value", [b"K\x01", CONSTRUCTOR], ids=["number", "constructor"])
def test_a_file_does_not_choose_the_methods_of_what_it_holds(tmp_path: Path, method: str, value: bytes) -> None:
    state = b"}" + item(method, value)
    arguments = hostile.storage() + b"K\x00(K\x04t(K\x01t\x89" + ORDERED + b"t"
    rebuild = hostile.name("torch._utils._rebuild_tensor_v2") + hostile.name("torch.Tensor") + b"(" + arguments + state
    weight = called("torch._tensor._rebuild_from_type_v2", rebuild)
    body = hostile.PROTO + ORDERED + item("w", weight) + state + b"b."
    (tmp_path / "x.pt").write_bytes(hostile.pt(body, {"0": bytes(16)}))
    assert_same(load_state(tmp_path / "x.pt").state, {"w": torch.zeros(4)})


def test_a_zip_that_two_readers_take_for_two_files_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:-22] + bytes(64) + data[-22:])  # the directory is not where its end says
    with pytest.raises(ValueError, match=r"x\.pt.*zip archive"):
        load_state(tmp_path / "x.pt")


def test_torchscript_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:  # what torch.jit.save writes, as far as it matters
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"x/{name}", b"")
    with pytest.raises(ValueError, match=r"x\.pt.*TorchScript archive.*save model\.state_dict\(\)"):
        load_state(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_any_truncation_is_an_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    whole, path = tmp_path / "whole", tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(STATE, whole)
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=kind == "zip")
    content = whole.read_bytes()
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"load_state: `.*{path.name}` expected weights"):
            load_state(path)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_noise_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    for seed in range(20):
        noise = torch.randint(256, (300,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        (tmp_path / name).write_bytes((b"PK\x03\x04" if seed % 2 else b"\x80\x02") + noise.numpy().tobytes())
        with pytest.raises(ValueError, match=f"load_state: `.*{name}` expected weights"):
            load_state(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.ones(1)], "a list"),
        ({"w": [1.0]}, "a list under `w`"),
        ({"model": {"w": 1.0}, "num_classes": 2}, "a float under `w`"),
        ({3: torch.ones(1)}, "the key 3"),
        ({"w": torch.ones(2, 2).to_sparse()}, "a sparse, nested or quantized tensor under `w`"),
        ({"w": torch.ones(2, device="meta")}, "a tensor without values under `w`"),
    ],
)
def test_other_content_is_refused(tmp_path: Path, content: Any, got: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x\.pt` expected weights \(dense tensors by name\), got {got}"):
        load_state(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, dtype: torch.dtype, bad: float) -> None:
    torch.save({"fine": torch.ones(2), "w": torch.tensor([1.0, bad, bad]).to(dtype)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt.*got 2 NaN or infinite of 3 numbers in `w`"):
        load_state(tmp_path / "x.pt")
    assert len(load_state(tmp_path / "x.pt", allow_nonfinite=True).state["w"]) == 3


def test_no_file_and_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"load_state: `.*gone\.pt` expected a file of weights, got nothing"):
        load_state(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="no regular file"):
        load_state(tmp_path)


def test_foreign_safetensors_metadata(tmp_path: Path) -> None:
    safetensors.torch.save_file(STATE, tmp_path / "x.safetensors", {"format": "pt", "shape": json.dumps([1, 2])})
    checkpoint = load_state(tmp_path / "x.safetensors")
    assert checkpoint.metadata == {"format": "pt", "shape": [1, 2]}
    assert sorted(checkpoint.state) == sorted(STATE)


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_model_travels_whole(tmp_path: Path, name: str) -> None:
    model = models.build("digits_cnn", num_classes=10, seed=0)
    metadata = {"model_name": "digits_cnn", "num_classes": 10, "img_size": [8, 8, 1], "nested": {"lr": 0.1}}
    save_state(tmp_path / name, model.state_dict(), metadata)
    checkpoint = load_state(tmp_path / name)
    assert checkpoint.metadata == metadata
    assert_same(checkpoint.state, dict(model.state_dict()))  # order included: other readers match by position
    other = models.build("digits_cnn", num_classes=10, seed=1)
    load_into(other, checkpoint.state)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_torch_files_are_small_and_hold_plain_objects(tmp_path: Path) -> None:
    save_state(tmp_path / "x.pt", {"w": torch.zeros(1_000_000)[:2]}, {"size": (8, 8)})
    assert (tmp_path / "x.pt").stat().st_size < 5_000  # the view, without what surrounds it
    assert load_state(tmp_path / "x.pt").metadata == {"size": [8, 8]}
