from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast import models
from bdfast.errors import MissingExtraError
from bdfast.models import external
from bdfast.runtime.checkpoints import load_into


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (models.build("digits_cnn", num_classes=4, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(one["linear.weight"], other["linear.weight"])


def test_without_seed_the_weights_come_from_the_global_generator() -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(5)
        one = models.build("digits_cnn", num_classes=4).state_dict()
        torch.manual_seed(5)
        same = models.build("digits_cnn", num_classes=4).state_dict()
    finally:
        torch.set_rng_state(state)
    assert all(torch.equal(one[key], same[key]) for key in one)


def test_the_generator_is_put_back_when_building_fails() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="unknown_net"):
        models.build("unknown_net", num_classes=2, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", [None, 0])
def test_default_device(seed: int | None) -> None:
    with torch.device("meta"):
        model = models.build("digits_cnn", num_classes=2, seed=seed)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_alias_and_default_channels() -> None:
    assert models.build("preactresnet18", num_classes=2).state_dict()["conv1.weight"].shape[1] == 3
    assert models.build("digits_cnn", num_classes=2).state_dict()["conv1.weight"].shape[1] == 1
    assert models.build("digits_cnn", num_classes=2, channels=3).state_dict()["conv1.weight"].shape[1] == 3


def test_dropout_reaches_the_head() -> None:
    with torch.device("meta"):
        model = models.build("vgg19_bn", num_classes=2, dropout=0.25)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "text"),
    [
        (
            "preact_resnet",
            {},
            ValueError,
            "build: `name` expected one of .* got 'preact_resnet'; did you mean 'preact_",
        ),
        ("qqq", {}, ValueError, "got 'qqq'; prefix it with torchvision: or timm:"),
        ("resnet18", {"num_classes": 0}, ValueError, "`num_classes` expected a positive number, got 0; count from 1"),
        ("resnet18", {"channels": -1}, ValueError, "`channels` expected a positive number, got -1"),
        ("resnet18", {"image_size": 0}, ValueError, "`image_size` expected positive numbers of pixels, got 0"),
        ("resnet18", {"image_size": (1, 2, 3)}, ValueError, r"`image_size`.*got \(1, 2, 3\)"),
        (
            "resnet18",
            {"dropout": 0.1},
            TypeError,
            r"build: `dropout` expected the options of resnet18 \(stem\), got 0\.1",
        ),
        (
            "digits_cnn",
            {"stem": "cifar"},
            TypeError,
            r"`stem` expected the options of digits_cnn \(none\), got 'cifar'",
        ),
        ("resnet34", {"stem": "big"}, ValueError, 'resnet34: `stem` expected "cifar" or "imagenet", got \'big\''),
        (
            "timm:x",
            {"pretrained": True},
            ValueError,
            "`pretrained` expected nothing, got a value; .*nothing is downloaded",
        ),
        ("vit_b_16", {"weights": "DEFAULT"}, ValueError, "build: `weights` expected nothing"),
        (
            "resnet18",
            {"num_classes": "2"},
            TypeError,
            "build: `num_classes` expected a whole number, got '2'; pass an int",
        ),
        ("resnet18", {"num_classes": None}, TypeError, "build: `num_classes` expected a whole number, got None"),
        ("resnet18", {"image_size": "32"}, TypeError, "build: `image_size` expected a whole number, got '32'"),
        ("resnet18", {"image_size": (32, 1.5)}, TypeError, "build: `image_size` expected a whole number, got 1.5"),
        ("resnet18", {"seed": "a"}, TypeError, "build: `seed` expected a whole number, got 'a'"),
        (
            "resnet18",
            {"normalize": ((0.5, 0.5), (0.5, 0.5))},
            ValueError,
            r"build: `normalize` expected \(mean, std\) of 1 or 3 numbers each, got lengths \[2, 2\]",
        ),
        ("digits_cnn", {"normalize": (0.5, 0.0)}, ValueError, r"build: `normalize: std` expected numbers above 0, got"),
        ("resnet18", {"normalize": "cifar10"}, TypeError, r"build: `normalize` expected a pair \(mean, std\)"),
        (5, {}, TypeError, "build: `name` expected text, got 5; pass one of digits_cnn"),
    ],
)
def test_errors(name: str, arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        models.build(name, **{"num_classes": 2, **arguments})


@pytest.mark.parametrize(
    ("name", "options", "image_size"),
    [
        ("preact_resnet18", {"channels": 1}, 32),
        ("resnet18", {"stem": "imagenet"}, 32),
        ("resnet18", {"stem": "cifar"}, 224),
        ("mobilenet_v2", {}, 32),
        ("digits_cnn", {}, 8),
    ],
)
def test_from_state_makes_a_model_to_measure(name: str, options: dict[str, Any], image_size: int) -> None:
    source = models.build(name, num_classes=7, seed=1, **options)
    model = models.from_state(name, source.state_dict(), image_size=image_size)
    load_into(model, source.state_dict())
    channels = source.state_dict()[next(iter(source.state_dict()))].shape[1]
    images = torch.rand(1, channels, 16, 16)
    assert torch.equal(model.eval()(images), source.eval()(images))


def test_from_state_errors() -> None:
    state = models.build("digits_cnn", num_classes=2).state_dict()
    with pytest.raises(ValueError, match=r"from_state: `name` expected one of .*, got 'vit_b_16'; use build"):
        models.from_state("vit_b_16", state)
    with pytest.raises(ValueError, match=r"`fc\.weight` of 2 dimensions for resnet18, got no such key among 20"):
        models.from_state("resnet18", state)
    with pytest.raises(ValueError, match=r"`conv1\.weight` of 4 dimensions .*, got \[2\]"):
        models.from_state("digits_cnn", {"conv1.weight": torch.ones(2)})


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r"torchvision.*pip install 'bdfast\[models\]'"):
        models.build("vit_b_16", num_classes=2)
    with pytest.raises(MissingExtraError, match=r"timm.*pip install 'bdfast\[models\]'"):
        models.build("timm:resnet26", num_classes=2)
    assert models.names(external=True) == models.names()


class Transformer(nn.Module):
    """Stands in for a library's model: one image size, RGB only."""

    def __init__(self, num_classes: int, image_size: Any = 224, channels: int = 3) -> None:
        super().__init__()
        self.conv_proj = nn.Conv2d(channels, 4, 8, 8, padding=2, bias=False)
        self.heads = nn.Sequential()
        self.heads.head = nn.Linear(4, num_classes)
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.conv_proj(images).mean((2, 3)))
        return logits


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A torchvision with two models; returns the calls that it gets."""
    calls: list[dict[str, Any]] = []

    def get_model(name: str, weights: object = "unset", **arguments: Any) -> nn.Module:
        assert weights is None
        calls.append({"name": name, **arguments})
        return Transformer(arguments["num_classes"], arguments.get("image_size"))

    package, zoo = ModuleType("torchvision"), ModuleType("torchvision.models")
    vars(zoo).update(get_model=get_model, list_models=lambda module: ["vit_b_16", "convnext_tiny"])
    vars(package).update(models=zoo)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", zoo)
    monkeypatch.setitem(sys.modules, "timm", None)
    return calls


def test_plain_transformers_have_the_names_of_the_benchmarks(torchvision: list[dict[str, Any]]) -> None:
    model = models.build("vit_b_16", num_classes=5, image_size=32)
    assert torchvision == [{"name": "vit_b_16", "num_classes": 5, "image_size": 224}]
    assert list(model.state_dict()) == ["1.conv_proj.weight", "1.heads.head.weight", "1.heads.head.bias"]
    images = torch.rand(2, 3, 32, 32)
    enlarged = nn.functional.interpolate(images, size=(224, 224), mode="bilinear")
    assert torch.equal(model(images), model[1](enlarged))  # type: ignore[index]
    assert torch.equal(torch.fx.symbolic_trace(model)(images), model(images))
    assert torch.equal(model(enlarged), model(images))


def test_shrinking_is_antialiased() -> None:
    checker = (torch.arange(448)[:, None] + torch.arange(448)).remainder(2).float()[None, None]
    inside = external.Resize((224, 224))(checker)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.5), atol=1e-5, rtol=0)


def test_prefixed_and_plain_names_go_to_the_library(torchvision: list[dict[str, Any]]) -> None:
    models.build("torchvision:vit_b_16", num_classes=5, image_size=32)
    models.build("convnext_tiny", num_classes=5, stochastic_depth_prob=0.2)
    assert torchvision == [
        {"name": "vit_b_16", "num_classes": 5, "image_size": 32},
        {"name": "convnext_tiny", "num_classes": 5, "stochastic_depth_prob": 0.2},
    ]
    assert models.names(external=True)[-2:] == ["torchvision:convnext_tiny", "torchvision:vit_b_16"]
    with pytest.raises(ValueError, match=r"an architecture of torchvision, got 'nothing'; see torchvision\.models"):
        models.build("torchvision:nothing", num_classes=5)
    with pytest.raises(ValueError, match=r"`image_size` expected a square for vit_b_16, got \(32, 48\)"):
        models.build("torchvision:vit_b_16", num_classes=5, image_size=(32, 48))


@pytest.mark.usefixtures("torchvision")
def test_torchvision_models_take_any_number_of_channels() -> None:
    model = models.build("torchvision:convnext_tiny", num_classes=5, channels=1)
    stem = model.conv_proj
    assert isinstance(stem, nn.Conv2d)
    assert (stem.in_channels, stem.stride, stem.padding, stem.bias) == (1, (8, 8), (2, 2), None)
    assert model(torch.rand(1, 1, 16, 16)).shape == (1, 5)


def test_timm_models_get_the_image_size_where_they_take_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def create_model(name: str, **arguments: Any) -> nn.Module:
        calls.append(arguments)
        if name == "resnet26" and "img_size" in arguments:
            raise TypeError("ResNet.__init__() got an unexpected keyword argument 'img_size'")
        if "wrong" in arguments:
            raise TypeError("got an unexpected keyword argument 'wrong'")
        return Transformer(arguments["num_classes"], channels=arguments["in_chans"])

    timm = ModuleType("timm")
    vars(timm).update(create_model=create_model, list_models=lambda: ["resnet26", "vit_tiny"])
    monkeypatch.setitem(sys.modules, "timm", timm)
    common = {"pretrained": False, "num_classes": 5, "in_chans": 1}
    models.build("timm:vit_tiny", num_classes=5, image_size=32, channels=1)
    models.build("timm:resnet26", num_classes=5, image_size=32, channels=1)
    assert calls == [{"img_size": (32, 32), **common}, {"img_size": (32, 32), **common}, common]
    with pytest.raises(TypeError, match="'wrong'"):
        models.build("timm:vit_tiny", num_classes=5, wrong=1)


def test_a_library_that_fails_at_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(external, "optional_import", fail)
    with pytest.raises(MissingExtraError, match=r"nms does not exist.*install the version that matches torch"):
        models.build("torchvision:resnet50", num_classes=2)
