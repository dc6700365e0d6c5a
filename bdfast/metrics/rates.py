"""ACC, ASR and RA of predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.metrics.checks import classes_of, labels_of, rate_of


def accuracy(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    labels: Tensor,  # [N] integer
) -> float:
    """Fraction of predictions that equal their label.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits.
        labels: [N] true classes.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, for an empty set.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> accuracy(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 1, 2, 3]))
        0.75
    """
    classes = classes_of("accuracy", predictions)
    labels = labels_of("accuracy", "labels", labels, classes)
    return rate_of("accuracy", classes == labels, torch.ones_like(classes, dtype=torch.bool))


def attack_success_rate(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    attack_labels: Tensor,  # [N] integer
    original_labels: Tensor,  # [N] integer
    *,
    include_target: bool = False,
) -> float:
    """Fraction of triggered images classified as the attacker wants.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits, of triggered images.
        attack_labels: [N] what the attacker wants.
        original_labels: [N] true classes.
        include_target: count images whose true class is the attack label already, too.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, where no image counts.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> predictions, wanted, true = torch.tensor([0, 0, 2]), torch.zeros(3, dtype=torch.long), torch.arange(3)
        >>> attack_success_rate(predictions, wanted, true)  # the first image is of the target class
        0.5
    """
    where = "attack_success_rate"
    classes = classes_of(where, predictions)
    wanted = labels_of(where, "attack_labels", attack_labels, classes)
    true = labels_of(where, "original_labels", original_labels, classes)
    return rate_of(
        where, classes == wanted, torch.ones_like(true, dtype=torch.bool) if include_target else true != wanted
    )


def robust_accuracy(
    predictions: Tensor,  # [N] integer, or logits [N, C]
    attack_labels: Tensor,  # [N] integer
    original_labels: Tensor,  # [N] integer
) -> float:
    """Fraction of triggered images classified as their true class, over those that count for ASR.

    Args:
        predictions: [N] classes, or [N, C] floating-point logits, of triggered images.
        attack_labels: [N] what the attacker wants; images whose true class it is do not count.
        original_labels: [N] true classes.

    Returns:
        A fraction in [0, 1]; NaN, with a warning, where no image counts.

    Raises:
        TypeError, ValueError: tensors of another kind or shape than stated.

    Example:
        >>> predictions, wanted, true = torch.tensor([0, 0, 2]), torch.zeros(3, dtype=torch.long), torch.arange(3)
        >>> robust_accuracy(predictions, wanted, true)
        0.5
    """
    classes = classes_of("robust_accuracy", predictions)
    wanted = labels_of("robust_accuracy", "attack_labels", attack_labels, classes)
    true = labels_of("robust_accuracy", "original_labels", original_labels, classes)
    return rate_of("robust_accuracy", classes == true, true != wanted)
