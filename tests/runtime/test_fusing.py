"""A frozen graph rewritten for a GPU: the same network, and the same gradient to its input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import bdfast
from bdfast.runtime.bfloat16 import InBfloat16
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.fusing import (
    ConvReLU,
    Pointwise,
    StridedPointwise,
    fuse_relus,
    replace_strided_pointwise,
    skip_identities,
)
from bdfast.runtime.gpu_graph import for_gpu
from bdfast.runtime.split_conv import SplitConv, split_first


class Block(nn.Module):
    """A sum whose terms come in the order asked for."""

    def __init__(self, conv_first: bool) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.conv_first = conv_first
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv1(x))
        y = self.conv2(h)
        return self.relu(y + h if self.conv_first else h + y).flatten(1)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    return grad


@pytest.mark.parametrize("conv_first", [True, False])
def test_sums_are_fused_whatever_their_order(conv_first: bool) -> None:
    graph = fx.symbolic_trace(Block(conv_first))
    x = torch.rand(2, 2, 5, 5)
    merged, names = for_gpu(graph, x)
    assert names == ["conv1", "conv2"]
    assert torch.equal(merged(x), graph(x))
    assert torch.equal(gradient(merged, x), gradient(graph, x))
    assert not any(isinstance(module, ConvReLU) for module in graph.modules())


def sequence(*layers: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(nn.Sequential(*layers))


@pytest.mark.parametrize(
    "graph",
    [
        sequence(nn.Conv2d(1, 2, 3), nn.ReLU()),  # weights are trained
        sequence(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect").requires_grad_(False), nn.ReLU()),
        sequence(nn.Conv2d(1, 2, 3, padding="same").requires_grad_(False), nn.ReLU()),
        sequence(nn.Conv2d(1, 2, 3).requires_grad_(False), nn.ReLU6()),
        sequence(nn.Conv2d(1, 2, 3).requires_grad_(False), nn.Identity()),
    ],
    ids=["trained", "reflect", "same", "relu6", "no relu"],
)
def test_what_is_no_plain_convolution_and_relu_stays(graph: fx.GraphModule) -> None:
    assert fuse_relus(graph) == []


def test_a_convolution_that_something_else_reads_stays() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.relu(y) + y

    assert fuse_relus(fx.symbolic_trace(Net())) == []


def test_a_rewritten_graph_that_differs_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.symbolic_trace(Block(True))
    monkeypatch.setattr(ConvReLU, "forward", lambda self, x, z=None: torch.relu(self.conv(x)) + 1)
    assert for_gpu(graph, torch.rand(2, 2, 5, 5)) == (graph, [])


def test_a_rewritten_graph_whose_gradient_differs_is_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.symbolic_trace(Block(True))
    monkeypatch.setattr(ConvReLU, "forward", lambda self, x, z=None: _wrong_backward(x, z, self.conv))
    assert for_gpu(graph, torch.rand(2, 2, 5, 5)) == (graph, [])


def _wrong_backward(x: Tensor, z: Tensor | None, conv: nn.Conv2d) -> Tensor:
    y = torch.relu(conv(x) if z is None else conv(x) + z)
    return y.detach() + 2 * (y - y.detach())


def test_only_strided_1x1_convolutions_become_products() -> None:
    def conv(*arguments: int, **options: int) -> nn.Conv2d:
        return nn.Conv2d(*arguments, **options).requires_grad_(False)  # type: ignore[arg-type]

    layers = [conv(4, 4, 1, stride=2), conv(4, 4, 1), conv(4, 4, 3, stride=2), conv(4, 4, 1, stride=2, groups=2)]
    graph = fx.symbolic_trace(nn.Sequential(*layers))
    assert replace_strided_pointwise(graph) == ["0"]


@pytest.mark.parametrize("half", [True, False])
def test_networks_in_bfloat16_have_products_whatever_their_images_are(half: bool) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 1, stride=2), nn.Flatten()]
    graph = fx.symbolic_trace(nn.Sequential(*layers).requires_grad_(False))
    graph = InBfloat16(graph).network if half else graph  # type: ignore[assignment]
    merged, names = for_gpu(graph, torch.rand(2, 3, 6, 6))
    assert names == (["0", "2"] if half else ["0"])
    assert isinstance(merged.get_submodule("2"), StridedPointwise) is half


def test_layers_are_neighbours_across_an_identity() -> None:
    layers = [nn.Conv2d(1, 2, 3), nn.Identity(), nn.ReLU(), nn.Identity(), nn.Flatten()]
    graph = fx.symbolic_trace(nn.Sequential(*layers).requires_grad_(False))
    assert for_gpu(graph, torch.rand(1, 1, 3, 3))[1] == ["0"]
    layers[1].register_forward_hook(lambda *_: None)
    skip_identities(graph)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "4"]


@pytest.mark.parametrize("relu", [True, False])
def test_a_split_first_layer_sees_float32_images(relu: bool) -> None:
    layers = [nn.Conv2d(3, 6, 3, stride=2, padding=1), *([nn.ReLU()] if relu else []), nn.Flatten(), nn.Linear(24, 4)]
    plain = fx.symbolic_trace(nn.Sequential(*layers).requires_grad_(False).eval())
    half = InBfloat16(copy.deepcopy(plain)).network
    assert isinstance(half, fx.GraphModule)
    assert split_first(half) == "0"
    assert isinstance(half.get_submodule("0"), SplitConv)
    assert half.get_submodule("0").relu is relu
    step = 1 / 512  # next to white, bfloat16 does not see it
    x = torch.full((1, 3, 4, 4), 1 - step)
    layer: SplitConv = half.get_submodule("0")  # type: ignore[assignment]
    parts = layer.parts(x)
    assert parts.shape == (1, 8, 4, 4)
    assert torch.equal(parts[:, :3].float() + parts[:, 3:6].float(), x)
    x = torch.rand(5, 3, 4, 4)
    high = x.to(torch.bfloat16)
    assert torch.equal(layer.parts(x), torch.cat((high, (x - high).to(torch.bfloat16), 0 * high[:, :2]), 1))
    assert layer.parts(x).is_contiguous(memory_format=torch.channels_last)
    exact = gradient(plain, x)
    assert torch.nn.functional.cosine_similarity(gradient(half, x).flatten(), exact.flatten(), dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("arch", ["resnet18", "preact_resnet18", "vgg19_bn"])
def test_on_a_gpu_logits_and_gradients_are_those_of_the_plain_network(arch: str, precision: str) -> None:
    model = bdfast.models.build(arch, num_classes=10, image_size=32, seed=0).cuda()
    x = torch.rand(16, 3, 32, 32, device="cuda")
    with torch.no_grad():
        model.train()(x)
    model.double().eval()
    exact = gradient(model, x.double())
    model.float()
    with FrozenModel(model, precision) as frozen:  # type: ignore[arg-type]
        logits, grad = frozen.logits(x), frozen.input_gradient(x, lambda z: z.square().sum(1))[1]
        kinds = {type(module) for module in frozen._source.modules()}  # type: ignore[union-attr]
        product = {"resnet18": [Pointwise], "preact_resnet18": [StridedPointwise]}.get(arch, [])
        assert {ConvReLU, *([SplitConv, *product] if precision == "bf16" else [])} <= kinds
    assert len(logits) == 16
    similar = torch.nn.functional.cosine_similarity(grad.double().flatten(), exact.flatten(), dim=0)
    assert float(similar) > (0.98 if precision == "fp32" else 0.9)  # cuDNN's float32 is TF32
