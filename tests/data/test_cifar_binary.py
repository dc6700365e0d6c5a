"""CIFAR's own files: record layout, missing and truncated files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import bdfast.data
from bdfast.errors import LabelRangeError
from tests.data.conftest import random_pixels


def write_batch(path: Path, labels: list[list[int]], seed: int) -> torch.Tensor:
    """Records of label bytes, then pixels; returns the pixels [N, 3, 32, 32]."""
    pixels = random_pixels(len(labels), 3, 32, 32, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.concatenate([np.array(labels, np.uint8), pixels.reshape(len(labels), -1)], axis=1).tofile(path)
    return torch.from_numpy(pixels)


@pytest.fixture
def cifar10(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-bin"
    write_batch(folder / "data_batch_1.bin", [[3], [9]], seed=1)
    write_batch(folder / "data_batch_2.bin", [[0]], seed=2)
    write_batch(folder / "test_batch.bin", [[7], [1]], seed=3)
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)) + "\n\n")
    return folder


def test_cifar10(cifar10: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDFAST_DATA", str(cifar10.parent))  # the folder that holds the unpacked archive
    train, test, names = bdfast.data.load("cifar10")
    expected = torch.cat([torch.from_numpy(random_pixels(2, 3, 32, 32, seed=1)), *_pixels(1, seed=2)])
    assert torch.equal(train[0], expected)
    assert train[1].tolist() == [3, 9, 0]
    assert test[1].tolist() == [7, 1]
    assert names == tuple(f"class{i}" for i in range(10))
    assert bdfast.data.load(cifar10, limit=(2, 1)).train[1].tolist() == [3, 9]
    assert bdfast.data.load(cifar10, image_size=16).test[0].shape == (2, 3, 16, 16)


def _pixels(count: int, seed: int) -> list[torch.Tensor]:
    return [torch.from_numpy(random_pixels(count, 3, 32, 32, seed=seed))]


def test_ten_batches_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 11):
        write_batch(tmp_path / f"data_batch_{number}.bin", [[number - 1]], seed=number)
    write_batch(tmp_path / "test_batch.bin", [[0]], seed=0)
    splits = bdfast.data.load(tmp_path)
    assert splits.train[1].tolist() == list(range(10))
    assert splits.class_names == tuple("0123456789")


def test_cifar100_gives_the_fine_labels(tmp_path: Path) -> None:
    pixels = write_batch(tmp_path / "train.bin", [[19, 99], [0, 5]], seed=1)
    write_batch(tmp_path / "test.bin", [[1, 2]], seed=2)
    train, test, names = bdfast.data.load(tmp_path)
    assert torch.equal(train[0], pixels)
    assert train[1].tolist() == [99, 5]
    assert test[1].tolist() == [2]
    assert len(names) == 100


@pytest.mark.parametrize("missing", ["test_batch.bin", "data_batch_1.bin"])
def test_missing_file(cifar10: Path, missing: str) -> None:
    (cifar10 / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{missing}` expected all files of the binary version"):
        bdfast.data.load(cifar10)


@pytest.mark.parametrize("size", [0, 3073 * 2 - 1])
def test_truncated_file(cifar10: Path, size: int) -> None:
    path = cifar10 / "data_batch_1.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        ValueError, match=rf"data_batch_1.bin` expected a whole .* 3073 bytes, got {size} bytes; the file"
    ):
        bdfast.data.load(cifar10)


def test_label_byte_that_is_no_class(cifar10: Path) -> None:
    write_batch(cifar10 / "test_batch.bin", [[1], [10]], seed=1)
    with pytest.raises(
        LabelRangeError, match=r"test_batch.bin: labels` expected classes in \[0, 10\), got 10 at index 1"
    ):
        bdfast.data.load(cifar10)


def test_wrong_number_of_class_names(cifar10: Path) -> None:
    (cifar10 / "batches.meta.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"batches.meta.txt` expected 10 class names, got 1"):
        bdfast.data.load(cifar10)
