"""Models by name."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from bdfast.errors import message
from bdfast.models.digits_cnn import digits_cnn
from bdfast.models.external import LIBRARIES, RESIZED, build_external, build_resized, find_library, library_names
from bdfast.models.mobilenet_v2 import mobilenet_v2
from bdfast.models.preact_resnet import preact_resnet18
from bdfast.models.resnet import resnet18, resnet34
from bdfast.models.vgg import vgg19_bn
from bdfast.nn.normalize import normalized, statistics


@dataclass(frozen=True)
class Architecture:
    """One of our own networks: how to make it, and the keys of its state dict that tell its size."""

    factory: Callable[..., nn.Module]
    stem: str  # weight [width, channels, k, k]
    head: str  # weight [num_classes, features]
    channels: int = 3  # of the images that it is meant for


_ARCHITECTURES = {
    "digits_cnn": Architecture(digits_cnn, "conv1.weight", "linear.weight", channels=1),
    "mobilenet_v2": Architecture(mobilenet_v2, "features.0.0.weight", "classifier.1.weight"),
    "preact_resnet18": Architecture(preact_resnet18, "conv1.weight", "linear.weight"),
    "resnet18": Architecture(resnet18, "conv1.weight", "fc.weight"),
    "resnet34": Architecture(resnet34, "conv1.weight", "fc.weight"),
    "vgg19_bn": Architecture(vgg19_bn, "features.0.weight", "classifier.6.weight"),
}
_ALIASES = {"preactresnet18": "preact_resnet18"}  # as BackdoorBench spells it


def names(*, external: bool = False) -> list[str]:
    """The names that :func:`build` knows.

    Args:
        external: list the architectures of the installed torchvision and timm too, as ``library:name``.

    Example:
        >>> names()
        ['digits_cnn', 'mobilenet_v2', 'preact_resnet18', 'resnet18', 'resnet34', 'vgg19_bn']
    """
    own = sorted(_ARCHITECTURES)
    return own + [f"{library}:{n}" for library in LIBRARIES for n in library_names(library)] if external else own


def build(
    name: str,
    *,
    num_classes: int,
    image_size: int | tuple[int, int] = 32,
    channels: int | None = None,
    normalize: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """A network from NCHW float images in [0, 1] to logits, with random weights.

    Args:
        name: one of :func:`names`; or ``"torchvision:..."`` and ``"timm:..."`` where these are installed (a plain name
            that is not ours is looked up there). ``vit_b_16`` and its sisters without prefix are torchvision's
            behind a resize to 224 pixels, with the state-dict names of the benchmarks.
        num_classes: width of the logits.
        image_size: pixels, one number or (height, width).
        channels: of the images; by default 3, and 1 for ``digits_cnn``.
        normalize: (mean, std) of the data set, per channel or one number; see :func:`bdfast.nn.normalized`. The state
            dict does not change.
        seed: of the initial weights, leaving torch's global generators alone; by default they are drawn from those.
        **options: of the architecture, such as ``stem=`` of the ResNets or ``dropout=``.

    Raises:
        ValueError: an unknown name, or a size that is not positive or too small for the network.
        TypeError: an option that the architecture does not have, or an argument of another kind.
        MissingExtraError: the library named by a prefix is not installed.

    Example:
        >>> model = build("digits_cnn", num_classes=10, image_size=8, seed=0)
        >>> model(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    if not isinstance(name, str):
        raise TypeError(message("build", "name", "text", f"{name!r:.80}", f"pass one of {', '.join(names())}"))
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    given = {"num_classes": num_classes, "channels": channels, "seed": seed}
    for argument, number in (*(("image_size", side) for side in size), *given.items()):
        if (number is not None or argument == "num_classes") and (
            isinstance(number, bool) or not isinstance(number, numbers.Integral)
        ):
            raise TypeError(message("build", argument, "a whole number", f"{number!r:.80}", "pass an int"))
    if len(size) != 2 or min(size) < 1:
        remedy = "pass one number or (height, width)"
        raise ValueError(message("build", "image_size", "positive numbers of pixels", f"{image_size}", remedy))
    for argument, value in (("num_classes", num_classes), ("channels", channels)):
        if value is not None and value < 1:
            raise ValueError(message("build", argument, "a positive number", f"{value}", "count from 1"))
    scale = statistics("build", normalize)
    if scale is not None:
        own = _ARCHITECTURES.get(_ALIASES.get(name, name))
        width = channels or (own.channels if own is not None else 3)
        lengths = [len(part) for part in scale]
        if any(length not in (1, width) for length in lengths):
            expected = f"(mean, std) of 1 or {width} numbers each"
            raise ValueError(message("build", "normalize", expected, f"lengths {lengths}", "one number a channel"))
    with _drawn_from(seed):
        model = _construct(name, num_classes, (size[0], size[1]), channels, options)
    if seed is not None:  # drawn on the CPU, where the numbers do not depend on the device
        model = model.to(torch.get_default_device())
    return model if scale is None else normalized(model, *scale)


def from_state(
    name: str,
    state: Mapping[str, Tensor],
    *,
    image_size: int | tuple[int, int] = 32,
    normalize: tuple[float | Sequence[float], float | Sequence[float]] | None = None,
) -> nn.Module:
    """One of our own networks, made to measure for a state dict: classes, channels and stem are read off its shapes.

    The weights are *not* loaded; see :func:`bdfast.runtime.checkpoints.load_into`.

    Args:
        name: one of :func:`names`.
        state: a state dict of that architecture.
        image_size: pixels, one number or (height, width).
        normalize: as in :func:`build`.

    Raises:
        ValueError: an unknown name, or the state dict lacks the first or the last weight of the architecture.

    Example:
        >>> state = build("digits_cnn", num_classes=7).state_dict()
        >>> from_state("digits_cnn", state, image_size=8).linear.out_features
        7
    """
    architecture = _ARCHITECTURES.get(_ALIASES.get(name, name))
    if architecture is None:
        raise ValueError(message("from_state", "name", f"one of {', '.join(names())}", f"{name!r}", "use build()"))
    for key, ndim in ((architecture.stem, 4), (architecture.head, 2)):
        if key not in state or state[key].ndim != ndim:
            got = f"{list(state[key].shape)}" if key in state else f"no such key among {len(state)}"
            expected = f"`{key}` of {ndim} dimensions for {name}"
            raise ValueError(message("from_state", "state", expected, got, "check the name of the architecture"))
    stem = state[architecture.stem]
    options: dict[str, Any] = {}
    if "stem" in signature(architecture.factory).parameters:
        options["stem"] = "imagenet" if stem.shape[-1] == 7 else "cifar"
    return build(
        name,
        num_classes=len(state[architecture.head]),
        image_size=image_size,
        channels=stem.shape[1],
        normalize=normalize,
        **options,
    )


def size_of(name: str, state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Channels of the images and number of classes of a state dict; None where it is of no network of ours.

    Example:
        >>> size_of("digits_cnn", build("digits_cnn", num_classes=7).state_dict())
        (1, 7)
    """
    own = _ARCHITECTURES.get(_ALIASES.get(name, name))
    if own is None or not all(key in state and state[key].ndim > 1 for key in (own.stem, own.head)):
        return None
    return state[own.stem].shape[1], len(state[own.head])


def _construct(
    name: str, num_classes: int, image_size: tuple[int, int], channels: int | None, options: dict[str, Any]
) -> nn.Module:
    key = _ALIASES.get(name, name)
    if key in _ARCHITECTURES:
        architecture = _ARCHITECTURES[key]
        known = list(signature(architecture.factory).parameters)[3:]
        if unknown := sorted(set(options) - set(known)):
            expected = f"the options of {key} ({', '.join(known) or 'none'})"
            raise TypeError(message("build", unknown[0], expected, f"{options[unknown[0]]!r}", "leave it out"))
        return architecture.factory(num_classes, image_size, channels or architecture.channels, **options)
    if name in RESIZED:
        return build_resized(name, num_classes=num_classes, channels=channels or 3, **options)
    library, colon, rest = name.partition(":")
    if not colon:
        library, rest = find_library(name) or "", name
    if library not in LIBRARIES:
        close = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)
        remedy = f"did you mean {close[0]!r}?" if close else "prefix it with torchvision: or timm: if it is theirs"
        expected = f"one of {', '.join(names())}, or an architecture of an installed torchvision or timm"
        raise ValueError(message("build", "name", expected, f"{name!r}", remedy))
    return build_external(
        library, rest, num_classes=num_classes, image_size=image_size, channels=channels or 3, **options
    )


@contextmanager
def _drawn_from(seed: int | None) -> Iterator[None]:
    """Draw initial weights from ``seed`` and put torch's CPU generator back; ``None`` draws from that generator.

    Constructors of modules take no generator. Only the CPU's is touched: torch.manual_seed would reseed every device.
    """
    if seed is None or torch.get_default_device().type == "meta":
        yield
        return
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        with torch.device("cpu"):
            yield
    finally:
        generator.set_state(before)
