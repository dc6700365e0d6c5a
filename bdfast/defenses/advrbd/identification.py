"""What the enhanced network tells: samples that it still classifies as labelled behave as poisoned ones do."""

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
    """Which samples the enhanced networks, one a round, misclassify: the last one, or most of them.

    A prediction of -1, of logits that were not finite, is evidence of nothing and counts as right.

    Example:
        >>> rounds = [torch.tensor([1, 1, 0]), torch.tensor([1, 0, -1]), torch.tensor([0, 0, 1])]
        >>> labels = torch.tensor([0, 0, 0])
        >>> misclassified_by(rounds, labels, "last").tolist(), misclassified_by(rounds, labels, "majority").tolist()
        ([False, False, True], [True, False, False])
    """
    wrong = _wrong(predictions, labels)
    return wrong[-1] if vote == "last" else 2 * wrong.sum(0) > len(predictions)


def _wrong(predictions: list[Tensor], labels: Tensor) -> Tensor:
    """``[T, N]`` bool."""
    return torch.stack([(p != labels) & (p >= 0) for p in predictions])


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
    predictions: Tensor,  # [N]
    labels: Tensor,  # [N]
    enhanced: list[Tensor],  # [N] each
    content: Tensor | None = None,  # [N]
) -> Tensor:
    """D_clean and what the clean model classifies as labelled, if somebody seconds that.

    A clean model that is often wrong takes some of the poison for its target, too, and what comes back teaches the next
    one the trigger. What seconds it is content or, where content tells nothing, one of the enhanced networks that
    misclassifies the sample: they keep the backdoor, and most poison is as labelled to all of them.

    Args:
        clean: D_clean so far.
        predictions: the clean model's.
        labels: as given.
        enhanced: predictions of the enhanced networks, one a round.
        content: content margins.

    Example:
        >>> clean, labels = torch.tensor([True, False, False, False]), torch.tensor([0, 0, 1, 1])
        >>> predictions = torch.tensor([1, 0, 0, 1])
        >>> recovered(clean, predictions, labels, [], torch.tensor([1.0, 1.0, 1.0, -1.0])).tolist()
        [True, True, False, False]
        >>> recovered(clean, predictions, labels, [labels, torch.tensor([0, 0, 0, 0])]).tolist()
        [True, False, False, True]
    """
    seconded = _wrong(enhanced, labels).any(0) if content is None else content > 0
    return clean | ((predictions == labels) & seconded)
