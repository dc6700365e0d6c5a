r"""Each image's perturbation shrunk to a ball, in place.

.. math::

    d_i \leftarrow d_i \min(1, r / \lVert d_i \rVert_p), \qquad p \in \{1, 2\}

The Euclidean projection for p = 2. For p = 1 the scaled point lies on the ball too, but is not the nearest one.

Bytes moved an element: one read and one write (the second read finds an image in cache), a read alone inside the ball.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_cuda
from bdfast.backends.devices import on_device_of, stream_of
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import channels as ch
from bdfast.ops.precision import compute_dtype
from bdfast.ops.rows import DTYPE_CODE
from bdfast.ops.validation import check_floating, is_number

NAME = "scale_to_ball_"
BLOCKS = 512  # of a GPU that together have enough loads on their way; kScaleToBallParts in csrc/include/cuda_api.h
PART = 4096  # least elements of a part: two loads of 16 bytes a thread, in float32


def scale_to_ball_(
    perturbation: Tensor,  # [N, ...]
    radius: float | Tensor,
    p: int = 2,
    *,
    backend: str = "auto",
) -> Tensor:
    """Scale each image of ``perturbation`` to norm ``radius`` where its norm is larger; returns ``perturbation``.

    Args:
        perturbation: ``[N, ...]``, one image a row, changed in place; float32, float16, bfloat16 or (on the reference)
            float64; any strides (a copy is made, and written back, where images are not dense).
        radius: of the ball, a number >= 0 or ``[N]``; a negative entry of a tensor counts as 0.
        p: 1 for the sum of magnitudes, 2 for the Euclidean norm.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``perturbation``. Images inside the ball keep their bits. The norm is accumulated in float64. An image with a
        NaN becomes NaN, one with an infinity NaN there and 0 elsewhere.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or numbers are wrong.

    Example:
        >>> import torch, bdfast
        >>> bdfast.ops.scale_to_ball_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]), 1.0)
        tensor([[0.6000, 0.8000],
                [0.0000, 0.5000]])
    """
    check_floating(NAME, perturbation, "perturbation", "[N, ...]")
    if perturbation.dim() == 0:
        raise ValueError(message(NAME, "perturbation", "shape [N, ...]", "[]", "add a dimension of images"))
    if p not in (1, 2):
        raise ValueError(message(NAME, "p", "1 or 2", repr(p), "clamp elements for the maximum norm"))
    number, radii = _radius(radius, perturbation)
    SCALE(perturbation, number, radii, p, requested(backend, NAME))
    return perturbation


# --- reference: the equation in plain PyTorch ------------------------------------------------------------------------


@torch.no_grad()
def reference(perturbation: Tensor, radius: float, radii: Tensor | None, p: int) -> None:
    """The scales, in float64, of all images at once."""
    d = perturbation.double().flatten(1) if perturbation.dim() > 1 else perturbation.double()[:, None]
    norm = d.abs().sum(1) if p == 1 else d.square().sum(1).sqrt()
    r = torch.full_like(norm, radius) if radii is None else radii.to(norm.dtype).clamp_min(0.0)
    scale = torch.where(norm <= r, torch.ones_like(norm), r / norm)
    perturbation.copy_((d * scale[:, None]).reshape(perturbation.shape))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _on_dense_images(run: Any, perturbation: Tensor, radius: float, radii: Tensor | None, p: int) -> None:
    """Call ``run`` with images that follow each other in memory; copied and written back where they do not."""
    d = ch.dense(perturbation, ch.is_channels_last(perturbation))
    images = d.shape[0]
    run(
        d, d.data_ptr(), DTYPE_CODE[d.dtype], images, d.numel() // max(1, images), radius,
        0 if radii is None else radii.data_ptr(), p == 1,
    )  # fmt: skip
    if d is not perturbation:
        perturbation.copy_(d)


def _cpp(_: Tensor, *arguments: Any) -> None:
    native().scale_to_ball(*arguments)


def _cuda(d: Tensor, address: int, dtype: int, images: int, numel: int, *options: Any) -> None:
    parts = _parts(images, numel)
    partials = d.new_empty(images * parts if parts > 1 else 0, dtype=torch.float64)
    with on_device_of(d):
        native().scale_to_ball_cuda(address, dtype, images, numel, *options, parts, partials.data_ptr(), stream_of(d))


def _parts(images: int, numel: int) -> int:
    """Blocks that share an image: one where images are many or small. The same on every GPU, for the same bits."""
    return max(1, min(BLOCKS // max(1, images), numel // PART))


def _fake(*_: Any) -> None:
    return None


SCALE = Op(
    name="scale_to_ball_",
    public=NAME,
    schema="(Tensor(a!) perturbation, float radius, Tensor? radii, SymInt p, str backend) -> ()",
    fake=_fake,
    key=lambda perturbation, *_: perturbation,
    implementations=(
        Implementation("cpp", partial(_on_dense_images, _cpp), runs_cpp),
        Implementation("cuda", partial(_on_dense_images, _cuda), runs_cuda),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _radius(radius: float | Tensor, perturbation: Tensor) -> tuple[float, Tensor | None]:
    """``radius`` as the raw op takes it: a number, or ``[N]`` of the dtype that is computed in."""
    if isinstance(radius, Tensor):
        images = perturbation.shape[0]
        if radius.dim() > 1 or (radius.dim() == 1 and radius.shape[0] != images):
            expected, got = f"a number or a tensor [{images}]", f"shape {list(radius.shape)}"
            raise ValueError(message(NAME, "radius", expected, got, "pass one radius for all images or each"))
        if radius.device != perturbation.device:
            expected = f"the device of perturbation, {perturbation.device}"
            raise ValueError(message(NAME, "radius", expected, str(radius.device), "move it there"))
        return 0.0, radius.detach().to(compute_dtype(perturbation)).expand(images).contiguous()
    if not is_number(radius):
        raise TypeError(message(NAME, "radius", "a number or a tensor [N]", type(radius).__name__, "pass one of these"))
    if not 0.0 <= radius < math.inf:
        raise ValueError(message(NAME, "radius", "a finite number >= 0", str(radius), "correct it"))
    return float(radius), None
