"""What a model returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from bdfast.errors import ModelInputError, message
from bdfast.runtime.chunks import is_out_of_memory


@contextmanager
def first_pass(where: str, images: Tensor) -> Iterator[None]:
    """Around the first call of a model: what it raises over images that do not fit speaks of them.

    Raises:
        ModelInputError: the model raised a RuntimeError, of which the first line is quoted.

    Example:
        >>> import torch
        >>> with first_pass("example", torch.rand(2, 3, 8, 8)):
        ...     torch.nn.Conv2d(1, 4, 3)(torch.rand(2, 3, 8, 8))
        Traceback (most recent call last):
        bdfast.errors.ModelInputError: example: `images` expected what the model takes, got float32 [2, 3, 8, 8] (...
    """
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        got = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)} ({reason})"
        remedy = "convert the images, or pass the model that was trained on them"
        raise ModelInputError(message(where, "images", "what the model takes", got, remedy)) from error


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
