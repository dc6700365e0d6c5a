r"""A pixel for every sample id, uniform over the image: where its patch goes in a round.

.. math::

    (w_0, w_1, \cdot, \cdot) = \mathrm{Philox}_{\mathrm{key}}(\mathrm{id}, 0), \qquad
    (\lfloor w_0 H / 2^{32} \rfloor, \lfloor w_1 W / 2^{32} \rfloor)

The key is a hash of (seed, round). See :mod:`bdfast.ops.philox`.

Bytes moved a sample: 16.
"""

from __future__ import annotations

from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_cuda
from bdfast.backends.devices import on_device_of, stream_of
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import patches
from bdfast.ops.philox import philox4x32, stream_key

NAME = "patch_centers"


def patch_centers(
    ids: Tensor,  # [N]
    height: int,
    width: int,
    *,
    seed: int,
    round: SupportsIndex = 0,
    backend: str = "auto",
) -> Tensor:  # [N, 2]
    """A uniform pixel for every sample id, as a function of ``(seed, round, id)`` and the image size alone.

    Args:
        ids: ``[N]`` int64, the index of each sample in its data set.
        height: of the images, in pixels.
        width: of the images, in pixels.
        seed: any integer of 64 bits.
        round: redraws all centers; any integer of 64 bits.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[N, 2]`` int32, (row, column). The same bits on every backend and device, whatever the batch that an id is in.

    Notes:
        A pixel's probability is off from ``1 / (height * width)`` by less than ``2^-31``. A captured CUDA graph repeats
        the round that it was captured with.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: sizes or seeds out of range.

    Example:
        >>> import torch, bdfast
        >>> bdfast.ops.patch_centers(torch.tensor([7, 8, 7]), 32, 32, seed=0)
        tensor([[...]], dtype=torch.int32)
    """
    patches.check_ids(NAME, ids)
    for name, size in (("height", height), ("width", width)):
        if not 0 < size < 2**31:
            raise ValueError(message(NAME, name, "an integer in [1, 2^31)", str(size), "pass the images' size"))
    numbers = patches.check_seed(NAME, "seed", seed), patches.check_seed(NAME, "round", round)
    return cast(Tensor, CENTERS(ids, height, width, *numbers, requested(backend, NAME)))


# --- reference: the definition in plain PyTorch ----------------------------------------------------------------------


def reference(
    ids: Tensor,  # [N]
    height: int,
    width: int,
    seed: int,
    round: int,
) -> Tensor:
    """The centers in int64 arithmetic."""
    row, column, _, _ = philox4x32(stream_key(seed, NAME, round), ids, torch.zeros_like(ids))
    return torch.stack(((row * height) >> 32, (column * width) >> 32), dim=1).to(torch.int32)


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(ids: Tensor, height: int, width: int, seed: int, round: int) -> Tensor:
    ids = ids.contiguous()
    centers = ids.new_empty((len(ids), 2), dtype=torch.int32)
    key = stream_key(seed, NAME, round)
    native().patch_centers(ids.data_ptr(), len(ids), height, width, key, centers.data_ptr())
    return centers


def _cuda(ids: Tensor, height: int, width: int, seed: int, round: int) -> Tensor:
    ids = ids.contiguous()
    centers = ids.new_empty((len(ids), 2), dtype=torch.int32)
    key = stream_key(seed, NAME, round)
    with on_device_of(ids):
        native().patch_centers_cuda(ids.data_ptr(), len(ids), height, width, key, centers.data_ptr(), stream_of(ids))
    return centers


def _fake(ids: Tensor, *_: Any) -> Tensor:
    return ids.new_empty((ids.shape[0], 2), dtype=torch.int32)


# Ids are checked to be int64, and the numbers drawn have no dtype to choose: any key will do.


def _runs_cpp(ids: Any) -> str | None:
    return runs_cpp(ids, (ids.dtype,))


def _runs_cuda(ids: Any) -> str | None:
    return runs_cuda(ids, (ids.dtype,))


CENTERS = Op(
    name="patch_centers",
    public=NAME,
    schema="(Tensor ids, SymInt height, SymInt width, SymInt seed, SymInt round, str backend) -> Tensor",
    fake=_fake,
    key=lambda ids, *_: ids,
    implementations=(
        Implementation("cpp", _cpp, _runs_cpp),
        Implementation("cuda", _cuda, _runs_cuda),
        Implementation("reference", reference, always),
    ),
)
