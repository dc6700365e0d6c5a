"""What the commands leave: a folder of results that appears as a whole, tables, JSON and CSV."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bdfast.cli.state import make_state_folder
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
def results_folder(
    where: str, out: str | os.PathLike[str], *, kept: Sequence[Path] = (), argument: str = "--out"
) -> Iterator[Path]:
    """A folder to write results to; they move into ``out`` when the block ends, and vanish if it raises.

    So ``out`` never holds half of a run. What was there under the same names is replaced.

    Args:
        where: opens the messages.
        out: made if it is not there.
        kept: what the same command continues from; it goes once the results are in place, and not before, so that a
            full disk or Ctrl-C at the very end costs no training. Where it lies in another folder than ``out``
            (:func:`bdfast.cli.state.state_folder`), that one is made, and goes with the last of it.
        argument: what messages call ``out``.

    Raises:
        ValueError: ``out`` is a file, or a folder stands where a result is to go.
        OSError: the system refuses; its ``filename`` is where the file would have ended.
        KeyboardInterrupt: with a message that says what there is.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(message(where, argument, "a folder", f"{folder}, a file", "choose another path"))
    made, moved = not folder.exists(), False
    states = sorted({path.parent for path in kept} - {folder})
    for state in states:
        make_state_folder(where, state)
    staging, held = folder / _UNFINISHED, None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        staging = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        held = _lock(staging)
        yield staging
        with _undisturbed():
            _move(where, staging, folder)
            moved = True
            _remove(kept)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"the results are in {folder}" if moved else _left(folder, kept)) from interrupt
    except OSError as error:
        final = _final(folder, error.filename)
        if error.errno is None or final is None:
            raise
        raise OSError(error.errno, error.strerror, str(final)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if held is not None:
            os.close(held)
        _remove([path for path in kept if not _holds_files(path)])
        _remove([state for state in states if not any(path.exists() for path in kept if path.parent == state)])
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _move(where: str, staging: Path, folder: Path) -> None:
    """Everything, or nothing where one of the names is taken by a folder."""
    paths = sorted(staging.iterdir())
    for path in paths:
        if (folder / path.name).is_dir():
            got = "a folder of this name"
            raise ValueError(message(where, str(folder / path.name), "a file to replace, or nothing", got, "move it"))
    for path in paths:
        os.replace(path, folder / path.name)


def _final(folder: Path, name: object) -> Path | None:
    """Where a file would have ended that was to be written first to a folder which is gone by now."""
    path = Path(str(name))
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else ()
    return folder.joinpath(*parts[1:]) if parts and parts[0].startswith(_UNFINISHED) else None


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _holds_files(path: Path) -> bool:
    return path.is_file() or any(inner.is_file() for inner in path.rglob("*"))


def _left(folder: Path, kept: Sequence[Path]) -> str:
    """What an interrupted run leaves."""
    text = f"no result was written to {folder}"
    there = [str(path) for path in kept if _holds_files(path)]
    return f"{text}; the same command goes on where it stopped ({', '.join(there)})" if there else text


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is done, which takes milliseconds."""
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    pressed: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


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
    rows += [_epoch_row(record) for record in history]
    if rows:
        rows[-1].update(_test_rates(after))
    return rows


def record_rows(history: Sequence[Mapping[str, Any]], after: Metrics) -> list[dict[str, Any]]:
    """Rows of a record's ``<method>_df.csv``, which are read by position: one an epoch, counted from 0, as there.

    What was not measured is left out, which makes an empty cell: the test rates of all epochs but the last, and the
    model before, whose rates are in ``metrics.json``. ``valid_max`` of the summary is so one of the model's own rates.
    """
    rows = [{**_epoch_row(record), "epoch": number} for number, record in enumerate(history)]
    if rows:
        rows[-1].update(_test_rates(after))
    return [{key: value for key, value in row.items() if not _is_nan(value)} for row in rows]


def _epoch_row(record: Mapping[str, Any]) -> dict[str, Any]:
    row = {"epoch": record["epoch"], "train_loss": record["loss"], "train_acc": record["accuracy"]}
    return {**row, "lr": record["lr"], **_totals(record)}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


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
    if any(not math.isnan(metrics.asr_others) for metrics in rows.values()):
        columns["ASR-others"] = "asr_others"
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
