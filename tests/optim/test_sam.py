"""SAM against hand-computed perturbations and a plain loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from bdfast.optim import SAM


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    g = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return net


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(8, 6, generator=g).to(dtype), torch.randint(0, 3, (8,), generator=g)


def test_perturbation_by_hand() -> None:
    for adaptive, expected in (
        (False, [3 + 0.6, -4 + 0.8]),
        (True, [3 + 9 * 6 / math.hypot(18, 32), -4 + 16 * 8 / math.hypot(18, 32)]),
    ):
        w = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        optimizer = SAM([w], torch.optim.SGD, rho=1.0, adaptive=adaptive, lr=0.1)
        w.grad = torch.tensor([6.0, 8.0], dtype=torch.float64)
        with optimizer.perturbed():
            assert w.tolist() == pytest.approx(expected)
        assert w.tolist() == [3.0, -4.0]


def test_the_oldest_torch_has_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_foreach_clone", raising=False)  # torch 2.10 lacks it
    test_perturbation_by_hand()


def test_norm_is_over_all_parameters() -> None:
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SAM([{"params": [a]}, {"params": [b]}], rho=5.0, lr=0.1)
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    with optimizer.perturbed():
        assert (a.item(), b.item()) == pytest.approx((3.0, 4.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("adaptive", [False, True])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype, adaptive: bool) -> None:
    net = network(dtype)
    optimizer = SAM(net.parameters(), rho=2.0, adaptive=adaptive, lr=0.1)
    x, y = batch(dtype)
    nn.functional.cross_entropy(net(x), y).backward()
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):  # the second time in the memory of the first
        with optimizer.perturbed():
            assert not any(torch.equal(p, q) for p, q in zip(net.state_dict().values(), before.values(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), before.values(), strict=True))
    with pytest.raises(KeyboardInterrupt), optimizer.perturbed():
        raise KeyboardInterrupt
    assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), before.values(), strict=True))


def test_gradients_that_are_not_finite_do_no_harm() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM([w], rho=1.0, lr=0.1)
    w.grad = torch.tensor([float("nan"), 0.0])
    with optimizer.perturbed():
        assert bool(w.isnan().any())
    assert w.tolist() == [1.0, 2.0]
    w.grad = torch.zeros(2)
    with optimizer.perturbed():
        assert w.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("adaptive", [False, True])
def test_trajectory_is_that_of_a_plain_loop(adaptive: bool) -> None:
    ours, plain = network(torch.float64), network(torch.float64)
    x, y = batch(torch.float64)
    optimizer = SAM(ours.parameters(), torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.05, momentum=0.9)
    base = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ours(x), y)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)  # type: ignore[arg-type]
        base.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        weights = list(plain.parameters())
        gradients = torch.autograd.grad(loss, weights)
        flat = [(w.abs() * g if adaptive else g) for w, g in zip(weights, gradients, strict=True)]
        norm = torch.cat([f.flatten() for f in flat]).norm()
        with torch.no_grad():
            kept = [w.clone() for w in weights]
            for w, f in zip(weights, flat, strict=True):
                w.add_(0.3 * (w.abs() * f if adaptive else f) / norm)
        nn.functional.cross_entropy(plain(x), y).backward()
        with torch.no_grad():
            for w, old in zip(weights, kept, strict=True):
                w.copy_(old)
        base.step()
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_rho_zero_is_the_base_optimizer() -> None:
    ours, plain = network(), network()
    x, y = batch()
    optimizer = SAM(ours.parameters(), rho=0.0, lr=0.1, momentum=0.9)
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for net, chosen in ((ours, optimizer), (plain, base)):

        def closure(net: nn.Module = net, chosen: torch.optim.Optimizer = chosen) -> Tensor:
            chosen.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            return loss

        for _ in range(5):
            chosen.step(closure)  # type: ignore[arg-type]
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))


def test_schedules_state_and_copies_are_those_of_the_base() -> None:
    net = network()
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = batch()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    schedule.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.05
    twin, twin_net = copy.deepcopy((optimizer, net))
    assert twin.param_groups is twin.base.param_groups
    for p, q in zip(net.parameters(), twin_net.parameters(), strict=True):
        assert p.grad is not None
        q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), twin_net.parameters(), strict=True))
    fresh = SAM(network().parameters(), torch.optim.SGD, rho=0.1, lr=1.0, momentum=0.9)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["lr"] == fresh.base.param_groups[0]["lr"] == 0.05
    assert len(fresh.state) == len(optimizer.state) == 4
    fresh.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(fresh.base.param_groups) == len(fresh.param_groups) == 2


def test_parameters_without_gradient_are_left_alone() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = SAM([a, b], rho=1.0, lr=0.1)
    with optimizer.perturbed():
        assert a.tolist() == [1.0, 1.0]
    a.grad = torch.ones(2)
    with optimizer.perturbed():
        assert a.tolist() != [1.0, 1.0]
        assert b.tolist() == [1.0, 1.0]


def test_wrong_use() -> None:
    w = nn.Parameter(torch.ones(2))
    for rho in (-0.1, float("nan"), float("inf"), True):
        with pytest.raises(ValueError, match="SAM: `rho` expected a finite number >= 0"):
            SAM([w], rho=rho, lr=0.1)
    optimizer = SAM([w], rho=0.1, lr=0.1)
    w.grad = torch.ones(2)
    with optimizer.perturbed():
        with pytest.raises(RuntimeError, match="SAM: `step` expected weights in their place"):
            optimizer.step()
        with (
            pytest.raises(RuntimeError, match="SAM: `perturbed` expected weights in their place"),
            optimizer.perturbed(),
        ):
            pass
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="dense gradients"), SAM(embedding.parameters(), lr=0.1).perturbed():
        pass
