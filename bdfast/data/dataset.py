"""The data a defense may be given, brought to one form: ``(images, labels)`` tensors in index order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from bdfast.data.decode import pil_to_chw
from bdfast.data.layout import resize, to_nchw
from bdfast.data.splits import DataSplits, ReadOptions, Split, head, numbered_classes, split_fraction
from bdfast.errors import LabelRangeError, message

INTEGER_DTYPES = frozenset(
    (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
)


def check_labels(
    labels: Tensor,  # [N], any integer dtype
    num_classes: int,
    where: str,
    argument: str = "labels",
) -> None:
    """Raise unless every label lies in ``[0, num_classes)``; names the first that does not. Synchronizes a GPU.

    Raises:
        LabelRangeError: a label out of range.
        TypeError, ValueError: no integers, or not one axis.

    Example:
        >>> check_labels(torch.tensor([0, 9]), 10, "d3")
        >>> check_labels(torch.tensor([0, 10]), 10, "d3")
        Traceback (most recent call last):
        bdfast.errors.LabelRangeError: d3: `labels` expected classes in [0, 10), got 10 at index 1; ...
    """
    _check_label_form(labels, where, argument)
    labels = labels.to(torch.int64)  # the wider unsigned types have no comparisons
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        first = int(outside.to(torch.uint8).argmax())
        raise LabelRangeError(
            message(
                where,
                argument,
                f"classes in [0, {num_classes})",
                f"{int(labels[first])} at index {first}",
                "drop those samples or correct the number of classes",
            )
        )


def check_images(
    images: Tensor,  # [N, C, H, W]
    where: str,
    argument: str = "images",
) -> None:
    """Raise unless images are uint8, or float, finite and in [0, 1], with no empty axis. Synchronizes a GPU.

    Raises:
        TypeError, ValueError: another dtype, shape or range.
    """
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(
            message(
                where, argument, "uint8 or float in [0, 1]", str(images.dtype), "convert, for example with .to(uint8)"
            )
        )
    if images.ndim != 4 or not images.numel():
        raise ValueError(
            message(
                where, argument, "[N, C, H, W] with at least one image", str(list(images.shape)), "reshape the images"
            )
        )
    if images.is_floating_point():
        low, high = (float(bound) for bound in images.detach().aminmax())
        if not (low >= 0.0 and high <= 1.0):  # also when either is NaN
            remedy = "divide 0..255 by 255 and leave the normalization to the model"
            if low >= -0.1 and high <= 1.1:  # what an interpolation leaves
                remedy = "clamp them with .clamp(0, 1)"
            raise ValueError(message(where, argument, "finite pixels in [0, 1]", f"{low:.8g} to {high:.8g}", remedy))


def as_tensors(data: object, where: str, argument: str = "data") -> Split:
    """Images and labels of a data set, in index order.

    Args:
        data: one of

            - a tuple ``(images, labels)`` of tensors, or an object with those two attributes:
              images uint8 or float in [0, 1], ``[N, C, H, W]``; labels of any integer dtype, ``[N]``;
            - a map-style ``Dataset`` (or list) of ``(image, label, ...)``, image being a tensor ``[C, H, W]``, a Pillow
              image, or an array ``[H, W, C]``, ``[C, H, W]`` or ``[H, W]``;
            - a ``DataLoader`` over one: its ``dataset`` is read from first to last, its sampler is not asked.

        where: the function on whose behalf the data is read; it opens the messages.
        argument: the name of its argument.

    Returns:
        images as they are (uint8, or float in [0, 1]), labels as int64 ``[N]``; tensors are not copied, unless they
        were made in inference mode, where autograd could not read them.

    Raises:
        TypeError: an iterable data set (its samples have no index), other types or dtypes.
        ValueError: other shapes, mixed sizes, no sample, pixels outside [0, 1] or not finite.

    Example:
        >>> images, labels = as_tensors([(torch.zeros(3, 8, 8), 4), (torch.ones(3, 8, 8), 7)], "d3")
        >>> images.shape, labels
        (torch.Size([2, 3, 8, 8]), tensor([4, 7]))
    """
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, IterableDataset):
        raise TypeError(
            message(
                where,
                argument,
                "a map-style data set, whose samples have an index",
                f"the iterable {type(data).__name__}",
                "read it into tensors first and pass (images, labels)",
            )
        )
    pair = _tensor_pair(data)
    images, labels = pair if pair is not None else _read_items(data, where, argument)
    check_images(images, where, f"{argument}: images")
    _check_label_form(labels, where, f"{argument}: labels")
    if len(labels) != len(images) or labels.device != images.device:
        raise ValueError(
            message(
                where,
                argument,
                f"one label an image, {len(images)} on {images.device}",
                f"{len(labels)} on {labels.device}",
                "pass images and labels of the same samples, on one device",
            )
        )
    with torch.inference_mode(False):
        images, labels = (part.clone() if part.is_inference() else part for part in (images, labels))
        return images.detach(), labels.to(torch.int64)


def read_dataset(source: object, options: ReadOptions) -> DataSplits:
    """Splits from data in memory or from data set objects, such as torchvision's.

    A pair ``(train, test)`` of anything that :func:`as_tensors` takes keeps its split; one set is split by seed. Class
    names come from the attribute ``classes`` of the (training) set, if it names every label.
    """
    first = source
    if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Tensor):
        first = source[0]
        train, test = as_tensors(first, "load", "source[0]"), as_tensors(source[1], "load", "source[1]")
    else:
        images, labels = as_tensors(source, "load", "source")
        head_indices, tail_indices = split_fraction(len(labels), options, "source")
        train, test = (images[head_indices], labels[head_indices]), (images[tail_indices], labels[tail_indices])
    class_names = _class_names(first, train[1], test[1])
    for part, (_, labels) in (("train", train), ("test", test)):
        check_labels(labels, len(class_names), "load", f"source: {part} labels")
    train, test = head(train, options.limit[0]), head(test, options.limit[1])
    return DataSplits(
        (resize(train[0], options.image_size), train[1]), (resize(test[0], options.image_size), test[1]), class_names
    )


def _class_names(dataset: object, *labels: Tensor) -> tuple[str, ...]:
    names = getattr(dataset, "classes", None)
    if isinstance(names, Sequence) and len(names) > max(int(part.max()) for part in labels):
        return tuple(str(name) for name in names)
    return numbered_classes("source: labels", *labels)


def _check_label_form(labels: Tensor, where: str, argument: str) -> None:
    if labels.dtype not in INTEGER_DTYPES:
        raise TypeError(message(where, argument, "integers", str(labels.dtype), "convert with .long()"))
    if labels.ndim != 1:
        raise ValueError(message(where, argument, "[N]", str(list(labels.shape)), "pass one class a sample"))


def _tensor_pair(data: object) -> Split | None:
    """(images, labels) where ``data`` holds them as tensors already."""
    if isinstance(data, TensorDataset):
        data = data.tensors[:2]
    if isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = data
    else:
        images, labels = getattr(data, "images", None), getattr(data, "labels", None)
    return (images, labels) if isinstance(images, Tensor) and isinstance(labels, Tensor) else None


def _read_items(data: Any, where: str, argument: str) -> Split:
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, (str, bytes, dict, tuple)):
        raise TypeError(
            message(
                where,
                argument,
                "a tuple (images, labels) of tensors, a map-style Dataset or a DataLoader",
                _kinds(data) if isinstance(data, tuple) else type(data).__name__,
                "convert arrays with torch.from_numpy, lists with torch.tensor, and pass a tuple",
            )
        )
    if len(data) == 0:
        raise ValueError(message(where, argument, "at least one sample", "an empty data set", "check the selection"))
    images: Tensor | None = None
    labels = torch.empty(len(data), dtype=torch.int64)
    for index in range(len(data)):
        item, name = data[index], f"{argument}[{index}]"
        if not isinstance(item, (tuple, list)) or len(item) < 2:
            raise TypeError(
                message(
                    where, name, "a sample (image, label, ...)", type(item).__name__, "wrap the data set to give tuples"
                )
            )
        image = _image(item[0], where, name)
        if images is None:
            images = image.new_empty(len(data), *image.shape)
        elif image.shape != images.shape[1:] or image.dtype != images.dtype:
            raise ValueError(
                message(
                    where,
                    name,
                    f"the form of the first image, {images.dtype} {list(images.shape[1:])}",
                    f"{image.dtype} {list(image.shape)}",
                    "resize or convert in the data set's transform",
                )
            )
        images[index] = image
        labels[index] = _label(item[1], where, name)
    assert images is not None
    return images, labels


def _kinds(parts: tuple[object, ...]) -> str:
    """What a tuple is made of, as errors tell it."""
    more = ", ..." if len(parts) > 3 else ""
    return f"a tuple of ({', '.join(type(part).__name__ for part in parts[:3])}{more})"


def _image(image: object, where: str, name: str) -> Tensor:
    """One image as [C, H, W]."""
    pillow = sys.modules.get("PIL.Image")  # imported already if the item is a Pillow image
    if pillow is not None and isinstance(image, pillow.Image):
        return pil_to_chw(image, where, name)
    if isinstance(image, np.ndarray):
        return to_nchw(torch.from_numpy(np.ascontiguousarray(image)).unsqueeze(0), where, name).squeeze(0)
    if isinstance(image, Tensor) and image.ndim == 3:
        return image.detach()
    got = str(list(image.shape)) if isinstance(image, Tensor) else type(image).__name__
    raise TypeError(
        message(
            where, name, "a tensor [C, H, W], a Pillow image or an array", got, "add a transform such as ToTensor()"
        )
    )


def _label(label: object, where: str, name: str) -> int:
    """One class number; arrays and tensors of a single integer count as one."""
    if isinstance(label, (Tensor, np.ndarray)) and int(np.prod(label.shape)) == 1:
        label = label.item()
    if isinstance(label, (int, np.integer)) and not isinstance(label, bool):
        return int(label)
    raise TypeError(message(where, f"{name}: label", "an integer", repr(label)[:80], "give the class number"))
