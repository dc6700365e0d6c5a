"""Batch norms fused with what follows them: the same training."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bdfast
from bdfast.backends.availability import runs_cpp, runs_triton
from bdfast.nn.normalize import normalized
from bdfast.optim import SAM
from bdfast.training import TrainConfig, fused_norms, parallel, train_classifier
from bdfast.training.fused_norms import NormChain, fuse
from bdfast.training.loop import set_training_mode


@pytest.fixture(autouse=True)
def _reference_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "_REFERENCE_TOO", True)


def chains(model: nn.Module) -> list[NormChain]:
    return [module for module in model.modules() if isinstance(module, NormChain)]


class TorchvisionBlock(nn.Module):
    """A ReLU that is used twice, in place, and an addition in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.downsample = shortcut if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def torchvision_like() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    blocks = nn.Sequential(TorchvisionBlock(4, 4, 1), TorchvisionBlock(4, 6, 2))
    return nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 10))


class Functions(nn.Module):
    """Additions and ReLUs of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3, eps=1e-3, momentum=0.3) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norms[0](x), inplace=True)
        b = torch.relu(torch.add(a, self.norms[1](a)))
        c = self.norms[2](b).add_(x).relu_()
        d = self.norms[3](c).add(self.norms[4](x)).relu()
        e = self.norms[5](d)
        return (e + F.relu(e)).mean((2, 3))  # two readers: the batch norm alone


def built(name: str, size: int = 16) -> Callable[[], nn.Module]:
    return lambda: bdfast.models.build(name, num_classes=10, image_size=size, seed=0)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (built("resnet18"), 20),
    "preact_resnet18": (built("preact_resnet18"), 16),
    "mobilenet_v2": (built("mobilenet_v2", 64), 52),
    "vgg19_bn": (built("vgg19_bn", 32), 16),
    "torchvision": (torchvision_like, 6),
    "functions": (Functions, 6),
    "normalized": (lambda: normalized(torchvision_like(), (0.5,) * 3, (0.25,) * 3), 6),
}


def images(name: str, batch: int) -> Tensor:
    size = 64 if name == "mobilenet_v2" else 32 if name == "vgg19_bn" else 16
    return torch.rand(batch, 3, size, size)


def step(forward: nn.Module, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(1)  # dropout
    model.zero_grad()
    output = forward(x)
    loss = F.cross_entropy(output, torch.arange(len(x)) % output.shape[1])
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), [p.grad for p in model.parameters()]


def assert_alike(found: list[Any], expected: list[Any], rounding: float = 1e-3) -> None:
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=rounding, atol=rounding * float(b.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_trains_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, since batch norms of few values amplify what float32 makes of another order of sums."""
    monkeypatch.setattr(fused_norms, "_DTYPES", (torch.float64,))
    calls: list[int] = []
    op = fused_norms.batch_norm_relu
    monkeypatch.setattr(fused_norms, "batch_norm_relu", lambda *a, **k: [calls.append(1), op(*a, **k)][1])
    make, count = MODELS[name]
    model = make().double()
    twin, fused = copy.deepcopy(model), fuse(model)
    assert len(chains(fused)) == count == sum(type(m) is nn.BatchNorm2d for m in model.modules())
    names = list(model.state_dict())
    x = images(name, 7).double()
    loss, grads = step(fused, model.train(), x)
    assert len(calls) == count
    expected, expected_grads = step(twin, twin.train(), x)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert_alike(grads, expected_grads, 1e-6)
    assert_alike(list(model.buffers()), list(twin.buffers()), 1e-9)
    assert list(model.state_dict()) == names
    assert not chains(model)


@pytest.mark.parametrize("name", MODELS)
def test_eval_mode_and_frozen_statistics_are_as_they_were(name: str) -> None:
    model = MODELS[name][0]()
    twin, fused = copy.deepcopy(model), fuse(model)
    x = images(name, 2)
    for net in (model, twin):
        net.eval()
    assert torch.equal(fused(x), twin(x))
    for net in (model, twin):
        set_training_mode(net, "frozen")
    loss, grads = step(fused, model, x)
    expected, expected_grads = step(twin, twin, x)
    assert torch.equal(loss, expected)
    for got, wanted in zip(grads, expected_grads, strict=True):
        assert got is wanted is None or torch.equal(got, wanted)  # type: ignore[arg-type]
    for got, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(got, wanted)


def test_frozen_parameters_get_no_gradient() -> None:
    model = torchvision_like()
    fused = fuse(model)
    model[0].requires_grad_(False)  # type: ignore[index]
    _, grads = step(fused, model.train(), images("", 5))
    assert [grad is None for grad in grads] == [not p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("backend", ["cpp", "triton"])
def test_the_kernels_train_alike(backend: str) -> None:
    reason = {"cpp": runs_cpp, "triton": runs_triton}[backend](torch.empty(0))
    if reason is not None:
        pytest.skip(reason)
    model = Functions().train()
    twin, fused = copy.deepcopy(model), fuse(model)
    x = images("", 3)[:, :, :5, :7].contiguous(memory_format=torch.channels_last)
    with bdfast.backend(backend):
        loss, grads = step(fused, model, x)
    expected, expected_grads = step(twin, twin, x)
    torch.testing.assert_close(loss, expected)
    assert_alike(grads, expected_grads)
    assert_alike(list(model.buffers()), list(twin.buffers()))


def test_both_passes_of_sam() -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10))
        x = images("", 5)
        model(x)
        forward = fuse(model) if fused else model
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
        step(forward, model, x)
        with optimizer.perturbed():
            step(forward, model, x)
        optimizer.step()
        results.append([*model.parameters(), *model.buffers()])
    assert_alike(*results)


def test_a_dtype_that_the_op_does_not_take_runs_as_it_was() -> None:
    model = Functions().double()
    twin, fused = copy.deepcopy(model), fuse(model)
    x = images("", 3).double()
    assert torch.equal(fused(x), twin(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fuse(nn.BatchNorm2d(3))(torch.rand(1, 3, 1, 1))


class Decides(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean() > 0 else -x)


class LooksAtItsMode(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.5, self.training))


class Remembers(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        self.features = super().forward(x)
        return self.features


class Draws(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * random.random())


class Makes(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.ones(1)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Decides, "torch.fx: TraceError"),
        (LooksAtItsMode, "differs in training mode"),
        (Remembers, "the forward of Remembers changes its attributes"),
        (Draws, "draws random numbers on the host"),
        (Makes, "makes tensors that do not depend on its input"),
    ],
)
def test_what_is_no_graph_stays(kind: type[nn.Sequential], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    model = kind(nn.BatchNorm2d(3), nn.ReLU())
    model[0].eval()
    before = dict(vars(model))
    with caplog.at_level(logging.INFO, logger="bdfast"):
        assert fuse(model) is model
    assert reason in caplog.text
    assert vars(model).keys() == before.keys()
    assert [m.training for m in model.modules()] == [True, False, True]


def test_hooks_and_other_results_keep_the_network_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    with caplog.at_level(logging.INFO, logger="bdfast"):
        assert fuse(model, lambda _: False) is model
        model[1].register_forward_hook(lambda *_: None)
        assert fuse(model) is model
    assert "computes something else" in caplog.text
    assert "modules have hooks" in caplog.text
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None))
    assert fuse(plain) is plain


class Shared(nn.Module):
    """A batch norm that is called twice, and one whose input changes before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.norm = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(x))
        y = self.norm(h)
        return y + h.mul_(2)


def test_what_would_change_meaning_is_left_out() -> None:
    model = Shared().eval()
    twin, fused = copy.deepcopy(model), fuse(model)
    assert isinstance(fused, fx.GraphModule)
    (chain,) = chains(fused)
    assert chain.norm is model.norm
    x = images("", 2)
    with torch.no_grad():
        assert torch.equal(fused(x), twin(x))


def test_training_takes_the_fused_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loop; the trained model is the caller's own."""
    made: list[nn.Module] = []

    def forward(model: nn.Module, ranks: Any, compiled: bool, same: Any) -> nn.Module:
        made.append(parallel.training_forward(model, ranks, compiled, same))
        return made[-1]

    data = torch.rand(22, 3, 8, 8), torch.arange(22) % 10
    config = TrainConfig(epochs=2, batch_size=8, lr=0.05, augment="none")
    states = []
    for fused in (False, True):
        monkeypatch.setattr(fused_norms, "_ENABLED", fused)
        if fused:
            monkeypatch.setattr("bdfast.training.workspace.training_forward", forward)
        torch.manual_seed(0)
        states.append(train_classifier(torchvision_like(), data, config).model.state_dict())
    assert len(chains(made[0])) == 6
    assert list(states[0]) == list(states[1])
    assert_alike(list(states[1].values()), list(states[0].values()), 5e-3)


def test_on_a_cpu_too_but_not_in_several_processes_or_compiled() -> None:
    model = torchvision_like()
    assert len(chains(parallel.training_forward(model, bdfast.runtime.ranks.ALONE, False))) == 6
    assert not chains(parallel.training_forward(model, bdfast.runtime.ranks.ALONE, True))


def test_where_the_op_has_no_kernel_the_chain_runs_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_norms, "_REFERENCE_TOO", False)
    monkeypatch.setattr(fused_norms, "batch_norm_relu", lambda *_, **__: pytest.fail("called"))
    model = torchvision_like().train()
    twin, fused = copy.deepcopy(model), fuse(model)
    x = images("", 5)
    with bdfast.backend("reference"):
        loss, grads = step(fused, model, x)
    expected, expected_grads = step(twin, twin, x)
    torch.testing.assert_close(loss, expected)
    assert_alike(grads, expected_grads)
