"""A caller's hooks while a defense works: those that only watch rest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")
_FORWARD = ("_forward_pre_hooks", "_forward_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of any kind hang on a module itself.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> handle = net.register_forward_hook(lambda *_: None)
        >>> has_hooks(net), has_hooks(nn.Sequential(net))
        (True, False)
    """
    return any(getattr(module, name) for name in (*_BACKWARD, *_FORWARD))


class _Hooks(NamedTuple):
    """Hooks of one kind on one module."""

    module: nn.Module
    name: str
    hooks: OrderedDict[int, Any]

    def put(self, hooks: OrderedDict[int, Any]) -> None:
        vars(self.module)[self.name] = hooks


@contextmanager
def quiet_hooks(model: nn.Module, logits: Callable[[], Tensor]) -> Iterator[None]:
    """:func:`silence_hooks` in the block; on leaving, all hooks are back.

    Example:
        >>> net, seen = nn.Linear(2, 2), []
        >>> handle = net.register_forward_hook(lambda *_: seen.append(1))
        >>> with quiet_hooks(net, lambda: net(torch.ones(1, 2))):
        ...     seen.clear()
        ...     _ = net(torch.ones(1, 2))
        >>> seen, len(net._forward_hooks)
        ([], 1)
    """
    before = _hooks_of(model, (*_BACKWARD, *_FORWARD))
    try:
        silence_hooks(model, logits)
        yield
    finally:
        for found in before:
            found.put(found.hooks)


def silence_hooks(model: nn.Module, logits: Callable[[], Tensor]) -> None:
    """Take off the hooks of ``model`` that are no part of what it computes.

    A hook that collects activations for its owner would collect those of every training step. A forward hook is part of
    the model, and stays, if the logits change without it: here, or elsewhere in the space of weights, since a hook may
    compute weights from others (old ``weight_norm``) or keep some at zero (``prune``). Hooks on gradients are taken
    off always.

    Args:
        model: the model; its parameters are moved meanwhile, and put back.
        logits: what it makes of some images, the same at every call but for hooks and parameters; it is asked once,
            and twice for every forward hook.
    """
    for found in _hooks_of(model, _BACKWARD):
        found.put(OrderedDict())
    forward = _hooks_of(model, _FORWARD)
    if not forward:
        return
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    values = [p.detach().clone() for p in parameters]
    elsewhere = [_moved(values, seed) for seed in (0, 1)]

    def asked(place: int) -> Tensor:
        _set(parameters, elsewhere[place])  # each time, since hooks may change parameters
        return logits()

    try:
        with torch.no_grad():
            _take_off(forward, asked)
    finally:
        _set(parameters, values)


def _take_off(hooks: list[_Hooks], asked: Callable[[int], Tensor]) -> None:
    expected = asked(0)
    for found in hooks:
        kept = OrderedDict(found.hooks)
        for key in found.hooks:
            asked(1)  # what the hook may have computed is of another place now
            trial = OrderedDict((other, hook) for other, hook in kept.items() if other != key)
            found.put(trial)
            kept = trial if _same(asked, expected) else kept
            found.put(kept)


def _same(asked: Callable[[int], Tensor], expected: Tensor) -> bool:
    try:
        found = asked(0)
    except Exception:  # the model cannot do without the hook
        return False
    return found.shape == expected.shape and torch.equal(found.nan_to_num(), expected.nan_to_num())


def _moved(values: list[Tensor], seed: int) -> list[Tensor]:
    """Parameters as far from these as they are large."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value) for value in values]
    return [value + value.square().mean().sqrt() * drawn for value, drawn in zip(values, noise, strict=True)]


@torch.no_grad()
def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def _hooks_of(model: nn.Module, names: tuple[str, ...]) -> list[_Hooks]:
    return [
        _Hooks(module, name, vars(module)[name])
        for module in model.modules()
        for name in names
        if vars(module).get(name)
    ]
