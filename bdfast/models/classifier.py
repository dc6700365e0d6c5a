"""The classifier head of any model: which linear layers end it."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.modules import activation, dropout

from bdfast.errors import message
from bdfast.nn.clipped_relu import ClippedReLU

# What may stand between the linear layers of a head. MultiheadAttention is filed under activations by torch.
_TRANSPARENT = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    ClippedReLU,
    *(
        cls
        for module in (activation, dropout)
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module) and cls not in (nn.Module, nn.MultiheadAttention)
    ),
)


# Most callers have no other layer to work on; those that take names say so.
_REMEDY = "end it in one: the 1x1 convolution behind a global pool, say, is a Linear of the pooled features"


def classifier_layers(
    model: nn.Module, where: str = "classifier_layers", *, remedy: str = _REMEDY
) -> list[tuple[str, nn.Linear]]:
    """The trailing run of ``nn.Linear`` in module order, with the names that ``model.get_submodule`` takes.

    The run is interrupted by anything but activations, dropout, flatten and identity. What stands behind the last
    linear layer and has no parameters (a loss, a pool that was registered late) does not matter, and neither does a
    wrapper around the model: PreAct-ResNet gives 1 layer, VGG 3, a vision transformer its head and no attention. Of
    heads side by side, whose logits a distilled DeiT or LeViT averages, all count: see :func:`classifier_heads`.

    Args:
        model: the network.
        where: the function on whose behalf this happens; it opens the message.
        remedy: what its caller can do about a model without a linear head; it ends the message.

    Raises:
        ValueError: the model does not end in a linear layer.

    Example:
        >>> mlp = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [name for name, layer in classifier_layers(mlp)]
        ['2', '4']
    """
    run: list[tuple[str, nn.Linear]] = []
    for name, module in reversed(_units(model)):
        if isinstance(module, nn.Linear):
            run.insert(0, (name, module))
        elif run:
            if not _is_transparent(module):
                break
        elif next(module.parameters(), None) is not None:
            got = f"{type(module).__name__} (`{name}`)"
            raise ValueError(message(where, "model", "a model that ends in nn.Linear", got, remedy))
    if not run:
        raise ValueError(message(where, "model", "a model that ends in nn.Linear", "none", remedy))
    found = dict(run)
    return [*((name, layer) for name, layer in _beside(model, run[-1][0]) if name not in found), *run]


def classifier_heads(model: nn.Module, where: str = "classifier_heads") -> list[tuple[str, nn.Linear]]:
    """Those of :func:`classifier_layers` that put out logits: the last one, and its like side by side with it.

    Raises:
        ValueError: the model does not end in a linear layer.

    Example:
        >>> class Distilled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        ...         self.head_dist = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        ...     def forward(self, x):
        ...         return (self.head(x) + self.head_dist(x)) / 2
        >>> [name for name, layer in classifier_heads(Distilled())]
        ['head.1', 'head_dist.1']
    """
    name, layer = classifier_layers(model, where)[-1]
    return [*_beside(model, name), (name, layer)]


def _beside(model: nn.Module, name: str) -> list[tuple[str, nn.Linear]]:
    """Linear layers that stand as the one named does, in modules just before its own and made alike.

    A module with one matrix, from D to K features, cannot follow on another like it unless D = K: so these are heads
    side by side and no layers in a row.
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    if layer.in_features == layer.out_features:
        return []
    parts = name.split(".") if name else []
    for depth in reversed(range(len(parts))):
        parent, inner = model.get_submodule(".".join(parts[:depth])), parts[depth + 1 :]
        own = parent.get_submodule(parts[depth])
        if sum(p.ndim > 1 for p in own.parameters()) != 1:
            break
        alike: list[str] = []
        for key, other in parent.named_children():
            if key == parts[depth]:
                break
            alike = [*alike, key] if _is_like(other, own) else []
        if alike:
            paths = [".".join([*parts[:depth], key, *inner]) for key in alike]
            return [(path, cast(nn.Linear, model.get_submodule(path))) for path in paths]
    return []


def _is_like(other: nn.Module, own: nn.Module) -> bool:
    shapes = [{key: p.shape for key, p in module.named_parameters()} for module in (other, own)]
    return other is not own and type(other) is type(own) and shapes[0] == shapes[1]


def _units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that compute something themselves, in order: linear and attention layers whole, and leaves."""
    units: list[tuple[str, nn.Module]] = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        whole = isinstance(module, (nn.Linear, nn.MultiheadAttention))
        if whole:
            inside.update(module.modules())
        if whole or next(module.children(), None) is None:
            units.append((name, module))
    return units


def _is_transparent(module: nn.Module) -> bool:
    if isinstance(module, _TRANSPARENT):
        return True
    # An activation or dropout of someone else's making: outside torch.nn, and nothing in it to train.
    return not type(module).__module__.startswith("torch.nn") and next(module.parameters(), None) is None
