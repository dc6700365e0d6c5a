"""Chunks: one grid whoever computes them, kept once they are there, halved where memory ends."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bdfast.runtime.chunks import ChunkStore, Columns, backing_off, in_chunks, is_out_of_memory
from bdfast.runtime.ranks import Ranks

KINDS = {"value": (torch.float32, 1)}


def squares(rows: range) -> Columns:
    return {"value": torch.tensor([float(i * i) for i in rows])}


def store(folder: Path, run: str = "a", count: int = 10) -> ChunkStore:
    return ChunkStore(
        "score", "checkpoint", folder, format="test/1", run=run, count=count, chunk=4, kinds=KINDS
    )  # fmt: skip


def test_rows_in_order_and_progress() -> None:
    told: list[int] = []
    columns = in_chunks(10, 4, squares, finished=told.append)
    assert columns["value"].tolist() == [float(i * i) for i in range(10)]
    assert told == [4, 8, 10]


def test_what_is_kept_is_not_computed_again(tmp_path: Path) -> None:
    asked: list[range] = []

    def compute(rows: range) -> Columns:
        asked.append(rows)
        return squares(rows)

    first = in_chunks(10, 4, compute, store=store(tmp_path))
    assert asked == [range(4), range(4, 8), range(8, 10)]
    (tmp_path / "scores-000001.npz").write_bytes(b"cut off")
    asked.clear()
    again = in_chunks(10, 4, compute, store=store(tmp_path))
    assert asked == [range(4, 8)]
    assert torch.equal(first["value"], again["value"])


def test_an_error_leaves_what_was_finished(tmp_path: Path) -> None:
    def compute(rows: range) -> Columns:
        if rows.start == 4:
            raise KeyboardInterrupt
        return squares(rows)

    with pytest.raises(KeyboardInterrupt):
        in_chunks(10, 4, compute, store=store(tmp_path))
    assert store(tmp_path).load(range(4)) is not None
    assert store(tmp_path).load(range(4, 8)) is None


@pytest.mark.parametrize(
    "arrays",
    [
        {"value": np.zeros(3, np.float32)},
        {"value": np.zeros(4, np.float64)},
        {"value": np.zeros((4, 1), np.float32)},
        {"other": np.zeros(4, np.float32)},
        {"value": np.array([print] * 4, dtype=object)},
    ],
)
def test_chunks_of_another_form_count_as_missing(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    kept = store(tmp_path)
    np.savez(tmp_path / "scores-000000.npz", run=np.array("a"), **arrays)
    assert kept.load(range(4)) is None


def test_a_chunk_of_another_run_counts_as_missing(tmp_path: Path) -> None:
    kept = store(tmp_path)
    np.savez(tmp_path / "scores-000000.npz", run=np.array("b"), value=np.zeros(4, np.float32))
    assert kept.load(range(4)) is None
    np.savez(tmp_path / "scores-000000.npz", run=np.array("a"), value=np.zeros(4, np.float32))
    assert kept.load(range(4)) is not None


def test_another_run_is_refused(tmp_path: Path) -> None:
    store(tmp_path)
    assert json.loads((tmp_path / "manifest.json").read_text()) == {
        "format": "test/1", "run": "a", "samples": 10, "chunk": 4,
    }  # fmt: skip
    for other in ({"run": "b"}, {"count": 11}):
        with pytest.raises(ValueError, match=r"score: `checkpoint` expected scores of this very run .*; take another"):
            store(tmp_path, **other)  # type: ignore[arg-type]


def test_memory_that_ends_halves_only_what_fails() -> None:
    """Rows 4 to 7 are too many for the machine, the rest is not."""
    asked: list[range] = []

    def compute(rows: range) -> Columns:
        asked.append(rows)
        if len(rows) > 2 and rows.start >= 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return squares(rows)

    parts = [part for rows in (range(4), range(4, 8)) for part in backing_off(compute, rows)]
    assert [(rows, halved) for rows, _, halved in parts] == [
        (range(4), False), (range(4, 6), True), (range(6, 8), True),
    ]  # fmt: skip
    assert asked == [range(4), range(4, 8), range(4, 6), range(6, 8)]
    assert torch.cat([columns["value"] for _, columns, _ in parts]).tolist() == [float(i * i) for i in range(8)]


def test_one_row_that_does_not_fit_and_other_errors_are_raised() -> None:
    def never(rows: range) -> Columns:
        raise torch.OutOfMemoryError(f"{len(rows)} rows")

    def other(rows: range) -> Columns:
        raise RuntimeError("shapes")

    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        list(backing_off(never, range(4)))
    with pytest.raises(RuntimeError, match="shapes"):
        list(backing_off(other, range(4)))
    assert is_out_of_memory(MemoryError())


class Second(Ranks):
    """The second of two processes, which hears nothing of the first."""

    def __init__(self) -> None:
        super().__init__(1, 2)

    def gather(self, value):  # type: ignore[no-untyped-def]
        return [value]

    def share(self, make):  # type: ignore[no-untyped-def]
        return make()


def test_ranks_take_turns_over_what_is_missing(tmp_path: Path) -> None:
    kept = store(tmp_path, count=24)
    for start in (0, 8):
        kept.save(range(start, start + 4), squares(range(start, start + 4)))
    told: list[int] = []
    in_chunks(24, 4, squares, store=kept, ranks=Second(), finished=told.append)
    assert told == [4, 8]  # of 4, 12, 16, 20 the chunks at 12 and 20
    assert [kept.load(range(start, start + 4)) is not None for start in range(0, 24, 4)] == [
        True, False, True, True, False, True,
    ]  # fmt: skip
