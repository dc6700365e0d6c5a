r"""Projected gradient descent inside a random square patch of each image, batched, against a frozen network.

The consistency score of AdvrBD (arXiv 2405.12719, eq. 3) asks how far a perturbation that is limited to a patch can
move a prediction. From a random start inside the patch,

.. math::

    x'_0 = \Pi(x + m \circ u), \quad u \sim U(-\varepsilon, \varepsilon), \qquad
    x'_{t+1} = \Pi\bigl(x'_t + \alpha\, m \circ \mathrm{sign}(\nabla_{x'} \ell(f(x'_t)))\bigr)

with the projection on the eps ball around x and on the range of pixels, the mask m of half-width r around a uniform
pixel, and the loss KL(f(x) || f(x')) or the cross entropy against a label. At x' = x the gradient of KL is zero, which
is why the start is random. A sample whose gradient underflows, or is NaN, stays where it is: sign(0) = sign(NaN) = 0.

Patch and noise depend on (seed, round, sample id), not on the batch that a sample is in.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bdfast.attacks.checks import check_labels, describe
from bdfast.errors import message
from bdfast.ops import kl_divergence, masked_pgd_step_, masked_random_start, patch_centers, patches
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.graphed import Graphed

NAME = "masked_pgd"

Objective: TypeAlias = Literal["kl", "ce"]
Direction: TypeAlias = Literal["ascend", "descend"]


class MaskedPGD:
    """The attack with its numbers fixed; on a GPU all of its steps are one CUDA graph, captured at the first batch.

    Args:
        frozen: the network.
        radius: half-width of the patches in pixels (side 2r + 1, cut at the border); None is the whole image.
        steps: gradient steps, at least one.
        step_size: alpha, in the units of the images; a number or ``[C]``.
        eps: largest change of a pixel, likewise.
        objective: ``"kl"``: KL of the prediction on x against that on x'; ``"ce"``: cross entropy against a label.
        direction: ``"ascend"`` moves predictions away, ``"descend"`` towards.
        lower, upper: range of the pixels, numbers or ``[C]``. For images in [0, 1] they are 0 and 1; where the network
            takes normalised images, ``(0 - mean) / std`` and ``(1 - mean) / std``, with step and eps divided by std.

    Raises:
        TypeError: the network is not frozen; a radius, step, eps or bound that is no number.
        ValueError: an objective, a direction or a number of steps that is none; a number out of range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> x, ids = torch.rand(5, 1, 4, 4), torch.arange(5)
        >>> with FrozenModel(net) as frozen:
        ...     attack = MaskedPGD(frozen, radius=1, eps=0.1, step_size=0.05)
        ...     moved = attack(x, ids, frozen.logits(x), seed=0) - x
        >>> bool(moved.abs().max() <= 0.1 + 1e-6), int((moved != 0).flatten(1).sum(1).max()) <= 9
        (True, True)
    """

    def __init__(
        self,
        frozen: FrozenModel,
        *,
        radius: int | None,
        steps: int = 5,
        step_size: float | Tensor = 2 / 255,
        eps: float | Tensor = 8 / 255,
        objective: Objective = "kl",
        direction: Direction = "ascend",
        lower: float | Tensor = 0.0,
        upper: float | Tensor = 1.0,
    ) -> None:
        if not isinstance(frozen, FrozenModel):
            remedy = "enter `with FrozenModel(model) as frozen:`"
            raise TypeError(message(NAME, "frozen", "a FrozenModel", type(frozen).__name__, remedy))
        for name, value, choices in (
            ("objective", objective, get_args(Objective)),
            ("direction", direction, get_args(Direction)),
        ):
            if value not in choices:
                raise ValueError(message(NAME, name, " or ".join(choices), repr(value), "choose one of them"))
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(message(NAME, "steps", "a whole number, at least 1", repr(steps), "pass 5, say"))
        patches.check_radius(NAME, radius)
        patches.check_value(NAME, "step_size", step_size)
        patches.check_value(NAME, "eps", eps, lowest=0.0)
        patches.check_value(NAME, "lower", lower, finite=False)
        patches.check_value(NAME, "upper", upper, finite=False)
        patches.check_range(NAME, lower, upper)
        self._radius, self._step_size, self._objective = radius, step_size, objective
        self._ball: dict[str, Any] = {"eps": eps, "lower": lower, "upper": upper}
        signed = step_size if direction == "ascend" else -step_size
        # A function of its own: a graph that held this object would live, with its memory, until a collection.
        self._loop = Graphed(partial(_steps_, frozen, radius, steps, {"step_size": signed, **self._ball}, objective))

    def __call__(
        self,
        x: Tensor,  # [N, C, H, W]
        ids: Tensor,  # [N]
        target: Tensor,  # [N, K] or [N]
        *,
        seed: int,
        round: int = 0,
    ) -> Tensor:
        """x' of every image.

        Args:
            x: ``[N, C, H, W]`` float.
            ids: ``[N]`` int64, indices of the samples in their data set.
            target: logits on x, ``[N, K]`` float32, for ``"kl"``; labels, ``[N]`` int64, for ``"ce"``.
            seed: of patches and noise.
            round: redraws them.

        Returns:
            A new tensor like x, equal to it bit for bit outside the patches.

        Raises:
            TypeError, ValueError: arguments of another kind, shape or range than stated.
        """
        self.check(x, ids, seed=seed, round=round)
        _check_target(target, x, self._objective)
        ids = ids.to(x.device)
        centers = None
        if self._radius is not None:
            centers = patch_centers(ids, x.shape[2], x.shape[3], seed=seed, round=round)
        start = masked_random_start(x, ids, centers, self._radius, seed=seed, round=round, **self._ball)
        return self._loop(start, x, target) if centers is None else self._loop(start, x, target, centers)

    def check(self, x: Tensor, ids: Tensor, *, seed: int, round: int = 0) -> None:
        """What the ops would say of their arguments, said of the caller's before the network runs; reads no values."""
        patches.check_images(NAME, x, "x")
        patches.check_ids(NAME, ids)
        if len(ids) != len(x):
            expected, got = f"one id an image, [{len(x)}]", str(list(ids.shape))
            raise ValueError(message(NAME, "ids", expected, got, "pass ids for exactly these images"))
        patches.check_seed(NAME, "seed", seed)
        patches.check_seed(NAME, "round", round)
        for name, value in {"step_size": self._step_size, **self._ball}.items():
            patches.check_channels(NAME, name, value, x)


def _check_target(target: Tensor, x: Tensor, objective: Objective) -> None:
    if objective == "kl":
        expected, remedy = f"logits [{len(x)}, K], floating point", "pass those of the network on x"
        fits = isinstance(target, Tensor) and target.is_floating_point() and target.ndim == 2
    else:
        expected, remedy = f"labels [{len(x)}], int64", "pass the class of each image"
        fits = isinstance(target, Tensor) and target.dtype == torch.int64 and target.ndim == 1
    if not fits or len(target) != len(x):
        kind = ValueError if isinstance(target, Tensor) else TypeError
        raise kind(message(NAME, "target", expected, describe(target), remedy))


def _steps_(
    frozen: FrozenModel, radius: int | None, steps: int, options: dict[str, Any], objective: Objective,
    x_adv: Tensor, x: Tensor, target: Tensor, centers: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """All steps, into ``x_adv``; the same on every device, captured on a GPU."""

    def loss(logits: Tensor) -> Tensor:
        if objective == "kl":
            return kl_divergence(target, logits)
        return cross_entropy(logits, target, reduction="none")

    for _ in range(steps):
        _, grad = frozen.input_gradient(x_adv, loss)
        masked_pgd_step_(x_adv, x, grad, centers, radius, **options)
    return x_adv


def masked_pgd(
    frozen: FrozenModel,
    x: Tensor,  # [N, C, H, W]
    ids: Tensor | None = None,  # [N]
    *,
    radius: int | None,
    steps: int = 5,
    step_size: float | Tensor = 2 / 255,
    eps: float | Tensor = 8 / 255,
    objective: Objective = "kl",
    direction: Direction = "ascend",
    labels: Tensor | None = None,  # [N]
    seed: int = 0,
    round: int = 0,
    lower: float | Tensor = 0.0,
    upper: float | Tensor = 1.0,
) -> Tensor:
    """One batch of :class:`MaskedPGD` (which see): x' like ``x``, perturbed inside a random patch of each image.

    Args:
        ids: indices of the samples in their data set; 0 .. N - 1 by default.
        labels: ``[N]`` classes, for ``objective="ce"``.

    Raises:
        TypeError, ValueError: as :class:`MaskedPGD`; no labels for ``"ce"``, labels or ids of another kind or length.
        LabelRangeError: a label that is no class of the network.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 3))
        >>> with FrozenModel(net) as frozen:
        ...     masked_pgd(frozen, torch.rand(5, 1, 4, 4), radius=None).shape
        torch.Size([5, 1, 4, 4])
    """
    attack = MaskedPGD(
        frozen, radius=radius, steps=steps, step_size=step_size, eps=eps, objective=objective, direction=direction,
        lower=lower, upper=upper,
    )  # fmt: skip
    patches.check_images(NAME, x, "x")
    ids = torch.arange(len(x)) if ids is None else ids
    attack.check(x, ids, seed=seed, round=round)
    if objective == "ce" and labels is None:
        raise ValueError(message(NAME, "labels", 'labels [N] for objective="ce"', "None", "pass labels=..."))
    logits = frozen.logits(x)
    if labels is None or objective == "kl":
        return attack(x, ids, logits, seed=seed, round=round)
    check_labels(NAME, labels, len(x), logits.shape[1])
    return attack(x, ids, labels.to(x.device, torch.int64), seed=seed, round=round)
