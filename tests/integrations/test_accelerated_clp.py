"""CLP: bounds, pairing in module order, sweeps that decompose once, dead channels, errors."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bdfast.integrations.backdoorbench.accelerated import CLP_prune, channel_lipschitz, clear_cache, clp, clp_sweep
from bdfast.models import build


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    clear_cache()
    yield
    clear_cache()


def randomized(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, std=2.0)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.running_var, 0.1, 2.0)
    return net


def small() -> nn.Module:
    """Kernels wider than high, higher than wide, 1 x 1, and a grouped convolution."""
    return randomized(
        nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 24, 3), nn.BatchNorm2d(24),
            nn.Conv2d(24, 16, 1), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, groups=4), nn.BatchNorm2d(16),
            nn.Conv2d(16, 1, 3), nn.BatchNorm2d(1),
        )
    )  # fmt: skip


def by_definition(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    w = conv.weight.detach().double()
    w = w.reshape(len(w), w.shape[1], -1)
    scale = norm.weight.detach().double().abs() / norm.running_var.double().sqrt()
    return torch.linalg.matrix_norm(w, ord=2) * scale


@pytest.mark.parametrize("u", [-1.0, 0.0, 1.0, 2.0, 3.0])
def test_prunes_what_the_loop_prunes(u: float, monkeypatch: pytest.MonkeyPatch) -> None:
    net = small()
    fast, plain, expected = copy.deepcopy(net), copy.deepcopy(net), copy.deepcopy(net)
    CLP_prune(fast, u)
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    CLP_prune(plain, u)
    modules = list(expected)
    for conv, norm in zip(modules[::2], modules[1::2], strict=True):
        lips = by_definition(conv, norm)
        if len(lips) > 1:  # a single channel has no deviation, and stays
            norm.weight.data[lips > lips.mean() + u * lips.std()] = 0.0
            norm.bias.data[lips > lips.mean() + u * lips.std()] = 0.0
    for name, value in expected.state_dict().items():
        assert torch.equal(fast.state_dict()[name], value), name
        assert torch.equal(plain.state_dict()[name], value), name
    if u <= 1.0:
        assert any((m.weight == 0).any() for m in fast if isinstance(m, nn.BatchNorm2d))


def test_bounds() -> None:
    net = small()
    lips = channel_lipschitz(net)
    assert list(lips) == ["1", "3", "5", "7", "9"]
    for name, values in lips.items():
        expected = by_definition(net[int(name) - 1], net[int(name)])
        torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=0)


def test_pairs_in_module_order() -> None:
    """In a pre-activation block the first batch norm belongs to the convolution registered before the block."""
    net = randomized(build("preact_resnet18", num_classes=10, image_size=(32, 32)))
    modules = dict(net.named_modules())
    lips = channel_lipschitz(net)
    pairs = {
        "layer1.0.bn1": "conv1",
        "layer1.0.bn2": "layer1.0.conv1",
        "layer1.1.bn1": "layer1.0.conv2",
        "layer2.0.bn1": "layer1.1.conv2",
        "layer2.1.bn1": "layer2.0.shortcut.0",
        "layer4.1.bn2": "layer4.1.conv1",
    }
    for norm, conv in pairs.items():
        torch.testing.assert_close(lips[norm].double(), by_definition(modules[conv], modules[norm]), rtol=2e-6, atol=0)
    assert sum(map(len, lips.values())) == 3392


def test_sweep_is_pruning_at_each_threshold_and_changes_nothing() -> None:
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    thresholds = [0.0, 1.0, 2.5]
    for u, channels in zip(thresholds, clp_sweep(net, thresholds), strict=True):
        pruned = copy.deepcopy(net)
        CLP_prune(pruned, u)
        for name, indices in channels.items():
            assert torch.equal(indices, (pruned[int(name)].weight == 0).nonzero()[:, 0])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_decomposes_once_for_equal_weights_and_again_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(clp, "sigma_max", lambda w, f=clp.sigma_max: calls.append(w.shape) or f(w))
    net = small()
    for u in (1.0, 2.0, 3.0):
        CLP_prune(copy.deepcopy(net), u)
    assert len(calls) == 5
    with torch.no_grad():
        net[2].weight[3, 1, 0, 0] += 1e-3
    torch.testing.assert_close(channel_lipschitz(net)["3"].double(), by_definition(net[2], net[3]), rtol=2e-6, atol=0)
    assert len(calls) == 6
    CLP_prune(net.double(), 3.0)  # another dtype is another network
    assert len(calls) == 11


@pytest.mark.parametrize("reference", ["0", "1"])
def test_dead_channels(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variance: pruned, unless nothing comes through; and it does not count in mean and standard deviation."""
    monkeypatch.setenv("BDFAST_REFERENCE", reference)
    net = nn.Sequential(nn.Conv2d(2, 8, 1, bias=False), nn.BatchNorm2d(8))
    with torch.no_grad():
        net[0].weight[:] = torch.tensor([1.0, 1.1, 0.9, 1.0, 1.2, 7.0, 0.0, 1.0])[:, None, None, None]
        net[1].running_var[5:] = 0.0  # a kernel, no kernel, no gamma
        net[1].weight[7] = 0.0
        net[1].bias[:] = 1.0
    CLP_prune(net, 1.5)
    # bounds of the others, in units of sqrt(2): 1, 1.1, 0.9, 1, 1.2, 0, 0; mean 0.743, deviation 0.513
    assert net[1].bias.tolist() == [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (nn.Sequential(nn.BatchNorm2d(3)), "expected a convolution before `0` in module order, got none"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(3)), "expected at most 2 channels in `1`.*, got 3"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, affine=False)), "expected weight and bias in `1`"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), "running statistics in `1`"),
    ],
)
def test_errors(net: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=f"CLP_prune: `net` .*{text}"):
        CLP_prune(net, 3.0)
