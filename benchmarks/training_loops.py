"""One epoch of training, as bdfast does it and as it is commonly written: the same batches, network and optimizer."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import bdfast
from bdfast.runtime import Augment
from bdfast.training import TrainConfig, train_classifier

PADDING = 4


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        architecture: see :func:`bdfast.models.build`.
        device: where.
        images, labels: the epoch: uint8 [N, 3, 32, 32] on the host, int64 [N].
        config: of :func:`bdfast.training.train_classifier`; the other loops follow its batch size and
            optimizer, in float32.
        workers: processes of the DataLoader.
    """

    architecture: str
    device: torch.device
    images: Tensor
    labels: Tensor
    config: TrainConfig
    workers: int = 0

    def model(self) -> nn.Module:
        """A fresh network."""
        model = bdfast.models.build(self.architecture, num_classes=10, image_size=32, seed=0)
        return model.to(self.device)


def epochs(setting: Setting) -> dict[str, Callable[[], float]]:
    """Name -> a call that trains one more epoch and returns its seconds.

    ``bdfast`` is :func:`train_classifier`, ``bdfast plain`` that without bfloat16, channels-last and compilation;
    ``resident`` a loop over tensors on the device with the crop as an index of pixels; ``dataloader`` one over a
    Dataset whose transforms are of single images.
    """
    plain = replace(setting.config, precision="fp32", channels_last=False, compile=False)
    return {
        "bdfast": _ours(setting, setting.config),
        "bdfast plain": _ours(setting, plain),
        "resident": _Loop(setting, _resident(setting)).epoch,
        "dataloader": _Loop(setting, _dataloader(setting)).epoch,
    }


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Seconds an epoch, interleaved, and how many times as long the others take: medians over rounds."""
    calls = epochs(setting)
    for call in calls.values():
        call()  # warm up: kernels are chosen, code is compiled
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls)
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(calls[name]())
    ratios = {name: [b / a for a, b in zip(samples["bdfast"], samples[name], strict=True)] for name in calls}
    return {
        "architecture": setting.architecture,
        "images": len(setting.images),
        "steps": -(-len(setting.images) // setting.config.batch_size),
        "seconds": {name: round(statistics.median(values), 4) for name, values in samples.items()},
        "vs bdfast": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "rounds": rounds,
    }


def seconds_of_ours(setting: Setting, rounds: int) -> float:
    """An epoch of :func:`train_classifier` alone, the median of a few."""
    epoch = _ours(setting, setting.config)
    epoch()
    return statistics.median(epoch() for _ in range(rounds))


def _ours(setting: Setting, config: TrainConfig) -> Callable[[], float]:
    model = setting.model()
    # On a GPU steps are captured in a run's first epoch, and what its last one takes is what an epoch costs.
    epochs = 3 if setting.device.type == "cuda" else 1

    def epoch() -> float:
        result = train_classifier(model, (setting.images, setting.labels), replace(config, epochs=epochs))
        return float(result.history[-1]["seconds"])

    return epoch


class _Loop:
    """The common loop: plain SGD, the loss read back every step."""

    def __init__(self, setting: Setting, batches: Callable[[], Any]) -> None:
        self.setting, self.batches = setting, batches
        self.model = setting.model()
        config = setting.config
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def epoch(self) -> float:
        device = self.setting.device
        began = time.perf_counter()
        self.model.train()
        total, correct = 0.0, 0
        for x, y in self.batches():
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            logits = self.model(x)
            loss = F.cross_entropy(logits, y)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item()
            correct += int((logits.argmax(1) == y).sum().item())
        return time.perf_counter() - began


def _resident(setting: Setting) -> Callable[[], Any]:
    images, labels = setting.images.to(setting.device).float() / 255, setting.labels.to(setting.device)
    padded = F.pad(images, [PADDING] * 4)
    height, width = images.shape[2:]
    device = setting.device

    def batches() -> Any:
        for index in torch.randperm(len(images), device=device).split(setting.config.batch_size):  # type: ignore[no-untyped-call]
            top, left = torch.randint(0, 2 * PADDING + 1, (2, len(index), 1), device=device)
            rows, columns = top + torch.arange(height, device=device), left + torch.arange(width, device=device)
            x = padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            flip = torch.rand(len(index), device=device) < 0.5
            yield torch.where(flip[:, None, None, None], x.flip(3), x), labels[index]

    return batches


class _Images(Dataset[tuple[Tensor, Tensor]]):
    """Bytes; crop, flip and conversion of one image at a time."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = F.pad(self.images[index], [PADDING] * 4)
        top, left = torch.randint(0, 2 * PADDING + 1, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return image.float() / 255, self.labels[index]


def _dataloader(setting: Setting) -> Callable[[], Any]:
    loader = DataLoader(
        _Images(setting.images, setting.labels), setting.config.batch_size, shuffle=True,
        num_workers=setting.workers, pin_memory=setting.device.type == "cuda", persistent_workers=setting.workers > 0,
    )  # fmt: skip
    return lambda: loader


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """uint8 [count, 3, 32, 32] and labels: speed does not depend on what images show."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


def setting_for(
    architecture: str, device: torch.device, data: tuple[Tensor, Tensor], steps: int | None, batch_size: int
) -> Setting:
    """The first ``steps`` batches of the data (None: all), with the fast recipe on a GPU."""
    count = len(data[1]) if steps is None else steps * batch_size
    on_gpu = device.type == "cuda"
    config = TrainConfig.fast_cifar10(
        precision="bf16" if on_gpu else "fp32", batch_size=batch_size, augment=Augment(PADDING, True), lr=0.01
    )
    return Setting(architecture, device, data[0][:count], data[1][:count], config, workers=4 if on_gpu else 0)
