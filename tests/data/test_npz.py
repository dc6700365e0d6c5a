"""Plain .npz files: key groups, layouts, dtypes, ranges."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import bdfast.data
from bdfast.errors import LabelRangeError
from tests.data.conftest import random_pixels

LABELS = np.array([0, 1, 2, 0])
KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")


def write(path: Path, **arrays: NDArray[np.generic]) -> Path:
    np.savez_compressed(path, **arrays)
    return path


@pytest.mark.parametrize("keys", [KERAS, MEDMNIST])
def test_splits_in_the_file_are_kept(tmp_path: Path, keys: tuple[str, ...]) -> None:
    pixels = random_pixels(4, 5, 6, 3)
    arrays = (pixels, LABELS.reshape(4, 1), pixels[:2], LABELS[:2].astype(np.uint16))
    train, test, names = bdfast.data.load(write(tmp_path / "a.npz", **dict(zip(keys, arrays, strict=True))))
    assert torch.equal(train[0], torch.from_numpy(pixels).permute(0, 3, 1, 2))
    assert train[0].is_contiguous()
    assert train[1].tolist() == [0, 1, 2, 0]
    assert test[1].tolist() == [0, 1]
    assert test[1].dtype == torch.int64
    assert names == ("0", "1", "2")


def test_one_set_is_split_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", images=random_pixels(20, 3, 4, 4), labels=np.arange(20), extra=np.zeros(3))
    train, test, _ = bdfast.data.load(path)
    assert (len(train[1]), len(test[1])) == (16, 4)
    assert sorted([*train[1].tolist(), *test[1].tolist()]) == list(range(20))
    assert torch.equal(bdfast.data.load(path).test[1], test[1])
    assert not torch.equal(bdfast.data.load(path, seed=1).test[1], test[1])


def test_class_names_in_the_file(tmp_path: Path) -> None:
    arrays = {"images": random_pixels(4, 4, 4), "labels": LABELS}
    path = write(tmp_path / "a.npz", **arrays, class_names=np.array(["ant", "bee", "cow", "dog"]))
    assert bdfast.data.load(path).class_names == ("ant", "bee", "cow", "dog")
    path = write(tmp_path / "b.npz", **arrays, class_names=np.array(["ant", "bee"]))
    with pytest.raises(
        LabelRangeError, match=r"b.npz: (train|test) labels` expected classes in \[0, 2\), got 2 at index"
    ):
        bdfast.data.load(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_stay_floats(tmp_path: Path, dtype: type[np.floating]) -> None:
    pixels = (random_pixels(4, 4, 4) / 255).astype(dtype)
    path = write(tmp_path / "a.npz", x_train=pixels, y_train=LABELS, x_test=pixels, y_test=LABELS)
    images = bdfast.data.load(path).train[0]
    assert images.dtype == torch.float32
    assert np.array_equal(images[:, 0].numpy(), pixels.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 5, 6), (1, 5, 6)),
        ((4, 5, 6, 1), (1, 5, 6)),
        ((4, 3, 5, 6), (3, 5, 6)),
        ((4, 2, 2, 3), (3, 2, 2)),  # three channels although the image is smaller
        ((4, 2, 5, 6), (2, 5, 6)),  # no usual channel count: the shorter axis
        ((4, 5, 6, 2), (2, 5, 6)),
        ((4, 1, 6, 3), (1, 6, 3)),  # both usual: the shorter axis
    ],
)
def test_layouts(tmp_path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    path = write(tmp_path / "a.npz", images=random_pixels(*shape), labels=LABELS)
    assert bdfast.data.load(path).train[0].shape[1:] == expected


@pytest.mark.parametrize(
    ("images", "labels", "error", "says"),
    [
        (
            random_pixels(4, 3, 5, 3),
            LABELS,
            ValueError,
            "which axis holds the channels, got .4, 3, 5, 3.; pass a tuple",
        ),
        (random_pixels(4, 3), LABELS, ValueError, r"expected images as \[N, H, W\], .* got \[4, 3\]"),
        (random_pixels(0, 3, 4, 4), LABELS[:0], ValueError, r"got 0|got \[0, 3, 4, 4\]"),
        (
            random_pixels(4, 4, 4).astype(np.int64),
            LABELS,
            ValueError,
            r"images` expected uint8 0..255 or float .* got int64",
        ),
        (
            random_pixels(4, 4, 4).astype(np.float32),
            LABELS,
            ValueError,
            r"finite pixels in \[0, 1\], got .*divide 0..255",
        ),
        (np.full((4, 4, 4), np.nan), LABELS, ValueError, r"finite pixels in \[0, 1\], got nan to nan"),
        (np.full((4, 4, 4), -0.1), LABELS, ValueError, r"finite pixels in \[0, 1\], got -0.1 to -0.1"),
        (
            random_pixels(4, 4, 4),
            LABELS[:3],
            ValueError,
            r"labels` expected integers \[4\], one an image, got int64 \[3\]",
        ),
        (random_pixels(4, 4, 4), LABELS / 2, ValueError, r"labels` expected integers \[4\], one an image, got float64"),
        (random_pixels(4, 4, 4), LABELS - 1, LabelRangeError, r"expected classes in \[0, 2\), got -1 at index"),
    ],
)
def test_wrong_arrays(
    tmp_path: Path, images: NDArray[np.generic], labels: NDArray[np.generic], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        bdfast.data.load(write(tmp_path / "a.npz", images=images, labels=labels))


def test_wrong_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", pixels=random_pixels(4, 4, 4), x_train=LABELS)
    with pytest.raises(
        ValueError, match=r"a.npz` expected the keys \['x_train', .*got \['pixels', 'x_train'\]; rename"
    ):
        bdfast.data.load(path)


def test_a_file_that_is_no_zip(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"a.npz` expected a whole .npz file, got File is not a zip file"):
        bdfast.data.load(tmp_path / "a.npz")


def zip_of(path: Path, method: int, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array: NDArray[np.generic]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def header(descr: str, *shape: int) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdfast.data.archive.FREE_BYTES", 1 << 20)
    members = {"images": npy(np.zeros((4, 1024, 1024), np.uint8)), "labels": npy(LABELS)}
    for method, got in (
        (zipfile.ZIP_DEFLATED, "a decompression bomb"),
        (zipfile.ZIP_BZIP2, "a compression that numpy"),
    ):
        with pytest.raises(ValueError, match=rf"a\.npz: images` expected a whole array .*got .*{got}"):
            bdfast.data.load(zip_of(tmp_path / "a.npz", method, **members))
    assert len(bdfast.data.load(zip_of(tmp_path / "a.npz", zipfile.ZIP_STORED, **members)).train[0]) == 3


def test_names_of_no_letters_are_not_counted_in_millions(tmp_path: Path) -> None:
    members = {"images": npy(random_pixels(4, 5, 6)), "labels": npy(LABELS), "class_names": header("<U0", 10**10)}
    with pytest.raises(ValueError, match="class_names` expected a whole array"):
        bdfast.data.load(zip_of(tmp_path / "a.npz", zipfile.ZIP_STORED, **members))


def test_class_names_are_shown_without_what_a_terminal_obeys(tmp_path: Path) -> None:
    names = np.array(["a", "\x1b[2J", "c\n"])
    path = write(tmp_path / "a.npz", images=random_pixels(4, 5, 6), labels=LABELS, class_names=names)
    assert bdfast.data.load(path).class_names == ("a", "?[2J", "c?")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"a\.npz` expected an \.npz file, got no regular file"):
        bdfast.data.load(tmp_path / "a.npz")


def test_resized_floats_stay_in_range(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", images=np.ones((4, 3, 9, 9), np.float32), labels=LABELS)
    images = bdfast.data.load(path, image_size=(7, 13)).train[0]
    assert images.shape[1:] == (3, 7, 13)
    assert float(images.max()) <= 1.0
    assert torch.allclose(images, torch.ones(()))
