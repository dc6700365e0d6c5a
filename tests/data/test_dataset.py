"""What a defense may be given: the same tensors out of every form, and errors that say where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from bdfast.data import as_tensors, check_labels
from bdfast.errors import LabelRangeError
from tests.data.conftest import random_pixels

PIXELS = random_pixels(6, 5, 4, 3)  # NHWC
IMAGES = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).contiguous()
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@dataclass
class Poisoned:
    images: Tensor
    labels: Tensor
    is_poisoned: Tensor


class Items(Dataset[object]):
    """A map-style data set of ready samples."""

    def __init__(self, items: list[object]) -> None:
        self.items = items

    def __getitem__(self, index: int) -> object:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


FORMS = {
    "tuple": (IMAGES, LABELS),
    "list": [IMAGES, LABELS],
    "attributes": Poisoned(IMAGES, LABELS, LABELS > 0),
    "TensorDataset": TensorDataset(IMAGES, LABELS),
    "TensorDataset of three": TensorDataset(IMAGES, LABELS, LABELS),
    "Subset": Subset(TensorDataset(IMAGES, LABELS), range(6)),
    "tensors": Items([(image, int(label)) for image, label in zip(IMAGES, LABELS, strict=True)]),
    "Pillow": Items([(Image.fromarray(image), label) for image, label in zip(PIXELS, LABELS, strict=True)]),
    "arrays": Items([(image, np.int32(label)) for image, label in zip(PIXELS, LABELS, strict=True)]),
    "five fields": Items([(x, np.array([y]), 0, 1, 2) for x, y in zip(PIXELS, LABELS.tolist(), strict=True)]),
    "samples": [(image, label) for image, label in zip(IMAGES, LABELS, strict=True)],
    "shuffling loader": DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True, drop_last=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors_in_index_order(form: str) -> None:
    images, labels = as_tensors(FORMS[form], "d3")
    assert torch.equal(images, IMAGES)
    assert images.dtype == torch.uint8
    assert torch.equal(labels, LABELS)
    assert labels.dtype == torch.int64


def test_tensors_are_not_copied_and_floats_stay() -> None:
    floats = torch.rand(6, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    images, labels = as_tensors((floats, LABELS), "d3")
    assert images.data_ptr() == floats.data_ptr()
    assert labels.data_ptr() == LABELS.data_ptr()
    assert images.dtype == torch.float64
    assert not images.requires_grad


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    labels = as_tensors((IMAGES, LABELS.to(dtype)), "d3")[1]
    assert labels.dtype == torch.int64
    assert torch.equal(labels, LABELS)


def test_gray_pillow_images_have_one_channel() -> None:
    items = [(Image.fromarray(PIXELS[index, :, :, 0]), 0) for index in range(3)]
    assert torch.equal(as_tensors(items, "d3")[0], IMAGES[:3, :1])


def test_nothing_is_drawn_from_the_global_random_state() -> None:
    before = torch.get_rng_state()
    as_tensors(FORMS["shuffling loader"], "d3")
    assert torch.equal(torch.get_rng_state(), before)


class Stream(IterableDataset[object]):
    def __iter__(self) -> Iterator[object]:
        return iter([(IMAGES[0], 0)])


BAD = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (Stream(), TypeError, "d3: `data` expected a map-style data set, .* got the iterable Stream; read it into"),
        (DataLoader(Stream()), TypeError, "got the iterable Stream"),
        ({"images": BAD}, TypeError, "`data` expected a tuple .images, labels. of tensors, .* got dict"),
        (iter([]), TypeError, "got list_iterator"),
        ((PIXELS, LABELS.numpy()), TypeError, r"got a tuple of \(ndarray, ndarray\); convert arrays with"),
        ((BAD, LABELS.tolist()), TypeError, r"got a tuple of \(Tensor, list\); .* lists with torch.tensor"),
        ((BAD, LABELS, LABELS, 0), TypeError, r"got a tuple of \(Tensor, Tensor, Tensor, ...\)"),
        ([], ValueError, "`data` expected at least one sample, got an empty data set"),
        (
            (BAD[:0], LABELS[:0]),
            ValueError,
            r"images` expected \[N, C, H, W\] with at least one image, got \[0, 3, 4, 4\]",
        ),
        ((BAD[0], LABELS[:2]), ValueError, r"got \[3, 4, 4\]"),
        ((BAD.long(), LABELS[:2]), TypeError, "images` expected uint8 or float in .0, 1., got torch.int64"),
        ((BAD.bool(), LABELS[:2]), TypeError, "got torch.bool"),
        ((BAD + 1.5, LABELS[:2]), ValueError, r"expected finite pixels in \[0, 1\], got 1.5 to 1.5"),
        ((BAD + 1.0000001, LABELS[:2]), ValueError, r"got 1.0000001 to 1.0000001; clamp them with .clamp\(0, 1\)"),
        ((BAD * float("nan"), LABELS[:2]), ValueError, "got nan to nan; divide"),
        ((BAD - float("inf"), LABELS[:2]), ValueError, "got -inf to -inf"),
        ((BAD, LABELS[:2].float()), TypeError, "labels` expected integers, got torch.float32"),
        ((BAD, LABELS[:2] > 0), TypeError, "labels` expected integers, got torch.bool"),
        ((BAD, LABELS[:2].view(2, 1)), ValueError, r"labels` expected \[N\], got \[2, 1\]"),
        ((BAD, LABELS[:3]), ValueError, "`data` expected one label an image, 2 on cpu, got 3 on cpu"),
        (
            [(BAD[0], 0), (BAD[0, :, :2], 0)],
            ValueError,
            r"`data\[1\]` expected the form of the first image, .* got .*3, 2, 4",
        ),
        ([(BAD[0], 0), (BAD[0].byte(), 0)], ValueError, r"`data\[1\]` .* got torch.uint8"),
        ([BAD[0], BAD[1], BAD[0]], TypeError, r"`data\[0\]` expected a sample .image, label, ...., got Tensor"),
        ([(BAD[0],)], TypeError, r"`data\[0\]` expected a sample .image, label, ...., got tuple"),
        ([("path.png", 0)], TypeError, r"`data\[0\]` expected a tensor .*, got str; add a transform"),
        ([(BAD[0, 0], 0)], TypeError, r"`data\[0\]` expected a tensor \[C, H, W\], .*, got \[4, 4\]"),
        ([(BAD[0], 0.5)], TypeError, r"`data\[0\]: label` expected an integer, got 0.5"),
        ([(BAD[0], torch.tensor([0, 1]))], TypeError, r"`data\[0\]: label` expected an integer"),
        ([(BAD[0], True)], TypeError, "expected an integer, got True"),
    ],
)
def test_errors(data: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        as_tensors(data, "d3")


def test_the_callers_argument_is_named() -> None:
    with pytest.raises(ValueError, match="pad_ft: `poisoned_data: images`"):
        as_tensors((BAD[0], LABELS), "pad_ft", "poisoned_data")


def test_check_labels() -> None:
    check_labels(LABELS, 3, "d3")
    check_labels(LABELS[:0], 3, "d3")
    check_labels(LABELS.to(torch.uint16), 3, "d3")
    with pytest.raises(LabelRangeError, match=r"d3: `labels` expected classes in \[0, 2\), got 2 at index 2; drop"):
        check_labels(LABELS, 2, "d3")
    with pytest.raises(LabelRangeError, match=r"`y` .*got -1 at index 0"):
        check_labels(LABELS - 1, 2, "d3", "y")
    with pytest.raises(TypeError, match=r"expected integers, got torch.float32"):
        check_labels(LABELS.float(), 3, "d3")
