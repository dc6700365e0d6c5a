"""Vanilla fine-tuning on clean data, the baseline that every defense is held against."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from bdfast.errors import message
from bdfast.files import check_path
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import Precision
from bdfast.runtime.progress import Callback, check_callback
from bdfast.runtime.resident import Augment
from bdfast.training.loop import fit
from bdfast.training.options import (
    AugmentName,
    BatchNormMode,
    can_fuse,
    check_number,
    check_training_options,
)
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization, workspace


@dataclass(frozen=True)
class FineTuneConfig:
    """Options of :func:`fine_tune`; the defaults are BackdoorBench's.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> FineTuneConfig(epochs=0)
        Traceback (most recent call last):
        ValueError: FineTuneConfig: `epochs` expected a whole number, at least 1, got 0; correct it
    """

    epochs: int = 100
    """Passes over the clean set."""

    batch_size: int = 256
    """Samples a step; the last, smaller batch counts too."""

    lr: float = 0.01
    """Learning rate > 0, annealed to 0 along a half cosine, one step an epoch."""

    momentum: float = 0.9
    """In [0, 1)."""

    weight_decay: float = 5e-4
    """L2 penalty on all parameters, >= 0."""

    bn: BatchNormMode = "train"
    """Batch-norm statistics follow the clean set ("train") or stay ("frozen")."""

    augment: Augment | AugmentName = "auto"
    """Of the clean images: "crop+flip" pads by an eighth of the side (4 pixels at 32), "crop" does not mirror,
    "none"; "auto" mirrors colour images only, since grayscale ones are digits and characters; or an Augment."""

    seed: int = 0
    """Seeds order, augmentation and dropout."""

    precision: Precision = "fp32"
    """"bf16": forward and backward in bfloat16 (autocast), weights in float32."""

    channels_last: bool | None = None
    """Keep convolution weights and batches in channels-last memory, which GPUs with tensor cores prefer: it halves the
    time of a step in bfloat16. None: on a GPU in bfloat16."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check_number("FineTuneConfig", "weight_decay", self.weight_decay)
        check_training_options("FineTuneConfig", self)


@dataclass(frozen=True)
class FineTuneResult(TrainedResult):
    """What :func:`fine_tune` returns: model, history and timings, and the ``config`` as it ran."""

    config: FineTuneConfig


def fine_tune(
    model: nn.Module,
    clean_data: object,
    config: FineTuneConfig = FineTuneConfig(),
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FineTuneResult:
    """Train on with cross entropy, momentum SGD and weight decay; arguments and errors are those of :func:`d3`.

    Returns:
        :class:`FineTuneResult`; its history has ``epoch``, ``epochs``, ``loss`` (nats), ``accuracy``, ``lr`` and
        ``seconds``.

    Example:
        >>> import bdfast
        >>> clean_data, _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> result = fine_tune(model, clean_data, FineTuneConfig(epochs=2))
        >>> [record["lr"] for record in result.history]
        [0.01, 0.005]
    """
    if not isinstance(config, FineTuneConfig):
        raise TypeError(
            message("fine_tune", "config", "a FineTuneConfig", type(config).__name__, "pass FineTuneConfig(...)")
        )
    check_callback("fine_tune", callback)
    check_path("fine_tune", "checkpoint", checkpoint)
    with workspace(
        "fine_tune",
        model,
        clean_data,
        config,
        argument="clean_data",
        normalize=normalize,
        device=device,
        inplace=inplace,
        channels_last=config.channels_last,
    ) as work:
        parameters = [p for p in work.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            fused=can_fuse(parameters),
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
        with work.watch("train"):
            history = fit(
                "fine_tune", work, cross_entropy, optimizer, schedule, config, callback=callback, checkpoint=checkpoint
            )
    return FineTuneResult(work.model, history, work.watch.seconds, config)
