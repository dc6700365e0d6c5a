"""3x3 convolutions by Winograd's way: those of PyTorch, but for roundings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bdfast
from bdfast.backends.availability import cpp_missing
from bdfast.runtime import cpu_graph, winograd
from bdfast.runtime.cpu_graph import for_cpu
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.fusing import ConvReLU
from bdfast.runtime.winograd import WinogradConv, replace_convolutions, suits

pytestmark = pytest.mark.skipif(cpp_missing() is not None, reason="needs bdfast._C")
needs_fma = pytest.mark.skipif(not winograd.available(), reason="needs fused multiply-adds")

# channels, outputs, images, height, width, padding: odd sizes, parts of tiles, registers and panels, every padding, few
# and many tiles, no image
CASES = [
    (16, 16, 2, 5, 7, 1),
    (19, 37, 3, 9, 4, 1),
    (64, 128, 2, 13, 13, 0),
    (65, 63, 5, 8, 8, 2),
    (32, 96, 7, 3, 3, 1),
    (16, 16, 8, 1, 1, 1),
    (130, 70, 1, 17, 12, 1),
    (16, 32, 33, 8, 8, 1),
    (16, 16, 0, 8, 8, 1),
]
ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3}  # of the norm; one rounding in bfloat16


@pytest.fixture
def _all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not pay, too."""
    monkeypatch.setattr(winograd, "_pays", lambda shape, padding: True)


def draw(case: tuple[int, ...]) -> tuple[nn.Conv2d, Tensor, Tensor]:
    """A layer, its input, and something of the shape of its output."""
    channels, outputs, images, height, width, padding = case
    generator = torch.Generator().manual_seed(sum(case))
    conv = nn.Conv2d(channels, outputs, 3, padding=padding).requires_grad_(False)
    for p in conv.parameters():
        p.copy_(torch.randn(p.shape, generator=generator) / channels**0.5)
    x = torch.randn(images, channels, height, width, generator=generator)
    other = torch.randn(images, outputs, height + 2 * padding - 2, width + 2 * padding - 2, generator=generator)
    return conv, x, other


def exact(conv: nn.Conv2d, x: Tensor) -> Tensor:
    bias = None if conv.bias is None else conv.bias.double()
    return nn.functional.conv2d(x.double(), conv.weight.double(), bias, padding=conv.padding)


def error(got: Tensor, wanted: Tensor) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.usefixtures("_all_sizes", "poisoned_empty")
@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_convolution(case: tuple[int, ...], dtype: torch.dtype) -> None:
    conv, x, z = draw(case)
    x, z = x.to(dtype), z.to(dtype)
    layer, wanted = WinogradConv(conv), exact(conv, x)
    assert error(layer.run(x), wanted) <= ERROR[dtype]
    assert error(layer.run(x, relu=True), wanted.relu()) <= ERROR[dtype]
    assert error(layer.run(x, z, relu=True), (wanted + z.double()).relu()) <= ERROR[dtype]
    assert error(layer.run(x, z), wanted + z.double()) <= ERROR[dtype]
    assert layer.run(x).dtype == dtype
    assert layer.run(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_all_sizes", "poisoned_empty")
@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("case", CASES)
def test_its_gradient_is_that_of_the_convolution(case: tuple[int, ...], dtype: torch.dtype) -> None:
    conv, x, grad = draw(case)
    x, grad = x.to(dtype), grad.to(dtype)
    leaf = x.double().requires_grad_()
    y = exact(conv, leaf)
    layer = WinogradConv(conv)
    (wanted,) = torch.autograd.grad(y, leaf, grad.double(), retain_graph=True)
    assert error(layer.input_gradient(grad, x), wanted) <= ERROR[dtype]
    output = y.detach().relu().to(dtype)
    (masked,) = torch.autograd.grad(y, leaf, grad.double() * (output > 0))
    assert error(layer.input_gradient(grad, x, output), masked) <= ERROR[dtype]


@pytest.mark.usefixtures("_all_sizes")
def test_autograd_takes_it_from_there() -> None:
    conv, x, _ = draw(CASES[1])
    got, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    WinogradConv(conv)(got).square().sum().backward()
    conv(wanted).square().sum().backward()
    torch.testing.assert_close(got.grad, wanted.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_all_sizes")
def test_an_image_depends_on_neither_its_batch_nor_threads() -> None:
    conv, x, z = draw(CASES[3])
    layer, threads = WinogradConv(conv), torch.get_num_threads()
    together = layer.run(x, z, relu=True)
    for i in range(len(x)):
        assert torch.equal(layer.run(x[i : i + 1], z[i : i + 1], relu=True), together[i : i + 1])
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(layer.run(x, z, relu=True), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("_all_sizes")
def test_numbers_that_are_none_stay_in_their_image() -> None:
    conv, x, _ = draw(CASES[0])
    plain = WinogradConv(conv).run(x)
    x[0, 3, 2, 2], x[0, 5, 4, 4] = float("nan"), float("inf")
    got = WinogradConv(conv).run(x, relu=True)
    assert got[0].isnan().any()
    assert torch.equal(got[1], plain[1].relu())


def test_what_it_is_not_for_goes_through_the_convolution() -> None:
    conv, x, z = draw((16, 16, 4, 8, 8, 1))
    layer = WinogradConv(conv)
    few = x[:1, :, :4, :4]
    with bdfast.backend("reference"):
        assert torch.equal(layer(x), conv(x))
        assert torch.equal(layer.run(x, z, relu=True), (conv(x) + z).relu())
        assert torch.equal(layer.input_gradient(z, x), winograd.input_gradient(z, x, conv))
    assert torch.equal(layer(few), conv(few))
    assert torch.equal(layer.double()(x.double()), conv(x.double()))


@pytest.mark.parametrize(
    ("conv", "taken"),
    [
        (nn.Conv2d(16, 16, 3, padding=1), True),
        (nn.Conv2d(16, 16, 3, padding=0, bias=False), True),
        (nn.Conv2d(3, 16, 3, padding=1), False),
        (nn.Conv2d(16, 8, 3, padding=1), False),
        (nn.Conv2d(16, 16, 3, padding=1, stride=2), False),
        (nn.Conv2d(16, 16, 3, padding=2, dilation=2), False),
        (nn.Conv2d(32, 32, 3, padding=1, groups=2), False),
        (nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), False),
        (nn.Conv2d(16, 16, 3, padding="same"), False),
        (nn.Conv2d(16, 16, 3, padding=3), False),
        (nn.Conv2d(16, 16, (3, 1)), False),
        (nn.Conv2d(16, 16, 5, padding=2), False),
        (nn.Linear(16, 16), False),
    ],
)
def test_which_layers_it_is_for(conv: nn.Module, taken: bool) -> None:
    assert not suits(conv)  # its weights are trained
    assert suits(conv.requires_grad_(False)) == taken


def test_layers_with_hooks_or_parametrizations_stay() -> None:
    watched, normed = (nn.Conv2d(16, 16, 3) for _ in range(2))
    watched.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(normed)
    net = nn.Sequential(watched, normed).requires_grad_(False)
    assert replace_convolutions(net) == {}


@pytest.fixture
def network() -> Iterator[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield bdfast.models.build("preact_resnet18", num_classes=10, image_size=32, seed=0).eval()


@needs_fma
def test_a_frozen_network_is_the_same_with_it(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 3, 32, 32)

    def run() -> tuple[Tensor, Tensor, int]:
        with FrozenModel(network) as frozen:
            logits = frozen.logits(x)
            _, grad = frozen.input_gradient(x, lambda z: z.square().sum(1))
            assert frozen._source is not None
            return logits, grad, sum(isinstance(m, WinogradConv) for m in frozen._source.modules())

    logits, grad, count = run()
    monkeypatch.setattr(winograd, "_ENABLED", False)
    plain_logits, plain_grad, none = run()
    assert (count, none) == (13, 0)  # all but the stem, three of stride 2 and three of 1x1
    torch.testing.assert_close(logits, plain_logits, rtol=1e-5, atol=1e-5 * float(plain_logits.abs().max()))
    assert float((grad - plain_grad).norm()) < 0.02 * float(plain_grad.norm())
    assert not any(isinstance(m, WinogradConv) for m in network.modules())


@needs_fma
def test_relus_and_shortcuts_become_part_of_it(network: nn.Module) -> None:
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3)).requires_grad_(False)
    rewritten, names = for_cpu(torch.fx.symbolic_trace(plain), torch.rand(2, 16, 8, 8))
    assert names == ["0.conv", "2"]
    assert isinstance(rewritten.get_submodule("0"), ConvReLU)


class Choosy(nn.Module):
    """No tracer gets through this."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if x.sum() > 0 else -x).flatten(1)


@needs_fma
def test_a_network_without_a_graph_gets_new_layers_unless_they_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(2, 16, 8, 8)
    assert for_cpu(Choosy(), x)[1] == ["conv"]
    monkeypatch.setattr(cpu_graph.Behaviour, "agrees", lambda *_: False)
    net = Choosy()
    same, names = for_cpu(net, x)
    assert same is net
    assert names == []
    assert type(net.conv) is nn.Conv2d


_OTHER = """
import sys
import torch
from bdfast import _C
from tests.runtime.test_winograd import CASES, WinogradConv, draw, error, exact, winograd
winograd._pays = lambda shape, padding: True
assert _C.cpu_isa == sys.argv[1]
for case in CASES:
    conv, x, z = draw(case)
    assert error(WinogradConv(conv).run(x, z, relu=True), (exact(conv, x) + z).relu()) < 3e-6, case
    (wanted,) = torch.autograd.grad(exact(conv, leaf := x.double().requires_grad_()), leaf, z.double())
    assert error(WinogradConv(conv).input_gradient(z, x), wanted) < 3e-6, case
"""


@pytest.mark.parametrize("isa", ["avx2", "baseline"])
def test_other_instruction_sets_compute_the_same(isa: str) -> None:
    if winograd.native().cpu_isa == "baseline":
        pytest.skip("this processor, or build, has one instruction set alone")
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "BDFAST_ISA_MAX": isa, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", _OTHER, isa], check=True, cwd=root, env=environment)
