"""clip_activations: which ReLUs it finds, what it computes, and that it leaves nothing behind."""

from __future__ import annotations

import copy
import math
import pickle
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bdfast import models
from bdfast.models import classifier_layers
from bdfast.nn import ClippedModel, ClippedReLU, clip_activations, normalized

STAGES = {
    "preact_resnet18": {"layer1.0.relu1": 64, "layer2.0.relu1": 64, "layer3.0.relu1": 128},
    "resnet18": {"relu": 64, "layer1.1.relu2": 64, "layer2.1.relu2": 128},
    "resnet34": {"relu": 64, "layer1.2.relu2": 64, "layer2.3.relu2": 128},
    "vgg19_bn": {"features.2": 64, "features.5": 64, "features.12": 128},
    "mobilenet_v2": {"features.0.2": 32, "features.2.conv.0.2": 96, "features.4.conv.0.2": 144},
    "digits_cnn": {"relu1": 32, "relu2": 64, "relu3": 64},
}
RELUS = {"preact_resnet18": 16, "resnet18": 17, "resnet34": 33, "vgg19_bn": 18, "mobilenet_v2": 35, "digits_cnn": 3}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network whose batch norms do something, and images for it."""
    channels = 1 if name == "digits_cnn" else 3
    size = 32 if name == "vgg19_bn" else 16
    model = models.build(name, num_classes=10, image_size=size, channels=channels, seed=0)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            shape = module.running_mean.shape  # type: ignore[union-attr]
            module.running_mean = 0.1 * torch.randn(shape, generator=generator)
            module.running_var = 0.5 + torch.rand(shape, generator=generator)
            module.bias.data = 0.1 * torch.randn(shape, generator=generator)
    return model.eval(), torch.rand(2, channels, size, size, generator=generator)


class Functional(nn.Module):
    """A PreAct block with functions where modules might be, as the benchmarks write it."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        if stride != 1:
            self.shortcut = nn.Conv2d(channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = F.dropout(self.conv1(out), 0.5, self.training)
        out = self.conv2(self.bn2(out).relu())
        out += shortcut
        return out


class FunctionalNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Functional(8, 1), Functional(8, 1))
        self.layer2 = nn.Sequential(Functional(8, 2))
        self.layer3 = nn.Sequential(Functional(8, 2))
        self.bn = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        features = torch.relu(self.bn(out)).mean((2, 3))
        if return_features:
            return features
        return self.linear(features)


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_the_networks(name: str) -> None:
    model, _ = build(name)
    with clip_activations(model) as clipped:
        assert {site: len(bound) for site, bound in clipped.bounds.items()} == STAGES[name]


def test_a_vgg_with_one_relu_before_its_first_pool_has_two_sites() -> None:
    """As VGG11 and AlexNet have."""
    model = nn.Sequential()
    model.features = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)),
    )
    images = torch.rand(2, 3, 8, 8)
    expected = model.eval()(images)
    with clip_activations(model) as clipped:
        assert {site: len(bound) for site, bound in clipped.bounds.items()} == {"features.2": 4, "features.5": 6}
        torch.testing.assert_close(clipped(images), expected)


@pytest.mark.parametrize("name", STAGES)
def test_infinite_bounds_change_nothing(name: str) -> None:
    model, images = build(name)
    with torch.no_grad():
        expected = model(images)
        for sites in ("stage-relu", "all-relu"):
            with clip_activations(model, sites, fuse=False) as clipped:  # type: ignore[arg-type]
                assert torch.equal(clipped(images), expected)
                assert len(clipped.sites) == (len(STAGES[name]) if sites == "stage-relu" else RELUS[name])
            with clip_activations(model, sites) as clipped:  # type: ignore[arg-type]
                assert (clipped(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(model(images), expected)


def output_at(model: nn.Module, path: str, call: nn.Module, images: Tensor) -> Tensor:
    """What the module at ``path`` of ``model`` returns while ``call`` runs."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, inputs, y: seen.append(y))
    call(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    ("name", "probe"), [("preact_resnet18", ""), ("resnet18", ""), ("mobilenet_v2", "features.4.conv.1")]
)
def test_clips_what_a_hook_would(name: str, probe: str, fuse: bool) -> None:
    """In our networks every ReLU is a module called once: hooks that clip their outputs say what is right."""
    model, images = build(name)
    handles = []
    for site in STAGES[name]:
        relu = model.get_submodule(site)
        handles.append(relu.register_forward_hook(lambda module, inputs, y: y.clamp(max=0.1)))
    with torch.no_grad():
        expected = output_at(model, probe, model, images)
        for handle in handles:
            handle.remove()
        assert not torch.allclose(output_at(model, probe, model, images), expected, rtol=0.1)
        with clip_activations(model, bound=0.1, fuse=fuse) as clipped:
            torch.testing.assert_close(output_at(model, probe, clipped, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_of_bounds(fuse: bool) -> None:
    """Against finite differences of the loss in float64, for frozen and for trainable weights."""
    model, images = build("digits_cnn")
    model, images = model.double(), images.double()
    for frozen in (True, False):
        model.requires_grad_(not frozen)
        with clip_activations(model, bound=0.4, fuse=fuse) as clipped:
            clipped.double()
            bound = clipped.bounds["relu2"]
            clipped(images).square().sum().backward()
            assert bound.grad is not None
            channel, step = int(bound.grad.abs().argmax()), 1e-6
            with torch.no_grad():
                losses = []
                for sign in (1, -1):
                    bound[channel] += sign * step
                    losses.append(clipped(images).square().sum())
                    bound[channel] -= sign * step
            assert bound.grad[channel] != 0
            assert bound.grad[channel] == pytest.approx(float(losses[0] - losses[1]) / (2 * step), rel=1e-4)
            assert (model.linear.weight.grad is None) == frozen  # type: ignore[union-attr]


def test_functional_relus_of_every_spelling() -> None:
    model = FunctionalNet().eval()
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        with clip_activations(model, "all-relu") as clipped:
            names = [f"layer{k}.relu:{n}" for k in ("1.0", "1.1", "2.0", "3.0") for n in (1, 2)]
            assert list(clipped.sites) == [*names, "relu"]
            torch.testing.assert_close(clipped(images), expected)
            clipped.bounds["relu"].zero_()
            assert torch.equal(clipped(images), model.linear.bias.expand(2, 5))
        assert torch.equal(model(images), expected)
    with clip_activations(model) as clipped:
        assert list(clipped.sites) == ["layer1.0.relu:1", "layer2.0.relu:1", "layer3.0.relu:1"]


def test_a_module_that_a_block_calls_twice_is_two_sites() -> None:
    """As in torchvision's ResNet: one in-place ReLU a block, and a forward that delegates."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn2(self.conv2(out))
            out += x
            return self.relu(out)

    class ResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
            self.layer1, self.layer2, self.layer3 = (nn.Sequential(Block(), Block()) for _ in range(3))
            self.fc = nn.Linear(8, 2)

        def _forward_impl(self, x: Tensor) -> Tensor:
            x = self.layer3(self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x))))))
            return self.fc(x.mean((2, 3)))

        def forward(self, x: Tensor) -> Tensor:
            return self._forward_impl(x)

    model, images = ResNet().eval(), torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images)
        with clip_activations(model) as clipped:
            assert list(clipped.sites) == ["relu", "layer1.1.relu:2", "layer2.1.relu:2"]
            torch.testing.assert_close(clipped(images), expected)
        with clip_activations(model, ["layer3.0.relu", "layer1.0.relu:2"]) as clipped:  # both calls, and one
            assert list(clipped.sites) == ["layer1.0.relu:2", "layer3.0.relu:1", "layer3.0.relu:2"]


def test_each_spelling_is_found() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU(inplace=True)
            self.six = nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(x - 1) + F.relu(input=x - 2, inplace=True) + torch.relu(x - 3) + (x - 4).relu()
            b = torch.relu_(x - 5) + (x - 6).relu_() + F.relu_(x - 7) + self.act(x - 8) + self.act(x - 9)
            return a + b + self.six(x) + F.relu6(x + 1)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Spelled())
    images = 100 * torch.rand(2, 3, 2, 2)
    example = torch.rand(1, 3, 2, 2)
    with torch.no_grad(), clip_activations(model, "all-relu", example=example) as clipped:
        assert len(clipped.sites) == 11
        assert {"1.act:1", "1.act:2", "1.six"} < set(clipped.sites)
        assert [clip.ceiling for clip in clipped.sites.values()].count(6.0) == 2
        assert {tuple(bound.shape) for bound in clipped.bounds.values()} == {(4,)}
        expected = clipped(images)
        for bound in clipped.bounds.values():
            bound.zero_()
        assert torch.equal(clipped(images), torch.zeros_like(expected))
    with torch.no_grad():
        assert torch.equal(model(images), expected)


def test_who_reads_an_overwritten_input_reads_the_activation() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            before = x + 1
            self.act(x)
            return x + before

    model, images = Overwriting(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        expected = model(images)
        with clip_activations(model, "all-relu") as clipped:
            assert torch.equal(clipped(images), expected)
            clipped.bounds["act"].zero_()
            assert torch.equal(clipped(images), model.conv(images) + 1)


def test_batch_norm_that_others_read_is_not_joined() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(x)
            return F.relu(x) + x

    model, images = Shared().eval(), torch.randn(2, 3, 4, 4)
    with torch.no_grad(), clip_activations(model, bound=0.0) as clipped:
        assert torch.equal(clipped(images), model.bn(images))


def test_relus_in_a_row() -> None:
    """The second finds a clip where a layer was expected."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu6(F.relu(self.conv(x)) * 1.0).relu().relu()

    model, images = Twice().eval(), torch.rand(2, 3, 4, 4)
    expected = model(images)
    with clip_activations(model, "all-relu") as clipped:
        assert list(clipped.bounds) == ["relu:1", "relu:2", "relu:3", "relu:4"]
        assert torch.equal(clipped(images), expected)
    with clip_activations(model, ["relu:3", "relu:4"], bound=0.0) as clipped:
        assert torch.equal(clipped(images), torch.zeros_like(expected))


class Output:
    def __init__(self, logits: Tensor, features: list[Tensor]) -> None:
        self.logits = logits
        self.features = features


class Mapped(OrderedDict[str, Any]):
    """A mapping that has its items as attributes, as transformers' ModelOutput."""

    @property
    def logits(self) -> Tensor:
        return cast(Tensor, self["logits"])

    @property
    def features(self) -> list[Tensor]:
        return cast(list[Tensor], self["features"])


@pytest.mark.parametrize(
    "kind",
    [
        lambda z, h: SimpleNamespace(logits=z, features=[h]),
        lambda z, h: Output(z, [h]),
        lambda z, h: Mapped(logits=z, features=[h]),
    ],
)
def test_a_forward_that_returns_an_object(kind: Any) -> None:
    """Outputs with ``.logits`` that the same forward makes: torch.fx knows data classes, and of mappings dict alone."""

    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            h = F.relu(self.conv(x))
            return kind(self.head(h.mean((2, 3))), h)

    model, images = Labelled().eval(), torch.rand(2, 3, 4, 4)
    expected = model(images)
    with clip_activations(model) as clipped:
        output = clipped(images)
        assert type(output) is type(expected)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(output.features[0], expected.features[0])
    with clip_activations(model, bound=0.0) as clipped:
        assert torch.equal(clipped(images).logits, model.head.bias.expand(2, 2))


def test_training_mode_follows_the_model() -> None:
    """Dropout and batch norm of a rewritten block: each mode has a forward of its own."""
    model, images = FunctionalNet().eval(), torch.rand(4, 3, 8, 8)
    twin = copy.deepcopy(model)
    with clip_activations(model, "all-relu") as clipped:
        for training in (True, False, True):
            clipped.train(training)
            twin.train(training)
            torch.manual_seed(3)
            expected = twin(images)
            torch.manual_seed(3)
            torch.testing.assert_close(clipped(images), expected)
        for a, b in zip(model.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def test_nothing_is_left_behind() -> None:
    model, images = build("preact_resnet18")
    model.train()
    model.layer2.eval()  # type: ignore[union-attr]
    model.layer1[0].relu1.register_forward_hook(lambda *_: None)  # type: ignore[index,union-attr]
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    modes = [module.training for module in model.modules()]
    storage, rng = {key: value.data_ptr() for key, value in model.state_dict().items()}, torch.get_rng_state()
    for sites in ("stage-relu", "all-relu"):
        clipped = clip_activations(model, sites)  # type: ignore[arg-type]
        assert [module.training for module in model.modules()] == modes
        assert {key: value.data_ptr() for key, value in model.state_dict().items()} == storage
        assert clipped.remove() is model
        assert clipped.remove() is model
        assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="while clipped"), clip_activations(model):
        raise ValueError("while clipped")
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(RuntimeError, match=r"ClippedModel: `self` expected clips in place, got removed ones"):
        clipped(images)


def test_state_dict_round_trip() -> None:
    model, images = build("resnet18")
    clipped = clip_activations(model, bound=1.0)
    for k, bound in enumerate(clipped.bounds.values()):
        bound.data.fill_(0.2 + 0.1 * k)
    state = {name: value.clone() for name, value in clipped.state_dict().items()}
    extra = {f"clips.{site}.bound" for site in STAGES["resnet18"]}
    assert set(state) == set(model.state_dict()) | extra
    other = clip_activations(models.build("resnet18", num_classes=10, image_size=16, seed=7).eval())
    other.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert torch.equal(other(images), clipped(images))
    del state["clips.relu.bound"]
    with pytest.raises(RuntimeError, match=r"Missing key.*clips\.relu\.bound"):
        other.load_state_dict(state)


def test_copies_are_independent() -> None:
    model, images = build("digits_cnn")
    clipped = clip_activations(model, bound=0.5)
    twin = copy.deepcopy(clipped)
    with torch.no_grad():
        expected = clipped(images)
        assert torch.equal(twin(images), expected)
        for bound in twin.bounds.values():
            bound.zero_()
        twin.model.linear.weight.zero_()  # type: ignore[union-attr,operator]
        assert torch.equal(clipped(images), expected)
        assert torch.equal(twin(images), twin.model(images))
        twin.remove()
        assert torch.equal(clipped(images), expected)


def test_pickling_would_lose_the_clips() -> None:
    model, _ = build("digits_cnn")
    with clip_activations(model), pytest.raises(TypeError, match=r"a clipped one; save its state_dict\(\)"):
        pickle.dumps(model)
    pickle.dumps(model)


def test_the_model_shows_through() -> None:
    model, images = build("vgg19_bn")
    outer = normalized(model, 0.5, 0.5).eval()
    with torch.no_grad():
        expected = outer(images)
        clipped = clip_activations(outer, "all-relu")
        assert isinstance(clipped, ClippedModel)
        assert all(isinstance(clip, ClippedReLU) for clip in clipped.sites.values())
        torch.testing.assert_close(clipped(images), expected)
    assert list(clip_activations(clipped.remove()).sites) == [f"model.{site}" for site in STAGES["vgg19_bn"]]
    assert clipped.classifier is model.classifier
    assert clipped.get_submodule("classifier.6") is model.classifier[6]  # type: ignore[index]
    assert [layer for _, layer in classifier_layers(clipped)] == [layer for _, layer in classifier_layers(model)]


def test_compiles_without_graph_break() -> None:
    model, images = FunctionalNet().eval(), torch.rand(2, 3, 8, 8)
    with clip_activations(model, "all-relu", bound=0.3) as clipped:
        expected = clipped(images)
        torch.testing.assert_close(torch.compile(clipped, backend="aot_eager", fullgraph=True)(images), expected)


def test_bounds_are_on_the_device_of_the_model_and_move_with_it() -> None:
    model = models.build("digits_cnn", num_classes=4).to("meta")
    clipped = clip_activations(model)
    assert {bound.device.type for bound in clipped.bounds.values()} == {"meta"}
    assert {bound.dtype for bound in clipped.to(torch.bfloat16).bounds.values()} == {torch.bfloat16}


class Deciding(nn.Module):
    """Cannot be traced: the way depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return F.relu(x - 1) if x.mean() > 0 else x


def test_one_opaque_block_does_not_hide_the_others() -> None:
    model, images = Deciding(), torch.rand(2, 3, 4, 4)
    with torch.no_grad(), clip_activations(model, ["inner.1"], bound=0.0) as clipped:
        assert torch.equal(clipped(images), torch.zeros(2, 4, 4, 4))
    text = (
        r"got a Deciding with ReLUs inner\.1, and more in forwards that torch\.fx cannot trace: the model itself \(Tr"
    )
    with pytest.raises(ValueError, match=text):
        clip_activations(model, "all-relu")


class Anonymous(nn.Module):
    """An activation of someone's own making: nothing tells its channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_channels_that_only_a_run_tells() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Anonymous(), nn.Conv2d(4, 2, 1)).train()
    with pytest.raises(ValueError, match=r"`example` expected a batch, because the channels of 1\.relu cannot be read"):
        clip_activations(model)
    with clip_activations(model, bound=2.0, example=torch.rand(1, 3, 4, 4)) as clipped:
        assert clipped.bounds["1.relu"].tolist() == [2.0] * 4
        assert clipped.bounds["1.relu"].requires_grad
        assert all(module.training for module in clipped.modules())
    with pytest.raises(RuntimeError):
        clip_activations(model, example=torch.rand(1, 5, 4, 4))
    clip_activations(model, example=torch.rand(1, 3, 4, 4)).remove()  # the failure left nothing behind


def plain_network(relus: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(relus) for layer in (nn.Conv2d(3, 3, 1), nn.ReLU())))


@pytest.mark.parametrize(("relus", "places"), [(4, [0, 1, 2]), (5, [0, 1, 2]), (8, [0, 2, 4]), (17, [0, 4, 8])])
def test_a_network_without_stages_is_clipped_as_far_in(relus: int, places: list[int]) -> None:
    """17 are as many as a ResNet-18 has, whose sites are these."""
    with pytest.warns(UserWarning, match="finds no stages that it knows in a Sequential and takes 1, ") as told:
        clipped = clip_activations(plain_network(relus))
    assert list(clipped.sites) == [str(2 * place + 1) for place in places]
    assert told[0].filename == __file__


@pytest.mark.parametrize(
    ("sites", "options", "text"),
    [
        (["relu9"], {}, r"clip_activations: `sites` expected names of ReLUs, not 'relu9', got a DigitsCNN with ReLUs "
                        r"relu1, relu2, relu3; correct the names"),
        ("relu1", {}, "`sites` expected .*\"all-relu\" or a list of names, got 'relu1'; choose among relu1, relu2"),
        ([], {}, r"`sites` expected .* got \[\]"),
        (7, {}, r"`sites` expected .* got 7"),
        ("stage-relu", {"bound": -1.0}, "`bound` expected a number >= 0, got -1.0"),
        ("stage-relu", {"bound": math.nan}, "`bound` expected a number >= 0, got nan"),
    ],
)  # fmt: skip
def test_errors_of_arguments(sites: Any, options: dict[str, Any], text: str) -> None:
    model, _ = build("digits_cnn")
    with pytest.raises(ValueError, match=text):
        clip_activations(model, sites, **options)


@pytest.mark.parametrize("bound", ["1", None, True, torch.tensor(1.0)])
def test_a_bound_that_is_no_number(bound: Any) -> None:
    model, _ = build("digits_cnn")
    with pytest.raises(TypeError, match="clip_activations: `bound` expected a number, got"):
        clip_activations(model, bound=bound)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_errors_of_the_model() -> None:
    with pytest.raises(TypeError, match=r"`model` expected a torch\.nn\.Module, got function"):
        clip_activations(lambda x: x)  # type: ignore[arg-type]
    scripted = torch.jit.trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="expected a module with Python forwards, got a TorchScript one; clip it"):
        clip_activations(scripted)
    smooth = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GELU())
    for sites in ("stage-relu", "all-relu"):
        with pytest.raises(ValueError, match="got a Sequential with ReLUs none"):
            clip_activations(smooth, sites)  # type: ignore[arg-type]
    deep = plain_network(5)
    clipped = clip_activations(deep, "all-relu")
    for again in (deep, clipped):
        with pytest.raises(ValueError, match="`model` expected one without clips, got a clipped one"):
            clip_activations(again, "all-relu")
    clipped.remove()
    deep.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="got another one set on `Sequential`; unwrap the model"):
        clip_activations(deep, "all-relu")
