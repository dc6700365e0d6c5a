"""What the enhanced networks tell: samples that one still classifies as labelled behave as poisoned ones do."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bdfast.defenses.advrbd.config import Vote
from bdfast.ops import largest_scores


def misclassified_by(
    predictions: list[Tensor],  # [N] each
    labels: Tensor,  # [N]
    vote: Vote,
) -> Tensor:
    """Which samples the enhanced networks, one a round, misclassify: the last one, most or all of them.

    A prediction of -1, of logits that were not finite, is evidence of nothing and counts as right.

    Example:
        >>> rounds = [torch.tensor([1, 1, 0]), torch.tensor([1, 0, -1]), torch.tensor([1, 0, 1])]
        >>> for vote in ("last", "majority", "all"):
        ...     misclassified_by(rounds, torch.tensor([0, 0, 0]), vote).tolist()
        [True, False, True]
        [True, False, False]
        [True, False, False]
    """
    wrong = torch.stack([(p != labels) & (p >= 0) for p in predictions])
    if vote == "last":
        return wrong[-1]
    return wrong.all(0) if vote == "all" else 2 * wrong.sum(0) > len(predictions)


def identify(
    misclassified: Tensor,  # [N] bool
    labels: Tensor,  # [N]
    in_dc: Tensor,  # [N] bool
    scores: Tensor,  # [N]
    *,
    keep_dc: bool = True,
    min_per_class: int = 0,
    content: Tensor | None = None,  # [N]
) -> Tensor:
    """D_clean as a mask: D_c, and what the enhanced network misclassifies.

    Args:
        misclassified: see :func:`misclassified_by`.
        labels: as given.
        in_dc: D_c.
        scores: of the partition.
        keep_dc: D_c is clean by construction; otherwise it has to be misclassified, too.
        min_per_class: samples of each class that are clean in any case, those of the largest scores.
        content: content margins; samples at or below 0, or NaN, are not clean (unless ``min_per_class`` asks for them).

    Warns:
        UserWarning: nothing was misclassified, so that D_clean is D_c at most.

    Example:
        >>> labels, in_dc = torch.tensor([0, 0, 1, 1]), torch.tensor([True, False, False, False])
        >>> identify(torch.tensor([False, False, True, False]), labels, in_dc, torch.zeros(4)).tolist()
        [True, False, True, False]
    """
    if not bool(misclassified.any()):
        text = "the enhanced model misclassifies nothing, and only D_c counts as clean; raise mu or enhance_epochs"
        warnings.warn(f"advrbd: {text}", UserWarning, stacklevel=3)
        clean = in_dc.clone()
    else:
        clean = misclassified | (in_dc & keep_dc)
    if content is not None:
        clean &= content > 0
    for c in torch.unique(labels).tolist() if min_per_class else []:
        index = (labels == c).nonzero().flatten()
        clean[index[largest_scores(scores[index], min(min_per_class, len(index)))]] = True
    return clean


def recovered(
    clean: Tensor,  # [N] bool
    ratios: Tensor,  # [N]
    content: Tensor | None = None,  # [N]
) -> Tensor:
    """D_clean, and the suspects that differ in nothing from it.

    Args:
        clean: D_clean so far.
        ratios: log density ratios, of the suspects; NaN tells nothing. See :mod:`bdfast.defenses.advrbd.contrast`.
        content: content margins; samples at or below 0, or NaN, do not come back.

    Example:
        >>> clean, ratios = torch.tensor([True, False, False]), torch.tensor([float("nan"), -1.4, 3.0])
        >>> recovered(clean, ratios).tolist(), recovered(clean, ratios, torch.tensor([1.0, -1.0, 1.0])).tolist()
        ([True, True, False], [True, False, False])
    """
    back = ratios < 0
    return clean | (back if content is None else back & (content > 0))
