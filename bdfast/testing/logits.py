"""Logits and labels that the cases of several ops share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.testing.draws import seeded


def draw_logits(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    *,
    scale: float = 3.0,
    layout: str = "contiguous",
    special: str = "",
) -> tuple[Tensor, Tensor]:
    """Logits ``[N, C]`` of spread ``scale`` and labels ``[N]``; the label's logit is raised in half of the rows.

    Args:
        device: of both.
        dtype: of the logits.
        shape: ``(N, C)``.
        scale: standard deviation of the logits.
        layout: ``"contiguous"``, ``"transposed"`` (samples contiguous) or ``"padded rows"``.
        special: ``"confident"`` raises every label far past what float32 probabilities tell apart, ``"outliers"`` has
            logits of thousands, ``"-inf"`` masked classes, ``"non-finite"`` NaN and infinities in rows of their own.
    """
    generator = seeded(0)
    n, c = shape
    logits = torch.randn(n, c, generator=generator) * scale
    target = torch.randint(c, (n,), generator=generator)
    rows = torch.arange(n)
    logits[rows[::2], target[::2]] += 4.0 * scale
    if special == "confident":
        logits[rows, target] += 20.0 + 0.5 * rows
    if special == "outliers":
        logits[::3] *= 1e3
    if special == "-inf":
        logits[::3, 1::2] = -torch.inf
    if special == "non-finite" and n:
        logits[1, c // 2] = torch.nan
        logits[4, 0] = torch.inf
        logits[7, target[7]] = torch.inf
        logits[10, target[10]] = -torch.inf
        logits[13] = -torch.inf
    logits = logits.to(device, dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    if layout == "padded rows":
        logits = F.pad(logits, (3, 5))[:, 3 : 3 + c]
    return logits, target.to(device)
