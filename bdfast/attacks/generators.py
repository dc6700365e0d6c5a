"""The generators of the input-aware attack, and how they are trained; see :mod:`bdfast.attacks.input_aware`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdfast.attacks.seeding import stream
from bdfast.models.digits_cnn import DigitsCNN
from bdfast.runtime.determinism import in_float32, isolated_rng, stream_seed

TINY = 1e-7
PIXELS = 32 * 32  # for which lambda_mask is


class Options(Protocol):
    """The part of :class:`bdfast.attacks.InputAware` that training reads."""

    @property
    def density(self) -> float: ...
    @property
    def lambda_mask(self) -> float: ...
    @property
    def mask_epochs(self) -> int: ...
    @property
    def generator_epochs(self) -> int: ...
    @property
    def generator_lr(self) -> float: ...
    @property
    def generator_batch(self) -> int: ...
    @property
    def train_ratio(self) -> float: ...


class Generator(nn.Module):
    """Encoder and decoder over two halvings; [B, C, H, W] in [0, 1] to [B, K, H, W] in (0, 1).

    Normalised by groups: an image's pattern does not depend on the batch that it comes in.
    """

    def __init__(self, channels: int, outputs: int, width: int = 16) -> None:
        super().__init__()
        sizes = ((channels, width), (width, 2 * width), (2 * width, 2 * width), (2 * width, width))
        self.layers = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in sizes)
        self.head = nn.Conv2d(width, outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """The pattern, or the mask."""
        height, width = images.shape[2:]
        sizes = [(-(-height // step), -(-width // step)) for step in (2, 4, 2, 1)]
        x = 2 * images - 1
        for layer, size in zip(self.layers, sizes, strict=True):
            # "area" averages on the way down, and repeats pixels on the way up.
            x = F.interpolate(F.relu(F.group_norm(layer(x), 4)), size=size, mode="area")
        return _bounded(self.head(x))


def _bounded(u: Tensor) -> Tensor:
    return u.tanh() / (2 + TINY) + 0.5


def _threshold(mask: Tensor) -> Tensor:
    return _bounded(20 * mask - 10)


def show(
    pair: nn.ModuleList,  # G, M
    images: Tensor,  # [B, C, H, W] in [0, 1]
    givers: Tensor,  # [B, C, H, W] in [0, 1], whose patterns
) -> Tensor:
    """x + (G(z) - x) * T(M(z)): [B, C, H, W] in [0, 1]."""
    pattern: Tensor = pair[0](givers)
    return images + (pattern - images) * _threshold(pair[1](givers))


def train_generators(
    options: Options,
    x: Tensor,  # [N, C, H, W] float32 in [0, 1], on the CPU
    y: Tensor,  # [N] int64
    wanted: Tensor,  # [N] int64
    seed: int,
) -> nn.ModuleList:
    """G and M, trained; the global random state is as before."""
    channels = x.shape[1]
    classes = int(torch.cat((y, wanted)).max()) + 1 if len(y) else 1
    with isolated_rng(stream_seed(seed, "input-aware")), in_float32():
        pair = nn.ModuleList([Generator(channels, channels), Generator(channels, 1)])
        surrogate = DigitsCNN(classes, channels)
    draws = stream(seed, "input-aware batches")
    _train_mask(options, pair[1], x, draws)
    _train_pattern(options, pair, surrogate, x, y, wanted, draws)
    return pair


def _train_mask(options: Options, mask: nn.Module, x: Tensor, draws: torch.Generator) -> None:
    optimizer = torch.optim.Adam(mask.parameters(), lr=options.generator_lr, betas=(0.5, 0.9))
    weight = options.lambda_mask * x[:1, :1].numel() / PIXELS
    for _ in range(options.mask_epochs):
        for one, other in _pairs(len(x), options.generator_batch, draws):
            a, b = _threshold(mask(x[one])), _threshold(mask(x[other]))
            size = F.relu(a - options.density).mean() + F.relu(b - options.density).mean()
            _step(optimizer, weight * size + _diversity(x[one], x[other], a, b))


def _train_pattern(
    options: Options,
    pair: nn.ModuleList,
    surrogate: nn.Module,
    x: Tensor,
    y: Tensor,
    wanted: Tensor,
    draws: torch.Generator,
) -> None:
    pair[1].requires_grad_(False)
    generator = torch.optim.Adam(pair[0].parameters(), lr=options.generator_lr, betas=(0.5, 0.9))
    classifier = torch.optim.SGD(surrogate.parameters(), lr=options.generator_lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(options.generator_epochs):
        for one, other in _pairs(len(x), options.generator_batch, draws):
            count = min(max(1, int(options.train_ratio * len(one))), len(one) // 2)
            poisoned, cross, clean = one[:count], one[count : 2 * count], one[2 * count :]
            batch = torch.cat((
                show(pair, x[poisoned], x[poisoned]), show(pair, x[cross], x[other[count : 2 * count]]), x[clean],
            ))  # fmt: skip
            loss = F.cross_entropy(surrogate(batch), torch.cat((wanted[poisoned], y[cross], y[clean])))
            patterns = pair[0](x[poisoned]), pair[0](x[other[:count]])
            classifier.zero_grad()
            _step(generator, loss + _diversity(x[poisoned], x[other[:count]], *patterns))
            classifier.step()


def _pairs(count: int, batch: int, draws: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of index batches, each beside one of other samples; batches of one are left out."""
    if count < 2:
        return
    order = torch.randperm(count, generator=draws)
    other = order.roll(1)
    for one, beside in zip(torch.split(order, batch), torch.split(other, batch), strict=True):
        if len(one) > 1:
            yield one, beside


def _diversity(x: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """||x - z|| / (||a - b|| + 1e-7), root mean squares, mean over the batch."""
    apart, outputs = ((u - v).square().flatten(1).mean(1) for u, v in ((x, z), (a, b)))
    # The square root of 0 has no finite gradient, and two equal images ask for nothing.
    return (apart.sqrt() / ((outputs + TINY**2).sqrt() + TINY)).mean()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
