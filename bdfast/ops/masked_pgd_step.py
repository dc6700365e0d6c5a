r"""One projected step along the sign of the gradient, inside a square patch of each image, in place.

With step size :math:`\alpha`, radius :math:`\varepsilon` of the ball and bounds :math:`l, u`, inside the patch:

.. math::

    v &= x' + \alpha \, \mathrm{sign}(g) \\
    x' &\leftarrow \min(\max(\min(\max(v, x - \varepsilon), x + \varepsilon), l), u)

This is the inner step of projected gradient descent in the maximum norm (Madry et al., arXiv 1706.06083), limited to a
patch as in AdvrBD (arXiv 2405.12719); :math:`\alpha < 0` descends.

Bytes moved a patch pixel and channel: 4 elements (reads x', x, g; writes x'). The rest of the image is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp
from bdfast.backends.devices import on_device_of, stream_of
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import patches
from bdfast.ops.precision import upcast
from bdfast.ops.rows import DTYPE_CODE

NAME = "masked_pgd_step_"


def masked_pgd_step_(
    x_adv: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    grad: Tensor,  # [N, C, H, W]
    centers: Tensor | None,  # [N, 2]
    radius: SupportsIndex | None,
    *,
    step_size: float | Tensor,
    eps: float | Tensor,
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
    backend: str = "auto",
) -> Tensor:
    """One step of ``x_adv`` along the sign of ``grad`` inside each image's patch, projected; returns ``x_adv``.

    Args:
        x_adv: perturbed images ``[N, C, H, W]``, changed in place inside the patches and never touched outside, where
            the caller keeps them equal to ``x``. float32, float16, bfloat16 or (on the reference) float64; any strides.
        x: the images that ``x_adv`` started from; same shape and dtype, own strides.
        grad: gradient of the objective at ``x_adv``; same shape and dtype, own strides.
        centers: ``[N, 2]``, (row, column) of each patch, any integer dtype. A center may lie outside its image: the
            part of its patch that is inside, if any, is stepped. Not used with ``radius=None``.
        radius: half-width of the square patches, which have side ``2 radius + 1``, are cut at the border and are the
            same for all channels; ``None`` for whole images.
        step_size: a number or ``[C]``, in the units of ``x``; negative to descend.
        eps: radius of the ball in the maximum norm, a number >= 0 or ``[C]``.
        lower: least value of a pixel, a number or ``[C]``.
        upper: largest value of a pixel, a number or ``[C]``; wins where the two cross.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``x_adv``.

    Notes:
        A gradient of 0 or NaN takes no step, but the projection is applied. ``lower`` and ``upper`` come last: where
        ``x`` lies outside of them the result does not, even if it leaves the ball for it. A pixel that is NaN in ``x``
        or ``x_adv`` becomes NaN. Half precision is computed in float32 and rounded once, so that ``|x_adv - x|`` may
        pass ``eps`` by that rounding. All backends give the same bits. One launch on a GPU, no sync, no allocation
        (for int32 and int64 centers, and bounds that are numbers or float32).

    Raises:
        TypeError: wrong types or dtypes.
        ValueError: shapes, devices or numbers are wrong, or ``x_adv`` shares memory.

    Example:
        >>> import torch, bdfast
        >>> x = torch.full((1, 1, 3, 4), 0.5)
        >>> x_adv = bdfast.ops.masked_pgd_step_(x.clone(), x, torch.ones_like(x), torch.tensor([[0, 3]]), 1,
        ...                                     step_size=0.25, eps=0.125)
        >>> x_adv
        tensor([[[[0.5000, 0.5000, 0.6250, 0.6250],
                  [0.5000, 0.5000, 0.6250, 0.6250],
                  [0.5000, 0.5000, 0.5000, 0.5000]]]])
    """
    _check_tensors(x_adv, x, grad)
    centers, reach = patches.check_patch(NAME, centers, radius, x_adv)
    step, steps = patches.channel_value(NAME, "step_size", step_size, x_adv)
    ball, balls = patches.channel_value(NAME, "eps", eps, x_adv, lowest=0.0)
    low, lows = patches.channel_value(NAME, "lower", lower, x_adv, finite=False)
    high, highs = patches.channel_value(NAME, "upper", upper, x_adv, finite=False)
    patches.check_range(NAME, lower, upper)
    STEP(
        x_adv, x, grad, centers, reach, step, ball, low, high, steps, balls, lows, highs, requested(backend, NAME)
    )  # fmt: skip
    return x_adv


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


@torch.no_grad()
def reference(
    x_adv: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    grad: Tensor,  # [N, C, H, W]
    centers: Tensor | None,  # [N, 2]
    radius: int,
    step_size: float,
    eps: float,
    lower: float,
    upper: float,
    step_sizes: Tensor | None,  # [C]
    epsilons: Tensor | None,  # [C]
    lowers: Tensor | None,  # [C]
    uppers: Tensor | None,  # [C]
) -> None:
    """The step of the whole image, kept inside the patch."""
    _check_memory(x_adv, x, grad)
    old, x0 = upcast(x_adv), upcast(x)
    sign = (grad > 0).to(old.dtype) - (grad < 0).to(old.dtype)
    ball = patches.per_channel(eps, epsilons, x)
    v = old + patches.per_channel(step_size, step_sizes, x) * sign
    v = torch.minimum(torch.maximum(v, x0 - ball), x0 + ball)
    v = torch.maximum(v, patches.per_channel(lower, lowers, x))
    v = torch.minimum(v, patches.per_channel(upper, uppers, x))
    x_adv.copy_(torch.where(patches.patch_mask(x, centers, radius), v.to(x.dtype), x_adv))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _addresses(
    x_adv: Tensor, x: Tensor, grad: Tensor, centers: Tensor | None, radius: int, step_size: float, eps: float,
    lower: float, upper: float, step_sizes: Tensor | None, epsilons: Tensor | None, lowers: Tensor | None,
    uppers: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    _check_memory(x_adv, x, grad)
    return (
        x_adv.data_ptr(), x.data_ptr(), grad.data_ptr(), DTYPE_CODE[x_adv.dtype], x_adv.shape,
        x_adv.stride(), x.stride(), grad.stride(), radius, patches.address_of_centers(centers),
        patches.address(step_size, step_sizes), patches.address(eps, epsilons),
        patches.address(lower, lowers), patches.address(upper, uppers),
    )  # fmt: skip


@torch.no_grad()
def _launch(kernel: Callable[..., None], x_adv: Tensor, x: Tensor, grad: Tensor, *options: Any) -> None:
    """Kernels read memory at any stride, and would lose a lazy sign: that of the imaginary part of a conjugate."""
    target, x, grad = x_adv.resolve_neg(), x.resolve_neg(), grad.resolve_neg()
    kernel(*_addresses(target, x, grad, *options))
    if x_adv.is_neg():
        x_adv.copy_(target)


def _cpp(*arguments: Any) -> None:
    _launch(native().masked_pgd_step, *arguments)


def _cuda(x_adv: Tensor, *arguments: Any) -> None:
    with on_device_of(x_adv):
        _launch(lambda *a: native().masked_pgd_step_cuda(*a, stream_of(x_adv)), x_adv, *arguments)


def _fake(*_: Any) -> None:
    return None


STEP = Op(
    name="masked_pgd_step_",
    public=NAME,
    schema="(Tensor(a!) x_adv, Tensor x, Tensor grad, Tensor? centers, SymInt radius, float step_size, float eps, "
    "float lower, float upper, Tensor? step_sizes, Tensor? epsilons, Tensor? lowers, Tensor? uppers, str backend) "
    "-> ()",
    fake=_fake,
    key=lambda x_adv, *_: x_adv,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("cuda", _cuda, patches.runs_cuda_on_images),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_tensors(x_adv: Tensor, x: Tensor, grad: Tensor) -> None:
    patches.check_images(NAME, x_adv, "x_adv")
    patches.check_alike(NAME, x, "x", x_adv, "x_adv")
    patches.check_alike(NAME, grad, "grad", x_adv, "x_adv")
    if not x_adv.is_contiguous() and any(s == 0 < n - 1 for s, n in zip(x_adv.stride(), x_adv.shape, strict=True)):
        expected = "memory of its own for every element"
        raise ValueError(message(NAME, "x_adv", expected, "an expanded tensor", "pass x_adv.clone()"))


def _check_memory(x_adv: Tensor, x: Tensor, grad: Tensor) -> None:
    """``x_adv`` is no view of the others; where the kernels are called, since tracing has no addresses."""
    for name, tensor in (("x", x), ("grad", grad)):
        if tensor.data_ptr() == x_adv.data_ptr() and x_adv.numel() > 0:
            raise ValueError(
                message(NAME, name, "memory other than that of x_adv", "x_adv or a view", "start from x.clone()")
            )
