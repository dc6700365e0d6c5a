"""A number for every sample, and what is known of it: in memory, as CSV, as ``.npz``."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdfast.data.archive import Archive
from bdfast.errors import message
from bdfast.files import atomic_write

MAX_BYTES = 4 * 2**30  # of a file that is read
_OWN = ("id", "score")


@dataclass(frozen=True)
class ScoreTable:
    """Scores of samples by their index in the data set.

    Attributes:
        ids: int64 ``[N]``, ascending or as they were asked for.
        scores: float32 ``[N]``; NaN is a sample in quarantine: it has no score and is never ranked.
        columns: further tensors ``[N]`` by name (bool, int64 or float32), such as ``halved``: computed in a smaller
            batch than the rest, because memory ran out.

    Raises:
        ValueError: lengths or dtypes do not fit.

    Example:
        >>> table = ScoreTable(torch.tensor([7, 8, 9]), torch.tensor([0.5, float("nan"), 2.0]))
        >>> len(table), table.quarantined, table.ranking(), table.top(1)
        (3, tensor([8]), tensor([9, 7]), tensor([9]))
    """

    ids: Tensor
    scores: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = {"ids": (self.ids, torch.int64), "scores": (self.scores, torch.float32)}
        for name, (value, dtype) in kinds.items():
            if value.dtype != dtype or value.ndim != 1 or len(value) != len(self.ids):
                got, expected = f"{value.dtype} {list(value.shape)}", f"{dtype} [{len(self.ids)}]"
                raise ValueError(message("ScoreTable", name, expected, got, "convert it"))
        for name, value in self.columns.items():
            if name in _OWN or value.shape != self.ids.shape or value.dtype not in _CELLS:
                got, expected = f"{name!r}: {value.dtype} {list(value.shape)}", f"bool, int64 or float32 {len(self)}"
                raise ValueError(message("ScoreTable", "columns", expected, got, "convert or rename it"))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def quarantined(self) -> Tensor:
        """Ids of the samples without a score."""
        return self.ids[self.scores.isnan()]

    def ranking(self, *, largest: bool = True) -> Tensor:
        """Ids in the order of their scores, the lower id first among equals; those in quarantine are left out."""
        ids, order = self.ids.sort()
        scores = self.scores[order]
        ids, scores = ids[~scores.isnan()], scores[~scores.isnan()]
        return ids[torch.sort(scores, descending=largest, stable=True).indices]

    def top(self, k: int, *, largest: bool = True) -> Tensor:
        """The first k ids of :meth:`ranking`, or all where there are fewer."""
        return self.ranking(largest=largest)[:k]

    def auroc(self, positive: Tensor) -> float:
        r"""Probability that a positive sample scores above another one, ties counting half (Mann-Whitney U).

        Args:
            positive: bool ``[N]``, row by row as in the table.

        Returns:
            NaN where one of the two kinds is missing among the samples with a score.

        Example:
            >>> table = ScoreTable(torch.arange(4), torch.tensor([0.1, 0.4, 0.4, 0.9]))
            >>> table.auroc(torch.tensor([False, False, True, True]))
            0.875
        """
        scored = ~self.scores.isnan()
        scores, flags = self.scores[scored], positive.cpu()[scored]
        pos, neg = scores[flags].sort().values, scores[~flags].sort().values
        if len(pos) == 0 or len(neg) == 0:
            return float("nan")
        below = torch.searchsorted(neg, pos) + torch.searchsorted(neg, pos, right=True)
        return float(below.double().mean()) / (2 * len(neg))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.csv`` (a header, a row a sample) or an ``.npz``; the file appears whole or not at all.

        Raises:
            ValueError: another suffix.
            FileNotFoundError: no such folder.
        """
        path = Path(path)
        values = {"id": self.ids, "score": self.scores, **self.columns}
        if _suffix("save", path) == ".npz":
            with atomic_write(path, "wb") as stream:
                np.savez(stream, **{name: value.numpy() for name, value in values.items()})  # type: ignore[arg-type]
            return
        cells = [[_CELLS[value.dtype](x) for x in value.tolist()] for value in values.values()]
        with atomic_write(path, newline="") as file:
            writer = csv.writer(file)
            writer.writerow(values)
            writer.writerows(zip(*cells, strict=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ScoreTable:
        """Read what :meth:`save` wrote, bit for bit; nothing in the file is run.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another suffix, too large, or no such table.
        """
        path = Path(path)
        suffix = _suffix("load", path)
        if not path.is_file():
            raise FileNotFoundError(message("ScoreTable.load", str(path), "a file", "none", "check the path"))
        if path.stat().st_size > MAX_BYTES:
            got = f"{path.stat().st_size} bytes"
            raise ValueError(message("ScoreTable.load", str(path), f"at most {MAX_BYTES} bytes", got, "split it"))
        try:
            values = _read_npz(path) if suffix == ".npz" else _read_csv(path)
            return cls(values.pop("id"), values.pop("score"), values)
        except Exception as error:  # a damaged file can fail in any way
            got = f"another one ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            remedy = "write it with ScoreTable.save"
            raise ValueError(message("ScoreTable.load", str(path), "a table of scores", got, remedy)) from error


# Nine digits tell a float32 from its neighbours.
_CELLS: dict[torch.dtype, Callable[[Any], str]] = {
    torch.int64: str,
    torch.float32: lambda x: f"{x:.9g}",
    torch.bool: lambda x: str(x).lower(),
}


def _suffix(where: str, path: Path) -> str:
    if path.suffix not in (".csv", ".npz"):
        got = repr(path.name)
        raise ValueError(message(f"ScoreTable.{where}", "path", "a name that ends in .csv or .npz", got, "rename it"))
    return path.suffix


def _read_npz(path: Path) -> dict[str, Tensor]:
    with Archive(path) as archive:
        return {name: torch.from_numpy(archive.read(name)) for name in archive.order}


def _read_csv(path: Path) -> dict[str, Tensor]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names = next(reader)
        columns: list[list[str]] = [list(column) for column in zip(*reader, strict=True)] or [[] for _ in names]
    return {name: _column(name, cells) for name, cells in zip(names, columns, strict=True)}


def _column(name: str, cells: list[str]) -> Tensor:
    if cells and set(cells) <= {"true", "false"}:
        return torch.tensor([cell == "true" for cell in cells])
    if name != "score" and not any(set(cell) - set("-0123456789") for cell in cells):
        return torch.tensor([int(cell) for cell in cells], dtype=torch.int64)
    return torch.tensor([float(cell) for cell in cells], dtype=torch.float32)
