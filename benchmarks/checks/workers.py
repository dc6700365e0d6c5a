"""Work of many ops shared by processes, where there are cores for them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

from benchmarks.stage import Context

T = TypeVar("T")

CORES_A_PROCESS = 2  # other stages run at the same time
MOST = 8  # each holds a CUDA context of half a gigabyte


def each(work: Callable[[str], T], names: Sequence[str], context: Context) -> Iterator[T]:
    """``work`` of every name, as they are done: on a GPU in several processes, in this one elsewhere."""
    count = min(MOST, (os.cpu_count() or 1) // CORES_A_PROCESS)
    if context.device.type == "cpu" or count < 2:
        yield from map(work, names)
        return
    # Spawned: a forked child cannot use CUDA.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(work, name) for name in names]):
            yield done.result()
