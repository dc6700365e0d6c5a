"""ABL: the isolation order, and the two losses with their gradients."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bdfast.integrations.backdoorbench.accelerated import FloodingLoss, LGALoss, compute_loss_value, isolated

ARGS = SimpleNamespace(device="cpu", isolation_ratio=0.1)


def network() -> nn.Module:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    net(torch.randn(64, 3, 8, 8))  # running statistics of their own
    return net


def dataset(count: int = 203) -> TensorDataset:
    """5-tuples, as BackdoorBench's."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(count, 3, 8, 8, generator=generator), torch.randint(4, (count,), generator=generator)
    return TensorDataset(images, labels, torch.arange(count), torch.zeros(count), labels)


def test_order_of_one_image_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net, data = network(), dataset()
    fast = compute_loss_value(ARGS, data, net.train())
    assert not net.training  # as the usual loop leaves it
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    plain = compute_loss_value(ARGS, data, net)
    assert fast.dtype == np.int64
    losses = nn.CrossEntropyLoss(reduction="none")(net(data.tensors[0]), data.tensors[1]).detach().double().numpy()
    assert np.all(np.diff(losses[fast]) > -1e-5)
    assert np.array_equal(fast, plain)


def test_equal_losses_keep_their_order_and_nan_comes_last() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [float("nan"), 0.0], [2.0, 0.0]])
    data = TensorDataset(logits[:, :, None, None], torch.zeros(5, dtype=torch.int64))
    assert compute_loss_value(ARGS, data, nn.Flatten()).tolist() == [4, 1, 0, 2, 3]


def test_isolated() -> None:
    chosen, others = isolated(np.arange(9)[::-1], 0.25)  # int(2.25)
    assert chosen.tolist() == [8, 7]
    assert others.tolist() == [6, 5, 4, 3, 2, 1, 0]
    with pytest.raises(ValueError, match=r"isolated: `ratio` expected a fraction in \[0, 1\], got 1.5"):
        isolated(np.arange(3), 1.5)


def test_empty_set() -> None:
    data = TensorDataset(torch.zeros(0, 1, 2, 2), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="compute_loss_value: `poisoned_data` expected at least one sample"):
        compute_loss_value(ARGS, data, nn.Flatten())


CRITERIA = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(reduction="none"),
    nn.CrossEntropyLoss(label_smoothing=0.1),
    nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])),
]


@pytest.mark.parametrize("criterion", CRITERIA, ids=["mean", "none", "smoothed", "weighted"])
@pytest.mark.parametrize("level", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("kind", [LGALoss, FloodingLoss])
def test_losses_and_gradients(kind: type[nn.Module], level: float, criterion: nn.Module) -> None:
    logits, target = torch.randn(7, 3), torch.arange(7) % 3

    def gradient(value: Tensor, z: Tensor) -> Tensor:
        return torch.autograd.grad(value.sum(), z)[0]

    z, w = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = kind(level, criterion)(z, target)
    plain = criterion.double()(w, target)
    expected = plain * (plain - level).sign() if kind is LGALoss else (plain - level).abs() + level
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(value, z).double(), gradient(expected, w), rtol=1e-5, atol=1e-6)
    criterion.float()


def test_losses_by_hand() -> None:
    """ln 2 for equal logits: below 1, so LGA gives -ln 2, and flooding 2 - ln 2."""
    z, y = torch.zeros(1, 2), torch.tensor([1])
    assert LGALoss(1.0, nn.CrossEntropyLoss())(z, y).item() == pytest.approx(-0.693147, abs=1e-6)
    assert FloodingLoss(1.0, nn.CrossEntropyLoss())(z, y).item() == pytest.approx(2 - 0.693147, abs=1e-6)
