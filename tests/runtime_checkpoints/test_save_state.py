from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bdfast.runtime.checkpoints import atomic_write, load_into, load_state, save_state


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_shared_strided_and_empty_tensors(tmp_path: Path, name: str) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "tied": base,
        "again": base,
        "row": base[1],
        "transposed": base.T,
        "expanded": torch.ones(1).expand(5),
        "channels_last": torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
        "empty": torch.empty(0, 3),
        "also_empty": torch.empty(0),
        "flag": torch.tensor([True, False]),
        "half": torch.ones(2, dtype=torch.bfloat16, requires_grad=True),
    }
    save_state(tmp_path / name, state)
    loaded = load_state(tmp_path / name).state
    assert list(loaded) == list(state)
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value), key
    assert base.is_contiguous()


@pytest.mark.parametrize(
    ("state", "got"),
    [({"w": [1.0]}, "a list under `w`"), ({1: torch.ones(1)}, "the key 1"), ({"w": None}, "a NoneType under `w`")],
)
def test_only_tensors_are_written(tmp_path: Path, state: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"save_state: `state` expected dense tensors by name, got {got}"):
        save_state(tmp_path / "x.pt", state)
    assert not list(tmp_path.iterdir())


def test_metadata_is_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save_state: `metadata` expected what JSON can hold.*ndarray"):
        save_state(tmp_path / "x.pt", {}, {"accuracy": np.ones(2)})
    with pytest.raises(ValueError, match="save_state: `metadata` expected names that are free, got 'model'"):
        save_state(tmp_path / "x.pt", {}, {"model": "resnet18"})
    save_state(tmp_path / "x.pt", {}, {"accuracy": np.float64(0.5)})  # a float to JSON, a numpy object to pickle
    assert load_state(tmp_path / "x.pt").metadata == {"accuracy": 0.5}


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"atomic_write: `.*gone.x\.pt` expected a folder that exists"):
        save_state(tmp_path / "gone" / "x.pt", {})


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "result.csv"
    path.write_text("old")
    with atomic_write(path, newline="") as file:
        file.write("näw\r\n")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_bytes() == "näw\r\n".encode()
    with atomic_write(path, "wb") as binary:
        binary.write(b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in tmp_path.iterdir()] == ["result.csv"]


def test_atomic_write_leaves_no_trace_of_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text("old")
    with pytest.raises(TypeError, match="not JSON serializable"), atomic_write(path) as file:
        json.dump(["new", object()], file)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_atomic_write_respects_the_umask(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "ours.txt"):
        pass
    (tmp_path / "usual.txt").write_text("")
    assert (tmp_path / "ours.txt").stat().st_mode == (tmp_path / "usual.txt").stat().st_mode


def test_atomic_write_refuses_other_modes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='atomic_write: `mode` expected "w" or "wb", got \'a\''):
        atomic_write(tmp_path / "x", "a").__enter__()  # type: ignore[call-overload]


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))


def test_load_into_lists_what_differs_and_changes_nothing() -> None:
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 4),
        "0.bias": torch.ones(2),
        "1.weight": torch.ones(2, 2),
        "extra": torch.ones(1),
    }
    with pytest.raises(ValueError) as caught:
        load_into(net, state, "attack_result.pt")
    assert str(caught.value) == (
        "attack_result.pt: `state` expected the 4 tensors of Sequential, got 1 missing (1.bias), 1 unexpected (extra), "
        "1 of another shape (0.weight: float32[2, 4] for float32[2, 3]); "
        "build the architecture, number of classes and channels that the weights were trained with"
    )
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_load_into_lists_the_first_few() -> None:
    with pytest.raises(ValueError, match=r"got 6 unexpected \(k0, k1, k2, k3, \.\.\.\)"):
        load_into(nn.Identity(), {f"k{i}": torch.ones(1) for i in range(6)})


def test_load_into_says_when_only_names_differ_and_does_not_rename() -> None:
    net = model()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {f"fc{key}": torch.zeros_like(value) for key, value in before.items()}
    with pytest.raises(ValueError, match="only names differ, the shapes agree position by position"):
        load_into(net, state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    load_into(net, dict(zip(net.state_dict(), state.values(), strict=True)))  # what the message says to do
    assert not any(value.any() for value in net.state_dict().values())
    permuted = dict(reversed(state.items()))
    with pytest.raises(ValueError) as caught:
        load_into(net, permuted)
    assert "position by position" not in str(caught.value)


def test_load_into_refuses_integers_for_floats_and_converts_floats() -> None:
    net = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"weight: int8\[1, 2\] for float32\[1, 2\]"):
        load_into(net, {"weight": torch.ones(1, 2, dtype=torch.int8), "bias": torch.ones(1)})
    load_into(net, {"weight": torch.ones(1, 2, dtype=torch.float64), "bias": torch.ones(1)})
    assert net.weight.dtype == torch.float32
    assert net.weight.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_file_that_the_system_refuses_is_named_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """torch.save raises an error of its own about positions when a write fails; what the system said is what counts."""
    resource = pytest.importorskip("resource")
    state = {"a": torch.zeros(100_000)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_state(tmp_path / name, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_block_are_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "x"):
        open(tmp_path / "elsewhere").close()
    assert caught.value.filename == str(tmp_path / "elsewhere")


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    """The library writes metadata in an order that changes from run to run."""
    state = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {f"key {i}": i for i in range(9)} | {"umlaut": "\u00e4"}
    for name in ("x", "y"):
        save_state(tmp_path / f"{name}.safetensors", state, metadata)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert content == (tmp_path / "y.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = list(json.loads(content[8 : 8 + size])["__metadata__"])
    assert (size % 8, header) == (0, sorted(header))
    loaded = load_state(tmp_path / "x.safetensors")
    assert list(loaded.state) == ["b", "a"]
    assert loaded.metadata == metadata
