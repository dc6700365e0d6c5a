"""NPD: projections on three balls, perturbed images and their gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bdfast.integrations.backdoorbench.accelerated import Shared_PGD, get_perturbed_image, projection

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.247, 0.243, 0.261]


class Normalize:
    """As torchvision's."""

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = mean, std

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, dtype=x.dtype)[:, None, None] for v in (self.mean, self.std))
        return (x - mean) / std


class Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: Tensor) -> Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


NPD = SimpleNamespace(
    normalization=Normalize(MEAN, STD),
    denormalization=Compose([Normalize([0.0] * 3, [1 / s for s in STD]), Normalize([-m for m in MEAN], [1.0] * 3)]),
)


def test_by_hand() -> None:
    pert = torch.tensor([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]]).view(3, 2, 1, 1)
    args = SimpleNamespace(norm_type="L2", trigger_norm=1.0)
    out = projection(None, pert, args)
    assert out is pert
    torch.testing.assert_close(out.flatten(1), torch.tensor([[0.6, -0.8], [0.3, 0.4], [0.0, 0.0]]))
    args = SimpleNamespace(norm_type="L1", trigger_norm=0.7)
    torch.testing.assert_close(projection(None, pert, args).flatten(1), torch.tensor([[0.3, -0.4], [0.3, 0.4], [0, 0]]))
    args = SimpleNamespace(norm_type="L_inf", trigger_norm=0.35)
    expected = torch.tensor([[0.3, -0.35], [0.3, 0.35], [0, 0]])
    torch.testing.assert_close(projection(None, pert, args).flatten(1), expected)
    args = SimpleNamespace(norm_type="Reg", trigger_norm=0.1)
    torch.testing.assert_close(projection(None, pert, args).flatten(1), expected)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 9),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    norm=st.sampled_from(["L1", "L2", "L_inf"]),
    radius=st.floats(0.01, 10.0),
)
def test_projection_is_the_loop_and_stays(count: int, scale: float, norm: str, radius: float) -> None:
    args = SimpleNamespace(norm_type=norm, trigger_norm=radius)
    pert = scale * torch.randn(count, 3, 5, 4, generator=torch.Generator().manual_seed(count))
    fast = projection(None, pert.clone(), args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BDFAST_REFERENCE", "1")
        torch.testing.assert_close(fast, projection(None, pert.clone(), args), rtol=1e-6, atol=0)
    torch.testing.assert_close(projection(None, fast.clone(), args), fast, rtol=1e-6, atol=0)
    order = {"L1": 1, "L2": 2, "L_inf": float("inf")}[norm]
    assert (torch.linalg.vector_norm(fast.double(), ord=order, dim=(1, 2, 3)) <= radius * (1 + 1e-6)).all()


def test_a_leaf_that_requires_gradients_is_projected_too() -> None:
    pert = torch.full((2, 1, 2, 2), 5.0, requires_grad=True)
    attacker = Shared_PGD(torch.nn.Identity(), torch.nn.Identity(), norm_type="L2", norm_bound=1.0)
    assert attacker.projection(pert) is pert
    torch.testing.assert_close(pert.detach(), torch.full((2, 1, 2, 2), 0.5))


def test_unknown_norm() -> None:
    with pytest.raises(ValueError, match=r"NPD.projection: `norm_type` expected one of L_inf, L1, L2, Reg, got 'L3'"):
        projection(None, torch.zeros(1, 1, 1, 1), SimpleNamespace(norm_type="L3", trigger_norm=1.0))


def perturbed(npd: Any, images: Tensor, pert: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaves = images.clone().requires_grad_(), pert.clone().requires_grad_()
    out = get_perturbed_image(npd, *leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def test_perturbed_images_and_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    images = NPD.normalization(torch.rand(4, 3, 5, 5))
    pert, grad = 0.5 * torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    fast = perturbed(NPD, images, pert, grad)
    monkeypatch.setenv("BDFAST_REFERENCE", "1")
    for got, expected in zip(fast, perturbed(NPD, images, pert, grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_gradcheck() -> None:
    images = NPD.normalization(torch.rand(2, 3, 3, 3).double())
    pert = (0.4 * torch.randn(2, 3, 3, 3).double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda d: get_perturbed_image(NPD, images, d), pert)


def test_other_transforms_are_called() -> None:
    npd = SimpleNamespace(denormalization=torch.sigmoid, normalization=Compose([Normalize(MEAN, STD), torch.tanh]))
    images, pert = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = torch.tanh(Normalize(MEAN, STD)((images.sigmoid() + pert).clamp(0, 1)))
    assert torch.equal(get_perturbed_image(npd, images, pert), expected)


def test_constants_made_for_inference_serve_training() -> None:
    """They are kept from call to call, whatever mode the first one was in."""
    images = torch.rand(2, 3, 5, 5, dtype=torch.float64)
    with torch.inference_mode():
        get_perturbed_image(NPD, images, torch.zeros_like(images))
    pert = torch.zeros_like(images).requires_grad_()
    get_perturbed_image(NPD, images, pert).sum().backward()
    assert pert.grad is not None
    assert bool(pert.grad.isfinite().all())
