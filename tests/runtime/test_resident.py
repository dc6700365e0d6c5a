"""Batches from the resident set: exact pixels, the crop against its definition, and repeatable epochs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bdfast.runtime import Augment, ResidentData, normalize
from bdfast.runtime.resident import crop_and_flip, window_starts


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make(count: int = 11, **arguments: object) -> ResidentData:
    return ResidentData(pixels(count, 3, 6, 5), torch.arange(count) % 4, **arguments)  # type: ignore[arg-type]


def crop_and_flip_by_definition(image: Tensor, row: int, column: int, flip: bool, padding: int) -> Tensor:
    """Pad with zeros, cut a window of the old size, mirror it."""
    height, width = image.shape[1:]
    window = F.pad(image, (padding,) * 4)[:, row : row + height, column : column + width]
    return window.flip(-1) if flip else window


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 5),
    channels=st.integers(1, 4),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    padding=st.integers(0, 4),
    floats=st.booleans(),
    data=st.data(),
)
def test_crop_and_flip_is_pad_cut_mirror(
    batch: int, channels: int, height: int, width: int, padding: int, floats: bool, data: st.DataObject
) -> None:
    offsets = st.lists(st.integers(0, 2 * padding), min_size=batch, max_size=batch)
    row, column = torch.tensor(data.draw(offsets)), torch.tensor(data.draw(offsets))
    flip = torch.tensor(data.draw(st.lists(st.integers(0, 1), min_size=batch, max_size=batch)))
    images = pixels(batch, channels, height, width) + 1
    if floats:
        images = images / 256
    expected = torch.stack(
        [
            crop_and_flip_by_definition(image, int(r), int(c), bool(f), padding)
            for image, r, c, f in zip(images, row, column, flip, strict=True)
        ]
    )
    windows = window_starts(row, column, flip, padding, images.shape)
    assert torch.equal(crop_and_flip(images, windows, padding), expected)


def test_all_corner_windows_of_one_image() -> None:
    image = torch.tensor([[[[1, 2], [3, 4]]]], dtype=torch.uint8)
    corners = [(0, 0), (0, 2), (2, 0), (2, 2)]
    row, column = (torch.tensor(side) for side in zip(*corners, strict=True))
    windows = window_starts(row, column, torch.zeros(4, dtype=torch.int64), 1, image.shape)
    crops = crop_and_flip(image.repeat(4, 1, 1, 1), windows, 1)
    assert crops[:, 0].tolist() == [[[0, 0], [0, 1]], [[0, 0], [2, 0]], [[0, 3], [0, 0]], [[4, 0], [0, 0]]]


@pytest.mark.parametrize("augment", [None, Augment.none()])
@pytest.mark.parametrize("shuffle", [False, True])
def test_without_augmentation_batches_are_the_images_over_255(augment: Augment | None, shuffle: bool) -> None:
    data = make(augment=augment)
    seen = []
    for x, y, index in data.batches(4, shuffle=shuffle, epoch_seed=3):
        assert torch.equal(x, data.images[index].float() / 255)
        assert torch.equal(y, data.labels[index])
        assert x.dtype == torch.float32
        assert y.dtype == index.dtype == torch.int64
        seen += index.tolist()
    assert (seen == list(range(11))) is not shuffle
    assert sorted(seen) == list(range(11))


def test_every_byte_divides_exactly() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    ((x, _, _),) = ResidentData(images, torch.zeros(1, dtype=torch.int64)).batches(1, shuffle=False, epoch_seed=0)
    assert x.flatten().tolist() == [float(torch.tensor(value) / 255) for value in range(256)]


def test_float_images_are_not_divided() -> None:
    images = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    data = ResidentData(images, torch.arange(5))
    assert data.images.data_ptr() == images.data_ptr()
    x = torch.cat([x for x, _, _ in data.batches(2, shuffle=False, epoch_seed=0)])
    assert torch.equal(x, images)


def test_batches_do_not_alias_the_set() -> None:
    images = torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    for augment in (None, Augment()):
        for x, y, index in ResidentData(images, torch.arange(4), augment=augment).batches(
            4, shuffle=False, epoch_seed=0
        ):
            for part in (x, y, index):
                part.zero_()
    assert torch.equal(images, before)


def epoch(data: ResidentData, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    parts = list(data.batches(batch_size, shuffle=True, epoch_seed=seed))
    return torch.cat([x for x, _, _ in parts]), torch.cat([index for _, _, index in parts])


def test_the_seed_decides_the_epoch_at_every_batch_size() -> None:
    data = make(40, augment=Augment(crop_padding=2))
    x, index = epoch(data, 7, seed=5)
    for batch_size in (1, 7, 40, 64):
        again, same_index = epoch(data, batch_size, seed=5)
        assert torch.equal(again, x)
        assert torch.equal(same_index, index)
    other, other_index = epoch(data, 7, seed=6)
    assert not torch.equal(other_index, index)
    assert not torch.equal(other, x)


def test_order_does_not_depend_on_the_augmentation() -> None:
    assert torch.equal(epoch(make(40), 8, seed=1)[1], epoch(make(40, augment=Augment()), 8, seed=1)[1])


def test_every_batch_is_some_crop_of_its_images() -> None:
    data = make(30, augment=Augment(crop_padding=1))
    flips, windows = set(), set()
    for x, _, index in data.batches(8, shuffle=True, epoch_seed=0):
        for crop, image in zip(x, data.images[index], strict=True):
            matches = [
                (row, column, flip)
                for row in range(3)
                for column in range(3)
                for flip in (False, True)
                if torch.equal(crop, crop_and_flip_by_definition(image, row, column, flip, 1).float() / 255)
            ]
            assert len(matches) == 1
            windows.add(matches[0][:2])
            flips.add(matches[0][2])
    assert flips == {False, True}
    assert len(windows) > 5, "offsets are drawn for every image"


def test_crop_alone_and_flip_alone() -> None:
    data = make(30, augment=Augment(crop_padding=0, flip=True))
    mirrored = 0
    for x, _, index in data.batches(30, shuffle=False, epoch_seed=0):
        plain = data.images[index].float() / 255
        for crop, image in zip(x, plain, strict=True):
            assert torch.equal(crop, image) or torch.equal(crop, image.flip(-1))
            mirrored += torch.equal(crop, image.flip(-1))
    assert 0 < mirrored < 30

    ones = ResidentData(
        torch.full((30, 1, 5, 5), 255, dtype=torch.uint8), torch.zeros(30).long(), augment=Augment(4, False)
    )
    ((x, _, _),) = ones.batches(30, shuffle=False, epoch_seed=0)
    assert set(x.unique().tolist()) == {0.0, 1.0}, "cropped with zeros"


def test_drop_last_and_counts() -> None:
    data = make(11)
    assert len(data) == 11
    assert [len(y) for _, y, _ in data.batches(4, shuffle=False, epoch_seed=0)] == [4, 4, 3]
    assert [len(y) for _, y, _ in data.batches(4, shuffle=False, epoch_seed=0, drop_last=True)] == [4, 4]
    assert list(data.batches(12, shuffle=False, epoch_seed=0, drop_last=True)) == []
    assert data.num_batches(4) == 3
    assert data.num_batches(4, drop_last=True) == 2
    assert data.num_batches(11) == data.num_batches(11, drop_last=True) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_round_once(dtype: torch.dtype) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    data = ResidentData(images, torch.zeros(1, dtype=torch.int64), dtype=dtype)
    ((x, _, _),) = data.batches(1, shuffle=False, epoch_seed=0)
    assert torch.equal(x, (images.double() / 255).to(dtype))


@pytest.mark.parametrize("augment", [None, Augment()])
def test_channels_last_changes_the_strides_only(augment: Augment | None) -> None:
    plain, last = (make(12, augment=augment, channels_last=flag) for flag in (False, True))
    for (x, _, _), (x_last, _, _) in zip(
        plain.batches(5, shuffle=True, epoch_seed=2), last.batches(5, shuffle=True, epoch_seed=2), strict=True
    ):
        assert torch.equal(x, x_last)
        assert x_last.is_contiguous(memory_format=torch.channels_last)
        assert x.is_contiguous()


def test_strided_images_are_read_right() -> None:
    images = pixels(6, 3, 8, 8).to(memory_format=torch.channels_last)[:, :, ::2, 1:6]
    data = ResidentData(images, torch.arange(6), augment=Augment(2))
    same = ResidentData(images.contiguous(), torch.arange(6), augment=Augment(2))
    assert torch.equal(epoch(data, 4, seed=0)[0], epoch(same, 4, seed=0)[0])


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    epoch(make(augment=Augment()), 4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")
def test_a_gpu_sees_the_batches_of_the_cpu() -> None:
    for channels_last in (False, True):
        on_cpu = make(40, augment=Augment(2), channels_last=channels_last)
        on_gpu = make(40, augment=Augment(2), channels_last=channels_last, device="cuda")
        for cpu, gpu in zip(
            on_cpu.batches(7, shuffle=True, epoch_seed=9), on_gpu.batches(7, shuffle=True, epoch_seed=9), strict=True
        ):
            for a, b in zip(cpu, gpu, strict=True):
                assert b.is_cuda
                assert torch.equal(a, b.cpu())


def test_errors_come_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="batches: `batch_size` expected a whole number, at least 1, got 0"):
        make().batches(0, shuffle=True, epoch_seed=0)
    with pytest.raises(ValueError, match=r"`batch_size` expected .* got 2.5"):
        make().num_batches(2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`epoch_seed` expected an int, got 1.5"):
        make().batches(2, shuffle=True, epoch_seed=1.5)  # type: ignore[arg-type]


def test_wrong_sets() -> None:
    with pytest.raises(
        ValueError, match=r"ResidentData: `data: images` expected finite pixels in \[0, 1\], got 2 to 2"
    ):
        ResidentData(torch.full((2, 1, 4, 4), 2.0), torch.arange(2))
    with pytest.raises(ValueError, match="one label an image"):
        ResidentData(pixels(2, 1, 4, 4), torch.arange(3))
    with pytest.raises(TypeError, match=r"ResidentData: `dtype` expected one of .*, got torch.uint8"):
        make(dtype=torch.uint8)


def test_augment_is_checked() -> None:
    assert Augment() == Augment(crop_padding=4, flip=True)
    assert Augment.none() == Augment(crop_padding=0, flip=False)
    with pytest.raises(ValueError, match=r"Augment: `crop_padding` expected 0..1024 pixels, got -1"):
        Augment(crop_padding=-1)
    with pytest.raises(TypeError, match=r"`crop_padding` expected an int, got 1.5"):
        Augment(crop_padding=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`flip` expected a bool, got 0.5"):
        Augment(flip=0.5)  # type: ignore[arg-type]


def test_normalize() -> None:
    x = torch.tensor([[[[0.5]], [[1.0]]]])
    assert normalize(x, (0.5, 0.0), (0.25, 2.0)).flatten().tolist() == [0.0, 0.5]
    with pytest.raises(ValueError, match="normalize: `mean` expected 2 numbers, one a channel, got 1"):
        normalize(x, (0.5,), (0.25, 2.0))
    with pytest.raises(ValueError, match=r"normalize: `std` expected positive numbers, got \(0.0, 1.0\)"):
        normalize(x, (0.5, 0.0), (0.0, 1.0))
