"""A long pass over many rows in chunks: kept as they are finished, spread over processes, halved where memory ends.

The grid of chunks depends on the number of rows alone, neither on how many processes share the work nor on where an
earlier run was killed; what is computed for a row is then the same in every one of these cases, bit for bit.
"""

from __future__ import annotations

import gc
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from bdfast.data.archive import Archive
from bdfast.errors import message
from bdfast.files import atomic_write
from bdfast.runtime.ranks import Ranks

Columns: TypeAlias = "dict[str, Tensor]"
"""Tensors by name, on the CPU, of which row i speaks of row i of the chunk."""

Kinds: TypeAlias = "Mapping[str, tuple[torch.dtype, int]]"
"""Dtype and number of dimensions of each column."""

MANIFEST, MAX_MANIFEST = "manifest.json", 1 << 16  # bytes


def in_chunks(
    count: int,
    chunk: int,
    compute: Callable[[range], Columns],
    *,
    store: ChunkStore | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    finished: Callable[[int], object] | None = None,
) -> Columns:
    """Columns of all rows, from those of the chunks ``[0, chunk), [chunk, 2 chunk), ...``.

    Args:
        count: rows, at least one.
        chunk: rows a chunk; the last one may have fewer.
        compute: the columns of some rows.
        store: where chunks are kept and found again; every rank has to see the same folder.
        ranks: the processes that share the work. All of them call this and get all columns.
        finished: told the number of this process's rows that are done after every chunk.

    Example:
        >>> in_chunks(5, 2, lambda rows: {"square": torch.tensor([i * i for i in rows])})
        {'square': tensor([ 0,  1,  4,  9, 16])}
    """
    grid = [range(start, min(start + chunk, count)) for start in range(0, count, chunk)]
    found = [None if store is None else store.load(rows) for rows in grid]
    # Every rank must hold the same list of what is missing, however late it looks into the folder.
    missing = ranks.share(lambda: [i for i, columns in enumerate(found) if columns is None])
    done = 0
    made: dict[int, Columns] = {}
    for i in missing[ranks.rank :: ranks.size]:
        made[i] = compute(grid[i])
        if store is not None:
            store.save(grid[i], made[i])
        done += len(grid[i])
        if finished is not None:
            finished(done)
    for part in ranks.gather(made):
        for i, columns in part.items():
            found[i] = columns
    whole = [columns if columns is not None else compute(rows) for rows, columns in zip(grid, found, strict=True)]
    return {name: torch.cat([columns[name] for columns in whole]) for name in whole[0]}


class ChunkStore:
    """A folder of chunks, one ``.npz`` each, and a manifest that says of which run they are.

    Chunks are written beside and put in place whole; what is damaged counts as missing and is computed again.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        argument: the name of the argument that holds the folder.
        folder: made where it is missing.
        format: name and version of what is kept.
        run: what the rows depend on, as a hash.
        count: rows of the whole run.
        chunk: rows a chunk.
        kinds: dtype and dimensions of each column.
        note: what :func:`note_of` is to tell a later run, a number say.

    Raises:
        ValueError: the folder belongs to another run.
    """

    def __init__(
        self,
        where: str,
        argument: str,
        folder: str | os.PathLike[str],
        *,
        format: str,
        run: str,
        count: int,
        chunk: int,
        kinds: Kinds,
        note: object = None,
    ) -> None:
        self._folder, self._run, self._chunk, self._kinds = Path(folder), run, chunk, kinds
        manifest = {"format": format, "run": run, "samples": count, "chunk": chunk}
        manifest |= {} if note is None else {"note": note}
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / MANIFEST
        if not file.exists():
            with atomic_write(file) as stream:
                json.dump(manifest, stream)
        elif _read_manifest(file) != manifest:
            got = "one of another model, config or data set, or a damaged one"
            remedy = "take another folder, or empty this one to start afresh"
            raise ValueError(message(where, argument, f"scores of this very run in {folder}", got, remedy))

    def _file(self, rows: range) -> Path:
        return self._folder / f"scores-{rows.start // self._chunk:06d}.npz"

    def save(self, rows: range, columns: Columns) -> None:
        """Keep a chunk."""
        content = io.BytesIO()
        arrays: dict[str, Any] = {name: columns[name].numpy() for name in self._kinds}
        np.savez(content, run=np.array(self._run), **arrays)
        with atomic_write(self._file(rows), "wb") as stream:
            stream.write(content.getvalue())

    def load(self, rows: range) -> Columns | None:
        """A chunk, or None where it is missing or damaged."""
        try:
            with Archive(self._file(rows)) as archive:
                if str(archive.read("run")) != self._run:
                    return None
                columns = {name: torch.from_numpy(archive.read(name)) for name in self._kinds}
        except Exception:  # a damaged file can fail in any way
            return None
        fits = all(
            columns[name].dtype == dtype and columns[name].ndim == ndim and len(columns[name]) == len(rows)
            for name, (dtype, ndim) in self._kinds.items()
        )
        return columns if fits else None


def note_of(folder: str | os.PathLike[str]) -> object:
    """The note that a :class:`ChunkStore` left in its folder, or None."""
    file = Path(folder) / MANIFEST
    manifest = _read_manifest(file) if file.is_file() else None
    return manifest.get("note") if isinstance(manifest, dict) else None


def _read_manifest(file: Path) -> object:
    if file.stat().st_size > MAX_MANIFEST:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def backing_off(
    compute: Callable[[range], Columns],
    rows: range,
    *,
    halved: bool = False,
) -> Iterator[tuple[range, Columns, bool]]:
    """Compute rows at once or, where memory runs out, in halves: (rows, columns, whether they are part of a half).

    Raises:
        Whatever ``compute`` raises, lack of memory for a single row among it.

    Example:
        >>> def at_most_two(rows):
        ...     if len(rows) > 2:
        ...         raise torch.OutOfMemoryError("three are too many")
        ...     return {}
        >>> [(list(rows), halved) for rows, _, halved in backing_off(at_most_two, range(3))]
        [([0], True), ([1, 2], True)]
    """
    try:
        columns: Columns | None = compute(rows)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(rows) == 1:
            raise
        columns = None
    if columns is not None:
        yield rows, columns, halved
        return
    gc.collect()  # the traceback, gone by now, held on to what had been allocated
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = rows.start + len(rows) // 2
    for half in (range(rows.start, middle), range(middle, rows.stop)):
        yield from backing_off(compute, half, halved=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of a GPU or of the machine.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")), is_out_of_memory(RuntimeError("other"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


# torch has no class of its own for what its CPU allocator and the libraries below it raise.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory")
