r"""Step 3 of PAD-FT: fine-tuning of the last linear layer over frozen, clipped features.

.. math::

    L = \mathbb{E}\,\mathrm{SCE}(f_Z(x), y)
        + \beta\, \mathbb{E} \lVert \sigma(f_Z(x)) - \sigma(f_Z(\mathrm{aug}(x))) \rVert_2^2
        \;[\,- \gamma\, \mathbb{E}_{\mathrm{suspects}} \log(1 - p_y)\,]

Everything runs in eval mode, and the gradient of the second term flows through both of its sides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bdfast.defenses.pad_ft.bounds import Suspects, unlikelihood
from bdfast.defenses.pad_ft.config import PadFTConfig
from bdfast.errors import message
from bdfast.ops import sce_loss
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.progress import Record
from bdfast.runtime.resident import ResidentData
from bdfast.training.options import can_fuse
from bdfast.training.step import replayed_at_rates

Hidden = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] to the input of the last layer [B, D], without gradients."""

Step = Callable[..., Tensor]
"""(features [B, D], those of the augmented images [B, D], labels [B], features and labels of suspects where there are
any) to loss, consistency and the number of correct samples, ``[3]``."""


def fine_tune_head(
    hidden: Hidden,
    layer: nn.Linear,
    data: ResidentData,
    suspects: Suspects | None,
    config: PadFTConfig,
) -> Iterator[Record]:
    """Train ``layer`` in place, a record an epoch.

    Args:
        hidden: the frozen network below ``layer``, with its bounds.
        layer: the last linear layer.
        data: the selected samples.
        suspects: their images; None where there are none, or their weight is 0.
        config: of the run.

    Yields:
        ``loss`` (mean of the epoch), ``accuracy`` (of the images as they are, as met in training), ``consistency``
        (L_cons, mean of the epoch), ``lr``, ``seconds``.

    Raises:
        FloatingPointError: the loss or a weight was no longer finite at the end of an epoch.
    """
    parameters = list(layer.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
        fused=True if data.device.type == "cuda" and can_fuse(parameters) else None,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
    step = _head_step(layer, optimizer, config, data.device)
    features = _Features(hidden, data, config)
    if suspects is not None:  # as features: nothing that is trained here changes them
        parts = torch.split(suspects.inputs, config.score_batch_size)
        suspects = Suspects(torch.cat([hidden(x) for x in parts]), suspects.labels)
    for epoch in range(config.epochs):
        start = time.perf_counter()
        lr = float(optimizer.param_groups[0]["lr"])
        loss, consistency, accuracy = _tune_epoch(step, features, data, suspects, epoch, config)
        schedule.step()
        if not math.isfinite(loss) or not all(bool(p.isfinite().all()) for p in layer.parameters()):
            got = f"a loss of {loss:g} or weights that are not finite in epoch {epoch + 1} of fine-tuning"
            raise FloatingPointError(message("pad_ft", "model", "finite numbers", got, "lower lr"))
        record: Record = {"loss": loss, "accuracy": accuracy, "consistency": consistency, "lr": lr}
        yield {**record, "seconds": time.perf_counter() - start}


def _head_step(layer: nn.Linear, optimizer: torch.optim.Optimizer, config: PadFTConfig, device: torch.device) -> Step:
    """A step of the layer; on a GPU it is captured, and replayed from then on."""

    def take(plain: Tensor, augmented: Tensor, y: Tensor, *share: Tensor) -> Tensor:
        logits = layer(plain)
        loss = sce_loss(
            logits, y, alpha=config.a, beta=config.b, log_zero=config.log_zero, clamp=config.clamp, reduction="mean"
        )
        consistency = (logits.softmax(1) - layer(augmented).softmax(1)).square().sum(1).mean()
        loss = loss + config.beta * consistency
        if share:
            inputs, labels = share
            loss = loss + config.suspect_weight * unlikelihood(layer(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        correct = (logits.detach().argmax(1) == y).sum()
        return torch.stack((loss.detach(), consistency.detach(), correct.to(loss.dtype)))

    if device.type != "cuda" or not can_fuse(list(layer.parameters())):
        return take
    return replayed_at_rates(take, optimizer, device)


def _tune_epoch(
    step: Step, features: _Features, data: ResidentData, suspects: Suspects | None, epoch: int, config: PadFTConfig
) -> tuple[float, float, float]:
    """Mean loss, mean consistency and accuracy, read back once, at the end."""
    seed = stream_seed(config.seed, f"pad_ft: fine-tuning, epoch {epoch}")
    augmented = features.augmented(epoch)
    total = torch.zeros(3, dtype=torch.float64, device=data.device)
    shares = iter(()) if suspects is None else suspects.shares(data.num_batches(config.batch_size), seed)
    for index in data.shuffled(config.batch_size, epoch_seed=seed):
        figures = step(features.plain[index], augmented[index], data.labels[index], *next(shares, ())).double()
        total += torch.cat((figures[:2] * len(index), figures[2:]))
    mean, mean_consistency, accuracy = (total / len(data)).tolist()
    return mean, mean_consistency, accuracy


class _Features:
    """Features of images and of their augmentations: nothing that is trained here changes them.

    Those of the images are computed once, those of an augmentation once an epoch, or, where ``cache_features`` keeps
    them, once.
    """

    def __init__(self, hidden: Hidden, data: ResidentData, config: PadFTConfig) -> None:
        self._hidden, self._data, self._config = hidden, data, config
        self._kept: dict[int, Tensor] = {}
        self.plain = torch.cat([hidden(x) for x, _, _ in self._batches()])  # [N, D]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return self._data.batches(self._config.score_batch_size, shuffle=False, epoch_seed=0)

    def augmented(self, epoch: int) -> Tensor:
        """Of the augmentation of an epoch, ``[N, D]``."""
        number = epoch if self._config.draws is None else epoch % self._config.draws
        if number in self._kept:
            return self._kept[number]
        draw = Draw(self._data, self._config, number)
        found = torch.cat([self._hidden(draw(x, index)) for x, _, index in self._batches()])
        if self._config.cache_features:
            self._kept[number] = found
        return found


class Draw:
    """aug() with its random numbers drawn, one set a sample: flip, then brightness, then contrast.

    Example:
        >>> data = ResidentData(torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64))
        >>> draw = Draw(data, PadFTConfig(flip=True, brightness=0, contrast=0), 0)
        >>> x, index = data.images, torch.arange(4)
        >>> [torch.allclose(a, b) or torch.allclose(a, b.flip(-1)) for a, b in zip(draw(x, index), x)]
        [True, True, True, True]
    """

    def __init__(self, data: ResidentData, config: PadFTConfig, number: int) -> None:
        generator = torch.Generator().manual_seed(stream_seed(config.seed, f"pad_ft: augmentation {number}"))
        flip = data.images.shape[1] >= 3 if config.flip == "auto" else config.flip
        u = torch.rand(3, len(data), generator=generator, dtype=torch.float32).to(data.device)
        self._flip = (u[0] < 0.5) & flip
        self._brightness = 1 + config.brightness * (2 * u[1] - 1)
        self._contrast = 1 + config.contrast * (2 * u[2] - 1)

    def __call__(
        self,
        x: Tensor,  # [B, C, H, W] in [0, 1]
        index: Tensor,  # [B], which samples they are
    ) -> Tensor:
        flip, brightness, contrast = (
            v[index][:, None, None, None] for v in (self._flip, self._brightness, self._contrast)
        )
        x = torch.where(flip, x.flip(-1), x)
        x = (x * brightness.to(x.dtype)).clamp(0, 1)
        grey = x.mean((1, 2, 3), keepdim=True)
        return ((x - grey) * contrast.to(x.dtype) + grey).clamp(0, 1)
