"""The one training loop: epochs over data on the device, a look at the numbers once an epoch."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from bdfast.errors import message
from bdfast.runtime.determinism import searched_kernels, stream_seed
from bdfast.runtime.precision import Precision
from bdfast.runtime.progress import Callback, Record
from bdfast.runtime.ranks import Ranks
from bdfast.training import resume
from bdfast.training.options import BatchNormMode
from bdfast.training.step import Objective, Perturbed, Step, training_step
from bdfast.training.workspace import Workspace


class LoopOptions(Protocol):
    """The part of a config that the loop reads; see :class:`bdfast.training.TrainConfig` for the meaning."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def bn(self) -> BatchNormMode: ...
    @property
    def precision(self) -> Precision: ...


def fit(
    where: str,
    work: Workspace,
    objective: Objective,
    optimizer: Optimizer,
    schedule: LRScheduler,
    options: LoopOptions,
    *,
    schedule_every: Literal["epoch", "batch"] = "epoch",
    perturbed: Perturbed | None = None,
    measure: Callable[[float], Mapping[str, Any]] | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> list[Record]:
    """Minimise ``objective`` over shuffled, augmented batches; the last, smaller one counts too.

    Nothing is read back from the device within an epoch. Of several ranks (see :class:`Workspace`) each takes its part
    of every batch and all of them step alike, for an ``objective`` that is a mean over samples; ``callback`` is called
    on rank 0, which keeps the checkpoint too.

    Args:
        where: the function on whose behalf this happens; it opens the messages.
        work: model, data and device.
        objective: see :data:`Objective`; logits come as float32 or wider.
        optimizer, schedule: over the parameters of ``work.model``.
        options: a config; epoch e draws its order and augmentation from (seed, e).
        schedule_every: when the schedule takes a step.
        perturbed: where each batch's gradient is taken a second time, the one that the optimizer then gets; loss and
            accuracy are those of the first pass.
        measure: mean objective of an epoch to what else its record is to hold, at the end of the epoch.
        callback: called with every record.
        checkpoint: a file that is written after every epoch, and continued from, bit for bit, if it is there.

    Returns:
        A record an epoch: ``epoch`` (from 1), ``epochs``, ``loss`` (mean objective), ``accuracy`` (fraction of the
        augmented samples, as met in training), ``lr``, ``seconds``, and what ``measure`` adds.

    Raises:
        FloatingPointError: the objective or a weight was no longer finite at the end of an epoch.
        ValueError: ``checkpoint`` is damaged, or belongs to another run.
    """
    history: list[Record] = []
    run, ranks = "", work.ranks
    if checkpoint is not None:
        state = work.model.state_dict().values()
        run = resume.fingerprint(where, options, (*state, work.data.images, work.data.labels), ranks.size)
        history = resume.load(checkpoint, run, work.model, optimizer, schedule, work.data.device, ranks)
    step = training_step(where, work, objective, optimizer, perturbed, options.precision)
    for epoch in range(len(history) + 1, options.epochs + 1):
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        per_batch = schedule if schedule_every == "batch" else None
        loss, accuracy = _run_epoch(epoch, work, step, per_batch, options)
        if schedule_every == "epoch":
            schedule.step()
        _check_finite(where, epoch, loss, work.model, ranks)
        record: Record = {"epoch": epoch, "epochs": options.epochs, "loss": loss, "accuracy": accuracy, "lr": lr}
        if measure is not None:
            record.update(measure(loss))
        history.append({**record, "seconds": time.perf_counter() - start})
        if checkpoint is not None:
            resume.save(checkpoint, run, history, work.model, optimizer, schedule, work.data.device, ranks)
        if callback is not None:
            ranks.share(partial(callback, dict(history[-1])))
    return history


def _run_epoch(
    epoch: int, work: Workspace, step: Step, per_batch: LRScheduler | None, options: LoopOptions
) -> tuple[float, float]:
    """One epoch's steps; mean objective and accuracy, read back once, at the end."""
    data, ranks = work.data, work.ranks
    set_training_mode(work.model, options.bn)
    total = torch.zeros(2, dtype=torch.float64, device=data.device)  # of the objective, of correct samples
    seed, size = epoch_seed(options.seed, epoch), options.batch_size
    batches = data.batches(size, shuffle=True, epoch_seed=seed, ranks=ranks)
    for (x, y, _), count in zip(batches, data.sizes(size), strict=True):
        weight = ranks.divide(count).weight
        # The gradients of the ranks are averaged, and those of parts of unequal size weigh unequally.
        with searched_kernels(data.device, repeated=count == size):
            loss, correct = step(x, y, ranks.size * weight).double()
        total += torch.stack((loss * (count / ranks.size), correct * (count * weight / len(x))))
        if per_batch is not None:
            per_batch.step()
    ranks.add_(total)
    mean, accuracy = (total / len(data)).tolist()
    return mean, accuracy


def epoch_seed(seed: int, epoch: int) -> int:
    """Seed of an epoch's order and augmentation."""
    return stream_seed(seed, f"epoch {epoch}")


def set_training_mode(model: nn.Module, bn: BatchNormMode) -> None:
    """Training mode, but for batch norms where their statistics are frozen."""
    model.train()
    if bn == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _check_finite(where: str, epoch: int, mean: float, model: nn.Module, ranks: Ranks) -> None:
    """Once an epoch, since every look makes the host wait for the device; one rank's finding is every rank's."""
    floating = [p for p in model.state_dict().values() if isinstance(p, Tensor) and p.is_floating_point()]
    finite = math.isfinite(mean) and bool(torch.stack([p.isfinite().all() for p in floating]).all())
    if all(ranks.gather(finite)):
        return
    got = f"a loss of {mean:g} or weights that are not finite in epoch {epoch}"
    raise FloatingPointError(message(where, "model", "finite numbers", got, "lower lr; the model is as before"))
