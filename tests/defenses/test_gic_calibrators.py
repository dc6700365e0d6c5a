"""The three kinds of g, their guide, their steps and the imprint check."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bdfast.defenses import GICConfig, calibrator
from bdfast.defenses.gic.guide import Guide
from bdfast.defenses.gic.imprint import check_imprint
from bdfast.defenses.gic.steps import PromptDescent, descend_
from tests.defenses.conftest import Split


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(cross_entropy(model(images), labels))


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sample"},
        {"mode": "sample", "p": 2, "delta": 0.3},
        {"mode": "prompt"},
        {"mode": "prompt", "p": 2, "delta": 0.3},
        {"mode": "prompt", "per_class": True},
        {"mode": "network", "lr": 0.01},
    ],
)
def test_every_kind_lowers_the_loss_within_its_ball(mlp: nn.Sequential, tiny: Split, options: dict[str, Any]) -> None:
    config = GICConfig(**{"delta": 0.1, "epochs": 30, "batch_size": 16, **options})
    images, labels = tiny
    made = calibrator(config).fit(mlp, tiny).transform(images, labels)
    moved = made.images - images
    lengths = moved.flatten(1).norm(dim=1) if config.p != "inf" else moved.abs().amax((1, 2, 3))
    assert float(lengths.max()) <= config.delta * (1 + 1e-5)
    assert float(made.images.min()) >= 0
    assert float(made.images.max()) <= 1
    assert mean_loss(mlp, made.images, labels) < mean_loss(mlp, images, labels) - 0.01


def test_a_prompt_is_one_for_all_or_one_for_each_class(mlp: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny[0] / 2 + 0.25, tiny[1]  # nothing is clipped
    for per_class, count in ((False, 1), (True, 3)):
        config = GICConfig(mode="prompt", per_class=per_class, delta=0.1, epochs=5)
        d = calibrator(config).fit(mlp, (images, labels)).transform(images, labels).images - images
        assert len({tuple(round(v, 5) for v in row.flatten().tolist()) for row in d}) == count


def test_calibrators_serve_images_never_seen(mlp: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny
    for mode in ("sample", "prompt", "network"):
        chosen = calibrator(GICConfig(mode=mode, epochs=2)).fit(mlp, (images[:20], labels[:20]))  # type: ignore[arg-type]
        unseen = chosen.transform(images[20:])
        with torch.no_grad():
            assert torch.equal(unseen.labels, mlp(images[20:]).argmax(1))
        assert unseen.images.shape == (10, 1, 3, 4)


def test_transform_before_fit(tiny: Split) -> None:
    with pytest.raises(RuntimeError, match="transform: `self` expected a fitted calibrator"):
        calibrator().transform(*tiny)


def test_guide_gives_gradients_of_loss_and_statistics(mlp: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny
    for w in (0.0, 0.3):
        x = images.clone().requires_grad_()
        hidden = mlp[1](x.flatten(1))
        var, mean = torch.var_mean(hidden, 0, correction=0)
        distance = (mean - mlp[2].running_mean).square().sum() + (var - mlp[2].running_var).square().sum()
        losses = cross_entropy(mlp(x), labels, reduction="none")
        (expected,) = torch.autograd.grad(losses.sum() + w * len(x) * distance, x)
        got, grad = Guide(mlp, w_bn=w).gradient(images, labels)
        torch.testing.assert_close(got, losses.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
        assert Guide(mlp, w_bn=w).logits(images).shape == (30, 3)


def test_statistics_term_brings_statistics_closer(mlp: nn.Sequential, tiny: Split) -> None:
    def distance(x: Tensor) -> float:
        with torch.no_grad():
            var, mean = torch.var_mean(mlp[1](x.flatten(1)), 0, correction=0)
            return float((mean - mlp[2].running_mean).square().sum() + (var - mlp[2].running_var).square().sum())

    without, with_it = (
        calibrator(GICConfig(delta=0.2, w_bn=w)).fit(mlp, tiny).transform(*tiny).images for w in (0.0, 10.0)
    )
    assert distance(with_it) < distance(without)
    assert distance(with_it) < distance(tiny[0])


# --- steps -----------------------------------------------------------------------------------------------------------


def test_steps_by_hand() -> None:
    z = torch.tensor([0.5, 0.02, 0.5, 0.5]).view(1, 1, 1, 4)
    grad = torch.tensor([2.0, 1.0, 0.0, float("nan")]).view(1, 1, 1, 4)
    descend_(z, z.clone(), grad, p="inf", size=0.1, delta=0.05)
    assert z.flatten().tolist() == pytest.approx([0.45, 0.0, 0.5, 0.5])

    z = torch.full((3, 1, 1, 2), 0.5)
    grad = torch.tensor([[3.0, 4.0], [0.0, 0.0], [float("inf"), 1.0]]).view(3, 1, 1, 2)
    descend_(z, z.clone(), grad, p=2.0, size=0.1, delta=0.05)  # a step of (0.06, 0.08), cut in half
    assert z.flatten(1).tolist() == [pytest.approx([0.47, 0.46]), [0.5, 0.5], [0.5, 0.5]]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(["inf", 2.0]), st.floats(1e-3, 1.0), st.floats(1e-3, 2.0))
def test_steps_stay_in_ball_and_range(seed: int, p: Any, size: float, delta: float) -> None:
    g = torch.Generator().manual_seed(seed)
    center = torch.rand(3, 2, 2, 3, generator=g)
    z = center.clone()
    for _ in range(4):
        descend_(z, center, torch.randn(center.shape, generator=g), p=p, size=size, delta=delta)
    d = (z - center).flatten(1)
    length = d.abs().amax(1) if p == "inf" else d.norm(dim=1)
    assert float(length.max()) <= delta * (1 + 1e-6) + 1e-7
    assert 0 <= float(z.min()) <= float(z.max()) <= 1
    before = z.clone()
    descend_(z, center, torch.zeros_like(z), p=p, size=size, delta=delta)
    torch.testing.assert_close(z, before, rtol=0, atol=1e-6)


def test_prompt_descent_has_momentum_and_leaves_absent_classes() -> None:
    prompt = nn.Parameter(torch.zeros(2, 1, 1, 1))
    optimizer = PromptDescent([prompt], lr=0.1, momentum=0.5, p="inf", delta=0.25)
    for gradient, expected in (([1.0, 0.0], [-0.1, 0.0]), ([-0.4, 2.0], [-0.2, -0.1]), ([0.0, 1.0], [-0.2, -0.2])):
        prompt.grad = torch.tensor(gradient).view(2, 1, 1, 1)
        optimizer.step()
        assert prompt.flatten().tolist() == pytest.approx(expected)
    for _ in range(5):
        optimizer.step()
    assert prompt.flatten().tolist() == pytest.approx([-0.2, -0.25])


# --- imprint ---------------------------------------------------------------------------------------------------------


class Trigger(nn.Module):
    """Class 1 where the last pixel is lit, else the class that the first pixel says."""

    def forward(self, x: Tensor) -> Tensor:
        level = x[:, 0, 0, 0] * 2
        logits = -((level[:, None] - torch.arange(3)).square())
        return logits + 50 * (x[:, 0, -1, -1] > 0.5)[:, None] * torch.tensor([0.0, 1.0, 0.0])


def scene() -> tuple[Tensor, Tensor]:
    labels = torch.arange(60) % 3
    images = torch.zeros(60, 1, 2, 2)
    images[:, 0, 0, 0] = labels / 2
    return images, labels


def report(calibrated: Tensor, images: Tensor, labels: Tensor) -> Any:
    guide = Guide(Trigger())
    return check_imprint(guide, images, calibrated, labels, 3, tolerance=0.01, seed=0, batch_size=32)


def test_untouched_images_imprint_nothing() -> None:
    images, labels = scene()
    found = report(images, images, labels)
    assert found.before == found.after == found.transfer == [0.0, 0.0, 0.0]
    assert (found.drift, found.drifted, found.accuracy) == (0.0, [], (1.0, 1.0))


def test_a_trigger_on_images_of_other_classes_is_drift() -> None:
    images, labels = scene()
    calibrated = images.clone()
    calibrated[:2, 0, 1, 1] = 1.0  # classes 0 and 1: one of 40 images of other classes is now taken for class 1
    found = report(calibrated, images, labels)
    assert found.after == [0.0, pytest.approx(1 / 40), 0.0]
    assert found.drifted == [1]
    assert found.drift == pytest.approx(1 / 40)


def test_a_trigger_on_images_of_its_own_class_shows_in_transfer() -> None:
    images, labels = scene()
    calibrated = images.clone()
    calibrated[labels == 1, 0, 1, 1] = 1.0
    found = report(calibrated, images, labels)
    assert found.drifted == []
    assert found.transfer == [0.0, 1.0, 0.0]
    assert found.strongest == 1


def test_a_single_class_has_no_others() -> None:
    images, labels = scene()
    images, labels = images[labels == 2], labels[labels == 2]
    found = report(images, images, labels)
    assert math.isnan(found.after[2])
    assert found.drift == 0.0
