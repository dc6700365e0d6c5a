"""Ordinary supervised training: the victims of attacks, and clean models to compare with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from bdfast.errors import message
from bdfast.files import check_path
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import Precision
from bdfast.runtime.progress import Callback, check_callback
from bdfast.runtime.ranks import ALONE, Ranks
from bdfast.runtime.resident import Augment
from bdfast.training.loop import fit
from bdfast.training.options import (
    AugmentName,
    BatchNormMode,
    can_fuse,
    check_number,
    check_one_of,
    check_training_options,
)
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization, Workspace, workspace

Schedule: TypeAlias = Literal["cosine", "one_cycle"]


@dataclass(frozen=True)
class TrainConfig:
    """Options of :func:`train_classifier`; the defaults are BackdoorBench's for attacks on CIFAR-10.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> TrainConfig(epochs=30, lr=0.2, schedule="one_cycle").batch_size
        128
    """

    epochs: int = 100
    """Passes over the training set."""

    batch_size: int = 128
    """Samples a step; the last, smaller batch counts too."""

    lr: float = 0.01
    """Learning rate > 0: where the cosine starts, or the peak of one cycle."""

    momentum: float = 0.9
    """In [0, 1)."""

    weight_decay: float = 5e-4
    """L2 penalty on all parameters, >= 0."""

    schedule: Schedule = "cosine"
    """"cosine": a half cosine to 0, a step an epoch. "one_cycle": up over 30 % of the steps, then down, a step a batch
    (momentum stays), which reaches the same accuracy in fewer epochs at a higher lr."""

    bn: BatchNormMode = "train"
    """Batch-norm statistics follow the batches ("train") or stay ("frozen")."""

    augment: Augment | AugmentName = "auto"
    """Of the images: "crop+flip" pads by an eighth of the side (4 pixels at 32), "crop" does not mirror,
    "none"; "auto" mirrors colour images only, since grayscale ones are digits and characters; or an Augment."""

    seed: int = 0
    """Seeds order, augmentation and dropout; the initial weights are the model's."""

    precision: Precision = "fp32"
    """"bf16": forward and backward in bfloat16 (autocast), weights in float32."""

    channels_last: bool | None = None
    """Keep convolution weights and batches in channels-last memory, which GPUs with tensor cores prefer: it halves the
    time of a step in bfloat16. None: on a GPU in bfloat16."""

    compile: bool = False
    """Run forward and backward through ``torch.compile``: worth its minute of start-up in long runs on a GPU."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check_number("TrainConfig", "weight_decay", self.weight_decay)
        check_one_of("TrainConfig", "schedule", self.schedule, get_args(Schedule))
        check_training_options("TrainConfig", self)

    @classmethod
    def fast_cifar10(cls, **changes: Any) -> TrainConfig:
        """12 epochs of one cycle up to lr 0.1, bfloat16: a victim in an eighth of the usual passes.

        Example:
            >>> TrainConfig.fast_cifar10(precision="fp32").epochs
            12
        """
        recipe = {"epochs": 12, "lr": 0.1, "schedule": "one_cycle", "precision": "bf16"}
        return cls(**{**recipe, **changes})

    @classmethod
    def for_digits(cls, **changes: Any) -> TrainConfig:
        """20 epochs at lr 0.1, batches of 128, crops padded by 1 pixel: 98 % on scikit-learn's digits in seconds.

        Example:
            >>> TrainConfig.for_digits(seed=3).lr
            0.1
        """
        return cls(**{"epochs": 20, "lr": 0.1, "augment": "crop", **changes})


@dataclass(frozen=True)
class TrainResult(TrainedResult):
    """What :func:`train_classifier` returns: model, history and timings, and the ``config`` as it ran."""

    config: TrainConfig


def train_classifier(
    model: nn.Module,
    data: object,
    config: TrainConfig = TrainConfig(),
    callback: Callback | None = None,
    *,
    normalize: Normalization | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    distributed: bool | None = None,
) -> TrainResult:
    """Train ``model`` itself, where it is, with cross entropy and momentum SGD.

    Of several processes (``torch.distributed``, say under torchrun) each takes its part of every batch of
    ``config.batch_size``: order, augmentation and gradients are those of one process, and all end with the same model.
    Every rank passes the whole data set. Batch norm takes the statistics of a rank's own part, and the running ones of
    rank 0 are kept; without batch norm and dropout the result is that of one process up to rounding. What one rank
    alone raises leaves the others waiting until the group's ``timeout`` (of ``init_process_group``), unless
    torchrun, which ends all of them, started them.

    Args:
        model: from images ``[N, C, H, W]``, float in [0, 1], to logits ``[N, K]`` or an output with ``.logits``. If
            anything raises, KeyboardInterrupt too, it is as before.
        data: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int ``[N]``), a map-style Dataset or a
            DataLoader over one; a :class:`bdfast.attacks.PoisonedData` makes the model a victim.
        config: see :class:`TrainConfig`.
        callback: called with every epoch's record, on rank 0; what it raises ends the run, on all ranks.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        checkpoint: a file that is written after every epoch; if it is there, the run continues from it, bit for bit. A
            file of another run is refused. Rank 0 reads and writes it.
        distributed: train with the other ranks of ``torch.distributed``. None: if it has been initialised; False: this
            process alone.

    Returns:
        :class:`TrainResult`; a record holds ``epoch``, ``epochs``, ``loss`` (nats), ``accuracy``, ``lr``, ``seconds``.

    Raises:
        TypeError, ValueError: arguments of another kind than stated, weights that are not finite.
        LabelRangeError: a label that is no class of the model.
        FloatingPointError: the loss or a weight was no longer finite at the end of an epoch.
        RuntimeError: ``distributed`` without an initialised group.

    Example:
        >>> import bdfast
        >>> data, _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=0)
        >>> result = train_classifier(model, data, TrainConfig.for_digits(epochs=2))
        >>> result.history[1]["accuracy"] > result.history[0]["accuracy"]
        True
    """
    if not isinstance(config, TrainConfig):
        raise TypeError(
            message("train_classifier", "config", "a TrainConfig", type(config).__name__, "pass TrainConfig(...)")
        )
    check_callback("train_classifier", callback)
    check_path("train_classifier", "checkpoint", checkpoint)
    ranks = ALONE if distributed is False else Ranks.joined()
    if distributed and not Ranks.initialized():
        expected, remedy = "an initialised torch.distributed", "call init_process_group, or bdfast.runtime.torchrun"
        raise RuntimeError(message("train_classifier", "distributed", expected, "none", remedy))
    with workspace(
        "train_classifier", model, data, config, normalize=normalize, inplace=True,
        channels_last=config.channels_last, compiled=config.compile, quiet=False, ranks=ranks,
    ) as work:  # fmt: skip
        parameters = [p for p in work.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            fused=can_fuse(parameters),
        )  # fmt: skip
        with work.watch("train"):
            history = fit(
                "train_classifier", work, cross_entropy, optimizer, _schedule(optimizer, work, config), config,
                schedule_every="epoch" if config.schedule == "cosine" else "batch",
                callback=callback, checkpoint=checkpoint,
            )  # fmt: skip
    return TrainResult(work.model, history, work.watch.seconds, config)


def _schedule(optimizer: torch.optim.Optimizer, work: Workspace, config: TrainConfig) -> LRScheduler:
    if config.schedule == "cosine":
        return CosineAnnealingLR(optimizer, T_max=config.epochs)
    steps = config.epochs * work.data.num_batches(config.batch_size)
    return OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps, cycle_momentum=False)
