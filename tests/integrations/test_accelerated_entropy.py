"""EP: entropies that the loop over bins counts, and what is pruned by them."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast.integrations.backdoorbench.accelerated import EP_defense, batch_entropy

ARGS = SimpleNamespace(device="cpu")


def test_counts_what_the_loop_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64, 300)
    x = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)
    closed = batch_entropy(x, compat=False)
    fast = batch_entropy(x)
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    torch.testing.assert_close(fast, batch_entropy(x), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(closed, batch_entropy(x, compat=False), rtol=2e-6, atol=1e-6)
    assert (closed - fast).abs().max() > 1e-4  # the two rules are not the same


def test_any_leading_shape() -> None:
    x = torch.randn(3, 5, 40)
    assert torch.equal(batch_entropy(x), batch_entropy(x.view(15, 40)).view(3, 5))


@pytest.mark.parametrize("x", [[1.0], torch.tensor(1.0)])
def test_not_a_tensor_of_rows(x: Any) -> None:
    with pytest.raises(TypeError, match=r"batch_entropy: `x` expected a tensor \[..., M\]"):
        batch_entropy(x)


class CollectingLayerNorm(nn.LayerNorm):
    """Collects maxima over all but batch and channel when asked to, as the networks that EP is run on do."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.collect_feats = False
        self.batch_feats: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # [N, L, C]
        if self.collect_feats:
            self.batch_feats = x.amax(dim=1).t()
        return super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.bn = nn.BatchNorm2d(32)
        self.ln = CollectingLayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.bn(self.conv(x)).flatten(2).transpose(1, 2)).mean(dim=1)


def by_definition(net: Net, images: Tensor, u: float) -> None:
    """EP on batch norm and layer norm of :class:`Net`, in float64 and bin by bin."""
    with torch.no_grad():
        before = net.conv(images)
        between = net.bn(before).flatten(2).transpose(1, 2)
        for module, feats in ((net.bn, before.flatten(2).amax(2).t()), (net.ln, between.amax(1).t())):
            z = (feats - feats.mean(1, keepdim=True)) / feats.std(1, keepdim=True)
            low = z.min()
            entropy = torch.zeros(len(z))
            for n in range(int((z.max() - low) / 0.1)):
                p = ((z > low + n * 0.1) & (z < low + (n + 1) * 0.1)).float().mean(1)
                entropy -= torch.special.xlogy(p, p)
            pruned = entropy < entropy.mean() - u * entropy.std()
            module.weight[pruned] = 0.0
            module.bias[pruned] = 0.0


@pytest.mark.parametrize("u", [0.0, 1.0, 1.7])
def test_prunes_by_definition(u: float) -> None:
    net = Net().train()
    nn.init.normal_(net.bn.bias)
    images = torch.randn(100, 3, 6, 6)
    expected = copy.deepcopy(net).eval()
    by_definition(expected, images, u)
    EP_defense(net, u, [(images, None), (None, None)], ARGS)
    assert not net.training
    assert not net.ln.collect_feats
    assert not net.bn._forward_pre_hooks
    for name, value in expected.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert (net.bn.weight == 0).any()


def test_a_channel_without_variance_counts_as_constant() -> None:
    net = nn.Sequential(nn.BatchNorm2d(30))
    images = torch.randn(200, 30, 2, 2)
    images[:, 4] = 1.0
    EP_defense(net, 3.0, [(images,)], ARGS)
    assert (net[0].weight == 0).nonzero().flatten().tolist() == [4]


def test_hooks_are_gone_when_the_forward_pass_fails() -> None:
    net = Net()
    with pytest.raises(RuntimeError):
        EP_defense(net, 3.0, [(torch.zeros(2, 4, 6, 6),)], ARGS)
    assert not net.bn._forward_pre_hooks
    assert not net.ln.collect_feats


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("net", "loader", "text"),
    [
        (nn.Identity(), [], "`mixture_data_loader` expected at least one batch"),
        (nn.LayerNorm(4), [(torch.zeros(2, 4),)], "`net` expected .* to collect its inputs"),
        (nn.BatchNorm2d(2, affine=False), [(torch.zeros(2, 2, 1, 1),)], "`net` expected weight and bias"),
        (Unused(), [(torch.zeros(2, 2, 1, 1),)], "`net` expected `bn` to run in a forward pass"),
    ],
)
def test_errors(net: nn.Module, loader: Any, text: str) -> None:
    with pytest.raises(ValueError, match=f"EP_defense: {text}"):
        EP_defense(net, 3.0, loader, ARGS)


def test_the_plain_form_prunes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 16, 3), nn.BatchNorm2d(16))
    with torch.no_grad():
        net[0].weight[5] *= 0.0  # a constant channel: its entropy is 0
    pruned = []
    for switch in ("0", "1"):
        monkeypatch.setenv("BDFAST_REFERENCE", switch)
        copied = copy.deepcopy(net)
        EP_defense(copied, 1.0, [(images,)], ARGS)
        pruned.append([(copied[place].weight == 0).nonzero().flatten().tolist() for place in (1, 4)])
    assert pruned[0] == pruned[1]
    assert 5 in pruned[0][0]
