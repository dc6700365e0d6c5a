"""The calibrator that gives every image a d of its own."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from bdfast.defenses.gic.base import Calibrator, StrPath
from bdfast.defenses.gic.config import GICConfig
from bdfast.defenses.gic.guide import Guide
from bdfast.defenses.gic.steps import descend_
from bdfast.runtime.graphed import Replayed
from bdfast.runtime.progress import Callback


class SampleCalibrator(Calibrator):
    """A d of its own for every image, by projected descent; nothing is learned, and nothing is drawn."""

    def _learn(self, images: Tensor, labels: Tensor, callback: Callback | None, checkpoint: StrPath | None) -> None:
        self._descents: dict[torch.Size, _Descent] = {}

    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape not in self._descents:
            self._descents[x.shape] = _Descent(self.guide, self.config, x)
        return self._descents[x.shape](x, y)


class _Descent:
    """All steps of a batch, in memory of its own; on a GPU a step is captured, and replayed for batches to come."""

    def __init__(self, guide: Guide, config: GICConfig, like: Tensor) -> None:
        self._config = config
        self._z, self._x = torch.empty_like(like), torch.empty_like(like)
        self._y = torch.empty(len(like), dtype=torch.int64, device=like.device)
        self._early, self._failed = (torch.empty(len(like), dtype=torch.bool, device=like.device) for _ in range(2))
        memory = (self._z, self._x, self._y, self._early, self._failed)
        # A function of its own: a graph that held this object would live, with its memory, until a collection.
        self._step = Replayed(partial(_step_, guide, config, *memory), like.device)

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for place, value in ((self._z, x), (self._x, x), (self._y, y)):
            place.copy_(value)
        self._early.zero_()
        self._failed.zero_()
        for _ in range(self._config.steps):
            rest = self._step()
            if self._config.conf is not None and not bool(rest):
                break
        made = torch.where(self._failed.view(-1, 1, 1, 1), self._x, self._z)
        return made, self._early.clone(), self._failed.clone()


def _step_(
    guide: Guide, config: GICConfig,
    z: Tensor,  # [N, C, H, W]
    x: Tensor,  # [N, C, H, W]
    y: Tensor,  # [N]
    early: Tensor,  # [N] bool
    failed: Tensor,  # [N] bool
) -> Tensor:  # fmt: skip
    """One step of every image that is neither failed nor there, in place; how many those are."""
    losses, grad = guide.gradient(z, y)
    failed |= ~losses.isfinite()
    if config.conf is not None:
        early |= ~failed & (losses <= -math.log(config.conf))
    rests = early | failed
    descend_(z, x, torch.where(rests.view(-1, 1, 1, 1), 0.0, grad), p=config.p, size=config.step, delta=config.delta)
    return (~rests).sum()
