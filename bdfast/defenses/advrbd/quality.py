"""What the ground truth says of a split, where it is known: for reports alone, nothing decides by it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bdfast.runtime.progress import Record


def purity(
    chosen: Tensor,  # [M]
    is_poisoned: Tensor,  # [N] bool
) -> Record:
    """How clean a selection is: ``purity`` (share) and ``leaked`` (poisoned samples).

    Example:
        >>> purity(torch.tensor([0, 2, 3, 4]), torch.tensor([False, True, False, False, True]))
        {'purity': 0.75, 'leaked': 1}
    """
    leaked = int(is_poisoned[chosen].sum())
    return {"purity": 1 - leaked / len(chosen) if len(chosen) else math.nan, "leaked": leaked}


def auroc(
    scores: Tensor,  # [M]
    is_poisoned: Tensor,  # [M] bool
) -> float:
    """Chance that a clean sample scores above a poisoned one, ties half; NaN where there are not both.

    Example:
        >>> auroc(torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([False, False, True, True]))
        0.875
    """
    known = ~scores.isnan()
    clean, poisoned = scores[known & ~is_poisoned].double(), scores[known & is_poisoned].double().sort().values
    if len(clean) == 0 or len(poisoned) == 0:
        return math.nan
    below = torch.searchsorted(poisoned, clean) + torch.searchsorted(poisoned, clean, right=True)
    return float(below.double().mean()) / (2 * len(poisoned))


def as_labelled(
    predictions: Tensor,  # [N]
    labels: Tensor,  # [N]
    is_poisoned: Tensor,  # [N] bool
) -> Record:
    """Shares of the clean and of the poisoned training samples that a network classifies as they are labelled.

    Example:
        >>> as_labelled(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 0]), torch.tensor([False, False, True]))
        {'clean_as_labelled': 0.5, 'poisoned_as_labelled': 1.0}
    """
    right = (predictions == labels).float()
    return {
        "clean_as_labelled": _share(right[~is_poisoned]),
        "poisoned_as_labelled": _share(right[is_poisoned]),
    }


def split_quality(
    clean: Tensor,  # [N] bool
    labels: Tensor,  # [N]
    is_poisoned: Tensor,  # [N] bool
    original_labels: Tensor | None,  # [N]
) -> dict[str, Any]:
    """How good a split is.

    Returns:
        ``tpr`` and ``fpr``: shares of the poisoned and of the clean samples in D_p; ``leaked``: poisoned samples in
        D_clean; ``retention``: share of each class's clean samples in D_clean; and, where the true labels are known,
        ``tpr_relabelled`` and ``leaked_relabelled``: the same of poison whose label is wrong. Poisoned images that are
        of the target class anyway have a trigger and a right label.

    Example:
        >>> clean = torch.tensor([True, False, True, False])
        >>> poisoned, labels = torch.tensor([False, False, True, True]), torch.tensor([0, 1, 1, 1])
        >>> split_quality(clean, labels, poisoned, torch.tensor([0, 1, 1, 0]))["leaked_relabelled"]
        0
    """
    quality = {
        "tpr": _share((~clean[is_poisoned]).float()),
        "fpr": _share((~clean[~is_poisoned]).float()),
        "leaked": int((clean & is_poisoned).sum()),
        "retention": {
            str(c): _share(clean[(labels == c) & ~is_poisoned].float()) for c in torch.unique(labels).tolist()
        },
    }
    if original_labels is not None:
        wrong = is_poisoned & (original_labels != labels)
        quality["tpr_relabelled"] = _share((~clean[wrong]).float())
        quality["leaked_relabelled"] = int((clean & wrong).sum())
    return quality


def _share(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan
