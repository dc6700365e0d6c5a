"""Small data sets on disk, in each of the forms that `load` reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

Arrays = dict[str, NDArray[Any]]


def random_pixels(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def packed(files: list[bytes], labels: list[int], part: str) -> Arrays:
    return {
        f"{part}_jpeg": np.frombuffer(b"".join(files), dtype=np.uint8),
        f"{part}_offsets": np.cumsum([0, *map(len, files)]),
        f"{part}_labels": np.array(labels, dtype=np.uint8),
    }


@pytest.fixture
def jpeg_arrays() -> Arrays:
    """Five training and three test images of 8x8 RGB in three classes."""
    train = [jpeg(image) for image in random_pixels(5, 8, 8, 3, seed=1)]
    test = [jpeg(image) for image in random_pixels(3, 8, 8, 3, seed=2)]
    return {
        **packed(train, [0, 1, 2, 0, 1], "train"),
        **packed(test, [2, 1, 0], "test"),
        "class_names": np.array(["ant", "bee", "cow"]),
    }


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """``train`` (2 + 3 images) and ``test`` (1 + 1) of 6x6 RGB in the classes cat and dog."""
    root = tmp_path / "images"
    pixels = random_pixels(7, 6, 6, 3)
    names = ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png", "train/dog/2.png", "train/dog/10.png"]
    for image, name in zip(pixels, [*names, "test/cat/0.png", "test/dog/0.png"], strict=True):
        save(root / name, image)
    return root


def save(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
