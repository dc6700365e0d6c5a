"""The packed JPEG container: pixels as Pillow decodes them, and every kind of damage by name."""

from __future__ import annotations

import io
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

import bdfast.data
from bdfast.data.archive import Archive
from bdfast.errors import LabelRangeError
from tests.data.conftest import Arrays, jpeg, packed, random_pixels


def write(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


def pillow_pixels(arrays: Arrays, part: str, index: int) -> NDArray[np.uint8]:
    start, end = arrays[f"{part}_offsets"][index : index + 2]
    return np.asarray(Image.open(io.BytesIO(arrays[f"{part}_jpeg"][start:end].tobytes())))


def test_images_are_what_pillow_decodes(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    train, test, names = bdfast.data.load(write(tmp_path / "set.npz", jpeg_arrays))
    assert train[0].shape == (5, 3, 8, 8)
    assert train[0].dtype == torch.uint8
    assert train[1].tolist() == [0, 1, 2, 0, 1]
    assert test[1].tolist() == [2, 1, 0]
    assert names == ("ant", "bee", "cow")
    for index in range(5):
        assert np.array_equal(train[0][index].permute(1, 2, 0), pillow_pixels(jpeg_arrays, "train", index))


def test_limit_decodes_the_first_images_only(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    jpeg_arrays["train_jpeg"] = jpeg_arrays["train_jpeg"].copy()
    jpeg_arrays["train_jpeg"][jpeg_arrays["train_offsets"][3] :] = 0  # images 3 and 4 are damaged
    path = write(tmp_path / "set.npz", jpeg_arrays)
    train, test, _ = bdfast.data.load(path, limit=(3, 1))
    assert train[1].tolist() == [0, 1, 2]
    assert test[1].tolist() == [2]
    with pytest.raises(ValueError, match=r"set.npz: train image 3` expected a whole image"):
        bdfast.data.load(path)


def test_image_size_brings_mixed_sizes_together(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    files = [jpeg(random_pixels(1, 8, 8, 3)[0]), jpeg(random_pixels(1, 9, 7, 3)[0])]
    path = write(tmp_path / "set.npz", {**jpeg_arrays, **packed(files, [0, 1], "train")})
    with pytest.raises(
        ValueError, match=r"train image 1` expected the size of the first image, \(8, 8\), got \(9, 7\)"
    ):
        bdfast.data.load(path)
    splits = bdfast.data.load(path, image_size=5)
    assert splits.train[0].shape == (2, 3, 5, 5)
    assert splits.test[0].shape == (3, 3, 5, 5)


def test_gray_images_give_one_channel_and_mixtures_three(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    gray = [jpeg(image) for image in random_pixels(2, 8, 8)]
    both = {**jpeg_arrays, **packed(gray, [0, 1], "train"), **packed(gray[:1], [2], "test")}
    assert bdfast.data.load(write(tmp_path / "gray.npz", both)).train[0].shape == (2, 1, 8, 8)

    mixed = {**both, **packed([gray[0], jpeg(random_pixels(1, 8, 8, 3)[0])], [0, 1], "train")}
    mixed |= {key: value for key, value in jpeg_arrays.items() if key.startswith("test")}
    images = bdfast.data.load(write(tmp_path / "mixed.npz", mixed)).train[0]
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images[0, 0], images[0, 2])
    assert not torch.equal(images[1, 0], images[1, 2])


@pytest.mark.parametrize("key", ["train_offsets", "test_jpeg", "train_labels", "class_names"])
def test_missing_key(tmp_path: Path, jpeg_arrays: Arrays, key: str) -> None:
    del jpeg_arrays[key]
    with pytest.raises(ValueError, match=rf"set.npz: {key}` expected an array of that name, got keys \["):
        bdfast.data.load(write(tmp_path / "set.npz", jpeg_arrays))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("train_jpeg", np.zeros(9, np.int16), r"train_jpeg` expected uint8 \[bytes\], got int16 \[9\]"),
        ("test_offsets", np.zeros((2, 2), np.int64), r"test_offsets` expected integers \[N \+ 1\], N >= 1"),
        ("test_offsets", np.zeros(1, np.int64), r"test_offsets` expected integers \[N \+ 1\], N >= 1"),
        ("train_labels", np.zeros(5, np.float32), r"train_labels` expected integers \[5\], one an image, got float32"),
        ("train_labels", np.zeros(4, np.uint8), r"train_labels` expected integers \[5\]"),
        ("class_names", np.arange(3), r"class_names` expected unicode strings \[C\], .*, got int64 \[3\]"),
    ],
)
def test_wrong_arrays(tmp_path: Path, jpeg_arrays: Arrays, key: str, value: NDArray[np.generic], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bdfast.data.load(write(tmp_path / "set.npz", {**jpeg_arrays, key: value}))


def test_label_out_of_range(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    jpeg_arrays["train_labels"] = np.array([0, 1, 3, 0, 1])
    with pytest.raises(LabelRangeError, match=r"train_labels` expected classes in \[0, 3\), got 3 at index 2"):
        bdfast.data.load(write(tmp_path / "set.npz", jpeg_arrays))


def test_offsets_out_of_order(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    offsets = jpeg_arrays["train_offsets"].copy()
    offsets[[2, 3]] = offsets[[3, 2]]
    with pytest.raises(ValueError, match=rf"got {offsets[3]} after {offsets[2]} at image 2; the file is damaged"):
        bdfast.data.load(write(tmp_path / "set.npz", {**jpeg_arrays, "train_offsets": offsets}))


@pytest.mark.parametrize("end", [-1, 1])
def test_offsets_that_do_not_end_with_the_bytes(tmp_path: Path, jpeg_arrays: Arrays, end: int) -> None:
    offsets = jpeg_arrays["train_offsets"].copy()
    offsets[-1] += end
    with pytest.raises(ValueError, match=f"increasing offsets from 0 to {len(jpeg_arrays['train_jpeg'])}, got 0 to"):
        bdfast.data.load(write(tmp_path / "set.npz", {**jpeg_arrays, "train_offsets": offsets}))


def test_truncated_file(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    path = write(tmp_path / "set.npz", jpeg_arrays)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"set.npz` expected a whole .npz file, got .*; download or write the file again"
    ):
        bdfast.data.load(path)


def test_flipped_bytes_fail_the_checksum(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    path = write(tmp_path / "set.npz", jpeg_arrays)
    content = bytearray(path.read_bytes())
    at = content.find(jpeg_arrays["train_jpeg"].tobytes()) + 700
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train_jpeg` expected a whole array of numbers or text, got .*CRC"):
        bdfast.data.load(path)


def test_pickled_arrays_are_never_opened(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "ran",))

    jpeg_arrays["class_names"] = np.array([Bomb()], dtype=object)
    with pytest.raises(ValueError, match=r"class_names` expected .*, got pickled Python objects, which could run code"):
        bdfast.data.load(write(tmp_path / "set.npz", jpeg_arrays))
    assert not (tmp_path / "ran").exists()


def test_header_that_claims_more_than_the_file_holds(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    path = write(tmp_path / "set.npz", jpeg_arrays)
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    members["train_jpeg.npy"] = header.getvalue()
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    with pytest.raises(ValueError, match=f"train_jpeg` .*got a header of {1 << 50} bytes before"):
        bdfast.data.load(path)


@settings(max_examples=150, deadline=None)
@given(
    at=st.lists(st.integers(0, 127), min_size=1, max_size=4),
    byte=st.sampled_from(b"()[]{}',:019-|fOVUM\n \x00\xff"),
    end=st.integers(1, 300),
)
def test_doctored_arrays_are_read_or_refused_with_value_error(at: list[int], byte: int, end: int) -> None:
    original = io.BytesIO()
    np.lib.format.write_array(original, np.arange(20))
    content = bytearray(original.getvalue())
    for position in at:
        content[position] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.npz"
        with zipfile.ZipFile(path, "w") as target:  # the checksum is right: only the parser can object
            target.writestr("labels.npy", bytes(content[:end]))
        with Archive(path) as archive:
            try:
                assert archive.read("labels").nbytes <= len(content)
            except ValueError as error:
                assert "set.npz: labels` expected a whole array of numbers or text, got" in str(error)  # noqa: PT017


def test_decompression_bomb_is_refused_by_its_header(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    claims = struct.pack(">IIBBBBB", 5000, 5000, 8, 2, 0, 0, 0)  # 25 megapixels in a few bytes
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", claims) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path = write(tmp_path / "set.npz", {**jpeg_arrays, **packed([png], [0], "train")})
    with pytest.raises(ValueError, match=r"train image 0` .*5000 x 5000 pixels, more than 16777216"):
        bdfast.data.load(path)


def test_sixteen_bit_images_are_refused(tmp_path: Path, jpeg_arrays: Arrays) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(buffer, "PNG")
    path = write(tmp_path / "set.npz", {**jpeg_arrays, **packed([buffer.getvalue()], [0], "train")})
    with pytest.raises(ValueError, match="expected an image of 8 bits a channel, got mode I"):
        bdfast.data.load(path)
