"""Which hooks of a caller rest while a defense works, and which are part of the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast.runtime import FrozenModel
from bdfast.runtime.hooks import quiet_hooks

Register = Callable[[nn.Module, Callable[..., Any]], Any]
IMAGES = torch.rand(2, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


def heard(net: nn.Module, hook: list[int], backward: bool = False) -> list[int]:
    """What a hook notes of a pass inside the block."""
    with quiet_hooks(net, lambda: net(IMAGES)):
        hook.clear()
        loss = net(IMAGES).sum()
        if backward:
            loss.backward()
        inside = list(hook)
    hook.clear()
    net(IMAGES.clone().requires_grad_()).sum().backward()
    assert hook  # it is back
    return inside


@pytest.mark.parametrize(
    "register",
    [
        lambda layer, hook: layer.register_forward_hook(hook),
        lambda layer, hook: layer.register_forward_pre_hook(hook),
        lambda layer, hook: layer.register_forward_hook(hook, with_kwargs=True),
        lambda layer, hook: layer.register_full_backward_hook(hook),
        lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    ],
    ids=["forward", "forward_pre", "kwargs", "backward", "backward_pre"],
)
def test_what_only_watches_rests(register: Register) -> None:
    net, notes = network(), list[int]()
    before = [p.clone() for p in net.parameters()]
    register(net[0], lambda *_: notes.append(1))
    assert heard(net, notes, backward=True) == []
    assert all(torch.equal(p, value) for p, value in zip(net.parameters(), before, strict=True))


def test_what_changes_the_output_stays_in_its_order_and_the_watcher_beside_it_rests() -> None:
    net, notes = network(), list[int]()
    net[2].register_forward_hook(lambda *_: notes.append(0))
    net[2].register_forward_hook(lambda module, x, y: notes.append(1) or 2 * y)
    net[2].register_forward_hook(lambda module, x, y: notes.append(2) or y + 1)
    assert heard(net, notes) == [1, 2]


def test_a_hook_that_changes_its_input_in_place_stays() -> None:
    net, notes = network(), list[int]()

    def double(module: nn.Module, x: Any, y: Tensor) -> None:
        notes.append(1)
        y.data.mul_(2)

    net[2].register_forward_hook(double)
    assert heard(net, notes) == [1]


def test_a_hook_that_keeps_weights_at_zero_stays_though_they_are_zero_already() -> None:
    net, notes = network(), list[int]()
    net[0].weight.data[0] = 0

    def mask(layer: nn.Linear, _: Any) -> None:
        notes.append(1)
        layer.weight.data[0] = 0

    net[0].register_forward_pre_hook(mask)
    assert heard(net, notes) == [1]
    assert not net[0].weight[0].any()


def test_weights_that_torch_computes_by_a_hook_are_computed_still() -> None:
    net = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(net[0])
    with quiet_hooks(net, lambda: net(IMAGES)):
        assert len(net[0]._forward_pre_hooks) == 1


def test_hooks_are_back_after_an_exception() -> None:
    net = network()
    net[0].register_forward_hook(lambda *_: None)
    hooks = net[0]._forward_hooks
    with pytest.raises(KeyboardInterrupt), quiet_hooks(net, lambda: net(IMAGES)):
        raise KeyboardInterrupt
    assert net[0]._forward_hooks is hooks


def test_a_frozen_model_is_rid_of_watchers_and_keeps_the_rest() -> None:
    net, notes = nn.Sequential(nn.Flatten(), *network()), list[int]()
    net[1].register_forward_hook(lambda *_: notes.append(1))
    net[3].register_forward_hook(lambda module, x, y: 2 * y)
    x = IMAGES.reshape(2, 1, 2, 3)
    expected: Tensor = net(x)
    with FrozenModel(net) as frozen:
        frozen.logits(x)
        notes.clear()
        torch.testing.assert_close(frozen.logits(x), expected.detach())
    assert notes == []
