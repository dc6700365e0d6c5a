"""A data set that stays on the device as bytes, and batches that are built there.

A CIFAR image is 3,072 bytes as uint8 and 12,288 as float32: kept as bytes, the set is read at a quarter of the traffic,
and no worker process, collation or host copy stands between it and the model. All random draws of an epoch come from
one CPU generator and reach the device in one copy, so every device sees the same batches and no batch waits for the
host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.data.dataset import as_tensors
from bdfast.errors import message
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.ranks import ALONE, Ranks

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Augment:
    """Random crop, then random horizontal flip, drawn for every image anew.

    Attributes:
        crop_padding: pixels of zeros put around the image before a window of its old size is cut out; 0 is no crop.
        flip: mirror left and right with probability 1/2.
    """

    crop_padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        if isinstance(self.crop_padding, bool) or not isinstance(self.crop_padding, int):
            raise TypeError(
                message("Augment", "crop_padding", "an int", repr(self.crop_padding), "pass whole pixels; 0 is no crop")
            )
        if not 0 <= self.crop_padding <= 1024:
            raise ValueError(
                message("Augment", "crop_padding", "0..1024 pixels", str(self.crop_padding), "4 is usual for CIFAR")
            )
        if not isinstance(self.flip, bool):
            raise TypeError(message("Augment", "flip", "a bool", repr(self.flip), "pass True or False"))

    @classmethod
    def none(cls) -> Augment:
        """No augmentation: batches are the images divided by 255, bit for bit."""
        return cls(crop_padding=0, flip=False)


class ResidentData:
    """Images and labels on one device, and batches of them.

    Args:
        images: uint8 or float in [0, 1], ``[N, C, H, W]``; kept in its dtype (not copied if it is in place already).
        labels: integers ``[N]``.
        device: where set and batches live.
        augment: random crop and flip of every batch; None is the same as ``Augment.none()``.
        dtype: floating dtype of the batches.
        channels_last: memory format of the batches.

    Attributes:
        images, labels: the set on the device, ``[N, C, H, W]`` and int64 ``[N]``.
        augment: as given, ``Augment.none()`` for None.

    Raises:
        TypeError, ValueError: other shapes, dtypes, or pixels outside [0, 1].

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.randint(0, 256, (10, 1, 8, 8), dtype=torch.uint8, generator=generator)
        >>> data = ResidentData(images, torch.arange(10), augment=Augment(crop_padding=1))
        >>> len(data), data.num_batches(4)
        (10, 3)
        >>> for x, y, index in data.batches(4, shuffle=True, epoch_seed=1):
        ...     print(list(x.shape), x.dtype, torch.equal(y, index))
        [4, 1, 8, 8] torch.float32 True
        [4, 1, 8, 8] torch.float32 True
        [2, 1, 8, 8] torch.float32 True
    """

    def __init__(
        self,
        images: Tensor,  # [N, C, H, W]
        labels: Tensor,  # [N]
        *,
        device: str | torch.device = "cpu",
        augment: Augment | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(
                message("ResidentData", "dtype", f"one of {FLOAT_DTYPES}", str(dtype), "batches are floats in [0, 1]")
            )
        images, labels = as_tensors((images, labels), "ResidentData")
        self.images = images.to(device).contiguous()
        self.labels = labels.to(device)
        self.augment = augment if augment is not None else Augment.none()
        self.device = self.images.device
        # A tensor: by a number, GPUs multiply with 1 / 255, which differs in the last bit.
        self._white = torch.tensor(255, dtype=dtype, device=self.device)
        self._dtype = dtype
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __len__(self) -> int:
        return len(self.images)

    def num_batches(self, batch_size: int, *, drop_last: bool = False) -> int:
        """How many batches :meth:`batches` yields."""
        _check_batch_size(batch_size)
        return len(self) // batch_size if drop_last else -(-len(self) // batch_size)

    def batches(
        self, batch_size: int, *, shuffle: bool, epoch_seed: int, drop_last: bool = False, ranks: Ranks = ALONE
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch of ``(x, y, index)``.

        Args:
            batch_size: samples a batch.
            shuffle: visit the samples in an order drawn from ``epoch_seed``; in index order otherwise.
            epoch_seed: seeds order, crops and flips. Give every epoch its own; the same one gives the same bits on
                every device and, sample for sample, at every batch size.
            drop_last: leave out a last batch of fewer than ``batch_size`` samples.
            ranks: yield this rank's part of every batch (:meth:`Ranks.divide`); all ranks together make the batches of
                one process, sample for sample.

        Yields:
            x in ``[0, 1]`` ``[B, C, H, W]``, y int64 ``[B]``, and the samples' indices in the set, int64 ``[B]``.

        Raises:
            ValueError: batch_size below 1.
            TypeError: epoch_seed is no int.
        """
        count = self.num_batches(batch_size, drop_last=drop_last)
        if isinstance(epoch_seed, bool) or not isinstance(epoch_seed, int):
            raise TypeError(
                message("batches", "epoch_seed", "an int", repr(epoch_seed), "pass a number of its own for every epoch")
            )
        drawn = self._draw(shuffle, epoch_seed)
        return (
            self._batch(*(part[start : start + batch_size][ranks.divide(size).rows] for part in drawn))
            for start, size in zip(range(0, count * batch_size, batch_size), self.sizes(batch_size), strict=False)
        )

    def shuffled(self, batch_size: int, *, epoch_seed: int) -> tuple[Tensor, ...]:
        """The indices of the batches that :meth:`batches` yields with ``shuffle``, for whoever needs no images.

        Example:
            >>> data = ResidentData(torch.rand(5, 1, 2, 2), torch.arange(5))
            >>> of_batches = [index for _, _, index in data.batches(2, shuffle=True, epoch_seed=3)]
            >>> all(map(torch.equal, data.shuffled(2, epoch_seed=3), of_batches))
            True
        """
        _check_batch_size(batch_size)
        return torch.split(self._draw(True, epoch_seed)[0], batch_size)

    def sizes(self, batch_size: int) -> list[int]:
        """Samples in each batch of an epoch, of all ranks together."""
        return [min(batch_size, len(self) - start) for start in range(0, len(self), batch_size)]

    def _draw(self, shuffle: bool, epoch_seed: int) -> tuple[Tensor, Tensor]:
        """The epoch's order and, for every position in it, where its window starts (see :func:`crop_and_flip`)."""
        generator = torch.Generator().manual_seed(epoch_seed)
        order = torch.randperm(len(self), generator=generator) if shuffle else torch.arange(len(self))
        padding = self.augment.crop_padding
        row, column = torch.randint(0, 2 * padding + 1, (2, len(self)), generator=generator)
        flip = torch.randint(0, 1 + self.augment.flip, (len(self),), generator=generator)
        windows = window_starts(row, column, flip, padding, self.images.shape)
        order, windows = torch.stack((order, windows)).to(self.device)
        return order, windows

    def _batch(self, index: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.images.index_select(0, index)
        if self.augment != Augment.none():
            x = crop_and_flip(x, windows, self.augment.crop_padding)
        is_bytes = x.dtype == torch.uint8
        x = x.contiguous(memory_format=self._memory_format).to(self._dtype)  # reordered while it is still bytes
        return (x.div_(self._white) if is_bytes else x), self.labels.index_select(0, index), index


def window_starts(
    row: Tensor,  # [B], 0..2 * padding
    column: Tensor,  # [B], 0..2 * padding
    flip: Tensor,  # [B], 0 or 1
    padding: int,
    shape: Sequence[int],  # [..., C, H, W]
) -> Tensor:
    """Offset of each image's window in its two padded copies, the plain one followed by the mirrored one.

    Mirroring the window at ``column`` is the window at ``2 * padding - column`` of the mirrored image.
    """
    channels, height, width = shape[-3:]
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    column = torch.where(flip.bool(), 2 * padding - column, column)
    return flip * (channels * padded_height * padded_width) + row * padded_width + column


def crop_and_flip(
    images: Tensor,  # [B, C, H, W]
    windows: Tensor,  # [B] of window_starts
    padding: int,
) -> Tensor:
    """Zero-padded crops, mirrored where asked, all of them in one gather.

    Seen with overlapping strides, "the window that starts at byte i" is row i of a matrix, and one ``index_select``
    copies B of its rows: 0.13 ms for 256 x 3 x 32 x 32 bytes on one CPU core, against 1.5 ms through an index a pixel.
    """
    batch, channels, height, width = images.shape
    padded_height, padded_width = height + 2 * padding, width + 2 * padding
    padded = images.new_zeros(batch, 2, channels, padded_height, padded_width)
    inside = padded[..., padding : padding + height, padding : padding + width]
    inside[:, 0] = images
    inside[:, 1] = images.flip(-1)

    image_stride = 2 * channels * padded_height * padded_width
    last_window = (batch - 1) * image_stride + image_stride // 2 + 2 * padding * (padded_width + 1)
    strides = (1, padded_height * padded_width, padded_width, 1)
    every_window = padded.as_strided((last_window + 1, channels, height, width), strides)
    return every_window.index_select(0, windows + image_stride * torch.arange(batch, device=images.device))


def normalize(
    x: Tensor,  # [B, C, H, W] in [0, 1]
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """``(x - mean) / std`` per channel.

    Raises:
        ValueError: not one number a channel, or a std that is not positive.

    Example:
        >>> normalize(torch.ones(1, 1, 1, 2), [0.5], [0.25])
        tensor([[[[2., 2.]]]])
    """
    channels = x.shape[1]
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels:
            raise ValueError(
                message("normalize", name, f"{channels} numbers, one a channel", f"{len(values)}", "pass one a channel")
            )
    if min(std) <= 0:
        raise ValueError(message("normalize", "std", "positive numbers", str(tuple(std)), "pass 1 to leave a channel"))
    center, scale = (torch.tensor(values, dtype=x.dtype, device=x.device).view(-1, 1, 1) for values in (mean, std))
    return (x - center) / scale


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            message("batches", "batch_size", "a whole number, at least 1", repr(batch_size), "pass 128, say")
        )
