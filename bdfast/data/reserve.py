"""The small set of clean samples that a defense holds: how it is drawn, and how it is kept in a file.

An index file is text with one integer a line, as BackdoorBench reads and writes it (``log/index.txt``).
"""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from bdfast.data.dataset import as_tensors
from bdfast.errors import LabelRangeError, message
from bdfast.files import atomic_write

MAX_INDEX_FILE_BYTES = 1 << 30  # 50 million lines


def reserve(
    labels_or_data: object,
    *,
    ratio: float | None = None,
    count: int | None = None,
    seed: int = 0,
    per_class: bool = False,
    draw: Literal["permutation", "backdoorbench"] = "permutation",
) -> Tensor:
    """Draw the indices of a small clean set, without replacement.

    Args:
        labels_or_data: labels, integers ``[N]`` in a tensor, an array or a list (torchvision's ``targets``), or any
            data that :func:`bdfast.data.as_tensors` takes.
        ratio: share of the samples in (0, 1]; ``floor(N * ratio)`` are drawn (of every class, with ``per_class``).
        count: number of samples (of every class, with ``per_class``). Give either ratio or count.
        seed: same seed, same draw.
        per_class: draw from every class separately.
        draw: "permutation" is the head of ``torch.randperm``; "backdoorbench" is Python's ``random.sample`` after
            ``random.seed(seed)``, which picks the samples BackdoorBench picks with that seed. The caller's global
            random state is not used by either.

    Returns:
        int64 indices in the order drawn, **not** sorted, so that a prefix is a random subset too; with ``per_class``
        class 0 comes first, then class 1, and so on.

    Warns:
        UserWarning: a class of the data has no sample in the draw.

    Raises:
        ValueError: ratio or count out of range, both or none of them, nothing to draw, a class too small for ``count``.

    Example:
        >>> labels = torch.arange(100) % 4
        >>> reserve(labels, count=3, per_class=True, seed=1).shape
        torch.Size([12])
        >>> reserve(torch.zeros(100, dtype=torch.int64), ratio=0.05, seed=0, draw="backdoorbench")
        tensor([49, 97, 53,  5, 33])
    """
    labels = _labels_of(labels_or_data)
    _check_arguments(labels, ratio, count, per_class, draw)
    labels = labels.cpu()
    if per_class:
        generator = torch.Generator().manual_seed(seed)
        pools = [(labels == label).nonzero().flatten() for label in sorted(set(labels.tolist()))]
        chosen = torch.cat(
            [
                pool[
                    torch.randperm(len(pool), generator=generator)[
                        : _size(len(pool), ratio, count, f"class {labels[pool[0]]}")
                    ]
                ]
                for pool in pools
            ]
        )
    elif draw == "backdoorbench":
        size = _size(len(labels), ratio, count, "the set")
        chosen = torch.tensor(random.Random(seed).sample(range(len(labels)), size), dtype=torch.int64)
    else:
        size = _size(len(labels), ratio, count, "the set")
        chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    if not len(chosen):
        raise ValueError(
            message("reserve", "ratio", "at least one sample drawn", f"{ratio} of {len(labels)}", "raise the ratio")
        )
    empty = sorted(set(labels.tolist()) - set(labels[chosen].tolist()))
    if empty:
        warnings.warn(f"reserve: no sample of class {empty} was drawn; raise ratio or count", stacklevel=2)
    return chosen


def _labels_of(labels_or_data: object) -> Tensor:
    if isinstance(labels_or_data, Tensor):
        return labels_or_data
    if isinstance(labels_or_data, np.ndarray):
        return torch.from_numpy(labels_or_data.copy())
    if isinstance(labels_or_data, list) and all(isinstance(label, (int, np.integer)) for label in labels_or_data):
        return torch.tensor(labels_or_data)
    return as_tensors(labels_or_data, "reserve")[1]


def read_index(path: str | os.PathLike[str], size: int | None = None) -> Tensor:
    """Read an index file: one integer a line, in the order of the file; blank lines may follow the last one.

    Args:
        path: the file.
        size: number of samples in the data set, if indices are to be checked against it.

    Returns:
        int64 indices.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no integer, an index twice, or no index.
        LabelRangeError: an index below 0 or, given ``size``, beyond the data set (an IndexError and a ValueError).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "index.txt"
        >>> write_index(path, torch.tensor([7, 2]))
        >>> read_index(path, size=10)
        tensor([7, 2])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(message("read_index", str(path), "an index file", "no such file", "check the path"))
    if path.stat().st_size > MAX_INDEX_FILE_BYTES:
        raise ValueError(
            message(
                "read_index",
                str(path),
                f"at most {MAX_INDEX_FILE_BYTES} bytes",
                str(path.stat().st_size),
                "pass a file with one index a line",
            )
        )
    indices: list[int] = []
    for number, line in enumerate(path.read_text(encoding="ascii", errors="replace").rstrip().splitlines(), start=1):
        digits = line.strip()
        if not digits.removeprefix("-").isdigit() or len(digits) > 19:
            raise ValueError(
                message(
                    "read_index", f"{path}, line {number}", "one integer", repr(digits[:40]), "write one index a line"
                )
            )
        indices.append(int(digits))
    return _checked_indices(indices, size, "read_index", str(path))


def write_index(path: str | os.PathLike[str], indices: Tensor) -> None:
    """Write indices ``[n]``, one a line, in their order; a reader sees the old file or the new one, never a part.

    Raises:
        ValueError: no index, an index twice, or indices that are not one axis.
        TypeError: no integers.
        LabelRangeError: a negative index.
    """
    path = Path(path)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(
            message(
                "write_index", "indices", "integers", str(indices.dtype), "pass mask.nonzero().flatten() for a mask"
            )
        )
    if indices.ndim != 1:
        raise ValueError(message("write_index", "indices", "[n]", str(list(indices.shape)), "flatten the indices"))
    checked = _checked_indices(indices.tolist(), None, "write_index", "indices")
    with atomic_write(path) as file:
        file.writelines(f"{index}\n" for index in checked.tolist())


def _checked_indices(indices: list[int], size: int | None, where: str, argument: str) -> Tensor:
    if not indices:
        raise ValueError(message(where, argument, "at least one index", "none", "write one index a line"))
    limit = 2**63 if size is None else size
    outside = next((index for index in indices if not 0 <= index < limit), None)
    if outside is not None:
        raise LabelRangeError(
            message(
                where,
                argument,
                "indices of at least 0" if size is None else f"indices in [0, {size})",
                str(outside),
                "check that the file belongs to this data set",
            )
        )
    if len(set(indices)) != len(indices):
        seen: set[int] = set()
        twice = next(index for index in indices if index in seen or seen.add(index))  # type: ignore[func-returns-value]
        raise ValueError(message(where, argument, "every index once", f"{twice} twice", "remove the duplicates"))
    return torch.tensor(indices, dtype=torch.int64)


def _check_arguments(labels: Tensor, ratio: float | None, count: int | None, per_class: bool, draw: str) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(
            message(
                "reserve",
                "labels_or_data",
                "integer labels [N]",
                f"{labels.dtype} {list(labels.shape)}",
                "pass the labels, or a tuple (images, labels)",
            )
        )
    if (ratio is None) == (count is None):
        raise ValueError(
            message("reserve", "ratio, count", "one of the two", f"{ratio=}, {count=}", "say how many samples to draw")
        )
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise ValueError(message("reserve", "ratio", "a number in (0, 1]", str(ratio), "pass 0.05 for 5 %"))
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(message("reserve", "count", "a whole number, at least 1", repr(count), "draw at least one"))
    if draw not in {"permutation", "backdoorbench"}:
        raise ValueError(
            message("reserve", "draw", "'permutation' or 'backdoorbench'", repr(draw), "pass one of the two")
        )
    if draw == "backdoorbench" and per_class:
        raise ValueError(
            message(
                "reserve", "per_class", "False with draw='backdoorbench'", "True", "BackdoorBench draws from the set"
            )
        )


def _size(available: int, ratio: float | None, count: int | None, what: str) -> int:
    """Samples to draw of ``available``."""
    if count is None:
        assert ratio is not None
        return int(available * ratio)
    if count > available:
        raise ValueError(
            message("reserve", "count", f"at most {available}, all of {what}", str(count), "draw fewer samples")
        )
    return count
