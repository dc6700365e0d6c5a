"""A data set that is read in parts, so that no more of it than a part need be in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bdfast.data.dataset import as_tensors
from bdfast.runtime.determinism import isolated_rng, seed_host, stream_seed


class _Drawn(Dataset[Any]):
    """Some samples of a data set, each under a seed of its own; for the inside of :func:`isolated_rng`."""

    def __init__(self, dataset: Any, chosen: list[int]) -> None:
        self._dataset, self._chosen = dataset, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, position: int) -> Any:
        index = self._chosen[position]
        seed_host(stream_seed(index, "sample"))
        return self._dataset[index]


class Source:
    """Samples by index: of tensors by slice, of anything else sample by sample.

    A data set that augments gives a sample the same image each time: what was scored is what is trained on, in whatever
    parts the set is read, and a run that goes on does so with the same bits.

    Args:
        where: the function on whose behalf the data is read; it opens the messages.
        data: anything that :func:`bdfast.data.as_tensors` takes.
        argument: the name of its argument.

    Raises:
        TypeError, ValueError: as :func:`bdfast.data.as_tensors`, on construction or when a part is read.

    Example:
        >>> source = Source("example", (torch.zeros(5, 1, 2, 2), torch.arange(5)))
        >>> len(source), source.read(torch.tensor([4, 1]))[1]
        (5, tensor([4, 1]))
    """

    def __init__(self, where: str, data: object, argument: str = "poisoned_data") -> None:
        self._where, self._argument = where, argument
        inner = data.dataset if isinstance(data, DataLoader) else data
        held = isinstance(getattr(inner, "images", None), Tensor) and isinstance(getattr(inner, "labels", None), Tensor)
        lazy = isinstance(inner, Dataset) and not isinstance(inner, TensorDataset) and not held
        self._dataset: Any = inner if lazy and hasattr(inner, "__len__") and hasattr(inner, "__getitem__") else None
        self._tensors = None if self._dataset is not None else as_tensors(data, where, argument)

    def __len__(self) -> int:
        return len(self._dataset) if self._dataset is not None else len(self._tensors[1])  # type: ignore[arg-type,index]

    def read(
        self,
        indices: Tensor | range,  # [B]
    ) -> tuple[Tensor, Tensor]:
        """Images (uint8, or float in [0, 1]) and int64 labels of some samples."""
        if self._dataset is not None:
            chosen = indices.tolist() if isinstance(indices, Tensor) else list(indices)
            with isolated_rng(0):
                return as_tensors(_Drawn(self._dataset, chosen), self._where, self._argument)
        assert self._tensors is not None
        images, labels = self._tensors
        if isinstance(indices, range):
            return images[indices.start : indices.stop], labels[indices.start : indices.stop]
        return images[indices.to(images.device)], labels[indices.to(labels.device)]


def to_floats(
    images: Tensor,  # [B, C, H, W] uint8, or float in [0, 1]
    place: Tensor,
) -> Tensor:
    """Pixels in [0, 1], in the dtype and on the device of ``place``.

    Example:
        >>> to_floats(torch.tensor([[[[0, 255]]]], dtype=torch.uint8), torch.zeros(0))
        tensor([[[[0., 1.]]]])
    """
    x = images.to(place.device).to(place.dtype)
    # By a tensor: by a number, GPUs multiply with 1 / 255, which differs in the last bit. One that is filled there: a
    # number that is copied there makes the host wait.
    return x / torch.full((), 255, dtype=x.dtype, device=x.device) if images.dtype == torch.uint8 else x
