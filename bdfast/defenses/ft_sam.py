r"""FT-SAM: fine-tuning on clean data with sharpness-aware minimisation.

Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023,
https://arxiv.org/abs/2304.11823. Backdoors live in neurons of large weights, which fine-tuning hardly moves, since the
clean loss is flat there. Its eq. 1 looks for weights whose clean loss is low in a whole neighbourhood, wider where
weights are larger:

.. math::

    \min_w \max_{\lVert T_w^{-1} \epsilon \rVert_2 \le \rho} L(w + \epsilon), \qquad
    T_w = \mathrm{diag}(|w_1|, \ldots, |w_d|)

For each batch of clean images:

1. the gradient g at w, and from it :math:`\epsilon = \rho\, T_w^2 g / \lVert T_w g \rVert_2` (eq. 4);
2. the gradient at :math:`w + \epsilon`, then back to w, and the step of SGD along it (eq. 6).

Batch-norm statistics follow the first pass alone: those met at perturbed weights belong to no network that is kept. The
paper does not speak of this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from bdfast.errors import message
from bdfast.files import check_path
from bdfast.optim import SAM
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import Precision
from bdfast.runtime.progress import Callback, check_callback
from bdfast.runtime.resident import Augment
from bdfast.training.loop import fit
from bdfast.training.options import (
    AugmentName,
    BatchNormMode,
    can_fuse,
    check_flag,
    check_number,
    check_training_options,
)
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization, workspace


@dataclass(frozen=True)
class FTSAMConfig:
    """Options of :func:`ft_sam`. [P] is the paper, [B] BackdoorBench's settings for CIFAR-10.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> FTSAMConfig(rho=-1)
        Traceback (most recent call last):
        ValueError: FTSAMConfig: `rho` expected a finite number >= 0, got -1; correct it
    """

    rho: float = 2.0
    """rho >= 0, the reach of the perturbation: 2 for CIFAR-10, 8 for Tiny ImageNet and GTSRB [P sec. 4.1, B]. 0 is
    fine-tuning at twice the cost."""

    adaptive: bool = True
    """T_w = diag|w| [P eq. 2]; False is the identity, plain SAM, for which rho is far smaller (0.05)."""

    label_smoothing: float = 0.1
    """In [0, 1): the share of the target that is spread over all classes. 0.1 for CIFAR-10, 0 for GTSRB [B]; [P] says
    cross entropy and no more."""

    epochs: int = 100
    """Passes over the clean set. 100; 50 for GTSRB [P, B]."""

    batch_size: int = 256
    """Samples a step; the last, smaller batch counts too. 256 [P, B]."""

    lr: float = 0.01
    """eta > 0, annealed to 0 along a half cosine [B], one step an epoch. 0.01 [P, B]."""

    momentum: float = 0.9
    """In [0, 1). 0.9 [B]."""

    weight_decay: float = 5e-4
    """L2 penalty on all parameters, >= 0. 5e-4 [B]."""

    bn: BatchNormMode = "train"
    """Batch-norm statistics follow the clean set ("train") or stay ("frozen")."""

    augment: Augment | AugmentName = "auto"
    """Of the clean images: "crop+flip" pads by an eighth of the side (4 pixels at 32), "crop" does not mirror,
    "none"; "auto" mirrors colour images only, since grayscale ones are digits and characters; or an Augment."""

    seed: int = 0
    """Seeds order, augmentation and dropout."""

    precision: Precision = "fp32"
    """"bf16": forward and backward in bfloat16 (autocast), weights in float32."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check_number("FTSAMConfig", "rho", self.rho)
        check_flag("FTSAMConfig", "adaptive", self.adaptive)
        check_number("FTSAMConfig", "label_smoothing", self.label_smoothing, high=1.0)
        check_number("FTSAMConfig", "weight_decay", self.weight_decay)
        check_training_options("FTSAMConfig", self)

    @classmethod
    def for_digits(cls, **changes: Any) -> FTSAMConfig:
        """rho = 4 without label smoothing, batches of 32, no mirror images: for a reserve of 140 to 280 small digits.

        BadNets with 140 clean digits and 30 epochs: ASR 4 % and ACC 97 %, where rho = 2 left an ASR of 24 %, and
        fine-tuning one of 98 %.

        Example:
            >>> FTSAMConfig.for_digits(seed=1).rho
            4.0
        """
        return cls(**{"rho": 4.0, "label_smoothing": 0.0, "batch_size": 32, "augment": "crop", **changes})


@dataclass(frozen=True)
class FTSAMResult(TrainedResult):
    """What :func:`ft_sam` returns: model, history and timings, and the ``config`` as it ran."""

    config: FTSAMConfig


def ft_sam(
    model: nn.Module,
    clean_data: object,
    config: FTSAMConfig = FTSAMConfig(),
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> FTSAMResult:
    """Train on with sharpness-aware momentum SGD (arXiv 2304.11823); arguments and errors are those of :func:`d3`.

    Returns:
        :class:`FTSAMResult`; its history has ``epoch``, ``epochs``, ``loss`` (nats, at the weights before they are
        perturbed), ``accuracy``, ``lr`` and ``seconds``.

    Example:
        >>> import bdfast
        >>> clean_data, _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> result = ft_sam(model, clean_data, FTSAMConfig(epochs=2))
        >>> [record["lr"] for record in result.history]
        [0.01, 0.005]
    """
    if not isinstance(config, FTSAMConfig):
        raise TypeError(message("ft_sam", "config", "an FTSAMConfig", type(config).__name__, "pass FTSAMConfig(...)"))
    check_callback("ft_sam", callback)
    check_path("ft_sam", "checkpoint", checkpoint)
    with workspace(
        "ft_sam", model, clean_data, config, argument="clean_data", normalize=normalize, device=device, inplace=inplace
    ) as work:
        parameters = [p for p in work.model.parameters() if p.requires_grad]
        optimizer = SAM(
            parameters,
            torch.optim.SGD,
            rho=config.rho,
            adaptive=config.adaptive,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=can_fuse(parameters),
        )

        @contextmanager
        def perturbed() -> Iterator[None]:
            with optimizer.perturbed(), paused_statistics(work.model):
                yield

        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
        objective = partial(cross_entropy, label_smoothing=config.label_smoothing)
        with work.watch("train"):
            history = fit(
                "ft_sam", work, objective, optimizer, schedule, config,
                perturbed=perturbed, callback=callback, checkpoint=checkpoint,
            )  # fmt: skip
    return FTSAMResult(work.model, history, work.watch.seconds, config)


@contextmanager
def paused_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms normalise as they did, but no pass inside changes their running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with paused_statistics(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0.]), tensor(0))
    """
    tracked = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    try:
        for module in tracked:
            module.track_running_stats = False
        yield
    finally:
        for module in tracked:
            module.track_running_stats = True
