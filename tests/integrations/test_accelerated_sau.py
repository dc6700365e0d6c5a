"""SAU's inner attack against its plain form; gradients of its loss; what it leaves alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdfast.integrations.backdoorbench.accelerated import Shared_PGD
from bdfast.integrations.backdoorbench.accelerated import sau as module


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 36, 5))
    return net.double().eval()


def data(count: int = 17) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count,), generator=generator)


@pytest.mark.parametrize("norm", ["L_inf", "L1", "L2", "Reg"])
@pytest.mark.parametrize("init", ["max", "min", "zero"])
def test_same_steps_as_the_plain_form(norm: str, init: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = network(0), network(1)
    bound = {"L_inf": 0.2, "L1": 5.0, "L2": 0.8, "Reg": 0.1}[norm]
    attacker = Shared_PGD(model, reference, norm_bound=bound, norm_type=norm, step_size=0.03, init_type=init)
    fast = attacker.attack(*data())
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    plain = attacker.attack(*data())
    torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-12)
    assert not fast.requires_grad
    assert fast.abs().max() > 0


def test_loss_and_gradients_are_those_of_the_definition() -> None:
    """By automatic differentiation in float64; some probabilities lie below the clamp, some labels were left."""
    z, r = (10 * torch.randn(40, 6, dtype=torch.float64)).requires_grad_(), torch.randn(40, 6, dtype=torch.float64)
    r = (6 * r).requires_grad_()
    labels, clean, clean_ref = (torch.randint(6, (40,)) for _ in range(3))
    attacker = Shared_PGD(network(0), network(1), beta_1=0.3, beta_2=0.7)
    outcome, grads = module._loss_and_gradients(attacker, z.detach(), r.detach(), labels, clean, clean_ref)
    p, q = (F.softmax(t, dim=1).clamp(min=1e-8) for t in (z, r))
    assert (p == 1e-8).any()
    mix = (p + q) / 2
    js = (F.kl_div(mix.log(), p, reduction="none") + F.kl_div(mix.log(), q, reduction="none")).sum(dim=1) / 2
    kept = torch.stack([F.cross_entropy(t, labels, reduction="none") for t in (z, r)])
    fooled = torch.stack([t.argmax(1) != c for t, c in ((z, clean), (r, clean_ref))])
    shared = fooled.all(0) & (z.argmax(1) == r.argmax(1))
    loss = (0.7 * js[~shared].sum() - 0.15 * kept[~fooled].sum()) / 40
    for got, expected in zip(grads, torch.autograd.grad(loss, (z, r)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(outcome.loss, loss.detach())
    assert torch.equal(outcome.shared, shared)
    assert 0 < int(shared.sum()) < 40


class Counting(nn.Module):
    """Class 0 for dark images, 1 for bright ones; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        brightness = x.flatten(1).mean(1, keepdim=True) - 0.5
        return torch.cat((-brightness, brightness), dim=1)


def test_stops_when_all_are_shared() -> None:
    model, reference = Counting().eval(), Counting().eval()
    images, labels = torch.full((3, 1, 2, 2), 0.4), torch.zeros(3, dtype=torch.int64)
    pert = Shared_PGD(model, reference, norm_bound=0.2, step_size=0.01).attack(images, labels)
    assert model.calls == reference.calls == 2  # the clean images once, and one step: +0.2 is bright to both
    # Where all are shared both losses are 0, so is the gradient, and the step goes nowhere.
    torch.testing.assert_close(pert, torch.full_like(images, 0.2))


def test_one_forward_a_step_and_model() -> None:
    model, reference = Counting().eval(), Counting().eval()
    images, labels = torch.full((3, 1, 2, 2), 0.1), torch.zeros(3, dtype=torch.int64)
    Shared_PGD(model, reference, norm_bound=0.2, step_size=0.01, num_steps=4).attack(images, labels)
    assert model.calls == reference.calls == 1 + 4


def test_models_are_left_as_they_were() -> None:
    model = network(0)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    Shared_PGD(model, network(1)).attack(*data(4))
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def failing(images: Tensor, pert: Tensor) -> Tensor:
        raise RuntimeError("pert_func")

    with pytest.raises(RuntimeError, match="pert_func"):
        Shared_PGD(model, network(1), pert_func=failing).attack(*data(4))
    assert model[4].weight.requires_grad


def test_training_mode_gets_the_plain_form() -> None:
    """Clean predictions then change the running statistics in every step, and with them what comes after."""
    models = [network(0).train(), network(1).train()]
    twins = copy.deepcopy(models)
    fast = Shared_PGD(*models, num_steps=3, step_size=0.03).attack(*data())
    start = torch.full_like(data()[0], 0.2)
    module.plain_steps(Shared_PGD(*twins, num_steps=3, step_size=0.03), *data(), start)
    torch.testing.assert_close(fast, start)
    assert torch.equal(models[0][1].running_mean, twins[0][1].running_mean)
    assert int(models[0][1].num_batches_tracked) == 6


def test_verbose_reports(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = torch.full((3, 1, 2, 2), 0.4), torch.zeros(3, dtype=torch.int64)
    Shared_PGD(Counting().eval(), Counting().eval(), verbose=True).attack(images, labels)
    assert "of 3 samples 3 fool the model, 3 the reference, 3 both, 3 in the same way" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_type": "ones"}, "`init_type` expected one of zero, random, max, min, got 'ones'"),
        ({"norm_type": "L0"}, "`norm_type` expected one of L_inf, L1, L2, Reg, got 'L0'"),
        ({"num_steps": 0}, "`num_steps` expected at least 1, got 0"),
    ],
)
def test_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"Shared_PGD.attack: {text}"):
        Shared_PGD(network(0), network(1), **options).attack(*data(2))
