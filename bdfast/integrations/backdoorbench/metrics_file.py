"""``<method>_df.csv`` and ``<method>_df_summary.csv``: BackdoorBench's tables of metrics.

A row an epoch behind an unnamed column that counts them; NaN is the text ``nan_value``, and a metric that an epoch
lacks is an empty cell. The summary has, for each column, the last value, the largest, and whether a NaN occurs.

Losses in these files (``..._loss_avg_over_batch``) are means of the means of batches, so that a small last batch weighs
like a full one: :func:`mean_of_batches`.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdfast.errors import message
from bdfast.files import atomic_write

NAN = "nan_value"
MAX_BYTES = 1 << 28


def write_metrics(folder: str | os.PathLike[str], method: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write both tables into a folder that exists.

    Args:
        folder: of the defense (or of the attack).
        method: opens the names of the files: ``d3``, or ``attack``.
        rows: one mapping an epoch; None leaves a cell empty.
    """
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [[number, *(_cell(row.get(column, "")) for column in columns)] for number, row in enumerate(rows)]
    _write(Path(folder) / f"{method}_df.csv", columns, table)
    present = {column: [row[column] for row in rows if column in row] for column in columns}
    summary = [
        ["last", *(_cell(present[column][-1]) for column in columns)],
        ["valid_max", *(_largest(present[column]) for column in columns)],
        ["exist_nan_value", *(any(map(_is_nan, present[column])) for column in columns)],
    ]
    _write(Path(folder) / f"{method}_df_summary.csv", columns, summary)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a table by column name; ``nan_value`` is NaN, empty cells and cells that are no numbers are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no table.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_metrics(folder, "d3", [{"epoch": 1, "test_acc": 0.9, "test_asr": float("nan")}])
        ...     read_metrics(f"{folder}/d3_df.csv")
        [{'epoch': 1.0, 'test_acc': 0.9, 'test_asr': nan}]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            message("read_metrics", str(path), "a table of metrics", "no such file", "check the path")
        )
    if path.stat().st_size > MAX_BYTES:
        got = str(path.stat().st_size)
        raise ValueError(
            message("read_metrics", str(path), f"at most {MAX_BYTES} bytes", got, "pass a table of metrics")
        )
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        try:
            lines = list(csv.reader(file))
        except csv.Error as error:
            raise ValueError(
                message("read_metrics", str(path), "a table", str(error), "fetch the file again")
            ) from error
    if not lines or len(lines[0]) < 2:
        raise ValueError(message("read_metrics", str(path), "a header of columns", "none", "fetch the file again"))
    header = lines[0][1:]
    return [
        {name: number for name, cell in zip(header, line[1:], strict=False) if (number := _number(cell)) is not None}
        for line in lines[1:]
        if line
    ]


def mean_of_batches(losses: Sequence[float], sizes: Sequence[int]) -> float:
    """``..._loss_avg_over_batch`` from the losses of samples: the mean of each batch, then the mean of those.

    Example:
        >>> mean_of_batches([1.0, 1.0, 1.0, 5.0], sizes=[3, 1])  # the mean over samples is 2.0
        3.0
    """
    if sum(sizes) != len(losses) or not sizes or min(sizes) < 1:
        got = f"{list(sizes)[:8]}"
        raise ValueError(message("mean_of_batches", "sizes", f"sizes that add up to {len(losses)}", got, "count again"))
    means, start = [], 0
    for size in sizes:
        means.append(math.fsum(losses[start : start + size]) / size)
        start += size
    return math.fsum(means) / len(means)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _cell(value: Any) -> Any:
    return NAN if _is_nan(value) else value


def _largest(values: Sequence[Any]) -> Any:
    numbers = [value for value in values if isinstance(value, (int, float)) and not _is_nan(value)]
    return float(max(numbers)) if numbers else ""


def _number(cell: str) -> float | None:
    if cell == NAN:
        return math.nan
    try:
        return float(cell)
    except ValueError:
        return None


def _write(path: Path, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["", *columns])
        writer.writerows(lines)
