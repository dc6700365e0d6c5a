"""What a model returns."""

from __future__ import annotations

from torch import Tensor

from bdfast.errors import message


def logits_of(where: str, output: object, count: int) -> Tensor:
    """The logits [count, K] in a model's output.

    Raises:
        TypeError, ValueError: it is neither one row of logits an image nor an object with such ``.logits``.

    Example:
        >>> import torch
        >>> logits_of("example", torch.zeros(2, 3), 2).shape
        torch.Size([2, 3])
    """
    logits = getattr(output, "logits", output)
    expected = f"an output of logits [{count}, K], or one with .logits"
    if not isinstance(logits, Tensor):
        raise TypeError(message(where, "model", expected, type(logits).__name__, "return the logits"))
    if logits.ndim != 2 or len(logits) != count or logits.shape[1] == 0:
        raise ValueError(message(where, "model", expected, str(list(logits.shape)), "return one row an image"))
    return logits
