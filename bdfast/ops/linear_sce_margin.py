r"""Keys of :mod:`bdfast.ops.sce_margin` straight from the penultimate features, without the logits.

.. math::

    z_{ij} = \langle f_i, w_j \rangle + b_j, \qquad m_i = \log\sum_{j \ne y_i} e^{z_{ij}} - z_{iy_i}

With 20,000 classes the logits of a million samples take 80 GB; here a tile of them lives at a time, and the logsumexp
is carried from block to block of classes. Memory is O(N + tile), arithmetic that of the linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import validation
from bdfast.ops.precision import compute_dtype, upcast
from bdfast.ops.sce_margin import reference as margin_of_logits

NAME = "linear_sce_margin"

# A tile of logits is 4 MiB, which stays in the cache between the product and its logsumexp. Its shape depends on C
# alone: neither the number of threads nor the batch changes a bit. Of 20,000 classes, blocks of 1,024 took 0.9 of the
# time that blocks of 4,096 took, and all at once 1.35 of it.
TILE_ELEMENTS = 1 << 20
TILE_CLASSES = 1024


def linear_sce_margin(
    features: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    target: Tensor,  # [N] int64
    *,
    backend: str = "auto",
) -> Tensor:
    """``sce_margin(linear(features, weight, bias), target)`` without ever holding N x C logits.

    Args:
        features: ``[N, D]`` float32, float16, bfloat16 (products accumulate in float32) or float64 (reference only).
        weight: ``[C, D]`` of the last layer, in the dtype of ``features``.
        bias: ``[C]`` in that dtype, or None.
        target: ``[N]`` int64 class labels in ``[0, C)``. A label out of range raises on the CPU; on a GPU it gives NaN
            for its row (``with bdfast.debug():`` raises there too).
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[N]`` float32 (float64 for float64 features), not differentiable; the smaller, the cleaner. A row with a NaN
        or infinite logit is not trusted: +Inf. A single class: -Inf.

    Raises:
        TypeError: a dtype is not supported, or they differ.
        ValueError: shapes or devices do not fit together.
        LabelRangeError: a label lies outside ``[0, C)``.

    Example:
        >>> import torch, bdfast
        >>> layer = torch.nn.Linear(2, 3)
        >>> features, target = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
        >>> keys = bdfast.ops.linear_sce_margin(features, layer.weight, layer.bias, target)
        >>> torch.allclose(keys, bdfast.ops.sce_margin(layer(features), target), atol=1e-5)
        True
    """
    _check_layer(features, weight, bias)
    validation.check_target(NAME, target, features, "features")
    tensors = (features.detach(), weight.detach(), None if bias is None else bias.detach())
    return cast(Tensor, LINEAR_MARGIN(*tensors, target, requested(backend, NAME)))


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


def reference(
    features: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    bias: Tensor | None,  # [C]
    target: Tensor,  # [N]
) -> Tensor:
    """The margin of a tile of rows at a time."""
    validation.check_label_range(NAME, target, weight.shape[0])
    w, b = upcast(weight), None if bias is None else upcast(bias)
    margin = w.new_empty(len(features))
    for rows in _blocks(len(features), _tile_rows(len(w))):
        margin[rows] = margin_of_logits(F.linear(upcast(features[rows]), w, b), target[rows])
    return margin


def _tile_rows(classes: int) -> int:
    return max(64, TILE_ELEMENTS // classes)


def _blocks(total: int, size: int) -> Iterator[slice]:
    return (slice(begin, min(begin + size, total)) for begin in range(0, total, size))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _cpp(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Products by BLAS into one tile, and the online logsumexp over it in C++."""
    validation.check_label_range(NAME, target, weight.shape[0])
    y, n, c = target.contiguous(), len(features), len(weight)
    state = [features.new_zeros(n, dtype=torch.float32) for _ in ("maximum", "sum", "label")]
    rows = max(1, min(n, _tile_rows(min(c, TILE_CLASSES))))
    tile = features.new_empty(rows * min(c, TILE_CLASSES), dtype=torch.float32)
    for classes in _blocks(c, TILE_CLASSES):
        w = weight[classes].float().t()
        b = w.new_zeros(w.shape[1]) if bias is None else bias[classes].float()
        for block in _blocks(n, rows):
            logits = tile[: (block.stop - block.start) * w.shape[1]].view(-1, w.shape[1])
            torch.addmm(b, features[block].float(), w, out=logits)
            native().linear_sce_margin_update(
                logits.data_ptr(), *logits.shape, classes.start, y[block].data_ptr(),
                *(values[block].data_ptr() for values in state),
            )  # fmt: skip
    margin = features.new_empty(n, dtype=torch.float32)
    native().linear_sce_margin_finish(*(values.data_ptr() for values in state), n, margin.data_ptr())
    return margin


def _triton(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    from bdfast.triton_kernels import linear_sce_margin as kernels

    validation.check_label_range(NAME, target, weight.shape[0])
    return kernels.forward(features, weight, bias, target)  # type: ignore[no-any-return]


def _fake(features: Tensor, *_: Any) -> Tensor:
    dtype = compute_dtype(features)
    return features.new_empty((features.shape[0],), dtype=dtype)


LINEAR_MARGIN = Op(
    name="linear_sce_margin",
    public=NAME,
    schema="(Tensor features, Tensor weight, Tensor? bias, Tensor target, str backend) -> Tensor",
    fake=_fake,
    key=lambda features, *_: features,
    implementations=(
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("triton", _triton, runs_triton),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check_layer(features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    validation.check_floating(NAME, features, "features", "[N, D]")
    if features.dim() != 2:
        raise ValueError(
            message(NAME, "features", "shape [N, D]", str(list(features.shape)), "flatten to one row a sample")
        )
    validation.check_floating(NAME, weight, "weight", "[C, D]")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != features.shape[1]:
        raise ValueError(
            message(
                NAME,
                "weight",
                f"shape [C, {features.shape[1]}] with C >= 1",
                str(list(weight.shape)),
                "pass the features that enter this layer",
            )
        )
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        got = str(list(bias.shape)) if isinstance(bias, Tensor) else type(bias).__name__
        raise ValueError(
            message(NAME, "bias", f"a tensor [{weight.shape[0]}] or None", got, "pass the bias of the same layer")
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != features.dtype:
            raise TypeError(
                message(
                    NAME, name, f"the dtype of features, {features.dtype}", str(tensor.dtype), "convert one of them"
                )
            )
        if tensor.device != features.device:
            raise ValueError(
                message(NAME, name, f"the device of features, {features.device}", str(tensor.device), "move it there")
            )
