"""A victim to purify, and networks too small to take time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from bdfast import attacks, data, metrics, models
from bdfast.training import TrainConfig, train_classifier

Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Victim:
    model: nn.Module
    train: Split
    test: Split
    triggered: tuple[Tensor, ...]

    def reserve(self, count: int, seed: int) -> Split:
        index = data.reserve(self.train, count=count, seed=seed)
        return self.train[0][index], self.train[1][index]

    def evaluate(self, model: nn.Module) -> metrics.Metrics:
        return metrics.evaluate(model, self.test, self.triggered)


@pytest.fixture(scope="session")
def victim() -> Victim:
    """A network with a BadNets backdoor (3x3 white corner, 10 %, target 0) in scikit-learn's digits."""
    seed = 0
    train, test, _ = data.load("digits", seed=0)
    poisoned = attacks.poison(*train, "badnets", rate=0.1, target=0, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.build("digits_cnn", num_classes=10, image_size=8, channels=1)
    train_classifier(model, (poisoned.images, poisoned.labels), TrainConfig.for_digits(epochs=12, seed=seed))
    return Victim(model.eval(), train, test, tuple(poisoned.trigger(*test)))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def mlp() -> nn.Sequential:
    """12 pixels to 3 classes, with batch norm, dropout and one hidden layer; in eval mode, one bias frozen."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    net[2].bias.requires_grad_(False)
    return net.eval()


@pytest.fixture
def tiny() -> Split:
    """30 images [1, 3, 4] of 3 classes."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(30) % 3
    images = (torch.rand(30, 1, 3, 4, generator=g) + labels[:, None, None, None]) / 4
    return images, labels
