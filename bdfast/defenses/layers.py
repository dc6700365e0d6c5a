"""Which layers a defense works on: the classifier by rule, or whatever is named."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

from torch import nn

from bdfast.errors import message
from bdfast.models import classifier_layers

_REMEDY = 'name the layers in the config: layers=["conv5"], say'


def select_layers(
    where: str, model: nn.Module, layers: Literal["classifier"] | Sequence[str]
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers by name, in the order of the model.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        model: the network.
        layers: ``"classifier"`` for the linear layers that end the network (:func:`bdfast.models.classifier_layers`),
            or names of modules: each stands for every Linear and Conv2d inside it, itself included.

    Raises:
        ValueError: the model does not end in a linear layer, a name is no module or holds no layer, or a layer's
            weight is not a parameter of its own.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> list(select_layers("example", model, "classifier")), list(select_layers("example", model, ["0", "4"]))
        (['2', '4'], ['0', '4'])
    """
    if layers == "classifier":
        chosen: dict[str, nn.Linear | nn.Conv2d] = dict(classifier_layers(model, where, remedy=_REMEDY))
    else:
        chosen = {}
        for name in layers:
            chosen.update(_layers_inside(where, model, name))
        order = [name for name, _ in model.named_modules() if name in chosen]
        chosen = {name: chosen[name] for name in order}
    for name, layer in chosen.items():
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            remedy = "remove its parametrization first (torch.nn.utils.parametrize.remove_parametrizations)"
            got = f"a computed weight in `{name}`"
            raise ValueError(message(where, "layers", "layers that own their weight", got, remedy))
    first = {layer.weight: name for name, layer in reversed(chosen.items())}  # layers that share a weight count once
    return {name: layer for name, layer in chosen.items() if first[layer.weight] == name}


def _layers_inside(where: str, model: nn.Module, name: str) -> dict[str, nn.Linear | nn.Conv2d]:
    modules = dict(model.named_modules())
    if name not in modules:
        close = difflib.get_close_matches(name, modules, n=3) or list(modules)[-3:]
        expected = "names of modules of the model"
        raise ValueError(message(where, "layers", expected, repr(name), f"perhaps one of {', '.join(close)}"))
    found = {
        path: module
        for path, module in modules.items()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and (path == name or path.startswith(f"{name}.") or name == "")
    }
    if not found:
        expected = "modules that hold a Linear or Conv2d"
        raise ValueError(message(where, "layers", expected, repr(name), "name a layer, or a module around one"))
    return found
