"""One optimizer step: forward, backward, update; on a GPU it is captured, and replayed from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from bdfast.runtime.graphed import Replayed
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.precision import Precision, autocast
from bdfast.training.options import can_fuse
from bdfast.training.workspace import Workspace

Objective: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels [B]) to the scalar whose gradient the optimizer gets."""

Perturbed: TypeAlias = Callable[[], AbstractContextManager[object]]
"""A block in which the weights are elsewhere, such as :meth:`bdfast.optim.SAM.perturbed`."""

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class TrainingStep:
    """``step(x, y)`` trains on a batch, and returns its objective and how many of its samples were right, ``[2]``.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        work: model and device.
        objective: see :data:`Objective`.
        optimizer: over the parameters of ``work.model``.
        perturbed: see :func:`bdfast.training.loop.fit`.
        precision: of forward and backward.
    """

    def __init__(
        self, where: str, work: Workspace, objective: Objective, optimizer: Optimizer, perturbed: Perturbed | None,
        precision: Precision,
    ) -> None:  # fmt: skip
        self._where, self._work, self._objective, self._optimizer = where, work, objective, optimizer
        self._perturbed, self._precision = perturbed, precision
        device = work.data.device
        self._rates = DeviceRates(optimizer, device) if _can_replay(work, optimizer) else None
        self._replayed = Replayed(self._take, device)

    def __call__(
        self,
        x: Tensor,  # [B, C, H, W]
        y: Tensor,  # [B]
        factor: float = 1.0,  # of the objective; another than 1 where several ranks share a batch
    ) -> Tensor:
        if self._rates is None:
            return self._take(x, y, factor)
        self._rates.follow()
        return self._replayed(x, y)

    def _take(self, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        loss, logits = self._backward(x, y, factor)
        if self._perturbed is not None:
            with self._perturbed():
                self._backward(x, y, factor)
        if self._rates is None:
            self._optimizer.step()
        else:
            with self._rates.in_place():
                self._optimizer.step()
        return torch.stack((loss, (logits.argmax(1) == y).sum().to(loss.dtype)))

    def _backward(self, x: Tensor, y: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """The gradients of one batch; its objective and its logits."""
        with autocast(self._work.data.device, self._precision):
            logits = logits_of(self._where, self._work.forward(x), len(x))
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        loss = self._objective(logits, y)
        loss = loss if factor == 1.0 else factor * loss
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), logits.detach()


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
    hooked = any(getattr(module, name) for module in work.forward.modules() for name in _HOOKS)
    hooked |= any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    return work.data.device.type == "cuda" and work.ranks.size == 1 and not hooked and can_fuse(parameters)
