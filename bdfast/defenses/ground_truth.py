"""Which samples are poisoned, where a user knows: for reports, and for the oracle that AdvrBD is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from bdfast.errors import message


def known_truth(where: str, ground_truth: Tensor | None, data: object, count: int) -> Tensor | None:
    """bool ``[count]`` on the CPU, as given or as the data says itself; None where nobody knows.

    Raises:
        ValueError: it is something else.
    """
    truth = getattr(data, "is_poisoned", None) if ground_truth is None else ground_truth
    if truth is None:
        return None
    if not isinstance(truth, Tensor) or truth.dtype != torch.bool or truth.shape != (count,):
        got = f"{truth.dtype} {list(truth.shape)}" if isinstance(truth, Tensor) else type(truth).__name__
        raise ValueError(message(where, "ground_truth", f"bool [{count}]", got, "say which samples are poisoned"))
    return truth.cpu()
