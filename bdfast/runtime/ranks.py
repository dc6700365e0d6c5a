"""Processes that share one piece of work, as ``torchrun`` starts them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

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
            raise box[1]
        value: T = box[0]
        return value

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values
