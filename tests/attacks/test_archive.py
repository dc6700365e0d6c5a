from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bdfast.attacks import BadNets, Blended, PoisonedData, names, poison

from .conftest import QUICK, make_set


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_round_trip(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    images, labels = make_set(20)
    if dtype != torch.uint8:
        images = images.to(dtype) / 255
    data = poison(images, labels, name, rate=0.1, target=3, seed=4, num_classes=10, **QUICK.get(name, {}))
    data.save(tmp_path / "set.npz")
    back = PoisonedData.load(tmp_path / "set.npz")
    for field in ("images", "labels", "original_labels", "is_poisoned", "is_cover"):
        assert torch.equal(getattr(back, field), getattr(data, field))
        assert getattr(back, field).dtype == getattr(data, field).dtype
    assert (back.attack, back.relabel, back.seed, back.quantize) == (data.attack, data.relabel, 4, True)
    a, b = back.trigger(images, labels), data.trigger(images, labels)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["set.npz"]


@pytest.mark.parametrize(
    "attack",
    [Blended(pattern=torch.rand(3, 5, 5)), BadNets(pattern=torch.ones(2, 3), mask=torch.full((2, 3), 0.5))],
    ids=["blended", "badnets"],
)
def test_tensor_options_round_trip(attack: Any, tmp_path: Path) -> None:
    images, labels = make_set(20)
    data = poison(images.float() / 255, labels, attack, quantize=False, mode="all-to-all")
    data.save(str(tmp_path / "set"))
    back = PoisonedData.load(str(tmp_path / "set"))
    assert back.attack == attack
    assert back.quantize is False
    assert back.relabel == data.relabel


def test_an_empty_set_round_trips(tmp_path: Path) -> None:
    images, labels = make_set(20)
    poison(images[:0], labels[:0], "badnets").save(tmp_path / "x.npz")
    assert PoisonedData.load(tmp_path / "x.npz").images.shape == (0, 3, 32, 32)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = make_set(20)
    data = poison(images, labels, "badnets")
    data.save(tmp_path / "x.npz")
    before = (tmp_path / "x.npz").read_bytes()

    def broken(stream: io.BufferedWriter, **arrays: object) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(OSError, match="disk full"):
        data.save(tmp_path / "x.npz")
    assert (tmp_path / "x.npz").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_images_without_a_numpy_dtype(tmp_path: Path) -> None:
    images, labels = make_set(20)
    data = poison(images.bfloat16() / 255, labels, "badnets")
    with pytest.raises(TypeError, match=r"PoisonedData.save: `images` expected images of a dtype that NumPy has"):
        data.save(tmp_path / "x.npz")


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def members(tmp_path: Path) -> dict[str, bytes]:
    images, labels = make_set(20)
    poison(images, labels, "wanet", num_classes=10).save(tmp_path / "good.npz")
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def header(parts: dict[str, bytes], **changes: Any) -> None:
    values = json.loads(bytes(np.load(io.BytesIO(parts["header.npy"]))).decode())
    values.update(changes)
    parts["header.npy"] = npy(np.frombuffer(json.dumps(values).encode(), dtype=np.uint8))


def lying_shape(parts: dict[str, bytes]) -> None:
    """Claims 2**40 images."""
    parts["images.npy"] = parts["images.npy"].replace(b"(20, 3, 32, 32)", b"(1099511627776,)")


def overlap(parts: dict[str, bytes]) -> None:
    is_cover = np.load(io.BytesIO(parts["is_poisoned.npy"]))
    parts["is_cover.npy"] = npy(is_cover)


def described(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


CORRUPTIONS: dict[str, Callable[[dict[str, bytes]], object]] = {
    "pickled object": lambda p: p.update({"labels.npy": npy(np.array([{}], dtype=object))}),
    "missing array": lambda p: p.pop("labels.npy"),
    "missing header": lambda p: p.pop("header.npy"),
    "unknown member": lambda p: p.update({"../evil.npy": npy(np.zeros(1))}),
    "lying shape": lying_shape,
    "short body": lambda p: p.update({"images.npy": p["images.npy"][:-5]}),
    "long body": lambda p: p.update({"images.npy": p["images.npy"] + b"more"}),
    "not npy": lambda p: p.update({"images.npy": b"hello"}),
    "empty member": lambda p: p.update({"images.npy": b""}),
    "array header of brackets": lambda p: p.update({"images.npy": described("(((")}),
    "dtype of commas": lambda p: p.update(
        {"images.npy": described("{'descr': ',,', 'fortran_order': 0, 'shape': ()}")}
    ),
    "fortran order": lambda p: p.update({"images.npy": npy(np.zeros((20, 3, 32, 32), np.uint8, order="F"))}),
    "structured dtype": lambda p: p.update({"labels.npy": npy(np.zeros(20, dtype=[("a", "i8")]))}),
    "labels too long": lambda p: p.update({"labels.npy": npy(np.zeros(21, np.int64))}),
    "labels out of range": lambda p: p.update({"labels.npy": npy(np.full(20, 10))}),
    "float labels": lambda p: p.update({"labels.npy": npy(np.zeros(20))}),
    "mask of another type": lambda p: p.update({"is_cover.npy": npy(np.zeros(20, np.uint8))}),
    "poison that is cover": overlap,
    "float images out of range": lambda p: p.update({"images.npy": npy(np.full((20, 3, 4, 4), 9.0))}),
    "header of nonsense": lambda p: p.update({"header.npy": npy(np.zeros(5, np.uint8))}),
    "header of brackets": lambda p: p.update({"header.npy": npy(np.frombuffer(b"[" * 200_000, np.uint8))}),
    "header list": lambda p: p.update({"header.npy": npy(np.frombuffer(b"[]", np.uint8))}),
    "other format": lambda p: header(p, format="bdfast.poisoned/9"),
    "unknown attack": lambda p: header(p, attack="nope"),
    "attack of another type": lambda p: header(p, attack=[]),
    "unknown option": lambda p: header(p, options={"evil": 1}),
    "option out of range": lambda p: header(p, options={"s": -1}),
    "grid of gigabytes": lambda p: header(p, options={"k": 100_000}),
    "patch of gigabytes": lambda p: header(p, attack="badnets", options={"size": 10**9}),
    "endless tiles": lambda p: header(p, attack="adaptive_blend", options={"tiles": 10**10}),
    "file as a pattern": lambda p: header(p, attack="blended", options={"pattern": "/etc/hostname"}),
    "unknown mode": lambda p: header(p, relabel={"mode": "x"}),
    "tensor option unknown": lambda p: p.update({"option.evil.npy": npy(np.zeros(3))}),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_files_that_are_not_ours_are_refused(name: str, tmp_path: Path) -> None:
    parts = members(tmp_path)
    CORRUPTIONS[name](parts)
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for member, body in parts.items():
            archive.writestr(member, body)
    with pytest.raises(ValueError, match=r"PoisonedData.load: `path` expected a file that PoisonedData.save wrote"):
        PoisonedData.load(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    parts = members(tmp_path)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for member, body in parts.items():
            archive.writestr(member, body)
    with pytest.raises(ValueError, match=r"PoisonedData.load.*(compressed|exceed)"):
        PoisonedData.load(tmp_path / "bomb.npz")


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"PoisonedData.load: `path` expected a file.*nothing"):
        PoisonedData.load(tmp_path / "nothing.npz")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match=r"PoisonedData.load"):
        PoisonedData.load(tmp_path / "text")
