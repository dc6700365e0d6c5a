"""Training on pairs of batches, one of the suspected samples and one of those presumed clean, in one pass.

Enhancement (:mod:`.enhancement`) and contrast (:mod:`.contrast`) differ in their objective, in the side whose batches
make an epoch, and in the learning rate over it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LRScheduler

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.errors import message
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.precision import autocast
from bdfast.runtime.progress import Record
from bdfast.runtime.resident import ResidentData
from bdfast.training import resume
from bdfast.training.options import augmentation, can_fuse
from bdfast.training.step import replayed_at_rates

Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
Lead: TypeAlias = Literal["suspected", "presumed"]

PairObjective: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, ...]]
"""(logits ``[B, K]``, labels ``[B]``, how many of them are suspected: the first ones) to scalars, the loss first."""


@dataclass(frozen=True)
class Sides:
    """The two sets, resident on the device of the network."""

    suspected: ResidentData  # D_u
    presumed: ResidentData  # D_c

    def led_by(self, lead: Lead) -> tuple[ResidentData, ResidentData]:
        """The leading side and the other one."""
        return (self.suspected, self.presumed) if lead == "suspected" else (self.presumed, self.suspected)


@dataclass(frozen=True)
class PairTraining:
    """How a network is trained on two sides.

    Attributes:
        name: of the stage; what is drawn in it depends on the name.
        objective: see :data:`PairObjective`.
        told: names of what it returns besides the loss.
        lead: the side that every epoch goes through once; the other one goes round and round beside it.
        epochs: how many.
        lr: learning rate, constant or, ``annealed``, along a half cosine over all steps.
    """

    name: str
    objective: PairObjective
    told: tuple[str, ...]
    lead: Lead
    epochs: int
    lr: float
    annealed: bool


def two_sides(
    images: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N]
    suspected: Tensor,  # [N] bool
    presumed: Tensor,  # [N] bool
    weight: Tensor,
    config: AdvrBDConfig,
) -> Sides:
    """Both sides on the device and in the dtype of ``weight``, augmented as ``config`` says."""
    options: dict[str, Any] = {
        "device": weight.device, "dtype": weight.dtype, "augment": augmentation(config.augment, images.shape),
        "channels_last": weight.device.type == "cuda" and config.precision == "bf16",  # as networks are trained there
    }  # fmt: skip
    return Sides(*(ResidentData(images[side], labels[side], **options) for side in (suspected, presumed)))


def train_on_pairs(
    model: nn.Module,
    forward: nn.Module,
    sides: Sides,
    training: PairTraining,
    config: AdvrBDConfig,
    *,
    checkpoint: Path | None,
    finished: Callable[[Record], object],
) -> list[Record]:
    """Train ``model`` itself.

    Args:
        model: the network, trained in place.
        forward: images in [0, 1] to its output.
        sides: the two sets.
        training: what to do.
        config: as the run's.
        checkpoint: a file that is written after every epoch, and continued from.
        finished: called with every epoch's record.

    Returns:
        A record an epoch: ``epoch`` (of this training), ``loss``, what the objective tells, ``lr``, ``seconds``; means
        over the leading side.

    Raises:
        FloatingPointError: the loss or a weight was no longer finite at the end of an epoch.
        ValueError: a damaged ``checkpoint``, or one of another run.
    """
    optimizer, schedule = _optimizer(model, sides, training, config)
    device = sides.suspected.device
    history: list[Record] = []
    run = ""
    if checkpoint is not None:
        tensors = (*model.state_dict().values(), *(t for s in (sides.suspected, sides.presumed) for t in _content(s)))
        run = resume.fingerprint(f"advrbd: {training.name}", config, tensors)
        history = resume.load(checkpoint, run, model, optimizer, schedule, device)
    step: Callable[..., Tensor] = partial(_step, forward, optimizer, training.objective, config)
    if device.type == "cuda" and can_fuse(list(model.parameters())):
        step = replayed_at_rates(step, optimizer, device)
    for epoch in range(len(history) + 1, training.epochs + 1):
        start, lr = time.perf_counter(), float(optimizer.param_groups[0]["lr"])
        seed = stream_seed(config.seed, f"advrbd: {training.name}, epoch {epoch}")
        loss, *told = _epoch(model, sides, training.lead, step, schedule, config.batch_size, seed)
        if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in model.parameters()):
            got = f"a loss of {loss:g} or weights that are not finite in {training.name}, epoch {epoch}"
            raise FloatingPointError(message("advrbd", "model", "finite numbers", got, "lower its learning rate"))
        values = dict(zip(training.told, told, strict=True))
        record: Record = {"epoch": epoch, "loss": loss, **values, "lr": lr, "seconds": time.perf_counter() - start}
        history.append(record)
        if checkpoint is not None:
            resume.save(checkpoint, run, history, model, optimizer, schedule, device)
        finished(record)
    return history


def _optimizer(
    model: nn.Module, sides: Sides, training: PairTraining, config: AdvrBDConfig
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=training.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        fused=can_fuse(parameters),
    )  # fmt: skip
    if not training.annealed:
        return optimizer, ConstantLR(optimizer, factor=1.0)
    steps = training.epochs * len(sides.led_by(training.lead)[0].sizes(config.batch_size))
    return optimizer, CosineAnnealingLR(optimizer, T_max=steps)


def _epoch(
    model: nn.Module, sides: Sides, lead: Lead, step: Callable[..., Tensor], schedule: LRScheduler, size: int, seed: int
) -> list[float]:
    """One pass over the leading side; means of what a step returns, read back at the end."""
    model.train()
    leading, other = sides.led_by(lead)
    total = torch.zeros(1, dtype=torch.float64, device=leading.device)
    others = _endless(other, size, seed)
    for x, y, _ in leading.batches(size, shuffle=True, epoch_seed=seed):
        x_other, y_other, _ = next(others)
        pair = (x, y, x_other, y_other) if lead == "suspected" else (x_other, y_other, x, y)
        total = total + len(x) * step(*pair)
        schedule.step()
    means: list[float] = (total / len(leading)).tolist()
    return means


def _step(
    forward: nn.Module, optimizer: torch.optim.Optimizer, objective: PairObjective, config: AdvrBDConfig,
    x_u: Tensor, y_u: Tensor, x_c: Tensor, y_c: Tensor,
) -> Tensor:  # fmt: skip
    """The scalars of the objective, float64."""
    x, y = torch.cat((x_u, x_c)), torch.cat((y_u, y_c))
    with autocast(x.device, config.precision):  # one pass, so that batch norms see both sides
        logits = logits_of("advrbd", forward(x), len(x))
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    loss, *told = objective(logits, y, len(x_u))
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return torch.stack([value.detach().double() for value in (loss, *told)])


def _endless(data: ResidentData, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of one side, epoch after epoch in new orders."""
    turn = 0
    while True:
        yield from data.batches(batch_size, shuffle=True, epoch_seed=stream_seed(seed, f"turn {turn}"))
        turn += 1


def _content(data: ResidentData) -> tuple[Tensor, Tensor]:
    return data.images, data.labels
