r"""Enhancement: the network forgets what D_c has in common with the rest, and keeps what only the rest has.

.. math::

    L = \frac{1}{|B_u|} \sum_{i \in B_u} \mathrm{CE}_i
        - \mu \, \frac{1}{|B_c|} \sum_{i \in B_c} \min(\mathrm{CE}_i, \tau)

over batches of D_u and of D_c (eq. 4 of arXiv 2405.12719, whose ascent has no bound). If D_c is clean, what can satisfy
both terms is a feature that D_u alone carries: the trigger. A few poisoned samples in D_c unlearn the trigger too: 5
among 280, of 140 in all, left 6 % of a BadNets poison to be found on digits. The loss is
:func:`bdfast.ops.bounded_ascent_cross_entropy`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bdfast.defenses.advrbd.config import AdvrBDConfig
from bdfast.errors import message
from bdfast.ops import bounded_ascent_cross_entropy
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.graphed import Replayed
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.precision import autocast
from bdfast.runtime.progress import Record
from bdfast.runtime.resident import ResidentData
from bdfast.training import resume
from bdfast.training.options import augmentation, can_fuse

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sides:
    """The two sets of a round, resident on the device of the network."""

    suspected: ResidentData  # D_u
    presumed: ResidentData  # D_c


def two_sides(
    images: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N]
    in_dc: Tensor,  # [N] bool
    weight: Tensor,
    config: AdvrBDConfig,
) -> Sides:
    """D_u and D_c on the device and in the dtype of ``weight``, augmented as ``config`` says."""
    options: dict[str, Any] = {
        "device": weight.device, "dtype": weight.dtype, "augment": augmentation(config.augment, images.shape),
        "channels_last": weight.device.type == "cuda" and config.precision == "bf16",  # as networks are trained there
    }  # fmt: skip
    return Sides(*(ResidentData(images[side], labels[side], **options) for side in (~in_dc, in_dc)))


def enhance(
    model: nn.Module,
    forward: nn.Module,
    sides: Sides,
    config: AdvrBDConfig,
    *,
    number: int,
    num_classes: int,
    checkpoint: Path | None,
    finished: Callable[[Record], object],
) -> list[Record]:
    """E1 epochs of a round on ``model`` itself.

    Args:
        model: the network, trained in place.
        forward: images in [0, 1] to its output.
        sides: D_u and D_c.
        config: as the run's.
        number: of the round, from 0.
        num_classes: K.
        checkpoint: a file that is written after every epoch, and continued from.
        finished: called with every epoch's record.

    Returns:
        A record an epoch: ``epoch`` (of the round), ``loss``, ``accuracy`` (on D_u, as met in training), ``dc_loss``
        (mean of the bounded cross entropies of D_c), ``lr``, ``seconds``.

    Raises:
        FloatingPointError: the loss or a weight was no longer finite at the end of an epoch.
        ValueError: a damaged ``checkpoint``, or one of another run.
    """
    tau = 2 * math.log(num_classes) if config.tau is None else config.tau
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=config.enhance_lr, momentum=config.momentum, weight_decay=config.weight_decay,
        fused=can_fuse(parameters),
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    device = sides.suspected.device
    history: list[Record] = []
    run = ""
    if checkpoint is not None:
        tensors = (*model.state_dict().values(), *(t for s in (sides.suspected, sides.presumed) for t in _content(s)))
        run = resume.fingerprint(f"advrbd: enhancement {number}", config, tensors)
        history = resume.load(checkpoint, run, model, optimizer, schedule, device)
    step = Replayed(partial(_step, forward, optimizer, config, tau), device)
    for epoch in range(len(history) + 1, config.enhance_epochs + 1):
        start = time.perf_counter()
        seed = stream_seed(config.seed, f"advrbd: enhancement {number}, epoch {epoch}")
        loss, accuracy, dc_loss = _epoch(model, sides, step, config.batch_size, seed)
        if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in model.parameters()):
            got = f"a loss of {loss:g} or weights that are not finite in round {number + 1}, epoch {epoch}"
            raise FloatingPointError(message("advrbd", "model", "finite numbers", got, "lower enhance_lr or tau"))
        record: Record = {
            "epoch": epoch, "loss": loss, "accuracy": accuracy, "dc_loss": dc_loss, "lr": config.enhance_lr,
            "seconds": time.perf_counter() - start,
        }  # fmt: skip
        history.append(record)
        if checkpoint is not None:
            resume.save(checkpoint, run, history, model, optimizer, schedule, device)
        finished(record)
    return history


def _epoch(
    model: nn.Module, sides: Sides, step: Callable[..., Tensor], batch_size: int, seed: int
) -> tuple[float, float, float]:
    """One pass over D_u; mean loss, accuracy on D_u, mean bounded cross entropy of D_c, read back at the end."""
    model.train()
    totals = torch.zeros(3, dtype=torch.float64, device=sides.suspected.device)
    others = _endless(sides.presumed, batch_size, seed)
    for x_u, y_u, _ in sides.suspected.batches(batch_size, shuffle=True, epoch_seed=seed):
        x_c, y_c, _ = next(others)
        totals += step(x_u, y_u, x_c, y_c)
    loss, accuracy, dc_loss = (totals / len(sides.suspected)).tolist()
    return loss, accuracy, dc_loss


def _step(
    forward: nn.Module, optimizer: torch.optim.Optimizer, config: AdvrBDConfig, tau: float,
    x_u: Tensor, y_u: Tensor, x_c: Tensor, y_c: Tensor,
) -> Tensor:  # fmt: skip
    """Loss, correct samples of D_u and bounded cross entropy of D_c, each times the samples of D_u; float64 ``[3]``."""
    x, y = torch.cat((x_u, x_c)), torch.cat((y_u, y_c))
    with autocast(x.device, config.precision):  # one pass, so that batch norms see both sides
        logits = logits_of("advrbd", forward(x), len(x))
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    loss = bounded_ascent_cross_entropy(logits, y, len(x_u), mu=config.mu, tau=tau)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    with torch.no_grad():
        right = (logits[: len(x_u)].argmax(1) == y_u).sum()
        ascent = cross_entropy(logits[len(x_u) :], y_c, reduction="none").clamp_max(tau).mean()
        return torch.stack((loss.detach() * len(x_u), right, ascent * len(x_u))).double()


def _endless(data: ResidentData, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of D_c, epoch after epoch in new orders."""
    turn = 0
    while True:
        yield from data.batches(batch_size, shuffle=True, epoch_seed=stream_seed(seed, f"turn {turn}"))
        turn += 1


def _content(data: ResidentData) -> tuple[Tensor, Tensor]:
    return data.images, data.labels
