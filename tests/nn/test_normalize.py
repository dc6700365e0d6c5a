from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.nn import Normalize, Normalized, normalized

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 0.1)


@pytest.fixture
def images() -> Tensor:  # [2, 3, 8, 8]
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def base() -> nn.Module:
    return models.build("digits_cnn", num_classes=4, channels=3, seed=0).eval()


def test_by_hand() -> None:
    image = torch.tensor([0.75, 0.4, 0.4]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(Normalize(MEAN, STD)(image).flatten(), torch.tensor([1.0, 0.0, 1.0]))
    assert Normalize(0.5, 2.0)(torch.ones(1, 7, 2, 2)).unique().tolist() == [0.25]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(images: Tensor, dtype: torch.dtype) -> None:
    assert Normalize(MEAN, STD)(images.to(dtype)).dtype == dtype


def test_build_with_normalisation_equals_normalised_images(images: Tensor, base: nn.Module) -> None:
    model = models.build("digits_cnn", num_classes=4, channels=3, seed=0, normalize=(MEAN, STD)).eval()
    by_hand = (images - torch.tensor(MEAN).reshape(3, 1, 1)) / torch.tensor(STD).reshape(3, 1, 1)
    assert torch.equal(model(images), base(by_hand))


def test_the_state_dict_is_that_of_the_model_inside(images: Tensor, base: nn.Module) -> None:
    outer = normalized(base, MEAN, STD)
    state, expected = outer.state_dict(), base.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())
    assert state._metadata["bn1"] == expected._metadata["bn1"]  # type: ignore[attr-defined]
    other = normalized(models.build("digits_cnn", num_classes=4, channels=3, seed=9), MEAN, STD).eval()
    other.load_state_dict(expected, strict=True)
    assert torch.equal(other(images), outer(images))
    base.load_state_dict(state, strict=True)
    assert sorted(state) == sorted(normalized(outer, 0.0, 1.0).state_dict())  # however deep
    inner = nn.Sequential(normalized(base, MEAN, STD))  # and below a prefix
    assert list(inner.state_dict()) == [f"0.{key}" for key in expected]
    inner.load_state_dict(inner.state_dict(), strict=True)


def test_strict_loading_still_complains(base: nn.Module) -> None:
    outer = normalized(base, MEAN, STD)
    state = dict(base.state_dict())
    state["linear.extra"] = state.pop("linear.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*linear\.bias.*\n.*Unexpected key.*linear\.extra"):
        outer.load_state_dict(state)


def test_loading_leaves_the_callers_dict_alone(base: nn.Module) -> None:
    state = base.state_dict()
    names = list(state)
    normalized(base, MEAN, STD).load_state_dict(state)
    assert list(state) == names


def test_attributes_of_the_model_are_reached_through_the_wrapper(base: nn.Module) -> None:
    outer = normalized(base, MEAN, STD)
    assert outer.linear is base.linear
    assert outer.get_submodule("linear") is base.linear
    assert isinstance(outer, Normalized)
    assert outer.model is base
    with pytest.raises(AttributeError, match="nothing"):
        outer.nothing  # noqa: B018


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(images: Tensor, base: nn.Module, duplicate: Any) -> None:
    outer = normalized(base, MEAN, STD)
    twin = duplicate(outer)
    assert torch.equal(twin(images), outer(images))
    assert list(twin.state_dict()) == list(base.state_dict())
    with torch.no_grad():
        twin.linear.weight.zero_()
    assert base.linear.weight.abs().max() > 0  # type: ignore[operator,union-attr]


def test_tracing_compiling_and_gradient(images: Tensor, base: nn.Module) -> None:
    outer = normalized(base, MEAN, STD)
    expected = outer(images)
    assert torch.equal(torch.fx.symbolic_trace(outer)(images), expected)
    assert torch.equal(torch.compile(outer, backend="eager", fullgraph=True)(images), expected)
    images.requires_grad_()
    outer(images).sum().backward()
    through_normalised = images.grad
    inner = Normalize(MEAN, STD)(images.detach()).requires_grad_()
    base(inner).sum().backward()
    assert through_normalised is not None
    assert inner.grad is not None
    torch.testing.assert_close(through_normalised, inner.grad / torch.tensor(STD).reshape(3, 1, 1))


def test_statistics_follow_the_model_and_are_not_trained() -> None:
    module = Normalize(MEAN, STD).to("meta")
    assert module.mean.device.type == "meta"
    assert list(module.state_dict()) == list(module.parameters()) == []
    assert repr(module) == "Normalize(mean=[0.5, 0.4, 0.3], std=[0.25, 0.5, 0.1])"


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        ((0.5, 0.5), (1.0,), "Normalize: `std` expected as many numbers as `mean`, got 2 and 1; pass one per channel"),
        (0.5, 0.0, "`std` expected numbers above 0, got 0.0"),
        (0.5, (-1.0,), "`std` expected numbers above 0"),
        (float("nan"), 1.0, "`mean` expected finite numbers, got nan"),
        ((), (), r"`mean` expected finite numbers, got \(\)"),
        (0.5, float("inf"), "`std` expected finite numbers, got inf"),
    ],
)
def test_statistics_are_checked(mean: Any, std: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Normalize(mean, std)


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match=r"`images` expected \[N, 3, H, W\], got \[2, 1, 4, 4\]"):
        Normalize(MEAN, STD)(torch.rand(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"`images` expected floats in \[0, 1\], got torch\.uint8; divide uint8"):
        Normalize(MEAN, STD)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
