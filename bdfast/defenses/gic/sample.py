"""The calibrator that gives every image a d of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdfast.defenses.gic.base import Calibrator, StrPath
from bdfast.defenses.gic.steps import descend_
from bdfast.runtime.progress import Callback


class SampleCalibrator(Calibrator):
    """A d of its own for every image, by projected descent; nothing is learned, and nothing is drawn."""

    def _learn(self, images: Tensor, labels: Tensor, callback: Callback | None, checkpoint: StrPath | None) -> None:
        return

    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        z = x.clone()
        early, failed = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for _ in range(2))
        for _ in range(c.steps):
            losses, grad = self.guide.gradient(z, y)
            failed |= ~losses.isfinite()
            if c.conf is not None:
                early |= ~failed & (losses <= -math.log(c.conf))
                if bool((early | failed).all()):
                    break
            grad = torch.where((early | failed).view(-1, 1, 1, 1), 0.0, grad)
            descend_(z, x, grad, p=c.p, size=c.step, delta=c.delta)
        return torch.where(failed.view(-1, 1, 1, 1), x, z), early, failed
