r"""How far the statistics of a batch are from those that a batch norm keeps.

.. math::

    \sum_c (\mu_c - \hat\mu_c)^2 + (\sigma_c^2 - \hat\sigma_c^2)^2, \qquad
    \mu_c = \frac{1}{M} \sum x_c, \quad \sigma_c^2 = \frac{1}{M} \sum (x_c - \mu_c)^2

over the M values of a channel (batch and space). The statistics a network keeps are a trace of its training data, and
this term pulls inputs towards it. The variance is biased, as the one that a batch norm normalises with. (The one it
keeps is unbiased: larger by M / (M - 1).) The gradient is

.. math::

    \frac{\partial}{\partial x}
    = \frac{2}{M} \left[(\mu_c - \hat\mu_c) + 2 (\sigma_c^2 - \hat\sigma_c^2)(x - \mu_c)\right]

Bytes moved an element: one read forward; one read and one write backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import channels as ch
from bdfast.ops.autograd import apply, once_differentiable, wants_gradient
from bdfast.ops.precision import compute_dtype, in_precision_of
from bdfast.ops.rows import DTYPE_CODE

NAME = "batch_norm_stat_distance"


def batch_norm_stat_distance(
    x: Tensor,  # [N, C, ...]
    running_mean: Tensor,  # [C]
    running_var: Tensor,  # [C]
    *,
    backend: str = "auto",
) -> Tensor:
    """Squared distance of the batch's mean and biased variance from the running ones, summed over channels.

    Args:
        x: ``[N, C, ...]``, what goes into the batch norm; float32, float16, bfloat16 or (on the reference) float64.
        running_mean: ``[C]``.
        running_var: ``[C]``.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        A scalar, float32 (float64 for float64), differentiable in ``x`` once. NaN for an empty batch. Sums are
        accumulated in float64, and reruns are bit-identical.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape or device does not fit, or a statistic requires grad while autograd records.

    Example:
        >>> import torch, bdfast
        >>> x = torch.tensor([[1.0], [3.0]], requires_grad=True)
        >>> distance = bdfast.ops.batch_norm_stat_distance(x, torch.tensor([0.0]), torch.tensor([4.0]))
        >>> distance.item()
        13.0
        >>> torch.autograd.grad(distance, x)[0]
        tensor([[ 8.], [-4.]])
    """
    ch.check_activations(NAME, x)
    if x.dim() < 2 or x.shape[1] == 0:
        got = str(list(x.shape))
        raise ValueError(message(NAME, "x", "shape [N, C, ...] with C >= 1", got, "pass a batch of activations"))
    mean, var = (_statistic(n, s, x) for n, s in (("running_mean", running_mean), ("running_var", running_var)))
    wish = requested(backend, NAME)
    if wants_gradient(NAME, x):
        return cast(Tensor, apply(_BatchNormStatDistance, x, mean, var, wish))
    return cast(Tensor, FORWARD(x, mean, var, wish)[0])


class _BatchNormStatDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, backend: str) -> Tensor:
        distance, stats = FORWARD(x, mean, var, backend)
        ctx.save_for_backward(x, mean, var, stats)
        ctx.backend = backend
        return distance  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BACKWARD(*ctx.saved_tensors, grad, ctx.backend), None, None, None


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    x: Tensor,  # [N, C, ...]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
) -> tuple[Tensor, Tensor]:
    """The distance, and the batch's means and variances, ``[2, C]`` float64."""
    values = x.double().movedim(1, 0).flatten(1)
    mu = values.mean(dim=1)
    sigma2 = (values - mu[:, None]).square().mean(dim=1)
    distance = ((mu - mean.double()).square() + (sigma2 - var.double()).square()).sum()
    return distance.to(compute_dtype(x)), torch.stack((mu, sigma2))


def reference_backward(
    x: Tensor,  # [N, C, ...]
    mean: Tensor,  # [C]
    var: Tensor,  # [C]
    stats: Tensor,  # [2, C]
    grad: Tensor,  # []
) -> Tensor:
    """Gradient of x, in the memory order of x."""
    mu, sigma2 = stats
    factor = 2.0 / max(1, x.numel() // x.shape[1]) * grad.double()
    slope, shift = 2.0 * factor * (sigma2 - var.double()), factor * (mu - mean.double())
    grad_x = ch.per_channel(slope, x) * (x.double() - ch.per_channel(mu, x)) + ch.per_channel(shift, x)
    return ch.dense(grad_x.to(x.dtype), ch.is_channels_last(x))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _arguments(x: Tensor, mean: Tensor, var: Tensor) -> tuple[int, ...]:
    layout = ch.layout(x, ch.is_channels_last(x), x.shape[1])
    return x.data_ptr(), DTYPE_CODE[x.dtype], *layout, mean.data_ptr(), var.data_ptr()


def _cpp(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    x = ch.dense(x, ch.is_channels_last(x))
    stats = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    if x.numel() == 0:
        return x.new_full((), torch.nan, dtype=torch.float32), stats.fill_(torch.nan)
    distance = native().batch_norm_stat_distance_fwd(*_arguments(x, mean, var), stats.data_ptr())
    return x.new_full((), distance, dtype=torch.float32), stats


def _cpp_backward(x: Tensor, mean: Tensor, var: Tensor, stats: Tensor, grad: Tensor) -> Tensor:
    channels_last = ch.is_channels_last(x)
    x, stats = ch.dense(x, channels_last), stats.contiguous()
    grad_x = ch.empty_dense(x, channels_last)
    if x.numel():
        native().batch_norm_stat_distance_bwd(
            *_arguments(x, mean, var), stats.data_ptr(), grad.item(), grad_x.data_ptr()
        )
    return grad_x


def _triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    from bdfast.triton_kernels import batch_norm_stat_distance as kernels

    return kernels.forward(*arguments)  # type: ignore[no-any-return]


def _triton_backward(*arguments: Any) -> Tensor:
    from bdfast.triton_kernels import batch_norm_stat_distance as kernels

    return kernels.backward(*arguments)  # type: ignore[no-any-return]


def _fake(x: Tensor, mean: Tensor, var: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty((), dtype=compute_dtype(x)), x.new_empty((2, x.shape[1]), dtype=torch.float64)


def _fake_backward(x: Tensor, *_: Any) -> Tensor:
    return ch.empty_dense(x, ch.is_channels_last(x))


FORWARD = Op(
    name="batch_norm_stat_distance_fwd",
    public=NAME,
    schema="(Tensor x, Tensor mean, Tensor var, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)

BACKWARD = Op(
    name="batch_norm_stat_distance_bwd",
    public=NAME,
    schema="(Tensor x, Tensor mean, Tensor var, Tensor stats, Tensor grad, str backend) -> Tensor",
    fake=_fake_backward,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cpp", _cpp_backward, runs_cpp),
        Implementation("triton", _triton_backward, runs_triton),
        Implementation("reference", reference_backward, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _statistic(name: str, value: Tensor, x: Tensor) -> Tensor:
    """``value`` as the raw ops take it: ``[C]``, contiguous, of the dtype that is computed in."""
    ch.check_per_channel(NAME, name, value, x)
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(message(NAME, name, "no gradient to be asked for", "requires_grad=True", "detach it"))
    return in_precision_of(value, x).contiguous()
