r"""Entropy of each row's histogram, over bins that all rows share.

.. math::

    e_n = \min_{r,j} x_{rj} + n s, \qquad
    p_{rn} = \tfrac1M \bigl|\{\, j : e_n < x_{rj} < e_{n+1} \,\}\bigr|, \qquad
    H_r = -\sum_{n=0}^{B-1} p_{rn} \log p_{rn}, \qquad
    B = \lfloor (\max x - \min x) / s \rfloor

This is how EP (Zheng et al., NeurIPS 2022, "Pre-activation distributions expose backdoor neurons") measures a channel,
with s = 0.1 on standardised pre-activations: a backdoor neuron's samples fall into few bins. Both inequalities are
strict there, so that the smallest element, what lies on an edge and what lies above the last edge count nowhere. The
usual loop passes over x once a bin; the least is one read for the range and one for the counts.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_cuda
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import validation
from bdfast.ops.precision import compute_dtype, upcast
from bdfast.ops.rows import DTYPE_CODE

NAME = "histogram_entropy"
MOST_BINS = 2**20  # kMostBins in csrc/include/histogram_entropy.h
PARTS = 256  # kHistogramEntropyParts in csrc/include/cuda_api.h


def histogram_entropy(
    x: Tensor,  # [C, M]
    step_size: float = 0.1,
    *,
    compat: bool = True,
    backend: str = "auto",
) -> Tensor:  # [C]
    """Entropy in nats of each row of ``x``, binned by ``step_size`` from the smallest element of all rows.

    Args:
        x: ``[C, M]`` float32, float16, bfloat16 (computed in float32) or float64 (reference only).
        step_size: width of a bin, > 0.
        compat: bins as in EP's release: open intervals, and no bin for what is left over at the upper end. False:
            half-open bins over the whole range, the last one closed, so that every element counts.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[C]`` float32 (float64 for float64). All NaN where any element is not finite, and for ``M = 0``; 0 where the
        range holds no bin. Reruns are bit-identical, and compiled float32 results on the CPU
        are those of the usual loop over bins, bit for bit. Not differentiable: counts have no gradient.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: shape or step are wrong, or the range holds more than 2^20 bins (on a GPU, where that is known
            on the device alone, the CUDA kernel gives NaN).

    Example:
        >>> import torch, bdfast
        >>> x = torch.tensor([[0.0, 0.5, 0.5, 1.5], [0.5, 1.5, 2.5, 3.0]])
        >>> bdfast.ops.histogram_entropy(x, 1.0)  # shares 2/4, 1/4 and 1/4 three times; 0.0 and 3.0 are edges
        tensor([0.6931, 1.0397])
    """
    validation.check_floating(NAME, x, "x", "[C, M]")
    if x.dim() != 2:
        raise ValueError(message(NAME, "x", "shape [C, M]", str(list(x.shape)), "flatten to one row a channel"))
    validation.check_number(NAME, "step_size", step_size, "pass e.g. 0.1")
    if not 0.0 < step_size < float("inf"):
        raise ValueError(message(NAME, "step_size", "a finite number > 0", str(step_size), "pass e.g. 0.1"))
    return cast(Tensor, ENTROPY(x.detach(), float(step_size), compat, requested(backend, NAME)))


# --- reference: the definition in plain PyTorch ----------------------------------------------------------------------


def reference(x: Tensor, step_size: float, compat: bool) -> Tensor:
    """Counts by a search among the edges."""
    z = upcast(x).contiguous()
    if z.numel() == 0:
        return z.new_full((len(z),), float("nan"))
    low, high = z.min(), z.max()
    bars = float((high - low) / step_size)
    if not bars < float("inf"):
        return z.new_full((len(z),), float("nan"))
    bins = int(bars) if compat else max(1, -int(-bars // 1))
    _check_bins(bins)
    # The product in float64, rounded to the dtype of z, then the sum: as `z.min() + n * step_size` does it.
    edges = low + (torch.arange(bins + 1, dtype=torch.float64, device=z.device) * step_size).to(z.dtype)
    below = torch.searchsorted(edges, z, side="left" if compat else "right")  # how many edges lie below (or at) z
    n = below - 1 if compat else (below - 1).clamp(0, bins - 1)
    inside = (n >= 0) & (n < bins) & (z != edges[below.clamp_max(bins)]) if compat else torch.ones_like(n).bool()
    counts = torch.zeros((len(z), bins + 1), dtype=torch.int64, device=z.device)
    counts.scatter_add_(1, torch.where(inside, n, bins), torch.ones_like(n))
    terms: Tensor = torch.special.entr(counts[:, :bins].double() / z.shape[1])
    return terms.sum(dim=1).to(z.dtype)


def _check_bins(bins: int) -> None:
    if bins > MOST_BINS:
        got = "more" if bins > 2 * MOST_BINS else str(bins)
        remedy = "standardise x, or pass a larger step"
        raise ValueError(message(NAME, "step_size", f"at most {MOST_BINS} bins in the range of x", got, remedy))


# --- compiled implementations ----------------------------------------------------------------------------------------


def _fake(x: Tensor, step_size: float, compat: bool, backend: str) -> Tensor:
    return x.new_empty((x.shape[0],), dtype=compute_dtype(x))


def _cpp(x: Tensor, step_size: float, compat: bool) -> Tensor:
    if x.numel() == 0:
        return x.new_full((len(x),), float("nan"), dtype=torch.float32)
    x = x.contiguous()
    terms, entropy = _terms(x), x.new_empty(len(x), dtype=torch.float32)
    bins = native().histogram_entropy(
        x.data_ptr(), DTYPE_CODE[x.dtype], *x.shape, terms.data_ptr(), step_size, compat, entropy.data_ptr()
    )
    _check_bins(bins)
    return entropy


def _cuda(x: Tensor, step_size: float, compat: bool) -> Tensor:
    if x.numel() == 0:
        return x.new_full((len(x),), float("nan"), dtype=torch.float32)
    x = x.float().contiguous()
    entropy, parts = x.new_empty(len(x)), x.new_empty(3 * PARTS)
    with torch.cuda.device(x.device):
        native().histogram_entropy_cuda(
            x.data_ptr(), *x.shape, step_size, compat, parts.data_ptr(), entropy.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return entropy


def _terms(x: Tensor) -> Tensor:  # [M + 1] float32
    """``-p log p`` of a bin with 0, 1, ..., M elements, rounded as the usual loop does: the C++ takes no logarithm."""
    p = torch.arange(x.shape[1] + 1, device=x.device).to(torch.float32) / x.shape[1]
    return -p * p.log().nan_to_num(0.0)


ENTROPY = Op(
    name=NAME,
    public=NAME,
    schema="(Tensor x, float step_size, bool compat, str backend) -> Tensor",
    fake=_fake,
    key=lambda x, *_: x,
    implementations=(
        Implementation("cuda", _cuda, runs_cuda),
        Implementation("cpp", _cpp, runs_cpp),
        Implementation("reference", reference, always),
    ),
)
