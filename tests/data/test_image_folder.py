"""Folders of images: order of classes and files, splits, limits, and broken folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

import bdfast.data
from bdfast.data import decode
from tests.data.conftest import random_pixels, save


def pixels_of(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def test_train_and_test_folders(image_root: Path) -> None:
    train, test, names = bdfast.data.load(image_root)
    assert names == ("cat", "dog")
    assert train[1].tolist() == [0, 0, 1, 1, 1]
    assert test[1].tolist() == [0, 1]
    order = ["cat/0.png", "cat/1.png", "dog/0.png", "dog/2.png", "dog/10.png"]  # numbers by value
    for image, name in zip(train[0], order, strict=True):
        assert torch.equal(image, pixels_of(image_root / "train" / name))


def test_val_serves_as_test(image_root: Path) -> None:
    (image_root / "test").rename(image_root / "val")
    assert bdfast.data.load(image_root).test[1].tolist() == [0, 1]


def test_the_folder_that_an_archive_unpacks_to(image_root: Path, tmp_path: Path) -> None:
    (image_root / "test").rename(image_root / "val")
    save(image_root / "test" / "images" / "0.png", random_pixels(4, 4, 3))  # Tiny ImageNet's, without labels
    (tmp_path / "tiny").mkdir()
    image_root.rename(tmp_path / "tiny" / "tiny-imagenet-200")
    train, test, names = bdfast.data.load(tmp_path / "tiny")
    assert (len(train[1]), test[1].tolist(), names) == (5, [0, 1], ("cat", "dog"))


def test_train_and_test_are_no_classes(image_root: Path) -> None:
    (image_root / "train").rename(image_root / "Train")
    (image_root / "test").rename(image_root / "Test")
    with pytest.raises(ValueError, match=r"expected a folder `train`, or a folder a class, got `Train`"):
        bdfast.data.load(image_root)


def test_train_without_test(image_root: Path) -> None:
    (image_root / "test").rename(image_root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"expected a folder `test` .or `val`. beside `train`, got none"):
        bdfast.data.load(image_root)


def test_numbered_classes_keep_their_numbers(tmp_path: Path) -> None:
    for label in range(12):
        for index in range(2):
            save(tmp_path / str(label) / f"{index}.png", np.full((4, 4, 3), label, np.uint8))
    train, test, names = bdfast.data.load(tmp_path)
    assert names == tuple(str(label) for label in range(12))
    for images, labels in (train, test):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    assert (len(train[1]), len(test[1])) == (19, 5)


def test_limit_deals_out_the_classes_evenly(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name, count in (("a", 6), ("b", 1), ("c", 6)):
            for index in range(count):
                save(tmp_path / part / name / f"{index}.png", np.full((4, 4, 3), index, np.uint8))
    train, test, _ = bdfast.data.load(tmp_path, limit=(5, 3))
    assert train[1].tolist() == [0, 0, 1, 2, 2]
    assert train[0][:, 0, 0, 0].tolist() == [0, 1, 0, 0, 1], "the first of every class"
    assert test[1].tolist() == [0, 1, 2]


def test_only_images_count_and_they_may_lie_deeper(image_root: Path) -> None:
    (image_root / "train" / "cat" / "GT-00000.csv").write_text("a;b")
    (image_root / "train" / ".cache").mkdir()
    save(image_root / "train" / "cat" / "images" / "7.PNG", random_pixels(1, 6, 6, 3)[0])
    assert bdfast.data.load(image_root).train[1].tolist() == [0, 0, 0, 1, 1, 1]


def test_transparency_and_palettes_become_rgb(image_root: Path) -> None:
    path = image_root / "train" / "cat" / "0.png"
    Image.fromarray(random_pixels(1, 6, 6, 4)[0]).save(path)
    Image.fromarray(random_pixels(1, 6, 6, 3)[0]).quantize(8).save(image_root / "train" / "cat" / "1.png")
    assert bdfast.data.load(image_root).train[0].shape == (5, 3, 6, 6)


def test_empty_class_folder(image_root: Path) -> None:
    (image_root / "train" / "eel").mkdir()
    with pytest.raises(ValueError, match=r"train/eel` expected images \(.jpg, .*got an empty class folder; add images"):
        bdfast.data.load(image_root)


def test_no_class_folder(image_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "flat"
    save(root / "train" / "0.png", random_pixels(1, 6, 6, 3)[0])
    (image_root / "test").rename(root / "test")
    with pytest.raises(ValueError, match="flat/train` expected a folder a class, got no folders"):
        bdfast.data.load(root)


def test_classes_of_test_differ(image_root: Path) -> None:
    (image_root / "test" / "dog").rename(image_root / "test" / "eel")
    with pytest.raises(ValueError, match=r"expected the classes of `train`, got \['dog', 'eel'\] in one only"):
        bdfast.data.load(image_root)


def test_mixed_sizes(image_root: Path) -> None:
    save(image_root / "train" / "dog" / "2.png", random_pixels(1, 6, 7, 3)[0])
    with pytest.raises(
        ValueError, match=r"dog/2.png` expected the size of the first image, \(6, 6\), got \(6, 7\); pass"
    ):
        bdfast.data.load(image_root)
    assert bdfast.data.load(image_root, image_size=4).train[0].shape == (5, 3, 4, 4)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n"])
def test_what_is_no_image_is_refused_by_name(image_root: Path, content: bytes) -> None:
    (image_root / "train" / "dog" / "2.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"dog/2.png` expected a whole image .JPEG, PNG.*replace the file"):
        bdfast.data.load(image_root)


def test_truncated_image(image_root: Path) -> None:
    path = image_root / "train" / "dog" / "2.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"dog/2.png` expected a whole image"):
        bdfast.data.load(image_root)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_is_not_waited_for(image_root: Path) -> None:
    os.mkfifo(image_root / "train" / "dog" / "9.png")
    with pytest.raises(ValueError, match=r"dog/9.png` expected a whole image .*got no regular file"):
        bdfast.data.load(image_root)


needs_links = pytest.mark.skipif(os.name != "posix", reason="symbolic links")


@needs_links
@pytest.mark.parametrize("link", ["train", "test", "train/dog", "test/cat", "train/cat/more", "train/cat/deep/more"])
def test_a_link_to_a_folder_is_not_followed(image_root: Path, tmp_path: Path, link: str) -> None:
    place = image_root / link
    target = tmp_path / "elsewhere"
    if place.exists():
        place.rename(target)
    else:
        save(target / "7.png", random_pixels(1, 6, 6, 3)[0])
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(target)
    with pytest.raises(ValueError, match=rf"{link}` expected a folder, got a link to one, which is not followed; put"):
        bdfast.data.load(image_root)


@needs_links
def test_classes_that_are_links_are_not_followed(image_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    root.mkdir()
    (root / "cat").symlink_to(image_root / "train" / "cat")
    with pytest.raises(ValueError, match=r"linked/cat` expected a folder, got a link to one"):
        bdfast.data.load(root)
    assert len(bdfast.data.load(image_root, limit=(2, 2)).train[1]) == 2


@needs_links
def test_the_folder_itself_may_be_a_link(image_root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(image_root)
    assert bdfast.data.load(tmp_path / "link").train[1].tolist() == [0, 0, 1, 1, 1]


@needs_links
def test_links_to_files(image_root: Path, tmp_path: Path) -> None:
    """Inside the folder they are images like others, whatever name leads there; out of it they are refused."""
    (image_root / "train" / "dog" / "9.png").symlink_to("../cat/0.png")
    (tmp_path / "link").symlink_to(image_root)
    assert bdfast.data.load(tmp_path / "link").train[1].tolist() == [0, 0, 1, 1, 1, 1]
    save(tmp_path / "private.png", random_pixels(1, 6, 6, 3)[0])
    (image_root / "train" / "dog" / "9.png").unlink()
    (image_root / "train" / "dog" / "9.png").symlink_to(tmp_path / "private.png")
    with pytest.raises(
        ValueError, match=r"dog/9.png` expected a whole image .*, got a link that leads out of the fold"
    ):
        bdfast.data.load(image_root)


def test_threads_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bdfast.data.decode.CHUNK", 3)
    monkeypatch.setattr("bdfast.data.decode.PIXELS_WORTH_A_THREAD", 1)
    for part in ("train", "test"):
        for index in range(40):
            save(tmp_path / part / "a" / f"{index}.png", np.full((4, 4, 3), index, np.uint8))
    assert bdfast.data.load(tmp_path).train[0][:, 0, 0, 0].tolist() == list(range(40))


def test_an_interruption_does_not_wait_for_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    opened = []

    def open_image(index: int) -> BinaryIO:
        opened.append(index)
        return (tmp_path / "x.png").open("rb")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "CHUNK", 1)
    monkeypatch.setattr(decode, "enumerate", interrupt, raising=False)  # as soon as the threads have begun
    with pytest.raises(KeyboardInterrupt):
        decode.decode_all(5000, open_image, str, None)
    assert len(opened) < 2500
