r"""D3, Distance-Driven Detoxification: leave the backdoored weights as far behind as the clean loss allows.

Wei, Zha, Wu, "Backdoor Mitigation by Distance-Driven Detoxification", ICCV 2025, https://arxiv.org/abs/2411.09585.
Fine-tuning barely moves a backdoored network, whose clean loss is low where it stands. D3 maximises the distance to
that place instead, under a bound on the loss of a few clean samples. Its eq. 3 and 4, for weights
:math:`\theta_s = (W_1, W_2, \ldots)` of selected layers:

.. math::

    \min_{\theta,\ \lVert W_j \rVert = \lVert W_j^0 \rVert}\;
    \lambda\, \mathbb{E} \max(0, \ell - \epsilon) - \textstyle\sum_j \lVert W_j - W_j^0 \rVert_F

1. Remember the weights :math:`W_j^0` of the selected layers, and with them the spheres that they stay on.
2. Start elsewhere on the sphere: at :math:`W_j^0` the distance has no gradient.
3. SGD on the objective over all parameters, each step followed by the projection of the :math:`W_j`.

Assumed: a few hundred clean labelled samples. Neither the trigger nor the target class is known.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from bdfast.defenses.layers import select_layers
from bdfast.errors import message
from bdfast.files import check_path
from bdfast.ops import hinge_cross_entropy
from bdfast.ops.precision import norm_of
from bdfast.optim import ProjectedSGD
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.plain_numbers import take_plain_numbers
from bdfast.runtime.precision import Precision
from bdfast.runtime.progress import Callback, Record, check_callback
from bdfast.runtime.resident import Augment
from bdfast.training.loop import fit
from bdfast.training.options import AugmentName, BatchNormMode, check_number, check_one_of, check_training_options
from bdfast.training.results import TrainedResult
from bdfast.training.workspace import Normalization, workspace

WarmUp: TypeAlias = Literal["random", "far", "middle", "noise", "near"]
Hinge: TypeAlias = Literal["sample", "batch"]

PRESETS: dict[str, dict[str, float]] = {"paper": {"lam": 10.0}, "release": {"lam": 0.5}}
FROM_PRESET: Any = None  # a field's value before its preset is looked up


@dataclass(frozen=True)
class D3Config:
    """Options of :func:`d3`. [P] is the paper, [R] its first author's release.

    ``None`` in ``lam`` stands for the preset's value and is replaced by it, so that a config always says what runs.

    Raises:
        TypeError, ValueError: a value of another kind or range than stated.

    Example:
        >>> D3Config().lam, D3Config(preset="release").lam, D3Config(preset="release", lam=2).lam
        (10.0, 0.5, 2)
    """

    preset: Literal["paper", "release"] = "paper"
    """The experiments of [P] (lambda 10) or the defaults that [R] ships (lambda 0.5); fields given win."""

    lam: float = FROM_PRESET
    """lambda >= 0: weight of the clean loss against a unit of distance. 10 [P sec. 4.1], 0.5 [R]."""

    eps: float = 0.1
    """epsilon >= 0, nats: clean loss that is tolerated before the constraint bites. 0.1 [P, R]."""

    epochs: int = 100
    """E, passes over the clean set. 100 [R]."""

    batch_size: int = 256
    """Samples a step; the last, smaller batch counts too. 256 [R], for 2500 images. A few hundred images at 256 make
    one or two steps an epoch: smaller batches then lose less accuracy."""

    lr: float = 0.01
    """eta > 0, annealed to 0 along a half cosine, one step an epoch. 0.01 [R]."""

    momentum: float = 0.9
    """mu, in [0, 1). 0.9 [R]; there is no weight decay."""

    warm_up: WarmUp = "random"
    """Where the selected weights W start, given W0 of norm n0: "random", U(-0.5, 0.5) scaled to n0 [R]; "far", -W0;
    "noise", W0 + std(W0) N(0, 1); "middle", 0, which has no direction to project along; "near", W0, where the distance
    has no gradient."""

    hinge: Hinge = "sample"
    """max(0, CE - eps) of every "sample" [R], or of the "batch" mean [P eq. 4]."""

    layers: Literal["classifier"] | Sequence[str] = "classifier"
    """theta_s: the weights of the linear layers that end the network [P], of every head where a distilled DeiT or LeViT
    averages two; or of every Linear and Conv2d inside the modules named."""

    loss_scale: float | Literal["auto"] = "auto"
    """c > 0, factor of the whole objective, hence of the step. "auto": 1 / (lambda + 1) if lambda > 1, else 1 [R]."""

    bn: BatchNormMode = "train"
    """Batch-norm statistics follow the clean set ("train" [R]) or stay ("frozen")."""

    augment: Augment | AugmentName = "auto"
    """Of the clean images: "crop+flip" pads by an eighth of the side (4 pixels at 32 [R]), "crop" does not
    mirror, "none"; "auto" mirrors colour images only, since grayscale ones are digits and characters; or an Augment."""

    seed: int = 0
    """Seeds warm-up, order, augmentation and dropout."""

    precision: Precision = "fp32"
    """"bf16": forward and backward in bfloat16 (autocast), weights in float32. "fp32" [R]."""

    channels_last: bool | None = None
    """Keep convolution weights and batches in channels-last memory, which GPUs with tensor cores prefer: it halves the
    time of a step in bfloat16. None: on a GPU in bfloat16."""

    deterministic: bool = False
    """Same bits in every run on a GPU too, where it costs speed; the CPU always gives them."""

    near_noise: float = 0.0
    """With warm_up="near": length of a random displacement, in units of n0, that gives the distance a gradient; 1e-3
    does."""

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check_one_of("D3Config", "preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is FROM_PRESET:
                object.__setattr__(self, name, value)
        check_number("D3Config", "lam", self.lam)
        check_number("D3Config", "eps", self.eps)
        check_number("D3Config", "near_noise", self.near_noise)
        check_one_of("D3Config", "warm_up", self.warm_up, get_args(WarmUp))
        check_one_of("D3Config", "hinge", self.hinge, get_args(Hinge))
        if self.loss_scale != "auto":
            check_number("D3Config", "loss_scale", self.loss_scale, above=True)
        if self.layers != "classifier":
            object.__setattr__(self, "layers", _check_names(self.layers))
        check_training_options("D3Config", self)

    @classmethod
    def for_digits(cls, **changes: Any) -> D3Config:
        """Batches of 32 and no mirror images, for the 140 to 280 images that a reserve of small digits has.

        140 images make one step an epoch in batches of 256, and five in batches of 32.

        Example:
            >>> D3Config.for_digits(seed=1).batch_size
            32
        """
        return cls(**{"batch_size": 32, "augment": "crop", **changes})

    @property
    def scale(self) -> float:
        """c, as a number."""
        if self.loss_scale == "auto":
            return 1 / (self.lam + 1) if self.lam > 1 else 1.0
        return self.loss_scale


@dataclass(frozen=True)
class D3Result(TrainedResult):
    """What :func:`d3` returns.

    Attributes:
        config: as it ran.
        layers: names of the selected layers.
        history: a record an epoch: ``epoch``, ``epochs``, ``loss`` (c * (lambda * hinge - sum of distances)), ``hinge``
            (nats above eps, mean of the epoch), ``distance`` and ``norm`` by layer (at its end), ``accuracy`` (on the
            clean set, augmented, as met in training), ``lr``, ``seconds``.
    """

    config: D3Config
    layers: tuple[str, ...]


def d3(
    model: nn.Module,
    clean_data: object,
    config: D3Config = D3Config(),
    *,
    callback: Callback | None = None,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    inplace: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
) -> D3Result:
    """Move away from suspect weights while the clean loss stays under eps (arXiv 2411.09585, eq. 4).

    Args:
        model: from images ``[N, C, H, W]``, float in [0, 1], to logits ``[N, K]`` or an output with ``.logits``. It is
            left alone, unless ``inplace``. All of its parameters are trained.
        clean_data: the reserve: a tuple ``(images, labels)`` of tensors (uint8, or float in [0, 1]; int ``[N]``), a
            map-style Dataset or a DataLoader over one.
        config: see :class:`D3Config`.
        callback: called with every epoch's record; what it raises ends the run.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work, and where the returned model is; None is where ``model`` is.
        inplace: train ``model`` itself. Its old weights come back if anything raises, KeyboardInterrupt too.
        checkpoint: a file that is written after every epoch; if it is there, the run continues from it, bit for bit. A
            file of another run is refused.

    Returns:
        :class:`D3Result`. Model, train/eval mode, requires_grad flags, random state of the caller are as before. Its
        hooks too; meanwhile those rest that only watch, and those on gradients.

    Warns:
        UserWarning: a class without a clean sample, a warm-up that cannot move or project.

    Raises:
        TypeError, ValueError: arguments of another kind than stated, weights that are not finite, a selected layer of
            norm 0.
        LabelRangeError: a label that is no class of the model.
        FloatingPointError: the loss or a weight was no longer finite at the end of an epoch.

    Example:
        >>> import bdfast
        >>> (images, labels), _, _ = bdfast.data.load("digits", limit=(200, 1))
        >>> model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
        >>> result = d3(model, (images, labels), D3Config(epochs=2))
        >>> result.layers, [sorted(record["distance"]) for record in result.history]
        (('linear',), [['linear'], ['linear']])
    """
    if not isinstance(config, D3Config):
        raise TypeError(message("d3", "config", "a D3Config", type(config).__name__, "pass D3Config(...)"))
    check_callback("d3", callback)
    check_path("d3", "checkpoint", checkpoint)
    with workspace(
        "d3", model, clean_data, config, argument="clean_data", normalize=normalize, device=device, inplace=inplace,
        channels_last=config.channels_last,
    ) as work:  # fmt: skip
        # 1. The place to leave: theta_init of the selected layers, whose norms are the radii of S.
        layers = select_layers("d3", work.model, config.layers)
        weights = {name: layer.weight for name, layer in layers.items()}
        anchors = [w.detach().clone() for w in weights.values()]
        _check_norms(weights)

        # 2. Start elsewhere.
        _warm_up_(list(weights.values()), config)

        # 3. The optimizer adds the gradient of -c sum_j ||W_j - W_j^0|| to that of the loss, and projects on S.
        lam, c = config.lam, config.scale
        groups: list[dict[str, Any]] = [
            {"params": list(weights.values()), "anchors": anchors},
            {"params": _others(work.model, weights), "projected": False},
        ]
        optimizer = ProjectedSGD(groups, lr=config.lr, momentum=config.momentum, distance_weight=c)

        def constraint(logits: Tensor, labels: Tensor) -> Tensor:
            return c * lam * hinge_cross_entropy(logits, labels, config.eps, hinge=config.hinge)

        def measure(mean_constraint: float) -> Record:
            distances = {name: optimizer.state[w]["distance"].item() for name, w in weights.items()}
            norms = {name: w.detach().norm().item() for name, w in weights.items()}
            return {
                "loss": mean_constraint - c * sum(distances.values()),
                "hinge": mean_constraint / (c * lam) if lam > 0 else 0.0,
                "distance": distances,
                "norm": norms,
            }

        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=config.epochs)
        with work.watch("train"):
            history = fit(
                "d3", work, constraint, optimizer, schedule, config,
                measure=measure, callback=callback, checkpoint=checkpoint,
            )  # fmt: skip
    return D3Result(work.model, history, work.watch.seconds, config, tuple(layers))


@torch.no_grad()
def _warm_up_(weights: Sequence[Tensor], config: D3Config) -> None:
    """Move each W from W0 to where it starts; draws on the CPU, so that every device starts alike."""
    if config.warm_up == "near" and config.near_noise == 0:
        text = "the distance has no gradient at W0, and training may stand still; pass near_noise=1e-3"
        warnings.warn(f'd3: `warm_up` is "near": {text}', UserWarning, stacklevel=4)
    if config.warm_up == "middle":
        text = "0 has no direction to project along before the first gradient arrives; prefer random"
        warnings.warn(f'd3: `warm_up` is "middle": {text}', UserWarning, stacklevel=4)
    generator = torch.Generator().manual_seed(stream_seed(config.seed, "warm-up"))
    for w in weights:
        norm = norm_of(w)
        if config.warm_up == "random":
            u = torch.rand(w.shape, generator=generator, dtype=torch.float32) - 0.5
            w.copy_(u * (norm.cpu() / norm_of(u)))
        elif config.warm_up == "far":
            w.neg_()
        elif config.warm_up == "noise":
            u = torch.randn(w.shape, generator=generator, dtype=torch.float32)
            w.add_((w.float().std().cpu() * u).to(w))
        elif config.warm_up == "middle":
            w.zero_()
        elif config.near_noise > 0:
            u = torch.randn(w.shape, generator=generator, dtype=torch.float32)
            w.add_((u * (config.near_noise * norm.cpu() / u.norm())).to(w))


def _others(model: nn.Module, weights: dict[str, Tensor]) -> list[nn.Parameter]:
    selected = {id(w) for w in weights.values()}
    return [p for p in model.parameters() if p.is_floating_point() and id(p) not in selected]


def _check_norms(weights: dict[str, Tensor]) -> None:
    for name, w in weights.items():
        if not bool(w.any()):
            expected, remedy = "layers with a norm above 0", "leave it out: there is no sphere to project it on"
            raise ValueError(message("d3", "layers", expected, f"0 in `{name}`", remedy))


def _check_names(layers: object) -> tuple[str, ...]:
    if isinstance(layers, (list, tuple)) and layers and all(isinstance(name, str) for name in layers):
        return tuple(dict.fromkeys(layers))
    expected = '"classifier", or a list of module names'
    raise ValueError(message("D3Config", "layers", expected, repr(layers), 'pass ["linear"], say'))
