"""3x3 convolutions trained by Winograd's way: the same training, but for roundings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bdfast
from bdfast.backends.availability import cpp_missing
from bdfast.runtime import winograd
from bdfast.runtime.ranks import ALONE
from bdfast.runtime.winograd import ConvShape
from bdfast.training.parallel import training_forward
from bdfast.training.winograd_convs import TrainedConv
from tests.runtime.test_winograd import CASES, ERROR, draw, error, exact

pytestmark = pytest.mark.skipif(cpp_missing() is not None, reason="needs bdfast._C")
needs_fma = pytest.mark.skipif(not winograd.available(), reason="needs fused multiply-adds")


@pytest.fixture
def _all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_pays", lambda shape, padding: True)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_all_sizes", "poisoned_empty")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("case", [*CASES, (64, 32, 40, 12, 12, 1)])  # the last one has tiles for several rounds
def test_the_gradient_to_the_weights(case: tuple[int, ...], dtype: torch.dtype, order: torch.memory_format) -> None:
    conv, x, grad = draw(case)
    x, grad = channels_last(x.to(dtype)), channels_last(grad.to(dtype))
    weight = conv.weight.detach().contiguous(memory_format=order)
    double = conv.double().requires_grad_()
    (wanted,) = torch.autograd.grad(exact(double, x), double.weight, grad.double())
    got = winograd.weight_gradient(x, grad, weight, ConvShape.of(conv))
    assert got.stride() == weight.stride()
    assert got.dtype == torch.float32
    assert error(got, wanted) <= 3e-6  # sums are float32 whatever the activations are


@pytest.mark.usefixtures("_all_sizes")
def test_its_bits_do_not_depend_on_threads() -> None:
    conv, x, grad = draw((64, 96, 9, 12, 12, 1))
    threads, shape = torch.get_num_threads(), ConvShape.of(conv)
    args = channels_last(x), channels_last(grad), conv.weight
    once = winograd.weight_gradient(*args, shape)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(winograd.weight_gradient(*args, shape), once)
    finally:
        torch.set_num_threads(threads)


def gradients(layer: nn.Module, x: Tensor) -> list[Tensor | None]:
    layer.zero_grad()
    x = x.clone().requires_grad_()
    layer(x).square().mean().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.usefixtures("_all_sizes")
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_has_the_gradients_of_the_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(20, 24, 3, padding=1, bias=bias), torch.randn(3, 20, 9, 6)
    expected = gradients(conv, x)
    expected = [None if g is None else g.clone() for g in expected]
    found = gradients(TrainedConv(conv), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_it_is_not_for_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    conv, x = nn.Conv2d(16, 16, 3, padding=1), torch.rand(4, 16, 8, 8)
    layer = TrainedConv(conv)
    monkeypatch.setattr(winograd, "convolve", lambda *_, **__: pytest.fail("called"))
    with torch.no_grad():
        assert torch.equal(layer(x), conv(x))
    assert torch.equal(layer.eval()(x), conv(x))
    layer.train()
    with bdfast.backend("reference"):
        assert torch.equal(layer(x), conv(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), conv(x))
    assert torch.equal(layer.double()(x.double()), conv(x.double()))


@needs_fma
def test_a_network_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses(*, on: bool) -> tuple[list[float], nn.Module]:
        monkeypatch.setattr(winograd, "_ENABLED", on)
        model = bdfast.models.build("digits_cnn", num_classes=10, image_size=8, channels=1, seed=0).train()
        forward = training_forward(model, ALONE, False)
        assert sum(isinstance(module, TrainedConv) for module in forward.modules()) == (2 if on else 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(8):
            x, y = torch.rand(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)
            loss = F.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(loss.item())
        return found, model

    found, model = losses(on=True)
    expected, plain = losses(on=False)
    assert found == pytest.approx(expected, rel=1e-4)
    assert list(model.state_dict()) == list(plain.state_dict())


@needs_fma
def test_layers_stay_the_models_own() -> None:
    model = bdfast.models.build("resnet18", num_classes=10, image_size=32, seed=0)
    twin = copy.deepcopy(model)
    forward: Any = training_forward(model, ALONE, False)
    found = [module for module in forward.modules() if isinstance(module, TrainedConv)]
    assert len(found) == 13
    assert found[0].conv is model.layer1[0].conv1
    assert not any(isinstance(module, TrainedConv) for module in model.modules())
    assert list(model.state_dict()) == list(twin.state_dict())
    compiled = training_forward(twin, ALONE, True)
    assert not any(isinstance(module, TrainedConv) for module in compiled.modules())
