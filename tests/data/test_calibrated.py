"""Calibrated sets on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bdfast.data import calibrated_folder, load_calibrated, save_calibrated


def some() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 4, 5, generator=g), torch.arange(6) % 2, torch.tensor([5, 3, 1, 0, 2, 1])


def test_every_bit_comes_back(tmp_path: Path) -> None:
    images, labels, ids = some()
    place = calibrated_folder(tmp_path, "blur_vp", "badnets")
    save_calibrated(place, images, labels, ids, {"delta": 8 / 255})
    found = load_calibrated(place)
    assert torch.equal(found.images, images)
    assert found.images.is_contiguous()
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.ids, ids)
    assert found.about == {"delta": 8 / 255}
    assert sorted(file.name for file in place.iterdir()) == ["ids.npy", "images.npy", "labels.npy", "manifest.json"]


def test_arrays_are_what_others_read(tmp_path: Path) -> None:
    images, labels, _ = some()
    save_calibrated(tmp_path, images, labels)
    array = np.load(tmp_path / "images.npy")
    assert (array.shape, array.dtype) == ((6, 4, 5, 3), np.float32)
    assert np.array_equal(array.transpose(0, 3, 1, 2), images.numpy())
    assert np.load(tmp_path / "labels.npy").tolist() == labels.tolist()


def test_sets_of_others_have_no_ids_and_no_manifest(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.full((2, 4, 4, 1), 0.5))
    np.save(tmp_path / "labels.npy", np.array([3, 1], dtype=np.int32))
    found = load_calibrated(tmp_path)
    assert found.images.dtype == torch.float32
    assert (found.labels.tolist(), found.ids.tolist(), found.about) == ([3, 1], [0, 1], {})


def test_saving_again_replaces(tmp_path: Path) -> None:
    images, labels, _ = some()
    save_calibrated(tmp_path, images, labels)
    save_calibrated(tmp_path, images[:2] / 2, labels[:2])
    assert torch.equal(load_calibrated(tmp_path).images, images[:2] / 2)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.mkdir, (self.path,)


def change(file: str, content: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: content(folder / file)


MANIFEST = {"format": "bdfast.calibrated/1", "arrays": {"images": [], "labels": {}, "ids": {"sha256": ""}}}


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (change("images.npy", lambda f: np.save(f, np.zeros((6, 4, 5, 3), np.float32))), "the array of its manifest"),
        (change("images.npy", lambda f: np.save(f, np.zeros((6, 4, 5, 3), np.uint8))), "4 axes of floats"),
        (change("images.npy", lambda f: f.write_bytes(f.read_bytes()[:-4])), "an array of numpy.save"),
        (change("labels.npy", lambda f: np.save(f, np.zeros((6, 1), np.int64))), "1 axes of integers"),
        (change("labels.npy", lambda f: np.save(f, np.array([Malicious(f.with_name("owned"))]))), "cannot be read"),
        (change("manifest.json", lambda f: f.write_text("{}")), "a manifest of bdfast.calibrated/1"),
        (change("manifest.json", lambda f: f.write_text("[" * 10000)), "a manifest of bdfast.calibrated/1"),
        (change("manifest.json", lambda f: f.write_text(json.dumps(MANIFEST))), "a manifest of bdfast.calibrated/1"),
    ],
)
def test_damaged_sets(tmp_path: Path, break_it: Callable[[Path], None], text: str) -> None:
    save_calibrated(tmp_path, *some())
    break_it(tmp_path)
    with pytest.raises(ValueError, match=text):
        load_calibrated(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_counts_and_range_without_a_manifest(tmp_path: Path) -> None:
    save_calibrated(tmp_path, *some())
    (tmp_path / "manifest.json").unlink()
    np.save(tmp_path / "ids.npy", np.arange(3))
    with pytest.raises(ValueError, match="one label and one id an image, got 6 images, 6 labels, 3 ids"):
        load_calibrated(tmp_path)
    (tmp_path / "ids.npy").unlink()
    np.save(tmp_path / "images.npy", np.full((6, 4, 5, 3), 200.0))
    with pytest.raises(ValueError, match=r"expected finite pixels in \[0, 1\], got 200 to 200"):
        load_calibrated(tmp_path)
    (tmp_path / "images.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a calibrated set, got no images.npy"):
        load_calibrated(tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    images, labels, ids = some()
    with pytest.raises(TypeError, match="save_calibrated: `images` expected floats"):
        save_calibrated(tmp_path, (images * 255).to(torch.uint8), labels)
    with pytest.raises(ValueError, match=r"save_calibrated: `ids` expected integers \[6\], got torch.int64 \[2\]"):
        save_calibrated(tmp_path, images, labels, ids[:2])
    with pytest.raises(ValueError, match="`reserved_type` expected a name with _vp, got 'blur'; call it blur_vp"):
        calibrated_folder(tmp_path, "blur", "badnets")
    for name in ("..", "a/b", "a\\b", "", "c:"):
        with pytest.raises(ValueError, match="expected the name of a folder"):
            calibrated_folder(tmp_path, "blur_vp", name)
    assert list(tmp_path.iterdir()) == []
