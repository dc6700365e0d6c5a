"""The network of a record: which of ours it is, and its weights under our names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.errors import MissingExtraError, printable
from bdfast.integrations.backdoorbench.stored import Fields, StoredRecord
from bdfast.runtime.checkpoints import load_into

_NAMES = {"preactresnet18": "preact_resnet18"}  # BackdoorBench's name -> ours; all others are the same


def architecture(model_name: str) -> str:
    """Our name of a network of BackdoorBench.

    Example:
        >>> architecture("preactresnet18"), architecture("vgg19_bn")
        ('preact_resnet18', 'vgg19_bn')
    """
    return _NAMES.get(model_name, model_name)


def benchmark_name(name: str) -> str:
    """BackdoorBench's name of one of our networks."""
    return next((theirs for theirs, ours in _NAMES.items() if ours == name), name)


def without_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without DataParallel's ``module.``."""
    short = {key.removeprefix("module."): value for key, value in state.items()}
    return short if len(short) == len(state) else dict(state)


def build_network(fields: Fields, record: StoredRecord) -> tuple[nn.Module, list[str]]:
    """The network with its weights, and what is to be said about it.

    Names that differ are matched by position, as BackdoorBench does, but only where there are as many and every shape
    agrees; the notes say so.

    Raises:
        ArtefactError: an architecture that is not known here, or weights that do not fit it.
        ValueError: names or shapes differ; the message lists them.
    """
    state = without_module(record.state)
    height, width, channels = record.image_shape
    name = architecture(record.model_name)
    expected = ""
    for options in _options(name, state):
        build = {"num_classes": record.num_classes, "image_size": (height, width), "channels": channels, **options}
        try:
            with torch.device("meta"):  # shapes first: what a file declares takes no memory yet
                shapes = {key: value.shape for key, value in models.build(name, **build).state_dict().items()}
        except (ValueError, TypeError, MissingExtraError) as error:
            remedy = "convert the weights alone with `bdfast convert`, and build the network yourself"
            raise fields.wrong("model_name", "an architecture that is known here", str(error), remedy) from error
        renamed = _match(shapes, state)
        if renamed is not None:
            model = models.build(name, **build)
            load_into(model, renamed[0], f"{fields.where}: {fields.path}: model")
            return model.eval(), renamed[1]
        expected = _difference(shapes, state)
    got = f"{len(state)} tensors: {expected}"
    remedy = f"check model_name ({record.model_name}), num_classes ({record.num_classes}) and img_size"
    raise fields.wrong("model", f"the weights of {name}", got, remedy)


def _options(name: str, state: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """What to build: residual networks come with two stems, told apart by the first weight."""
    if name in ("resnet18", "resnet34"):
        first = next(iter(state.values()))
        yield {"stem": "imagenet" if first.shape[-1:] == (7,) else "cifar"}
    else:
        yield {}


def _match(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
    if shapes.keys() == state.keys():
        return (dict(state), []) if all(state[key].shape == shapes[key] for key in shapes) else None
    if len(shapes) != len(state) or any(
        shape != value.shape for shape, value in zip(shapes.values(), state.values(), strict=True)
    ):
        return None
    pairs = list(zip(shapes, state, strict=True))
    changed = [f"{printable(theirs)} -> {ours}" for ours, theirs in pairs if ours != theirs]
    note = (
        f"{len(changed)} of {len(pairs)} weights were renamed by position, every shape agreeing: "
        f"{', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
    )
    return {ours: state[theirs] for ours, theirs in pairs}, [note]


def _difference(shapes: Mapping[str, torch.Size], state: Mapping[str, Tensor]) -> str:
    """The first disagreement, in words."""
    for key, shape in shapes.items():
        if key in state and state[key].shape != shape:
            return f"{key} is {list(state[key].shape)}, not {list(shape)}"
    missing = [key for key in shapes if key not in state]
    foreign = [key for key in state if key not in shapes]
    return f"missing {', '.join(missing[:3]) or 'none'}, unknown {', '.join(foreign[:3]) or 'none'}"
