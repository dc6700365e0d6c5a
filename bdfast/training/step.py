"""One optimizer step: forward, backward, update; on a GPU it is captured, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from bdfast.runtime.graphed import Replayed
from bdfast.runtime.hooks import has_hooks
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.precision import Precision, autocast
from bdfast.training.options import can_fuse
from bdfast.training.workspace import Workspace

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels [B]) to the scalar whose gradient the optimizer gets."""

Perturbed: TypeAlias = Callable[[], AbstractContextManager[object]]
"""A block in which the weights are elsewhere, such as :meth:`bdfast.optim.SAM.perturbed`."""

Step: TypeAlias = Callable[[Tensor, Tensor, float], Tensor]
"""(x [B, C, H, W], y [B], factor of the objective) to the objective and the number of correct samples, ``[2]``."""


def training_step(
    where: str, work: Workspace, objective: Objective, optimizer: Optimizer, perturbed: Perturbed | None,
    precision: Precision,
) -> Step:  # fmt: skip
    """A call that trains on a batch; on a GPU it is captured where that does all that a step does.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        work: model and device.
        objective: see :data:`Objective`.
        optimizer: over the parameters of ``work.model``.
        perturbed: see :func:`bdfast.training.loop.fit`.
        precision: of forward and backward.
    """
    take = partial(_take, where, work, objective, optimizer, perturbed, precision)
    if not _can_replay(work, optimizer):
        return take
    replayed = replayed_at_rates(take, optimizer, work.data.device)

    def step(x: Tensor, y: Tensor, factor: float) -> Tensor:
        assert factor == 1.0  # another one is for several ranks, whose steps are not captured
        return replayed(x, y)

    return step


def replayed_at_rates(take: Callable[..., Tensor], optimizer: Optimizer, device: torch.device) -> Callable[..., Tensor]:
    """``take``, a step of ``optimizer``, as :class:`Replayed` has it, at the learning rates that a schedule has set.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> optimizer = torch.optim.SGD([w], lr=0.5)
        >>> def take(x):
        ...     w.grad = x.clone()
        ...     optimizer.step()
        ...     return w.detach()
        >>> replayed_at_rates(take, optimizer, torch.device("cpu"))(torch.ones(1))
        tensor([0.5000])
    """
    rates = DeviceRates(optimizer, device)

    def take_there(*inputs: Tensor) -> Tensor:
        with rates.in_place():
            return take(*inputs)

    replayed = Replayed(take_there, device)

    def step(*inputs: Tensor) -> Tensor:
        rates.follow()
        return replayed(*inputs)

    return step


def _take(
    where: str, work: Workspace, objective: Objective, optimizer: Optimizer, perturbed: Perturbed | None,
    precision: Precision, x: Tensor, y: Tensor, factor: float = 1.0,
) -> Tensor:  # fmt: skip
    def backward() -> tuple[Tensor, Tensor]:
        with autocast(work.data.device, precision):
            logits = logits_of(where, work.forward(x), len(x))
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        loss = objective(logits, y)
        loss = loss if factor == 1.0 else factor * loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logits.detach()

    loss, logits = backward()
    if perturbed is not None:
        with perturbed():
            backward()
    optimizer.step()
    return torch.stack((loss, (logits.argmax(1) == y).sum().to(loss.dtype)))


class DeviceRates:
    """The learning rates of an optimizer in device memory, where a captured step finds those of its time.

    The optimizer's own stay numbers, for schedules, records and checkpoints; the tensors stand in their place while it
    takes a step, captured or not, so that both compute the same bits.

    Example:
        >>> layer = torch.nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
        >>> rates = DeviceRates(optimizer, torch.device("cpu"))
        >>> optimizer.param_groups[0]["lr"] = 0.25
        >>> rates.follow()
        >>> with rates.in_place():
        ...     optimizer.param_groups[0]["lr"]
        tensor(0.2500)
    """

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._groups = optimizer.param_groups
        self._numbers = [float(group["lr"]) for group in self._groups]
        self._tensors = [torch.tensor(rate, dtype=torch.float32, device=device) for rate in self._numbers]

    def follow(self) -> None:
        """Take over what a schedule has changed."""
        for j, (group, tensor) in enumerate(zip(self._groups, self._tensors, strict=True)):
            if group["lr"] != self._numbers[j]:
                self._numbers[j] = float(group["lr"])
                tensor.fill_(self._numbers[j])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The tensors as the optimizer's learning rates."""
        numbers = [group["lr"] for group in self._groups]
        for group, tensor in zip(self._groups, self._tensors, strict=True):
            group["lr"] = tensor
        try:
            yield
        finally:
            for group, number in zip(self._groups, numbers, strict=True):
                group["lr"] = number


def _can_replay(work: Workspace, optimizer: Optimizer) -> bool:
    """Whether a graph would do all that a step does: no other rank, no hook, and an optimizer that asks no host."""
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    hooked = any(map(has_hooks, work.forward.modules()))
    hooked |= any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    return work.data.device.type == "cuda" and work.ranks.size == 1 and not hooked and can_fuse(parameters)
