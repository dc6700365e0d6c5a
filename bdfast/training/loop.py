"""The one training loop: epochs over data on the device, a look at the numbers once an epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from bdfast.errors import message
from bdfast.runtime.precision import Precision, autocast
from bdfast.runtime.progress import Callback, Record
from bdfast.training.options import BatchNormMode
from bdfast.training.workspace import Workspace, logits_of

Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits [B, K], labels [B]) to the scalar whose gradient the optimizer gets."""


def fit(
    work: Workspace,
    objective: Objective,
    optimizer: Optimizer,
    schedule: LRScheduler,
    *,
    where: str,
    epochs: int,
    batch_size: int,
    seed: int,
    bn: BatchNormMode = "train",
    precision: Precision = "fp32",
    schedule_every: Literal["epoch", "batch"] = "epoch",
    measure: Callable[[float], Mapping[str, Any]] | None = None,
    callback: Callback | None = None,
) -> list[Record]:
    """Minimise ``objective`` over shuffled, augmented batches; the last, smaller one counts too.

    Nothing is read back from the device within an epoch.

    Args:
        work: model, data and device.
        objective: see :data:`Objective`; logits come as float32 or wider.
        optimizer, schedule: over the parameters of ``work.model``.
        where: the function on whose behalf this happens; it opens the messages.
        epochs, batch_size, seed: epoch e draws its order and augmentation from (seed, e).
        bn: ``"frozen"`` keeps batch-norm statistics and uses them.
        precision: arithmetic of forward and backward passes.
        schedule_every: when the schedule takes a step.
        measure: mean objective of an epoch to what else its record is to hold, at the end of the epoch.
        callback: called with every record.

    Returns:
        A record an epoch: ``epoch`` (from 1), ``epochs``, ``loss`` (mean objective), ``accuracy`` (fraction of the
        augmented samples, as met in training), ``lr``, ``seconds``, and what ``measure`` adds.

    Raises:
        FloatingPointError: the objective or a weight was no longer finite at the end of an epoch.
    """
    history: list[Record] = []
    for epoch in range(1, epochs + 1):
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        set_training_mode(work.model, bn)
        total = torch.zeros(2, dtype=torch.float64, device=work.data.device)  # of the objective, of correct samples
        for x, y, _ in work.data.batches(batch_size, shuffle=True, epoch_seed=epoch_seed(seed, epoch)):
            with autocast(work.data.device, precision):
                logits = logits_of(where, work.forward(x), len(x))
            logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
            loss = objective(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += torch.stack((loss.detach() * len(x), (logits.detach().argmax(1) == y).sum()))
            if schedule_every == "batch":
                schedule.step()
        if schedule_every == "epoch":
            schedule.step()
        mean, accuracy = (total / len(work.data)).tolist()
        _check_finite(where, epoch, mean, work.model)
        record: Record = {"epoch": epoch, "epochs": epochs, "loss": mean, "accuracy": accuracy, "lr": lr}
        if measure is not None:
            record.update(measure(mean))
        history.append({**record, "seconds": time.perf_counter() - start})
        if callback is not None:
            callback(dict(history[-1]))
    return history


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch's order and augmentation: distinct for all seeds below 2^32 and epochs below 2^20.

    Example:
        >>> epoch_seed(1, 0) == epoch_seed(0, 1)
        False
    """
    return (seed << 20) + epoch


def set_training_mode(model: nn.Module, bn: BatchNormMode) -> None:
    """Training mode, but for batch norms where their statistics are frozen."""
    model.train()
    if bn == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _check_finite(where: str, epoch: int, mean: float, model: nn.Module) -> None:
    """Once an epoch, since every look makes the host wait for the device."""
    floating = [p for p in model.state_dict().values() if isinstance(p, Tensor) and p.is_floating_point()]
    if math.isfinite(mean) and bool(torch.stack([p.isfinite().all() for p in floating]).all()):
        return
    got = f"a loss of {mean:g} or weights that are not finite in epoch {epoch}"
    raise FloatingPointError(message(where, "model", "finite numbers", got, "lower lr; the model is as before"))
