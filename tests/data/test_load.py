"""Choosing the reader, the embedded digits, and what every source has in common."""

from __future__ import annotations

import builtins
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import bdfast.data
from bdfast.errors import MissingExtraError
from tests.data.conftest import Arrays, random_pixels, save

real_cifar = pytest.mark.skipif(
    not Path(os.environ.get("BDFAST_DATA", "/nonexistent")).exists(),
    reason="BDFAST_DATA does not name a file or folder with CIFAR-10",
)


def test_digits_are_all_of_scikit_learns_images_once() -> None:
    from sklearn.datasets import load_digits

    train, test, names = bdfast.data.load("digits")
    assert train[0].shape == (1400, 1, 8, 8)
    assert test[0].shape == (397, 1, 8, 8)
    assert train[0].dtype == torch.uint8
    assert train[1].dtype == test[1].dtype == torch.int64
    assert names == tuple("0123456789")

    source = load_digits()
    # 0..16 scaled to 0..255, to the nearest
    pixels = np.floor(source.images * 255 / 16 + 0.5)
    expected = sorted((label, *image.ravel().tolist()) for image, label in zip(pixels, source.target, strict=True))
    both = [
        (int(label), *map(float, image.flatten().tolist()))
        for images, labels in (train, test)
        for image, label in zip(images, labels, strict=True)
    ]
    assert sorted(both) == expected


def test_the_seed_decides_the_split_of_the_digits() -> None:
    first, again, other = (bdfast.data.load("digits", seed=seed).train[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_limit_keeps_the_first_images() -> None:
    whole, part = bdfast.data.load("digits"), bdfast.data.load("digits", limit=(100, None))
    assert torch.equal(part.train[0], whole.train[0][:100])
    assert torch.equal(part.train[1], whole.train[1][:100])
    assert torch.equal(part.test[0], whole.test[0])
    assert bdfast.data.load("digits", limit=(10**9, 7)).train[0].shape[0] == 1400
    assert part.train[0].untyped_storage().nbytes() == 100 * 64, "a view would keep the whole set alive"


def test_limit_that_leaves_a_class_out_warns() -> None:
    with pytest.warns(UserWarning, match="leaves no training image of class"):
        bdfast.data.load("digits", limit=(10, 10), seed=0)


def test_image_size_resizes() -> None:
    (images, _), (test_images, _), _ = bdfast.data.load("digits", limit=(50, 20), image_size=16)
    assert images.shape[1:] == test_images.shape[1:] == (1, 16, 16)
    assert bdfast.data.load("digits", limit=(50, 20), image_size=(4, 6)).train[0].shape == (50, 1, 4, 6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"limit": (0, 5)}, r"load: `limit` expected two counts of at least 1, or None, got \(0, 5\)"),
        ({"limit": 5}, r"`limit` expected \(n_train, n_test\), got 5"),
        ({"limit": (1, 2, 3)}, r"`limit` expected \(n_train, n_test\)"),
        ({"image_size": 0}, r"`image_size` expected sides in 1..4096 pixels, got \(0, 0\)"),
        ({"image_size": (1, 2, 3)}, "`image_size` expected one side or"),
        ({"test_fraction": 1.0}, r"`test_fraction` expected a number in \(0, 1\), got 1.0"),
    ],
)
def test_wrong_options(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        bdfast.data.load("digits", **arguments)  # type: ignore[arg-type]


def test_seed_that_is_no_int() -> None:
    with pytest.raises(TypeError, match=r"`seed` expected an int, got 0.5"):
        bdfast.data.load("digits", seed=0.5)  # type: ignore[arg-type]


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_sklearn(module: str) -> object:
        if module.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return real_import(module)

    monkeypatch.setattr("bdfast.errors.importlib.import_module", no_sklearn)
    with pytest.raises(MissingExtraError, match=r"pip install 'bdfast\[data\]'"):
        bdfast.data.load("digits")


def test_unknown_name_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`cifar11` expected 'digits', 'cifar10' or a path, got no such file"):
        bdfast.data.load("cifar11")
    with pytest.raises(FileNotFoundError, match=r"nothing.npz"):
        bdfast.data.load(tmp_path / "nothing.npz")


def test_other_files_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "set.mat").write_bytes(b"MATLAB")
    with pytest.raises(ValueError, match=r"set.mat` expected an .npz file or a folder, got a .mat file"):
        bdfast.data.load(tmp_path / "set.mat")
    with pytest.raises(ValueError, match=r"got 0 .npz files and none of the others"):
        bdfast.data.load(tmp_path)


def test_cifar10_needs_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDFAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="`BDFAST_DATA` expected the file or folder that holds CIFAR-10"):
        bdfast.data.load("cifar10")


def test_cifar10_of_other_classes_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jpeg_arrays: Arrays
) -> None:
    np.savez(tmp_path / "animals.npz", **jpeg_arrays)
    monkeypatch.setenv("BDFAST_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="expected CIFAR-10 with its 10 classes, got 3 classes"):
        bdfast.data.load("cifar10")


def test_cifar10_comes_first_in_a_shared_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images, labels = random_pixels(20, 3, 4, 4), np.arange(20) % 10
    np.savez(tmp_path / "cifar10_small.npz", images=images, labels=labels)
    np.savez(tmp_path / "other.npz", images=images, labels=labels % 2)
    save(tmp_path / "figures" / "plot.png", images[0].transpose(1, 2, 0))
    monkeypatch.setenv("BDFAST_DATA", str(tmp_path))
    assert bdfast.data.load("cifar10").train[0].shape == (16, 3, 4, 4)


def test_map_style_data_sets_are_split_by_seed() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 2, 2)
    dataset = TensorDataset(images, torch.arange(10))
    train, test, names = bdfast.data.load(dataset, test_fraction=0.3, seed=1)
    assert len(train[1]) == 7
    assert sorted([*train[1].tolist(), *test[1].tolist()]) == list(range(10))
    assert torch.equal(train[0][:, 0, 0, 0].long(), train[1]), "images stay with their labels"
    assert names == tuple("0123456789")


def test_a_pair_of_data_sets_keeps_its_split_and_its_class_names() -> None:
    class Named(TensorDataset):
        classes = ("ant", "bee")

    train = Named(torch.zeros(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    test = Named(torch.ones(2, 1, 2, 2), torch.tensor([1, 1]))
    splits = bdfast.data.load((train, test), limit=(2, 1))
    assert splits.train[1].tolist() == [0, 1]
    assert splits.test[1].tolist() == [1]
    assert splits.class_names == ("ant", "bee")


def test_data_sets_with_negative_or_wild_labels_are_refused() -> None:
    images = torch.zeros(2, 1, 2, 2)
    with pytest.raises(bdfast.errors.LabelRangeError, match="got -1 at index"):
        bdfast.data.load(((images, torch.tensor([0, -1])), (images, torch.tensor([0, 1]))))
    with pytest.raises(ValueError, match="expected labels below 100000, got 1099511627776"):
        bdfast.data.load((images, torch.tensor([0, 1 << 40])))


def test_train_and_test_of_different_form_are_refused() -> None:
    train, test = (torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])), (torch.zeros(2, 3, 5, 5), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"test images like the training images, torch.float32 \[3, 4, 4\], got"):
        bdfast.data.load((train, test))
    assert bdfast.data.load((train, test), image_size=4).test[0].shape == (2, 3, 4, 4)


def test_one_sample_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least 2 images to split, got 1"):
        bdfast.data.load((torch.zeros(1, 1, 2, 2), torch.tensor([0])))


@real_cifar
def test_the_real_cifar10() -> None:
    train, test, names = bdfast.data.load("cifar10", limit=(1000, 500))
    assert train[0].shape == (1000, 3, 32, 32)
    assert test[0].shape == (500, 3, 32, 32)
    assert train[0].dtype == torch.uint8
    assert names[:3] == ("airplane", "automobile", "bird")
    counts = train[1].bincount(minlength=10)
    assert counts.min() > 50
    assert abs(train[0].float().mean() / 255 - 0.4733) < 0.01, "the mean of CIFAR-10's channel means"
