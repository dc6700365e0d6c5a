"""What the rates are made of: classes and labels checked, and the share of hits."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bdfast.errors import message


def classes_of(where: str, predictions: Tensor) -> Tensor:
    """Classes [N] int64 from classes [N] or logits [N, C]; -1 for rows that are not all finite."""
    expected = "integer classes [N], or floating-point logits [N, C]"
    if not isinstance(predictions, Tensor):
        raise TypeError(message(where, "predictions", expected, describe(predictions), "convert with torch.as_tensor"))
    if predictions.ndim == 2 and predictions.is_floating_point() and predictions.shape[1] > 0:
        finite = predictions.isfinite().all(dim=1)
        return torch.where(finite, predictions.argmax(dim=1), -1)  # argmax: the first of equal maxima
    if predictions.ndim == 1 and not predictions.is_floating_point() and predictions.dtype != torch.bool:
        return predictions.to(torch.int64)
    raise ValueError(message(where, "predictions", expected, describe(predictions), "pass model outputs or arg-maxes"))


def labels_of(where: str, argument: str, labels: Tensor, like: Tensor) -> Tensor:
    """Labels [N] int64 on the device of ``like``, one for each of its rows."""
    expected = f"an integer tensor [{len(like)}]"
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        remedy = "convert with labels.long()" if isinstance(labels, Tensor) else "convert with torch.as_tensor"
        raise TypeError(message(where, argument, expected, describe(labels), remedy))
    if tuple(labels.shape) != (len(like),):
        raise ValueError(message(where, argument, expected, describe(labels), "pass one label for each row"))
    return labels.to(like.device, torch.int64)


def rate_of(where: str, hits: Tensor, rows: Tensor) -> float:
    """Fraction of ``rows`` (bool [N]) that are ``hits`` (bool [N])."""
    hit, count = torch.stack(((hits & rows).sum(), rows.sum())).tolist()
    if count == 0:
        warnings.warn(f"{where}: no image counts, so the rate is NaN", RuntimeWarning, stacklevel=3)
        return math.nan
    return float(hit / count)


def describe(value: object) -> str:
    """Dtype and shape of a tensor, else the type: what an error says it got."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
