"""The classifier head of any model: which linear layers end it."""

from __future__ import annotations

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


def classifier_layers(model: nn.Module, where: str = "classifier_layers") -> list[tuple[str, nn.Linear]]:
    """The trailing run of ``nn.Linear`` in module order, with the names that ``model.get_submodule`` takes.

    The run is interrupted by anything but activations, dropout, flatten and identity. What stands behind the last
    linear layer and has no parameters (a loss, a pool that was registered late) does not matter, and neither does a
    wrapper around the model: PreAct-ResNet gives 1 layer, VGG 3, a vision transformer its head and no attention.

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
            remedy = "name the layers to use explicitly"
            raise ValueError(message(where, "model", "a model that ends in nn.Linear", got, remedy))
    if not run:
        remedy = "name the layers to use explicitly"
        raise ValueError(message(where, "model", "a model that ends in nn.Linear", "none", remedy))
    return run


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
