"""Processes that share one piece of work, as ``torchrun`` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Its functions have the group of the moment of its import as a default, and DistributedDataParallel imports it
    # late, after init_process_group: the group and its threads would then live until the interpreter ends, and a
    # thread of gloo that lets go of a tensor just then aborts the process.
    import torch.distributed.nn.functional

T = TypeVar("T")


class Share(NamedTuple):
    """One rank's part of a batch."""

    rows: slice
    weight: float  # of its mean in the batch's; those of all ranks add up to 1


@dataclass(frozen=True)
class Ranks:
    """This process among its fellows; alone by default.

    Attributes:
        rank: this process's number, 0 .. size - 1.
        size: how many there are.

    Example:
        >>> Ranks().share(lambda: 3), Ranks().gather(5)
        (3, [5])
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> Ranks:
        """The ranks of ``torch.distributed``, or this process alone where it was not initialised."""
        return cls(dist.get_rank(), dist.get_world_size()) if cls.initialized() else cls()

    @staticmethod
    def initialized() -> bool:
        """Whether ``torch.distributed`` is there and was initialised."""
        return dist.is_available() and dist.is_initialized()

    def share(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. What it raises is raised on every rank, so that none waits for ever."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box.pop()  # its traceback holds this frame: were it still in here, neither would go without gc
        value: T = box[0]
        return value

    def divide(self, count: int) -> Share:
        """This rank's part of a batch of ``count`` samples: as equal as can be, in the order of the ranks.

        A part has at least two samples, since batch norm has no use for one: of a batch too small for that, every
        rank takes the whole.

        Example:
            >>> [Ranks(rank, 2).divide(5).rows for rank in (0, 1)], Ranks(1, 2).divide(3)
            ([slice(0, 2, None), slice(2, 5, None)], Share(rows=slice(0, 3, None), weight=0.5))
        """
        if count < 2 * self.size:
            return Share(slice(0, count), 1 / self.size)
        start, stop = (count * rank // self.size for rank in (self.rank, self.rank + 1))
        return Share(slice(start, stop), (stop - start) / count)

    def add_(self, total: Tensor) -> None:
        """Replace ``total`` by the sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(total)

    def copy_(self, tensors: Iterable[Tensor]) -> None:
        """Replace ``tensors`` by those of rank 0."""
        if self.size == 1:
            return
        for tensor in tensors:
            value = tensor.detach().contiguous()
            dist.broadcast(value, 0)
            tensor.detach().copy_(value)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


ALONE = Ranks()


@contextmanager
def torchrun(minutes: float = 10.0) -> Iterator[Ranks]:
    """Join the processes that ``torchrun`` started, for the block; alone where there are none.

    A group that is there already is used as it is, and stays. Otherwise it is NCCL with a GPU for each process, chosen
    by ``LOCAL_RANK``, and gloo without GPUs.

    Args:
        minutes: how long a rank waits for the others before it gives up; torchrun ends all once one has failed.

    Example:
        >>> with torchrun() as ranks:
        ...     ranks
        Ranks(rank=0, size=1)
    """
    if Ranks.initialized() or not dist.is_available() or not dist.is_torchelastic_launched():
        yield Ranks.joined()
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=minutes))
    try:
        yield Ranks.joined()
    finally:
        dist.destroy_process_group()
