"""ReLUs that two layers read: the same values, and the same gradient to the bit."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, fx, nn

import bdfast
from bdfast.runtime import forks, fusing, relu_gradient, split_conv
from bdfast.runtime.bfloat16 import InBfloat16
from bdfast.runtime.folding import fold
from bdfast.runtime.forks import fork_relus
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.fusing import ConvReLU, Pointwise, fuse_relus, replace_strided_pointwise
from bdfast.runtime.gpu_graph import for_gpu

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """A stem, layers, and whatever ``forward`` makes of them."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.strided1, self.strided2 = nn.Conv2d(4, 4, 3, 2, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.projection = nn.Conv2d(4, 4, 1, 2)
        self._forward = forward
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def block(net: Net, y: Tensor) -> Tensor:
    return torch.relu(net.conv2(torch.relu(net.conv1(y))) + y)


def down(net: Net, y: Tensor) -> Tensor:
    return torch.relu(net.strided2(torch.relu(net.strided1(y))) + net.projection(y))


def identity_block(net: Net, x: Tensor) -> Tensor:
    return block(net, torch.relu(net.stem(x)))


def two_joins(net: Net, x: Tensor) -> Tensor:
    return down(net, block(net, torch.relu(net.stem(x))))


def projection_first(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.stem(x))
    shortcut = net.projection(y)
    return torch.relu(net.strided1(y) + shortcut)


def two_plain_convolutions(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.stem(x))
    return net.conv1(y) * net.conv2(y)


def three_readers(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.stem(x))
    return net.conv1(y) + net.conv2(y) + net.conv3(y)


def read_by_the_output(net: Net, x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.relu(net.stem(x))
    return y, net.conv1(y)


def read_by_a_function(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.stem(x))
    return net.conv1(y) + y.mul(2)


def read_twice_by_one(net: Net, x: Tensor) -> Tensor:
    y = torch.relu(net.stem(x))
    return torch.relu(net.conv1(y) + y) + net.conv2(y)


@pytest.fixture
def own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU runs here, with PyTorch's convolution in the place of cuDNN's."""
    monkeypatch.setattr(fusing, "_by_autograd", lambda x: False)


@pytest.fixture(params=["plain", "kernel"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Both ways to add and mask; the names of the kernels that were launched."""
    launched: list[str] = []
    if request.param == "plain":
        monkeypatch.setattr(relu_gradient, "runs_triton", lambda y: "not here")
        yield launched
        return
    if (reason := relu_gradient.runs_triton(torch.empty(0))) is not None:
        pytest.skip(reason)
    from bdfast.triton_kernels import masked_sum as kernels

    for name in ("masked_sum", "masked_strided_sum"):
        function = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=function, n=name: launched.append(n) or f(*a))
    yield launched
    assert launched


def rewritten(forward: Forward, *, strided: bool = True) -> tuple[fx.GraphModule, fx.GraphModule, list[str]]:
    """The graph, the same as a GPU has it, and the forked layers."""
    graph = fx.symbolic_trace(Net(forward))
    merged = fx.GraphModule(graph, fx.Graph.__deepcopy__(graph.graph))
    fuse_relus(merged)
    if strided:
        replace_strided_pointwise(merged)
    return graph, merged, fork_relus(merged)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    out = torch.cat([y.flatten(1) for y in out], 1) if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    return grad


@pytest.mark.usefixtures("own_functions")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("forward", [identity_block, two_joins])
def test_gradients_are_the_same_to_the_bit(forward: Forward, channels_last: bool, sums: list[str]) -> None:
    graph, merged, forked = rewritten(forward, strided=False)
    assert forked == ["stem", "conv2"][: 1 if forward is identity_block else 2]
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=order)
    for network in (graph, merged):
        network.to(memory_format=order)  # type: ignore[call-overload]
    assert torch.equal(merged(x), graph(x))
    assert torch.equal(gradient(merged, x), gradient(graph, x))
    assert sums in ([], ["masked_sum"] * len(forked))
    with torch.no_grad():
        assert torch.equal(merged(x), graph(x))


@pytest.mark.usefixtures("own_functions")
@pytest.mark.parametrize("size", [(6, 6), (5, 7)])
@pytest.mark.parametrize("forward", [two_joins, projection_first])
def test_a_strided_reader_gets_its_pixels_alone(forward: Forward, size: tuple[int, int], sums: list[str]) -> None:
    graph, merged, forked = rewritten(forward)
    assert len(forked) == (2 if forward is two_joins else 1)
    assert isinstance(merged.get_submodule("projection"), Pointwise)
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last)
    for network in (graph, merged):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(merged(x), graph(x))  # a product, instead of a convolution, rounds otherwise
    torch.testing.assert_close(gradient(merged, x), gradient(graph, x))
    assert not sums or sums[0] == "masked_strided_sum"


@pytest.mark.usefixtures("own_functions")
def test_two_convolutions_are_readers_like_others(sums: list[str]) -> None:
    graph, merged, forked = rewritten(two_plain_convolutions)
    x = torch.randn(2, 3, 6, 6)
    assert forked == ["stem"]
    assert torch.equal(gradient(merged, x), gradient(graph, x))


@pytest.mark.usefixtures("own_functions")
@pytest.mark.parametrize("forward", [three_readers, read_by_the_output, read_by_a_function, read_twice_by_one])
def test_other_readers_leave_things_as_they_are(forward: Forward) -> None:
    graph, merged, forked = rewritten(forward)
    assert forked == []
    assert not any(node.target is operator.getitem for node in merged.graph.nodes)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(gradient(merged, x), gradient(graph, x))  # autograd adds three in any order


def test_on_a_cpu_all_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing._ConvReLU, "apply", None)
    monkeypatch.setattr(fusing, "relu_gradient", None)
    graph, merged, forked = rewritten(two_joins)
    assert forked == ["stem", "conv2"]
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(merged(x), graph(x))
    torch.testing.assert_close(gradient(merged, x), gradient(graph, x))


def test_forks_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_STRIDED", False)
    _, merged, forked = rewritten(two_joins)
    assert forked == ["stem", "conv2"]
    assert not any(isinstance(module, Pointwise) for module in merged.modules())
    monkeypatch.setattr(forks, "_ENABLED", False)
    assert rewritten(two_joins)[2] == []


@pytest.mark.usefixtures("own_functions")
def test_a_reader_that_does_not_matter_has_no_gradient() -> None:
    layer = ConvReLU(nn.Conv2d(3, 4, 3).requires_grad_(False))
    for stride in ((1, 1), (2, 2)):
        layer.fork = stride
        x = torch.randn(2, 3, 6, 6, requires_grad=True)
        for place, seen in ((0, (1, 1)), (1, stride)):
            out = layer(x)[place]
            assert out.requires_grad
            plain = layer.conv(x).relu()[:, :, :: seen[0], :: seen[1]]
            assert torch.equal(out, plain)
            grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (out, plain)]
            assert torch.equal(*grads)
        (none,) = torch.autograd.grad(fusing._ConvReLU.apply(x, None, layer)[0].detach().sum() + 0 * x.sum(), x)
        assert not none.any()


@pytest.mark.usefixtures("own_functions")
def test_outputs_that_share_memory_do_not_outlive_their_readers() -> None:
    layer = ConvReLU(nn.Conv2d(3, 4, 3).requires_grad_(False))
    layer.fork = 1, 1
    first, second = layer(torch.randn(1, 3, 4, 4, requires_grad=True))
    assert first.data_ptr() == second.data_ptr()
    alive = weakref.ref(first.grad_fn)
    gc.disable()
    try:
        del first, second
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("own_functions")
@pytest.mark.parametrize("stem", [True, False], ids=["split stem", "float32"])
def test_a_resnet_is_forked_wherever_a_block_begins(stem: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relu_gradient, "runs_triton", lambda y: "too much for the interpreter")
    model = bdfast.models.build("resnet18", num_classes=10, image_size=32, seed=0).eval().requires_grad_(False)
    x = torch.rand(2, 3, 16, 16)
    graph, _ = fold(model, x)
    assert isinstance(graph, fx.GraphModule)
    graph = InBfloat16(graph).network if stem else graph  # type: ignore[assignment]
    found = []
    for enabled in (False, True):
        monkeypatch.setattr(forks, "_ENABLED", enabled)
        merged, names = for_gpu(graph, x)
        assert len(names) == (20 if stem else 17)
        kinds = (ConvReLU, split_conv.SplitConv)
        forked = [layer.fork for layer in merged.modules() if isinstance(layer, kinds) and layer.fork is not None]
        strided = 3 if stem else 0
        assert sorted(forked) == ([(1, 1)] * (8 - strided) + [(2, 2)] * strided if enabled else [])
        found.append((merged(x), gradient(merged, x)))
    (logits, grad), (forked_logits, forked_grad) = found
    torch.testing.assert_close(forked_logits, logits, rtol=0.05 if stem else 0, atol=0.05 if stem else 0)
    if stem:  # products round otherwise than cuDNN's convolutions
        assert torch.nn.functional.cosine_similarity(forked_grad.flatten(), grad.flatten(), dim=0) > 0.99
    else:
        assert torch.equal(forked_grad, grad)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_gradients_are_the_same_to_the_bit(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = bdfast.models.build("resnet18", num_classes=10, image_size=32, seed=0).cuda()
    x = torch.rand(16, 3, 32, 32, device="cuda")
    with torch.no_grad():
        model.train()(x)
    found = {}
    for name, enabled, strided in (("plain", False, False), ("forked", True, False), ("strided", True, True)):
        monkeypatch.setattr(forks, "_ENABLED", enabled)
        monkeypatch.setattr(forks, "_STRIDED", strided)
        with FrozenModel(model, precision) as frozen:  # type: ignore[arg-type]
            found[name] = frozen.input_gradient(x, lambda z: z.square().sum(1))
            layers = frozen._source.modules()  # type: ignore[union-attr]
            kinds = (ConvReLU, split_conv.SplitConv)
            assert sum(isinstance(layer, kinds) and layer.fork is not None for layer in layers) == (8 if enabled else 0)
    for plain, forked in zip(found["plain"], found["forked"], strict=True):
        assert torch.equal(plain, forked)
    grads = [found[name][1].double().flatten() for name in ("plain", "strided")]
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99
