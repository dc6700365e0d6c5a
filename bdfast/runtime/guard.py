"""What a defense may do to the caller's model: nothing, unless asked, and then all of it or none."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bdfast.errors import message


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter (or buffer); the CPU for a model without any.

    Example:
        >>> model_device(nn.Linear(2, 2))
        device(type='cpu')
    """
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def usable_device(where: str, device: str | torch.device) -> torch.device:
    """``device`` with its index, if this machine can put tensors there.

    Raises:
        TypeError: it is no name of a device.
        ValueError: it cannot.

    Example:
        >>> usable_device("example", "cpu")
        device(type='cpu')
    """
    if not isinstance(device, (str, torch.device, int)) or isinstance(device, bool):
        expected, remedy = "a torch.device, or its name", 'pass "cpu", or leave it out'
        raise TypeError(message(where, "device", expected, type(device).__name__, remedy))
    try:
        return torch.empty(0, device=device).device  # "cuda" becomes the current GPU
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        got = f"{device} ({str(error).splitlines()[0]})"
        remedy = 'pass "cpu", or leave it out'
        raise ValueError(message(where, "device", "a device of this machine", got, remedy)) from error


def check_in_memory(where: str, model: nn.Module) -> None:
    """Every parameter and buffer has values.

    Raises:
        ValueError: one is on the meta device, or waits for the first batch, as those of lazy modules do.

    Example:
        >>> check_in_memory("example", nn.LazyLinear(2))
        Traceback (most recent call last):
        ValueError: example: `model` expected weights with values, got none in `weight`; run a batch ...
    """
    named = (*model.named_parameters(), *model.named_buffers())
    empty = (name for name, tensor in named if is_lazy(tensor) or tensor.is_meta)
    if (name := next(empty, None)) is not None:
        remedy = "run a batch through the model, or load its weights"
        raise ValueError(message(where, "model", "weights with values", f"none in `{name}`", remedy))


@contextmanager
def working_model(
    model: nn.Module, where: str, *, inplace: bool = False, device: torch.device | None = None
) -> Iterator[nn.Module]:
    """A model to train in the block: a deep copy, or the caller's own.

    Gradients are enabled inside and autocast is off, whatever the caller runs under. On leaving, train/eval and
    ``requires_grad`` flags of the yielded model are those that ``model`` came with; a copy holds no gradients, an
    ``inplace`` model its old ones. If the block raises (KeyboardInterrupt too), an ``inplace`` model gets its
    parameters and buffers back; without ``inplace`` it was never touched.

    Args:
        model: the caller's.
        where: the function on whose behalf this happens; it opens the messages.
        inplace: yield ``model`` itself.
        device: where the copy is to be (with its index); None is where the model is.

    Raises:
        ValueError: ``inplace`` with another device, or with parameters that were made in inference mode and cannot be
            trained; a model that cannot be copied.

    Example:
        >>> model = nn.Linear(2, 2).eval()
        >>> with working_model(model, "example") as work:
        ...     _ = nn.init.zeros_(work.train().weight)
        >>> work.training, bool(model.weight.any())
        (False, True)
    """
    check_in_memory(where, model)
    own = model_device(model)
    if inplace and device not in (None, own):
        remedy = "move the model there first, or leave inplace out"
        raise ValueError(message(where, "device", f"the model's, {own}, with inplace=True", str(device), remedy))
    if inplace and any(p.is_inference() for p in model.parameters()):
        expected, got = "parameters that autograd can follow", "some made in torch.inference_mode"
        raise ValueError(message(where, "model", expected, got, "build the model outside of inference mode"))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast((device or own).type, enabled=False):
        work = model if inplace else _copy(model, where)
        snapshot = _Snapshot(work, values=inplace)
        try:
            yield work if device is None else work.to(device)
        except BaseException:
            snapshot.restore_values()
            raise
        finally:
            snapshot.restore_flags()


def _copy(model: nn.Module, where: str) -> nn.Module:
    try:
        with torch.no_grad():  # copies of a TorchScript module's parameters are its leaves
            return copy.deepcopy(model)
    except Exception as error:  # whatever a module's own __deepcopy__ may raise
        remedy = "pass inplace=True to change the model itself"
        got = f"{type(error).__name__}: {error}"
        raise ValueError(message(where, "model", "a model that copy.deepcopy can copy", got, remedy)) from error


class _Snapshot:
    """Flags of a model and, with ``values``, its parameters and buffers."""

    def __init__(self, model: nn.Module, *, values: bool) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._flags = [(p, p.requires_grad, p.grad if values else None) for p in model.parameters()]
        for p, _, _ in self._flags:
            p.grad = None
        self._values: list[tuple[Any, str, Tensor | None, Tensor | None]] = []
        if values:
            for module in model.modules():
                for store in (module._parameters, module._buffers):
                    for name, tensor in store.items():
                        self._values.append((store, name, tensor, None if tensor is None else tensor.detach().clone()))

    def restore_flags(self) -> None:
        for module, training in self._modes:
            module.training = training
        for p, requires_grad, grad in self._flags:
            p.requires_grad_(requires_grad)
            p.grad = grad

    @torch.no_grad()
    def restore_values(self) -> None:
        for store, name, tensor, value in self._values:
            store[name] = tensor  # a module may have put another tensor in its place
            if tensor is not None and value is not None:
                tensor.copy_(value)
