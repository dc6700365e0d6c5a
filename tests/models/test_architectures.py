from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bdfast import models
from bdfast.models.vgg import AdaptiveAveragePool

OWN = models.names()
SMALL = ["digits_cnn", "mobilenet_v2", "preact_resnet18", "resnet18"]


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return models.build(name, num_classes=10, **arguments)  # type: ignore[arg-type]


def conv(c_in: int, c_out: int, kernel: int = 3, bias: bool = False) -> int:
    return c_in * c_out * kernel**2 + bias * c_out


def bn(*channels: int) -> int:
    return 2 * sum(channels)


def test_names() -> None:
    assert OWN == ["digits_cnn", "mobilenet_v2", "preact_resnet18", "resnet18", "resnet34", "vgg19_bn"]


def preact_parameters() -> int:
    total = conv(3, 64) + 512 * 10 + 10
    for c_in, c in ((64, 64), (64, 128), (128, 256), (256, 512)):
        total += bn(c_in, c, c, c) + conv(c_in, c) + 3 * conv(c, c) + (conv(c_in, c, 1) if c_in != c else 0)
    return total


def resnet_parameters(depths: tuple[int, ...]) -> int:
    total = conv(3, 64) + bn(64) + 512 * 10 + 10
    for depth, (c_in, c) in zip(depths, ((64, 64), (64, 128), (128, 256), (256, 512)), strict=True):
        total += conv(c_in, c) + (2 * depth - 1) * conv(c, c) + 2 * depth * bn(c)
        total += conv(c_in, c, 1) + bn(c) if c_in != c else 0
    return total


def vgg_parameters() -> int:
    widths = [3] + [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8
    body = sum(conv(a, b, bias=True) + bn(b) for a, b in itertools.pairwise(widths))
    return body + 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 10 + 10


@pytest.mark.parametrize(
    ("name", "tensors", "parameters", "arithmetic"),
    [
        ("preact_resnet18", 102, 11_171_146, preact_parameters()),
        ("resnet18", 122, 11_173_962, resnet_parameters((2, 2, 2, 2))),
        ("resnet34", 218, 21_282_122, resnet_parameters((3, 4, 6, 3))),
        ("vgg19_bn", 118, 139_622_218, vgg_parameters()),
        # the published count for 1000 classes, less 990 rows of the head
        ("mobilenet_v2", 314, 2_236_682, 3_504_872 - 990 * (1280 + 1)),
        ("digits_cnn", 20, 56_554, conv(1, 32) + conv(32, 64) + conv(64, 64) + bn(32, 64, 64) + 64 * 10 + 10),
    ],
)
def test_sizes(name: str, tensors: int, parameters: int, arithmetic: int) -> None:
    model = on_meta(name)
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters == arithmetic


def bn_names(name: str) -> list[str]:
    return [f"{name}.{t}" for t in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]


def test_preact_names_and_shapes_are_those_of_the_benchmarks() -> None:
    names = ["conv1.weight"]
    for layer, block in itertools.product((1, 2, 3, 4), (0, 1)):
        prefix = f"layer{layer}.{block}"
        names += [*bn_names(f"{prefix}.bn1"), f"{prefix}.conv1.weight"]
        names += [*bn_names(f"{prefix}.bn2"), f"{prefix}.conv2.weight"]
        names += [f"{prefix}.shortcut.0.weight"] if layer > 1 and block == 0 else []
    names += ["linear.weight", "linear.bias"]
    state = on_meta("preact_resnet18").state_dict()
    assert list(state) == names  # order included: some readers match by position
    shapes = {
        "conv1.weight": [64, 3, 3, 3],
        "layer2.0.bn1.running_mean": [64],  # before the convolution that widens
        "layer2.0.conv1.weight": [128, 64, 3, 3],
        "layer4.0.shortcut.0.weight": [512, 256, 1, 1],
        "linear.weight": [10, 512],
    }
    assert {key: list(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize(("name", "depths"), [("resnet18", (2, 2, 2, 2)), ("resnet34", (3, 4, 6, 3))])
def test_resnet_names_are_torchvisions(name: str, depths: tuple[int, ...]) -> None:
    names = ["conv1.weight", *bn_names("bn1")]
    for layer, depth in enumerate(depths, start=1):
        for block in range(depth):
            for i in (1, 2):
                names += [f"layer{layer}.{block}.conv{i}.weight", *bn_names(f"layer{layer}.{block}.bn{i}")]
            if layer > 1 and block == 0:
                names += [f"layer{layer}.0.downsample.0.weight", *bn_names(f"layer{layer}.0.downsample.1")]
    assert list(on_meta(name).state_dict()) == [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(
    ("image_size", "stem", "shape"),
    [
        (32, None, [64, 3, 3, 3]),
        ((48, 64), None, [64, 3, 3, 3]),
        (224, None, [64, 3, 7, 7]),
        (32, "imagenet", [64, 3, 7, 7]),  # torchvision's, as trained on CIFAR by BackdoorBench
        (224, "cifar", [64, 3, 3, 3]),
    ],
)
def test_resnet_stems(image_size: int, stem: str | None, shape: list[int]) -> None:
    model = on_meta("resnet18", image_size=image_size, stem=stem)
    assert list(model.state_dict()["conv1.weight"].shape) == shape


def test_vgg_names_are_torchvisions() -> None:
    convs = [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49]  # configuration E: pools at 6, 13, 26, 39, 52
    names = []
    for i in convs:
        names += [f"features.{i}.weight", f"features.{i}.bias", *bn_names(f"features.{i + 1}")]
    names += [f"classifier.{i}.{t}" for i in (0, 3, 6) for t in ("weight", "bias")]
    state = on_meta("vgg19_bn").state_dict()
    assert list(state) == names
    assert [list(state[f"classifier.{i}.weight"].shape) for i in (0, 3, 6)] == [[4096, 25088], [4096, 4096], [10, 4096]]


def test_mobilenet_names_are_torchvisions() -> None:
    names = ["features.0.0.weight", *bn_names("features.0.1")]
    names += ["features.1.conv.0.0.weight", *bn_names("features.1.conv.0.1")]
    names += ["features.1.conv.1.weight", *bn_names("features.1.conv.2")]
    for i in range(2, 18):
        for part in ("0.0", "1.0", "2"):
            norm = {"0.0": "0.1", "1.0": "1.1", "2": "3"}[part]
            names += [f"features.{i}.conv.{part}.weight", *bn_names(f"features.{i}.conv.{norm}")]
    names += ["features.18.0.weight", *bn_names("features.18.1"), "classifier.1.weight", "classifier.1.bias"]
    state = on_meta("mobilenet_v2").state_dict()
    assert list(state) == names
    depthwise = {key: v.shape[0] for key, v in state.items() if key.endswith("conv.1.0.weight")}
    assert list(depthwise.values()) == [96, 144, 144, 192, 192, 192, *[384] * 4, *[576] * 3, *[960] * 3]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [32, 64, 224, (40, 72)])
def test_forward_shapes(name: str, channels: int, image_size: int | tuple[int, int]) -> None:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    model = on_meta(name, image_size=image_size, channels=channels).eval()
    assert model(torch.empty(2, channels, height, width, device="meta")).shape == (2, 10)
    traced = torch.fx.symbolic_trace(model)
    assert traced(torch.empty(1, channels, height, width, device="meta")).shape == (1, 10)


@pytest.mark.parametrize("name", SMALL)
def test_numbers_survive_tracing_batching_and_memory_format(name: str) -> None:
    model = models.build(name, num_classes=5, seed=0, channels=3).eval()
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
        assert logits.std() > 0
        assert torch.equal(model(images), logits)
        assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)
        torch.testing.assert_close(model(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
        nhwc = model.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(nhwc, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_gradient_reaches_every_weight_and_the_image(name: str) -> None:
    model = models.build(name, num_classes=5, seed=0, channels=3).train()
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    F.cross_entropy(model(images), torch.arange(4)).backward()  # type: ignore[no-untyped-call]
    assert images.grad is not None
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


def test_preact_block_by_hand() -> None:
    """x + conv2(relu(bn2(conv1(relu(bn1(x)))))), the shortcut reading relu(bn1(x)) where the shape changes."""
    model = models.build("preact_resnet18", num_classes=2, seed=3).eval()
    state = model.state_dict()
    for key in ("layer2.0.bn1", "layer2.0.bn2"):
        for t, value in (("running_mean", 0.3), ("running_var", 2.0), ("weight", 1.5), ("bias", -0.2)):
            state[f"{key}.{t}"].fill_(value)
    x = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))

    def activated(v: Tensor) -> Tensor:
        return ((v - 0.3) / (2.0 + 1e-5) ** 0.5 * 1.5 - 0.2).clamp_min(0)

    a = activated(x)
    hidden = activated(F.conv2d(a, state["layer2.0.conv1.weight"], stride=2, padding=1))
    expected = F.conv2d(hidden, state["layer2.0.conv2.weight"], padding=1)
    expected = expected + F.conv2d(a, state["layer2.0.shortcut.0.weight"], stride=2)
    block: nn.Module = model.get_submodule("layer2.0")
    torch.testing.assert_close(block(x), expected)


def test_vgg_needs_32_pixels() -> None:
    with pytest.raises(ValueError, match=r"vgg19_bn: `image_size` expected at least 32 pixels.*; resize the images"):
        models.build("vgg19_bn", num_classes=2, image_size=(64, 28))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 5), (7, 7), (14, 21), (1, 7), (9, 4)])
def test_adaptive_average_pool_is_torchs(shape: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = AdaptiveAveragePool(7)(x), F.adaptive_avg_pool2d(x, 7)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad((ours * weight).sum(), x)
    (expected,) = torch.autograd.grad((theirs * weight).sum(), x)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
