"""Normalisation that travels with the model, so that every caller speaks of images in [0, 1].

Attacks and defences add, clip and project in pixel space; a model that normalises its own input lets them stay there.
The state dict of a normalised model is that of the model inside, key for key: a checkpoint does not care whether the
normalisation sat in the data loader or in front of the first layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bdfast.errors import message

_PREFIX = "model."

Statistics: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, std), one number a channel."""


class Normalize(nn.Module):
    """``(images - mean) / std``, channel by channel.

    ``mean`` and ``std`` are buffers that follow ``.to(...)`` and stay out of the state dict.

    Args:
        mean: one number per channel, in the units of the images ([0, 1]); a single number serves every channel.
        std: likewise, above 0.

    Raises:
        ValueError: the lengths differ, a number is not finite or ``std`` is not positive; at call time, the images
            have another number of channels or an integer dtype.

    Example:
        >>> images = torch.tensor([0.5, 1.0]).reshape(1, 2, 1, 1)
        >>> Normalize(mean=(0.5, 0.5), std=(0.25, 0.5))(images).flatten().tolist()
        [0.0, 1.0]
    """

    mean: Tensor  # [C, 1, 1]
    std: Tensor  # [C, 1, 1]

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        means, stds = _channels("Normalize", "mean", mean), _channels("Normalize", "std", std)
        if len(means) != len(stds):
            got = f"{len(means)} and {len(stds)}"
            raise ValueError(message("Normalize", "std", "as many numbers as `mean`", got, "pass one per channel"))
        if min(stds) <= 0:
            raise ValueError(message("Normalize", "std", "numbers above 0", f"{std}", "pass standard deviations"))
        self.statistics = (means, stds)  # as given, for repr(): reading buffers would wait for the device
        self.register_buffer("mean", torch.tensor(means).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).reshape(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:  # [N, C, H, W] -> [N, C, H, W]
        return _normalize(images, self.mean, self.std)

    def extra_repr(self) -> str:
        return f"mean={self.statistics[0]}, std={self.statistics[1]}"


class Normalized(nn.Module):
    """A model behind a :class:`Normalize`; made by :func:`normalized`.

    ``state_dict()`` and ``load_state_dict()`` speak the names of the model inside (``linear.weight``, not
    ``model.linear.weight``), and its attributes are reached through the wrapper (``wrapped.linear``).
    ``named_parameters()`` and ``named_modules()`` tell where things are: below ``model``.
    """

    def __init__(self, model: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        self.register_state_dict_post_hook(_strip_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_prefix)  # type: ignore[no-untyped-call]

    def forward(self, images: Tensor) -> Any:  # [N, C, H, W] in [0, 1] -> whatever the model returns
        return self.model(self.normalize(images))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not `self._modules`: while a copy is being made it is not there yet, and would bring us back here.
            inside = self.__dict__.get("_modules", {}).get("model")
            if inside is None:
                raise
            return getattr(inside, name)


def normalized(model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> Normalized:
    """Put ``(images - mean) / std`` in front of ``model``; the state dict keeps the names of ``model``.

    Args:
        model: any module from normalised NCHW images to logits.
        mean: one number per channel, for images in [0, 1]; a single number serves every channel.
        std: likewise, above 0.

    Raises:
        ValueError: see :class:`Normalize`.

    Example:
        >>> head = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        >>> list(normalized(head, mean=0.5, std=0.25).state_dict())
        ['1.weight', '1.bias']
    """
    return Normalized(model, Normalize(mean, std))


@torch.fx.wrap  # one node of a traced graph: the checks read shapes, which a tracer's stand-in does not have
def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    if not images.is_floating_point():
        raise ValueError(
            message("Normalize", "images", "floats in [0, 1]", str(images.dtype), "divide uint8 images by 255")
        )
    channels = len(mean)
    if channels > 1 and (images.ndim < 3 or images.shape[-3] != channels):
        raise ValueError(
            message(
                "Normalize",
                "images",
                f"[N, {channels}, H, W]",
                str(list(images.shape)),
                "give `mean` and `std` one number per channel of the images",
            )
        )
    # The images' dtype: float32 statistics would promote a half precision batch.
    return (images - mean.to(images.dtype)) / std.to(images.dtype)


def statistics(where: str, normalize: object) -> Statistics | None:
    """``(mean, std)`` as a function was given them, as tuples of floats; None stays None.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        normalize: a pair of numbers, sequences, arrays or tensors, such as :func:`bdfast.data.normalization` returns.

    Raises:
        TypeError: it is no pair, or its parts are not numbers.
        ValueError: a number is not finite, or a standard deviation not above 0.

    Example:
        >>> statistics("example", (0.5, torch.tensor([0.25, 0.5])))
        ((0.5,), (0.25, 0.5))
    """
    if normalize is None:
        return None
    if not isinstance(normalize, (tuple, list)) or len(normalize) != 2:
        expected, remedy = "a pair (mean, std), one number a channel each", "see bdfast.data.normalization"
        raise TypeError(message(where, "normalize", expected, f"{normalize!r:.80}", remedy))
    mean, std = (
        _channels(where, f"normalize: {name}", part) for name, part in zip(("mean", "std"), normalize, strict=True)
    )
    if min(std) <= 0:
        raise ValueError(message(where, "normalize: std", "numbers above 0", f"{tuple(std)}", "pass deviations"))
    return tuple(mean), tuple(std)


def _channels(where: str, argument: str, value: object) -> list[float]:
    try:
        numbers: list[float] = torch.as_tensor(value, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        remedy = "pass one per channel"
        raise TypeError(message(where, argument, "numbers", f"{value!r:.80}", remedy)) from None
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(message(where, argument, "finite numbers", f"{value}", "pass one per channel"))
    return numbers


def _strip_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, local_metadata: Mapping[str, Any]) -> None:
    metadata = getattr(state, "_metadata", {})
    for names in (state, metadata):
        _rename(names, prefix + _PREFIX, prefix)
    if prefix + "model" in metadata:
        metadata[prefix[:-1]] = metadata.pop(prefix + "model")


def _add_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *unused: Any) -> None:
    _rename(state, prefix, prefix + _PREFIX)


def _rename(names: dict[str, Any], old: str, new: str) -> None:
    """Replace the prefix ``old`` by ``new``, in place and keeping the order."""
    for key in list(names):
        value = names.pop(key)
        names[new + key[len(old) :] if key.startswith(old) else key] = value
