"""Calibrators with parameters, learned over the auxiliary set: a prompt, a small network."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from bdfast.defenses.gic.base import Calibrator, StrPath
from bdfast.defenses.gic.steps import PromptDescent
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.progress import Callback, Record
from bdfast.runtime.resident import ResidentData
from bdfast.training import resume
from bdfast.training.loop import epoch_seed

WIDTH = 32  # channels of the network


class LearnedCalibrator(Calibrator):
    """A transformation with parameters, learned in epochs over the auxiliary set."""

    network: nn.Module

    @abstractmethod
    def _build(self, channels: int, height: int, width: int) -> tuple[nn.Module, Optimizer]: ...

    def _learn(self, images: Tensor, labels: Tensor, callback: Callback | None, checkpoint: StrPath | None) -> None:
        c, guide = self.config, self.guide
        self.network, optimizer = self._build(*images.shape[1:])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        run = ""
        if checkpoint is not None:
            run = resume.fingerprint(f"gic {c.mode}", c, (*guide.fingerprint(), images, labels))
            self.history = resume.load(checkpoint, run, self.network, optimizer, schedule, guide.device)
        data = ResidentData(images, labels, device=guide.device)
        for epoch in range(len(self.history) + 1, c.epochs + 1):
            total = torch.zeros((), dtype=torch.float64, device=guide.device)
            for x, y, _ in data.batches(c.batch_size, shuffle=True, epoch_seed=epoch_seed(c.seed, epoch)):
                z = self._transformed(x, y)
                losses, grad = guide.gradient(z.detach(), y)
                optimizer.zero_grad()
                # An image without a finite loss has no say.
                usable = (losses.isfinite() & grad.flatten(1).isfinite().all(1)).view(-1, 1, 1, 1)
                z.backward(torch.where(usable, grad, 0.0) / len(x))  # type: ignore[no-untyped-call]
                optimizer.step()
                total += losses.nan_to_num(0.0, 0.0).sum()
            record: Record = {"stage": "fit", "epoch": epoch, "epochs": c.epochs, "loss": float(total) / len(data)}
            self.history.append(record)
            if checkpoint is not None:
                resume.save(checkpoint, run, self.history, self.network, optimizer, schedule, guide.device)
            if callback is not None:
                callback(dict(record))

    def _transformed(self, x: Tensor, y: Tensor) -> Tensor:
        change: Tensor = self.network(x, y)
        return (x + change).clamp(0, 1)

    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self._transformed(x, y)
        failed = ~(self.guide.logits(x).isfinite().all(1) & self.guide.logits(z).isfinite().all(1))
        return torch.where(failed.view(-1, 1, 1, 1), x, z), torch.zeros_like(failed), failed

    def _fixed(self) -> tuple[Tensor, ...]:
        return (*self.guide.fingerprint(), *self.network.state_dict().values())


class PromptCalibrator(LearnedCalibrator):
    """One d for all images, or one for each class."""

    def _build(self, channels: int, height: int, width: int) -> tuple[nn.Module, Optimizer]:
        c = self.config
        prompt = _Prompt(self.num_classes if c.per_class else 1, channels, height, width).to(self.guide.device)
        return prompt, PromptDescent(prompt.parameters(), lr=c.learning_rate, momentum=c.momentum, p=c.p, delta=c.delta)


class NetworkCalibrator(LearnedCalibrator):
    """delta tanh(h(x)) with four 3x3 convolutions of 32 channels: smooth in x, of use for images never seen."""

    def _build(self, channels: int, height: int, width: int) -> tuple[nn.Module, Optimizer]:
        network = _Network(channels, self.config.delta, self.config.seed).to(self.guide.device)
        return network, torch.optim.Adam(network.parameters(), lr=self.config.learning_rate)


class _Prompt(nn.Module):
    def __init__(self, count: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.d = nn.Parameter(torch.zeros(count, channels, height, width, dtype=torch.float32))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if len(self.d) == 1:
            return self.d.expand_as(x)
        chosen = nn.functional.one_hot(y, len(self.d)).to(self.d.dtype)  # a gather's gradient would need atomics
        return (chosen @ self.d.flatten(1)).view_as(x)


class _Network(nn.Module):
    def __init__(self, channels: int, delta: float, seed: int) -> None:
        super().__init__()
        self._delta = delta
        widths = (channels, WIDTH, WIDTH, WIDTH, channels)
        generator = torch.Generator().manual_seed(stream_seed(seed, "gic network"))
        layers = [_convolution(a, b, generator) for a, b in itertools.pairwise(widths)]
        nn.init.zeros_(layers[-1].weight)
        self.hidden, self.last = nn.ModuleList(layers[:-1]), layers[-1]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for layer in self.hidden:
            x = layer(x).relu()
        return self._delta * torch.tanh(self.last(x))


def _convolution(inputs: int, outputs: int, generator: torch.Generator) -> nn.Conv2d:
    """3x3, with He's uniform weights for the ReLU behind it, drawn from ``generator``."""
    # Initialised as a layer is made, it would draw from the global generator.
    layer: nn.Conv2d = torch.nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1, dtype=torch.float32)  # type: ignore[no-untyped-call]
    bound = math.sqrt(6 / (9 * inputs))
    with torch.no_grad():
        layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32) - 1) * bound)
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer
