"""Auxiliary data of several kinds, made from a training set: what a defender may hold in place of clean data.

How well a backdoor is purified depends on where the auxiliary images come from. "Revisiting the Auxiliary Data in
Backdoor Purification" (arXiv 2502.07231) compares families of them; these eight need nothing but the training set:

==============  ======================================================================================================
family          images
==============  ======================================================================================================
``seen``        drawn from what the victim was trained on
``unseen``      the reserved part, which it was not trained on
``brightness``  the reserved part; times U(0.5, 1.5)
``contrast``    ... blended with its own mean gray level, weight U(0.5, 1.5) on the image
``colour``      ... brightness, contrast, saturation by U(0.5, 1.5), hue by U(-0.5, 0.5) turns, in random order
``blur``        ... 3x3 Gaussian, sigma U(0.1, 2.0) pixels, edges reflected
``rotation``    ... turned by U(-30, 30) degrees about its centre, nearest pixel, black outside
``noise``       ... plus N(0, 0.1) a pixel
==============  ======================================================================================================

The kinds and their strengths are those of the authors' code (BackdoorBenchER). Every image is changed once, and the
result is truncated to 8 bits, as a file of it would be. Ours: intermediate results stay in float, the draws of every
image come from a CPU generator (so that every device makes the same images, up to rounding), and images without colours
keep what is said of saturation and hue.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from bdfast.data.dataset import as_tensors
from bdfast.data.reserve import reserve
from bdfast.data.splits import Split
from bdfast.errors import message
from bdfast.runtime.determinism import stream_seed

Family: TypeAlias = Literal["seen", "unseen", "brightness", "contrast", "colour", "blur", "rotation", "noise"]
FAMILIES: tuple[Family, ...] = get_args(Family)

CHUNK = 1024  # images worked on at once
JITTER = 0.5  # brightness, contrast and saturation are multiplied by U(1 - JITTER, 1 + JITTER)
HUE = 0.5  # of a full turn, either way
SIGMA = (0.1, 2.0)  # pixels
DEGREES = 30.0
NOISE = 0.1  # standard deviation, of pixels in [0, 1]
GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601 luma of R, G, B


def auxiliary(
    train_set: object,
    family: Family,
    *,
    ratio: float = 0.05,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Split:
    """The auxiliary set of a family, for a victim that was trained on the first part of :func:`auxiliary_split`.

    Args:
        train_set: the whole training set, in any form that :func:`bdfast.data.as_tensors` takes.
        family: one of :data:`FAMILIES`.
        ratio: size of the set as a share of the training set, in (0, 1); the same share of every class, rounded down.
        seed: seeds the split and every draw; the same seed as in :func:`auxiliary_split`.
        device: where the images are made; None is where they are.

    Returns:
        ``(images, labels)``, uint8 ``[n, C, H, W]`` and int64 ``[n]``.

    Warns:
        UserWarning: a class of which rounding down leaves nothing.

    Raises:
        TypeError, ValueError: another family, a ratio out of range, data of another kind.

    Example:
        >>> import bdfast
        >>> train_set, _, _ = bdfast.data.load("digits")
        >>> images, labels = auxiliary(train_set, "blur", ratio=0.1)
        >>> images.shape, images.dtype
        (torch.Size([138, 1, 8, 8]), torch.uint8)
    """
    _check_family("auxiliary", family)
    images, labels = as_tensors(train_set, "auxiliary", "train_set")
    train, reserved = auxiliary_split(labels, ratio=ratio, seed=seed)
    if family == "seen":
        share = min(1.0, ratio * len(labels) / len(train))
        chosen = train[reserve(labels[train], ratio=share, seed=stream_seed(seed, "auxiliary seen"), per_class=True)]
    else:
        chosen = reserved
    chosen = chosen.to(images.device)
    picked, labels = images[chosen], labels[chosen]
    if device is not None:
        picked, labels = picked.to(device), labels.to(device)
    return shift(picked, family, seed=seed), labels


def auxiliary_split(
    labels: Tensor,  # [N] integer
    *,
    ratio: float = 0.05,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices of what the victim is trained on, and of the reserved part that it never sees.

    Args:
        labels: of the whole training set.
        ratio: reserved share of every class, in (0, 1), rounded down.
        seed: same seed, same split.

    Returns:
        ``(train, reserved)``, int64, each in ascending order.

    Warns:
        UserWarning: a class of which nothing is reserved.

    Raises:
        ValueError: a ratio out of range, or one that leaves either part empty.

    Example:
        >>> train, reserved = auxiliary_split(torch.arange(100) % 4, ratio=0.2)
        >>> len(train), len(reserved)
        (80, 20)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
        raise ValueError(message("auxiliary_split", "ratio", "a number in (0, 1)", repr(ratio), "pass 0.05 for 5 %"))
    reserved = reserve(labels, ratio=ratio, seed=stream_seed(seed, "auxiliary split"), per_class=True).sort().values
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[reserved] = False
    return kept.nonzero().flatten(), reserved


def shift(
    images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
    family: Family,
    *,
    seed: int = 0,
) -> Tensor:
    """Change every image once, as the families do; ``seen`` and ``unseen`` change nothing.

    Args:
        images: on any device, where the work is done.
        family: one of :data:`FAMILIES`.
        seed: the same seed makes the same images of the same set.

    Returns:
        uint8 ``[N, C, H, W]``: pixels in [0, 1] times 255, truncated.

    Raises:
        TypeError, ValueError: another family, images of another kind.

    Example:
        >>> images = torch.full((2, 1, 4, 4), 200, dtype=torch.uint8)
        >>> shift(images, "unseen").unique().tolist(), shift(images, "contrast").unique().tolist()
        ([200], [200])
    """
    _check_family("shift", family)
    images, _ = as_tensors((images, torch.zeros(len(images), dtype=torch.int64, device=images.device)), "shift")
    if family in ("seen", "unseen") and images.dtype == torch.uint8:
        return images.clone()
    generator = torch.Generator().manual_seed(stream_seed(seed, f"auxiliary {family}"))
    return torch.cat([_truncate(_shift(_floats(part), family, generator)) for part in torch.split(images, CHUNK)])


def _check_family(where: str, family: str) -> None:
    if family not in FAMILIES:
        raise ValueError(message(where, "family", f"one of {', '.join(FAMILIES)}", repr(family), "choose one of them"))


def _floats(images: Tensor) -> Tensor:
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _truncate(x: Tensor) -> Tensor:
    # Up to a thousandth of a level is rounding of the arithmetic, not darkness: 200 / 255 * 255 is to stay 200.
    return (x * 255 + 1e-3).clamp_(0, 255).to(torch.uint8)


def _shift(
    x: Tensor,  # [B, C, H, W] float32 in [0, 1]
    family: Family,
    generator: torch.Generator,
) -> Tensor:
    if family == "brightness":
        return _brightness(x, _uniform(x, 1 - JITTER, 1 + JITTER, generator))
    if family == "contrast":
        return _contrast(x, _uniform(x, 1 - JITTER, 1 + JITTER, generator))
    if family == "colour":
        return _colour(x, generator)
    if family == "blur":
        return _blur(x, _uniform(x, *SIGMA, generator))
    if family == "rotation":
        return _rotate(x, _uniform(x, -DEGREES, DEGREES, generator))
    if family == "noise":
        return (x + NOISE * torch.randn(x.shape, generator=generator, dtype=torch.float32).to(x.device)).clamp(0, 1)
    return x


def _uniform(x: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """One draw an image, [B]."""
    return (low + (high - low) * torch.rand(len(x), generator=generator, dtype=torch.float32)).to(x.device)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor.view(-1, 1, 1, 1)).clamp(0, 1)


def _gray(x: Tensor) -> Tensor:
    """[B, 1, H, W]"""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(GRAY).view(-1, 1, 1)).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _gray(x).mean((2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _gray(x), factor) if x.shape[1] == 3 else x


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV by ``turn`` full turns; images without colours stay."""
    if x.shape[1] != 3:
        return x
    value, argmax = x.max(1)  # [B, H, W]
    spread = value - x.min(1).values
    r, g, b = x.unbind(1)
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    sector = torch.stack(((g - b) / safe, 2 + (b - r) / safe, 4 + (r - g) / safe)).gather(0, argmax[None])[0]
    hue = (sector / 6 + turn.view(-1, 1, 1)).remainder(1) * 6
    # f(n) = v - spread * max(0, min(k, 4 - k, 1)), k = (n + h) mod 6, n = 5, 3, 1 for R, G, B: HSV to RGB in one line
    k = [(n + hue).remainder(6) for n in (5, 3, 1)]
    return torch.stack([value - spread * torch.minimum(c, 4 - c).clamp(0, 1) for c in k], 1)


def _colour(x: Tensor, generator: torch.Generator) -> Tensor:
    """The four jitters, in an order of its own for every image."""
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(len(x))])  # [B, 4]
    factors = [_uniform(x, 1 - JITTER, 1 + JITTER, generator) for _ in range(3)]
    factors.append(_uniform(x, -HUE, HUE, generator))
    jitters = (_brightness, _contrast, _saturation, _hue)
    x = x.clone()
    for place in range(4):
        for number, (jitter, factor) in enumerate(zip(jitters, factors, strict=True)):
            rows = (order[:, place] == number).nonzero().flatten().to(x.device)
            x[rows] = jitter(x[rows], factor[rows])
    return x


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable 3-tap Gaussians, one an image; a side of one pixel has nothing to blur along."""
    side = torch.exp(-0.5 / sigma.square())
    weights = torch.stack((side, torch.ones_like(side), side)) / (1 + 2 * side)  # [3, B]
    for axis in (2, 3):
        length = x.shape[axis]
        if length == 1:
            continue
        index = torch.arange(-1, length + 1, device=x.device).abs()
        index[-1] = length - 2  # reflected, the edge itself not repeated
        padded = x.index_select(axis, index)
        x = sum(w.view(-1, 1, 1, 1) * padded.narrow(axis, i, length) for i, w in enumerate(weights))  # type: ignore[assignment]
    return x


def _rotate(x: Tensor, degrees: Tensor) -> Tensor:
    height, width = x.shape[2:]
    angle = degrees * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    # grid_sample counts in half sides, a rotation in pixels
    rows = (torch.stack((cos, -sin * (height / width), zero), 1), torch.stack((sin * (width / height), cos, zero), 1))
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", padding_mode="zeros", align_corners=False)
