r"""The k largest of N scores, as one selection.

.. math::

    S = \{\, i : s_i \text{ is not NaN} \,\}, \qquad
    \mathrm{result} = \text{the first } \min(k, |S|) \text{ of } S \text{ by } (-s_i, i)

This picks AdvrBD's clean samples (algorithm 1 of arXiv 2405.12719), whose scores are those of
:func:`bdfast.ops.kl_divergence`. It is :func:`bdfast.ops.smallest_per_class` of one class and negated scores; the
scores of -Inf, which that op leaves out, come after.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from bdfast.backends import requested
from bdfast.errors import message
from bdfast.ops import validation
from bdfast.ops.smallest_per_class import SELECT

NAME = "largest_scores"


def largest_scores(
    scores: Tensor,  # [N]
    k: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Indices of the ``k`` largest scores, ordered by descending score, ties by ascending index.

    Args:
        scores: ``[N]`` float32, float16, bfloat16 or float64 (reference only). +Inf comes first and -Inf last, NaN is
            never selected; -0.0 equals 0.0.
        k: how many, >= 0.
        backend: ``"auto"``, or the implementation to run or raise for.

    Returns:
        ``[min(k, N - #NaN)]`` int64. Its length depends on the values, which costs two syncs on a GPU. Reruns are
        bit-identical, whatever the device.

    Raises:
        TypeError: the dtype is not supported, or ``k`` is not an integer.
        ValueError: the shape is wrong, or ``k`` is negative.

    Example:
        >>> import torch, bdfast
        >>> scores = torch.tensor([0.5, float("nan"), 2.0, 0.5, float("inf")])
        >>> bdfast.ops.largest_scores(scores, 3)
        tensor([4, 2, 0])
        >>> bdfast.ops.largest_scores(scores, 100)
        tensor([4, 2, 0, 3])
    """
    validation.check_floating(NAME, scores, "scores", "[N]")
    if scores.dim() != 1:
        raise ValueError(message(NAME, "scores", "shape [N]", str(list(scores.shape)), "pass one score a sample"))
    k = _count(k)
    wish = requested(backend, NAME)
    wanted = min(k, scores.shape[0])
    if wanted == 0:
        return scores.new_empty(0, dtype=torch.int64)
    labels = torch.zeros(scores.shape, dtype=torch.int64, device=scores.device)
    indices, _ = SELECT(-scores.detach(), labels, wanted, 1, wish)
    selected: Tensor = indices[indices >= 0]
    lowest = (scores == -torch.inf).nonzero()[:, 0]
    return torch.cat((selected, lowest))[:wanted]


def _count(k: int) -> int:
    try:
        count = operator.index(k)
    except TypeError:
        raise TypeError(message(NAME, "k", "an integer", type(k).__name__, "pass an int")) from None
    if count < 0:
        raise ValueError(message(NAME, "k", "an integer >= 0", str(count), "correct it"))
    return count
