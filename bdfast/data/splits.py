"""What every reader takes and returns: the options of a read, and a train/test pair with class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from bdfast.errors import message

Split: TypeAlias = tuple[Tensor, Tensor]
"""(images uint8 [N, C, H, W] or float in [0, 1], labels int64 [N])."""

# Names are made up for unnamed classes: a stray label of 2^40 must not make a list of 2^40 strings.
MAX_UNNAMED_CLASSES = 100_000


class DataSplits(NamedTuple):
    """A data set in memory; unpacks as ``train, test, class_names = load(...)``.

    Attributes:
        train: ``(images, labels)``, uint8 ``[N, C, H, W]`` (or float in [0, 1]) and int64 ``[N]``.
        test: the same for the test set.
        class_names: name of class ``i`` at position ``i``; labels lie in ``[0, len(class_names))``.
    """

    train: Split
    test: Split
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class ReadOptions:
    """The options of :func:`bdfast.data.load`, checked.

    Attributes:
        limit: most images to keep of (train, test); None keeps all.
        seed: seed of the train/test split, for sources that come without one.
        image_size: (height, width) to resize to, in pixels; None keeps the size.
        test_fraction: share of the images that becomes the test set, for sources that come without one.
    """

    limit: tuple[int | None, int | None] = (None, None)
    seed: int = 0
    image_size: tuple[int, int] | None = None
    test_fraction: float = 0.2

    def __post_init__(self) -> None:
        for part in self.limit:
            if part is not None and (isinstance(part, bool) or not isinstance(part, int) or part < 1):
                raise ValueError(
                    message("load", "limit", "two counts of at least 1, or None", repr(self.limit), "keep at least one")
                )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(message("load", "seed", "an int", repr(self.seed), "pass a whole number"))
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(message("load", "seed", "a number of 64 bits", repr(self.seed), "pass a smaller one"))
        if self.image_size is not None and not all(
            isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= 4096 for side in self.image_size
        ):
            raise ValueError(
                message("load", "image_size", "sides in 1..4096 pixels", repr(self.image_size), "pass (height, width)")
            )
        if not 0.0 < self.test_fraction < 1.0:
            raise ValueError(
                message("load", "test_fraction", "a number in (0, 1)", repr(self.test_fraction), "pass 0.2, say")
            )


def read_options(
    limit: Sequence[int | None] | None, seed: int, image_size: int | Sequence[int] | None, test_fraction: float
) -> ReadOptions:
    """Bring the loose forms a caller (or a YAML file) may use into :class:`ReadOptions`."""
    if limit is None:
        limit = (None, None)
    if not isinstance(limit, Sequence) or len(limit) != 2:
        raise ValueError(message("load", "limit", "(n_train, n_test)", repr(limit), "pass two counts; None keeps all"))
    if isinstance(image_size, int):
        image_size = (image_size, image_size)
    if image_size is not None and (not isinstance(image_size, Sequence) or len(image_size) != 2):
        raise ValueError(
            message("load", "image_size", "one side or (height, width)", repr(image_size), "pass whole pixels")
        )
    size = None if image_size is None else (image_size[0], image_size[1])
    return ReadOptions((limit[0], limit[1]), seed, size, test_fraction)


def split_by_seed(count: int, test_count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (train, test) of a seeded permutation of ``range(count)``: its head trains, its tail tests."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: count - test_count], order[count - test_count :]


def split_fraction(count: int, options: ReadOptions, source: str) -> tuple[Tensor, Tensor]:
    """:func:`split_by_seed` at ``options.test_fraction``, with at least one image on either side."""
    if count < 2:
        raise ValueError(
            message("load", source, "at least 2 images to split", str(count), "add images, or give a test set")
        )
    test_count = min(max(round(count * options.test_fraction), 1), count - 1)
    return split_by_seed(count, test_count, options.seed)


def head(split: Split, limit: int | None) -> Split:
    """The first ``limit`` samples, in memory of their own: a view would keep the whole set alive."""
    images, labels = split
    if limit is None or limit >= len(labels):
        return split
    return images[:limit].clone(), labels[:limit].clone()


def numbered_classes(source: str, *labels: Tensor) -> tuple[str, ...]:
    """Names "0", "1", ... for every label up to the largest one."""
    largest = max(int(part.max()) for part in labels)
    if largest >= MAX_UNNAMED_CLASSES:
        raise ValueError(
            message(
                "load",
                source,
                f"labels below {MAX_UNNAMED_CLASSES}",
                str(largest),
                "store `class_names` beside the labels, or number the classes from 0",
            )
        )
    return tuple(str(label) for label in range(largest + 1))
