"""What convert writes, what of it is refused when it was changed, and checkpoints of other kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bdfast.integrations.backdoorbench import (
    ArtefactError,
    convert,
    read_record,
)
from bdfast.integrations.backdoorbench.converted import sha256
from tests.integrations.conftest import Attack, assert_same, joined

# --- converted records -----------------------------------------------------------------------------------------------


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


# --- converting other files ------------------------------------------------------------------------------------------


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
    assert_same(joined(tmp_path / "out", attack), attack)


def test_unsafe_pickle_runs_what_the_user_vouches_for(tmp_path: Path) -> None:
    from tests.untrusted.hostile import Gadget

    torch.save({"model": {"a": torch.ones(1)}, "x": Gadget(Path.touch, tmp_path / "canary")}, tmp_path / "x.pt")
    with pytest.raises(ArtefactError, match="may run code"):
        convert(tmp_path / "x.pt", tmp_path / "out")
    assert not (tmp_path / "canary").exists()
    convert(tmp_path / "x.pt", tmp_path / "out", unsafe_pickle=sha256(tmp_path / "x.pt"))
    assert (tmp_path / "canary").exists()
