r"""Uniform noise inside a square patch of each image: the random start of projected gradient descent.

.. math::

    x' = \min(\max(x + \varepsilon u, l), u_{\max}), \qquad u = (\lfloor w / 2^8 \rfloor - 2^{23}) / 2^{23} \in [-1, 1)

The words :math:`w` come from Philox4x32-10 (see :mod:`bdfast.ops.philox`) under a key that is a hash of (seed, round),
at the counter (sample id, number of the quad): four pixels that are next to each other in a row of a channel, from a
column that is a multiple of four, share a counter and take a word each.

Bytes moved: one copy of the images, and 2 elements a patch pixel and channel; on a GPU the copy alone for whole images.
"""

from __future__ import annotations

from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp
from bdfast.backends.devices import on_device_of, stream_of
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import patches
from bdfast.ops.philox import philox4x32, stream_key
from bdfast.ops.precision import compute_dtype
from bdfast.ops.rows import DTYPE_CODE

NAME = "masked_random_start"


def masked_random_start(
    x: Tensor,  # [N, C, H, W]
    ids: Tensor,  # [N]
    centers: Tensor | None,  # [N, 2]
    radius: SupportsIndex | None,
    *,
    eps: float | Tensor,
    seed: int,
    round: SupportsIndex = 0,
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:  # [N, C, H, W]
    """``x`` plus noise uniform in ``[-eps, eps)`` inside each image's patch, clipped there; a new tensor.

    The noise of a pixel is a function of ``(seed, round, sample id, channel, row, column)`` and of the image size: not
    of the batch that the image is in, its order, its memory format, the patch, the number of threads or the device.

    Args:
        x: images ``[N, C, H, W]``, float32, float16, bfloat16 or (on the reference) float64; any strides.
        ids: ``[N]`` int64, the index of each sample in its data set.
        centers: ``[N, 2]``, (row, column) of each patch, as for :func:`masked_pgd_step_`.
        radius: half-width of the patches; ``None`` for whole images.
        eps: largest noise, a number >= 0 or ``[C]``, in the units of ``x``.
        seed: any integer of 64 bits.
        round: redraws the noise; any integer of 64 bits.
        lower: least value of a pixel inside the patches, a number or ``[C]``.
        upper: largest value of a pixel inside the patches, a number or ``[C]``; wins where the two cross.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        The layout of ``x``; outside the patches equal to ``x`` bit for bit. NaN stays NaN. The same bits on every
        backend (float64, which differs in rounding alone, runs on the reference). A captured CUDA graph repeats the
        round that it was captured with.

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or numbers are wrong.

    Example:
        >>> import torch, bdfast
        >>> x, ids = torch.full((2, 1, 1, 4), 0.5), torch.tensor([3, 4])
        >>> start = bdfast.ops.masked_random_start(x, ids, None, None, eps=0.1, seed=0)
        >>> bool(((start - x).abs() <= 0.1).all()), bool((start != x).all())
        (True, True)
        >>> torch.equal(start[1:], bdfast.ops.masked_random_start(x[1:], ids[1:], None, None, eps=0.1, seed=0))
        True
    """
    _check_tensors(x, ids)
    centers, reach = patches.check_patch(NAME, centers, radius, x)
    ball, balls = patches.channel_value(NAME, "eps", eps, x, lowest=0.0)
    low, lows = patches.channel_value(NAME, "lower", lower, x, finite=False)
    high, highs = patches.channel_value(NAME, "upper", upper, x, finite=False)
    patches.check_range(NAME, lower, upper)
    numbers = patches.check_seed(NAME, "seed", seed), patches.check_seed(NAME, "round", round)
    wish = requested(backend, NAME)
    return cast(Tensor, START(x, ids, centers, reach, *numbers, ball, low, high, balls, lows, highs, wish))


# --- reference: the definition in plain PyTorch ----------------------------------------------------------------------


@torch.no_grad()
def reference(
    x: Tensor,  # [N, C, H, W]
    ids: Tensor,  # [N]
    centers: Tensor | None,  # [N, 2]
    radius: int,
    seed: int,
    round: int,
    eps: float,
    lower: float,
    upper: float,
    epsilons: Tensor | None,  # [C]
    lowers: Tensor | None,  # [C]
    uppers: Tensor | None,  # [C]
) -> Tensor:
    """Noise for the whole image, kept inside the patch. In float64 until the clip: see ``masked_random_start.h``."""
    samples, channels, height, width = x.shape
    quads = (width + 3) // 4
    quad = torch.arange(channels * height * quads, device=x.device).expand(samples, -1)
    words = torch.stack(philox4x32(stream_key(seed, NAME, round), ids[:, None].expand_as(quad), quad), dim=-1)
    words = words.reshape(samples, channels, height, 4 * quads)[..., :width]
    u = ((words >> 8) - 2**23).double() * 2.0**-23
    v = (x.double() + patches.per_channel(eps, epsilons, x).double() * u).to(compute_dtype(x))
    v = torch.maximum(v, patches.per_channel(lower, lowers, x))
    v = torch.minimum(v, patches.per_channel(upper, uppers, x))
    return torch.empty_like(x).copy_(torch.where(patches.patch_mask(x, centers, radius), v.to(x.dtype), x))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _addresses(
    x_adv: Tensor, ids: Tensor, centers: Tensor | None, radius: int, seed: int, round: int, eps: float, lower: float,
    upper: float, epsilons: Tensor | None, lowers: Tensor | None, uppers: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    return (
        x_adv.data_ptr(), DTYPE_CODE[x_adv.dtype], x_adv.shape, x_adv.stride(), radius,
        patches.address_of_centers(centers), ids.data_ptr(), stream_key(seed, NAME, round),
        patches.address(eps, epsilons), patches.address(lower, lowers), patches.address(upper, uppers),
    )  # fmt: skip


def _cpp(x: Tensor, ids: Tensor, *options: Any) -> Tensor:
    x_adv, ids = x.clone(), ids.contiguous()
    native().masked_random_start(*_addresses(x_adv, ids, *options))
    return x_adv


def _cuda(x: Tensor, ids: Tensor, centers: Tensor | None, radius: int, *options: Any) -> Tensor:
    x_adv, ids = torch.empty_like(x), ids.contiguous()
    if radius >= 0 or x_adv.stride() != x.stride():
        x = x_adv.copy_(x)
    with on_device_of(x):
        native().masked_random_start_cuda(
            *_addresses(x_adv, ids, centers, radius, *options), x.data_ptr(), stream_of(x)
        )
    return x_adv


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


START = Op(
    name="masked_random_start",
    public=NAME,
    schema="(Tensor x, Tensor ids, Tensor? centers, SymInt radius, SymInt seed, SymInt round, float eps, float lower, "
    "float upper, Tensor? epsilons, Tensor? lowers, Tensor? uppers, str backend) -> Tensor",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("cuda", _cuda, patches.runs_cuda_on_images),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_tensors(x: Tensor, ids: Tensor) -> None:
    patches.check_images(NAME, x, "x")
    patches.check_ids(NAME, ids)
    if ids.shape[0] != x.shape[0]:
        expected, got = f"one id an image, [{x.shape[0]}]", str(list(ids.shape))
        raise ValueError(message(NAME, "ids", expected, got, "pass ids for exactly these images"))
    if ids.device != x.device:
        raise ValueError(message(NAME, "ids", f"the device of x, {x.device}", str(ids.device), "move it there"))
