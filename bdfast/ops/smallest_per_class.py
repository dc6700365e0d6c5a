r"""The k smallest scores of every class, as one selection.

.. math::

    S_c = \{\, i : l_i = c \,\}, \qquad
    R_c = \text{the first } \min(k, |S_c|) \text{ of } S_c \text{ by } (s_i, i), \qquad
    \mathrm{result} = (R_0, R_1, \dots, R_{C-1})

This is step 1 of PAD-FT (arXiv 2409.12072), where the scores are those of :func:`bdfast.ops.sce_margin`. A sample is
the 64-bit key (score, index), so that there are no ties and every way to select gives the same result. The least that
has to move is one read of scores and labels.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_cuda
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops import validation

NAME = "smallest_per_class"
_MOST_SCORES = 2**32  # an index is half of a 64-bit key


def smallest_per_class(
    scores: Tensor,  # [N]
    labels: Tensor,  # [N] int64
    k: int,
    num_classes: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Indices of the at most ``k`` smallest scores of each class, ordered by (class, score, index).

    Args:
        scores: ``[N]`` float32, float16, bfloat16 or float64 (reference only). NaN and +Inf are never selected, -Inf
            is; -0.0 equals 0.0, and equal scores are ordered by index.
        labels: ``[N]`` int64 class labels in ``[0, num_classes)``. A label out of range raises on the CPU; on a GPU its
            sample is left out (``with bdfast.debug():`` raises there too).
        k: how many to select in each class, >= 1. A class with fewer is selected whole.
        num_classes: C, >= 1; classes without a sample contribute nothing.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[M]`` int64, M <= C * k. Its length depends on the values, which costs one sync on a GPU;
        ``torch.ops.bdfast.smallest_per_class(scores, labels, k, num_classes, "auto")`` has none, and returns indices
        ``[C, k]``, padded with -1, and counts ``[C]``.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: shapes, ``k`` or ``num_classes`` are wrong.
        LabelRangeError: a label lies outside ``[0, num_classes)``.

    Example:
        >>> import torch, bdfast
        >>> scores = torch.tensor([0.5, -1.0, 0.5, float("nan"), 0.1])
        >>> labels = torch.tensor([1, 0, 1, 0, 1])
        >>> bdfast.ops.smallest_per_class(scores, labels, 2, 3)
        tensor([1, 4, 0])
    """
    _check(scores, labels)
    k, num_classes = _positive("k", k), _positive("num_classes", num_classes)
    wish = requested(backend, NAME)
    most = min(k, max(1, scores.shape[0]))
    if num_classes * most > 4 * scores.shape[0] + 2**20:  # a padded result that is mostly padding
        most = min(most, _largest_class(labels, num_classes))
    indices, counts = SELECT(scores.detach(), labels, most, num_classes, wish)
    return _compacted(indices, counts.cpu())  # the sync: a copy, no launch


def _compacted(
    indices: Tensor,  # [C, k], padded with -1
    counts: Tensor,  # [C], on the CPU
) -> Tensor:
    """What is selected. Classes that are all full, the usual case, need no launch; others no second sync."""
    flat = indices.view(-1)
    if torch.compiler.is_compiling():  # how many there are is not known then
        return flat[flat >= 0]
    selected = int(counts.sum())
    if selected == len(flat):
        return flat
    return flat[torch.nonzero_static(flat >= 0, size=selected)[:, 0]]


def _largest_class(labels: Tensor, num_classes: int) -> int:
    validation.check_label_range(NAME, labels, num_classes, "labels")
    inside = labels[(labels >= 0) & (labels < num_classes)]
    return max(1, int(torch.bincount(inside, minlength=num_classes).max()))


# --- reference: the definition in plain PyTorch ----------------------------------------------------------------------


def reference(
    scores: Tensor,  # [N]
    labels: Tensor,  # [N]
    k: int,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Indices ``[C, k]``, padded with -1, and counts ``[C]``, by two stable sorts."""
    validation.check_label_range(NAME, labels, num_classes, "labels")
    selectable = (scores < float("inf")) & (labels >= 0) & (labels < num_classes)
    group = torch.where(selectable, labels, torch.full_like(labels, num_classes))  # the others come last
    by_score = (scores + 0.0).argsort(stable=True)  # -0.0 + 0.0 is 0.0
    order = by_score[group[by_score].argsort(stable=True)]
    group = group[order]
    sizes = torch.zeros(num_classes + 1, dtype=torch.int64, device=labels.device)
    sizes.scatter_add_(0, group, torch.ones_like(group))
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[group]
    # One slot more than the result has: what is not selected goes there.
    slot = torch.where((group < num_classes) & (rank < k), group * k + rank, torch.full_like(rank, num_classes * k))
    indices = torch.full((num_classes * k + 1,), -1, dtype=torch.int64, device=order.device).scatter_(0, slot, order)
    return indices[:-1].view(num_classes, k).clone(), sizes[:-1].clamp_max(k)


# --- compiled implementations ----------------------------------------------------------------------------------------


def _results(scores: Tensor, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    return scores.new_empty((num_classes, k), dtype=torch.int64), scores.new_empty((num_classes,), dtype=torch.int64)


def _cpp(scores: Tensor, labels: Tensor, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    s, y = scores.float().contiguous(), labels.contiguous()
    indices, counts = _results(s, k, num_classes)
    outside = native().smallest_per_class(
        s.data_ptr(), y.data_ptr(), len(s), k, num_classes, indices.data_ptr(), counts.data_ptr()
    )
    if outside >= 0:
        validation.raise_label_range(NAME, labels, num_classes, outside, "labels")
    return indices, counts


def _cuda(scores: Tensor, labels: Tensor, k: int, num_classes: int) -> tuple[Tensor, Tensor]:
    validation.check_label_range(NAME, labels, num_classes, "labels")
    s, y = scores.float().contiguous(), labels.contiguous()
    indices, counts = _results(s, k, num_classes)
    with torch.cuda.device(s.device):
        keys = s.new_empty(len(s), dtype=torch.int64)
        counters = s.new_zeros(3 * num_classes + 1, dtype=torch.int32)
        native().smallest_per_class_cuda(
            s.data_ptr(), y.data_ptr(), len(s), k, num_classes, keys.data_ptr(), counters.data_ptr(),
            indices.data_ptr(), counts.data_ptr(), torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
    return indices, counts


def _fake(scores: Tensor, labels: Tensor, k: int, num_classes: int, backend: str) -> tuple[Tensor, Tensor]:
    return _results(scores, k, num_classes)


def _fits(scores: Any, *, runs: Any) -> str | None:
    """Why a compiled kernel cannot take ``scores`` (or a stand-in that has only a device and a dtype), or ``None``."""
    if isinstance(scores, Tensor) and scores.numel() >= _MOST_SCORES:
        return f"takes fewer than 2^32 scores, got {scores.numel()}"
    return cast("str | None", runs(scores))


SELECT = Op(
    name="smallest_per_class",
    public=NAME,
    schema="(Tensor scores, Tensor labels, SymInt k, SymInt num_classes, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    key=lambda scores, *_: scores,
    implementations=(
        Implementation("cuda", _cuda, partial(_fits, runs=runs_cuda)),
        Implementation("cpp", _cpp, partial(_fits, runs=runs_cpp)),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


def _check(scores: Tensor, labels: Tensor) -> None:
    validation.check_floating(NAME, scores, "scores", "[N]")
    if scores.dim() != 1:
        raise ValueError(message(NAME, "scores", "shape [N]", str(list(scores.shape)), "pass one score a sample"))
    validation.check_target(NAME, labels, scores, "scores", "labels")


def _positive(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(message(NAME, name, "an integer", type(value).__name__, "pass an int")) from None
    if number < 1:
        raise ValueError(message(NAME, name, "an integer >= 1", str(number), "correct it"))
    return number
