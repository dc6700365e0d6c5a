"""What the commands leave: a folder of results that appears as a whole, tables, JSON and CSV."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bdfast.errors import message
from bdfast.files import atomic_write
from bdfast.metrics import Metrics, defense_effectiveness_rating, robust_improvement_rating
from bdfast.runtime.plain_json import plain

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

RESUME_FILE = "resume.pt"
"""Where training stands, while it goes on; the same command continues from it."""

_UNFINISHED = ".unfinished-"

RATES = {"ACC": "acc", "ASR": "asr", "RA": "ra"}


@contextmanager
def results_folder(where: str, out: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write results to; they move into ``out`` when the block ends, and vanish if it raises.

    So ``out`` never holds half of a run. What was there under the same names is replaced.

    Raises:
        ValueError: ``out`` is a file.
        KeyboardInterrupt: with a message that says what was kept.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(message(where, "--out", "a folder", f"{folder}, a file", "choose another path"))
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    held = _lock(staging)
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
        (folder / RESUME_FILE).unlink(missing_ok=True)
    except KeyboardInterrupt as interrupt:
        kept = f"no result was written to {folder}"
        if (folder / RESUME_FILE).exists():
            kept += f"; the same command goes on where training stopped ({folder / RESUME_FILE})"
        raise KeyboardInterrupt(kept) from interrupt
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if held is not None:
            os.close(held)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def _remove_abandoned(folder: Path) -> None:
    """What runs that were killed have left: folders that no process has locked."""
    for staging in folder.glob(f"{_UNFINISHED}*"):
        held = _lock(staging)
        if held is not None:
            shutil.rmtree(staging, ignore_errors=True)
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder for this process until it is closed; None where it is another's."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held, or a file system without locks
        os.close(descriptor)
        return None
    return descriptor


def to_json(value: Any) -> str:
    """Indented JSON of :func:`bdfast.runtime.plain_json.plain`."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write :func:`to_json`."""
    with atomic_write(path) as file:
        file.write(to_json(value) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """BackdoorBench's form: an unnamed first column that counts rows, ``nan_value`` for what is missing or NaN."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *columns])
        for number, row in enumerate(rows):
            writer.writerow([number, *(_cell(row.get(column, math.nan)) for column in columns)])


def _cell(value: Any) -> Any:
    return "nan_value" if isinstance(value, float) and not math.isfinite(value) else value


def epoch_rows(history: Sequence[Mapping[str, Any]], before: Metrics | None, after: Metrics) -> list[dict[str, Any]]:
    """Rows of ``results.csv``: epoch 0 is the model before, the test rates of the last epoch are those after.

    ``train_loss`` is the mean over samples; BackdoorBench's ``..._avg_over_batch`` columns, which weigh a small last
    batch like a full one, are left out.
    """
    rows: list[dict[str, Any]] = [] if before is None else [{"epoch": 0, **_test_rates(before)}]
    for record in history:
        row = {"epoch": record["epoch"], "train_loss": record["loss"], "train_acc": record["accuracy"]}
        rows.append({**row, "lr": record["lr"], **_totals(record)})
    if rows:
        rows[-1].update(_test_rates(after))
    return rows


def _totals(record: Mapping[str, Any]) -> dict[str, float]:
    """Per-layer numbers of a record, such as D3's distances, summed."""
    return {key: sum(value.values()) for key, value in record.items() if isinstance(value, Mapping) and key != "norm"}


def _test_rates(metrics: Metrics) -> dict[str, float]:
    return {"test_acc": metrics.acc, "test_asr": metrics.asr, "test_ra": metrics.ra}


def ratings(before: Metrics, after: Metrics) -> dict[str, float]:
    """DER and RIR, from before to after."""
    return {"DER": defense_effectiveness_rating(before, after), "RIR": robust_improvement_rating(before, after)}


def table(rows: Mapping[str, Metrics], *, extended: bool = False) -> str:
    """Rates in percent, a row a model; from the second row on DER against the first.

    Example:
        >>> print(table({"before": Metrics(acc=0.9, asr=1.0), "d3": Metrics(acc=0.8, asr=0.0)}))
                   ACC     ASR      RA     DER
        before    90.0   100.0       -       -
        d3        80.0     0.0       -    95.0
    """
    columns = {**RATES, **({"ASR+target": "asr_with_target", "ACC-target": "acc_without_target"} if extended else {})}
    first = next(iter(rows.values()))
    compared = len(rows) > 1
    widths = [max(6, len(name)) for name in [*columns, *(["DER"] if compared else [])]]
    left = max(map(len, rows))
    lines = [" " * left + "".join(f"  {name:>{w}}" for name, w in zip([*columns, "DER"], widths, strict=False))]
    for label, metrics in rows.items():
        numbers = [getattr(metrics, name) for name in columns.values()]
        if compared:
            numbers.append(math.nan if metrics is first else ratings(first, metrics)["DER"])
        cells = ("-" if math.isnan(x) else f"{100 * x:.1f}" for x in numbers)
        lines.append(f"{label:<{left}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths, strict=True)))
    return "\n".join(lines)
