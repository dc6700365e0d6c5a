r"""The transformations g of GIC: an image's own step, a prompt for all, a small network.

==============================  ===================================  ===============================================
class                           g(x), clipped to [0, 1]              how it is found
==============================  ===================================  ===============================================
:class:`SampleCalibrator`       :math:`x + d_i`                      S projected steps of descent for every image
:class:`PromptCalibrator`       :math:`x + d`, or :math:`x + d_y`    signed momentum steps over batches, projected
:class:`NetworkCalibrator`      :math:`x + \delta \tanh(h(x))`       Adam on four convolutions, the last one zero
==============================  ===================================  ===============================================

All of them start as the identity and keep :math:`\lVert g(x) - x \rVert_p \le \delta`. Their interface is one,
``calibrator(config).fit(model, data).transform(images, labels)``. Where g is unrestricted, the problem separates into
one for each image, and "sample" solves it without an architecture to guess; this is our reading, see
:mod:`bdfast.defenses.gic`.
"""

from __future__ import annotations

import itertools
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from bdfast.data import as_tensors, check_labels
from bdfast.defenses.gic_config import GICConfig, Mode
from bdfast.defenses.gic_guide import Guide
from bdfast.defenses.gic_steps import PromptDescent, descend_
from bdfast.errors import message
from bdfast.runtime.chunks import ChunkStore, Columns, backing_off, in_chunks
from bdfast.runtime.determinism import stream_seed
from bdfast.runtime.progress import Callback, Record
from bdfast.runtime.resident import ResidentData
from bdfast.training import resume
from bdfast.training.loop import epoch_seed
from bdfast.training.workspace import Normalization

KINDS = {"images": (torch.float32, 4), "early": (torch.bool, 1), "failed": (torch.bool, 1)}
WIDTH = 32  # channels of the network

StrPath: TypeAlias = "str | os.PathLike[str]"


class Calibrated(NamedTuple):
    """What a calibrator made, on the CPU."""

    images: Tensor  # [N, C, H, W] float32 in [0, 1]
    labels: Tensor  # [N] int64: the classes that the images were calibrated for
    early: Tensor  # [N] bool: stopped before the last step, confident enough
    failed: Tensor  # [N] bool: left as they were, since their loss was not finite


class Calibrator(ABC):
    """What all calibrators share; see :func:`calibrator`.

    Attributes:
        config: as given.
        guide: the frozen victim, after :meth:`fit`.
        num_classes: K, after :meth:`fit`.
        history: a record an epoch of :meth:`fit`, or a batch of :meth:`transform` with "sample".
    """

    guide: Guide
    num_classes: int

    def __init__(self, config: GICConfig) -> None:
        self.config = config
        self.history: list[Record] = []

    def fit(
        self,
        model: nn.Module | Guide,
        data: object,
        *,
        normalize: Normalization | None = None,
        device: str | torch.device | None = None,
        callback: Callback | None = None,
        checkpoint: StrPath | None = None,
    ) -> Calibrator:
        """Learn g from the victim and the auxiliary set; returns the calibrator itself.

        Args:
            model: from images ``[N, C, H, W]``, float in [0, 1], to logits; it is copied, or a :class:`Guide` is used.
            data: anything that :func:`bdfast.data.as_tensors` takes.
            normalize: ``(mean, std)`` of a model that does not normalise its own input.
            device: where to work; None is where the model is.
            callback: called with every epoch's record.
            checkpoint: a file that is written after every epoch, and continued from if it is there.

        Raises:
            TypeError, ValueError: model or data of another kind.
            LabelRangeError: a label that is no class of the model.
        """
        images, labels = as_tensors(data, "gic", "auxiliary_data")
        c = self.config
        if isinstance(model, Guide):
            self.guide = model
        else:
            self.guide = Guide(model, w_bn=c.w_bn, precision=c.precision, normalize=normalize, device=device)
        self.num_classes = self.guide.logits(self._floats(images[:2])).shape[1]
        labels = self._targets(images, labels)
        with torch.inference_mode(False), torch.enable_grad():
            self._learn(images, labels, callback, checkpoint)
        return self

    def transform(
        self,
        images: Tensor,  # [N, C, H, W] uint8, or float in [0, 1]
        labels: Tensor | None = None,  # [N] int64
        *,
        callback: Callback | None = None,
        checkpoint: StrPath | None = None,
    ) -> Calibrated:
        """g of some images, which need not be those of :meth:`fit`.

        Args:
            images: in the form of those that it was fitted to.
            labels: their classes. None, or ``labels="pseudo"`` in the config: what the victim takes them for.
            callback: called with every batch's record ("sample").
            checkpoint: a folder that keeps finished batches, and from which they are taken up again.

        Raises:
            RuntimeError: before :meth:`fit`.
            ValueError: images or labels of another form; a folder of another run.
        """
        if not hasattr(self, "guide"):
            raise RuntimeError(message("transform", "self", "a fitted calibrator", "one that is not", "call fit first"))
        given = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        images, given = as_tensors((images, given.to(images.device)), "transform", "images")
        targets = self._targets(images, None if labels is None else given)
        count, size = len(images), self.config.batch_size
        store = None
        if checkpoint is not None:
            run = resume.fingerprint(f"gic {self.config.mode}", self.config, (*self._fixed(), images, targets))
            store = ChunkStore(
                "gic", "checkpoint", checkpoint, format="bdfast.gic/1", run=run, count=count, chunk=size, kinds=KINDS
            )

        def batch(rows: range) -> Columns:
            place = slice(rows.start, rows.stop)
            x, y = self._floats(images[place]), targets[place].to(self.guide.device)
            made, early, failed = self._batch(x, y)
            return {"images": made.cpu().contiguous(), "early": early.cpu(), "failed": failed.cpu()}

        def compute(rows: range) -> Columns:
            if self.config.w_bn > 0:  # the statistics are those of a batch: it is not to be cut
                columns = batch(rows)
            else:
                parts = [part for _, part, _ in backing_off(batch, rows)]
                columns = {name: torch.cat([part[name] for part in parts]) for name in KINDS}
            if self.config.mode == "sample":
                self._tell(rows, count, columns, callback)
            return columns

        with torch.inference_mode(False), torch.no_grad():
            columns = in_chunks(count, size, compute, store=store)
        return Calibrated(columns["images"], targets.cpu(), columns["early"], columns["failed"])

    def _targets(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The classes to calibrate for: as given and checked, or what the victim says."""
        if self.config.labels == "given" and labels is not None:
            check_labels(labels, self.num_classes, "gic", "auxiliary_data: labels")
            return labels
        size = self.config.batch_size
        parts = [self.guide.logits(self._floats(part)).argmax(1) for part in torch.split(images, size)]
        return torch.cat(parts).to(images.device)

    def _floats(self, images: Tensor) -> Tensor:
        x = images.to(self.guide.device)
        return x.float() / 255 if x.dtype == torch.uint8 else x.float()

    def _tell(self, rows: range, count: int, columns: Columns, callback: Callback | None) -> None:
        size = self.config.batch_size
        record: Record = {"stage": "calibrate", "epoch": rows.start // size + 1, "epochs": -(-count // size)}
        record["early"] = float(columns["early"].float().mean())
        self.history.append(record)
        if callback is not None:
            callback(dict(record))

    def _fixed(self) -> tuple[Tensor, ...]:
        """What images depend on besides config and input."""
        return self.guide.fingerprint()

    @abstractmethod
    def _learn(self, images: Tensor, labels: Tensor, callback: Callback | None, checkpoint: StrPath | None) -> None: ...

    @abstractmethod
    def _batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Calibrated images, which of them stopped early, and which failed."""


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
        self.d = nn.Parameter(torch.zeros(count, channels, height, width))

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
    layer: nn.Conv2d = torch.nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)  # type: ignore[no-untyped-call]
    bound = math.sqrt(6 / (9 * inputs))
    with torch.no_grad():
        layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=generator) - 1) * bound)
        layer.bias.zero_()  # type: ignore[union-attr]
    return layer


CALIBRATORS: dict[Mode, Callable[[GICConfig], Calibrator]] = {
    "sample": SampleCalibrator,
    "prompt": PromptCalibrator,
    "network": NetworkCalibrator,
}


def calibrator(config: GICConfig = GICConfig()) -> Calibrator:  # noqa: B008  (frozen)
    """The calibrator of a config's ``mode``.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> images, labels = torch.full((3, 1, 2, 2), 0.5), torch.tensor([0, 1, 1])
        >>> made = calibrator(GICConfig(delta=0.25, steps=4)).fit(model, (images, labels)).transform(images, labels)
        >>> made.images.shape, bool(((made.images - images).abs() <= 0.25).all())
        (torch.Size([3, 1, 2, 2]), True)
    """
    return CALIBRATORS[config.mode](config)
