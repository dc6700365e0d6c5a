"""ClippedReLU: values, gradients, what it accepts, and batch norms in front of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import fx, nn

from bdfast.models import classifier_layers
from bdfast.nn import ClippedReLU


def test_by_hand() -> None:
    layer = ClippedReLU(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[-1.0, 3.0], [4.0, 1.0]], requires_grad=True)
    y = layer(x)
    assert y.tolist() == [[0.0, 2.0], [1.0, 1.0]]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert layer.bound.grad is not None
    assert layer.bound.grad.tolist() == [1.0, 1.0]


def test_infinite_bound_is_relu_and_six_is_relu6() -> None:
    x = 5 * torch.randn(2, 3, 4, 4)
    assert torch.equal(ClippedReLU(math.inf)(x), nn.ReLU()(x))
    assert torch.equal(ClippedReLU(6)(x), nn.ReLU6()(x))
    assert torch.equal(ClippedReLU(math.inf, ceiling=6.0)(x), nn.ReLU6()(x))


def test_a_bound_above_the_ceiling_has_no_gradient() -> None:
    layer = ClippedReLU(torch.tensor([5.0, 7.0]), ceiling=6.0)
    layer(torch.full((1, 2), 10.0)).sum().backward()
    assert layer.bound.grad is not None
    assert layer.bound.grad.tolist() == [1.0, 0.0]


def test_the_bound_is_the_one_parameter() -> None:
    layer = ClippedReLU(2.5)
    assert layer.bound.requires_grad
    assert [*layer.state_dict()] == ["bound"]
    assert not ClippedReLU(2.5, learnable=False).bound.requires_grad
    shared = nn.Parameter(torch.ones(4), requires_grad=False)
    assert ClippedReLU(shared).bound is shared
    start = torch.ones(3)
    ClippedReLU(start).bound.data.zero_()
    assert start.sum() == 3
    other = ClippedReLU(0.0)
    other.load_state_dict(layer.state_dict())
    assert other.bound.item() == 2.5
    assert copy.deepcopy(layer).bound.item() == 2.5


def test_repr() -> None:
    assert repr(ClippedReLU(torch.ones(3), ceiling=6.0)) == "ClippedReLU(bound=[3], ceiling=6)"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("mode", ["frozen", "no_grad", "trainable", "training", "no statistics"])
def test_batch_norm_in_front(affine: bool, mode: str) -> None:
    """Joined or called, the result is that of the two layers, and so are running statistics and gradients."""
    bn = nn.BatchNorm2d(3, affine=affine, track_running_stats=mode != "no statistics")
    bn(torch.randn(8, 3, 4, 4) * 3 + 1)
    bn.train(mode == "training").requires_grad_(mode in ("trainable", "no_grad"))
    x, z = torch.randn(2, 3, 4, 4), torch.rand(3) + 0.5
    usual, ours, layer = copy.deepcopy(bn), copy.deepcopy(bn), ClippedReLU(z)
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = torch.minimum(usual(x).relu(), z[:, None, None])
        got = layer(x, ours)
    torch.testing.assert_close(got, expected)
    for a, b in zip(usual.buffers(), ours.buffers(), strict=True):
        assert torch.equal(a, b)
    if mode == "trainable" and affine:
        for network, y in ((usual, expected), (ours, got)):
            y.square().sum().backward()
            assert network.weight.grad is not None
        torch.testing.assert_close(ours.weight.grad, usual.weight.grad)


def test_does_not_end_a_classifier_head() -> None:
    head = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 4), ClippedReLU(torch.ones(4)), nn.Linear(4, 2))
    assert [name for name, _ in classifier_layers(head)] == ["2", "4"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"bound": -1.0}, ValueError, "ClippedReLU: `bound` expected a number >= 0, got -1.0"),
        ({"bound": math.nan}, ValueError, "`bound` expected a number >= 0, got nan"),
        ({"bound": None}, TypeError, "`bound` expected a number or a tensor, got NoneType"),
        ({"bound": torch.ones(3).int()}, TypeError, "`bound` expected a floating-point tensor, got torch.int32"),
        ({"bound": 1.0, "ceiling": -1.0}, ValueError, "`ceiling` expected a number >= 0, got -1.0"),
        ({"bound": 1.0, "ceiling": "6"}, TypeError, "`ceiling` expected a number, got str"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        ClippedReLU(**arguments)


def test_networks_are_traced_through_it() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), ClippedReLU(torch.ones(4), ceiling=6.0), nn.Flatten())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(fx.symbolic_trace(network)(x), network(x))
