"""A frozen copy computes what the model computes, forward and backward, and leaves the model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import bdfast
from bdfast.runtime import FrozenModel
from bdfast.runtime.folding import fold

SIZES = {"digits_cnn": (1, 8), "resnet18": (3, 32), "preact_resnet18": (3, 32), "mobilenet_v2": (3, 32)}


def trained_statistics(model: nn.Module, x: Tensor) -> nn.Module:
    """Batch norms with means, variances and weights that are not those of a fresh layer."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    model.train()(x)
    return model.eval()


def loss(logits: Tensor) -> Tensor:
    return logits.logsumexp(1) - logits[:, 0]


def plain(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    losses = loss(logits)
    (grad,) = torch.autograd.grad(losses.sum(), leaf)
    return logits.detach(), losses.detach(), grad


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


class Residual(nn.Module):
    """The convolution's output is read twice: by its batch norm and by the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((y + self.norm(y)).mean((2, 3)))


class Branching(nn.Module):
    """No tracer goes through it; layers follow each other all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.again, self.other = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() < 0:
            x = -x
        y = self.again(torch.relu(self.norm(self.conv(x))))
        return self.head((y + self.other(y)).mean((2, 3)))


@pytest.mark.parametrize("name", SIZES)
def test_same_logits_losses_and_gradients(name: str) -> None:
    channels, size = SIZES[name]
    x = torch.rand(6, channels, size, size)
    model = trained_statistics(bdfast.models.build(name, num_classes=5, image_size=size, seed=0), x)
    logits, losses, grad = plain(model, x)
    with FrozenModel(model) as frozen:
        torch.testing.assert_close(frozen.logits(x), logits, rtol=1e-3, atol=1e-4)
        got_losses, got = frozen.input_gradient(x, loss)
    torch.testing.assert_close(got_losses, losses, rtol=1e-3, atol=1e-4)
    assert got.shape == x.shape
    # A unit at the kink of a ReLU may take the other side: the direction tells, not the last bit.
    assert cosine(got, grad) > 0.999
    kept = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(frozen.report.folded) + len(frozen.report.fused) == kept
    assert frozen.report.method == "graph"


def test_preact_keeps_what_reads_a_sum() -> None:
    x = torch.rand(2, 3, 32, 32)
    model = trained_statistics(bdfast.models.build("preact_resnet18", num_classes=5, seed=0), x)
    _, report = fold(copy.deepcopy(model), x)
    assert set(report.folded) == {f"layer{i}.{j}.bn2" for i in (1, 2, 3, 4) for j in (0, 1)}
    assert set(report.fused) == {f"layer{i}.{j}.bn1" for i in (1, 2, 3, 4) for j in (0, 1)}


def test_bfloat16_is_close_and_returns_float32() -> None:
    x = torch.rand(6, 3, 32, 32)
    model = trained_statistics(bdfast.models.build("preact_resnet18", num_classes=5, seed=0), x)
    logits, _, grad = plain(model, x)
    with FrozenModel(model, precision="bf16") as frozen:
        got = frozen.logits(x)
        _, got_grad = frozen.input_gradient(x, loss)
    assert got.dtype == got_grad.dtype == torch.float32
    assert float((got - logits).norm() / logits.norm()) < 0.03
    assert cosine(got_grad, grad) > 0.9


def test_bfloat16_begins_behind_the_first_layer() -> None:
    """0.5 + 1/512 is no bfloat16 and would be rounded to 0.5; so would the mean be."""
    x = torch.full((2, 1, 2, 2), 0.5 + 1 / 512)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 1, bias=False), nn.ReLU(), nn.Linear(1, 2, bias=False))
    for p in model.parameters():
        nn.init.ones_(p)
    for normalize, expected in ((None, 2 + 4 / 512), ((0.5 - 1 / 512, 1.0), 4 / 256)):
        with FrozenModel(model, precision="bf16", normalize=normalize) as frozen:
            assert torch.equal(frozen.logits(x), torch.full((2, 2), expected).bfloat16().float())


def test_bfloat16_images_that_are_read_twice() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.conv(x)).flatten(1))

    x, model = torch.rand(4, 2, 4, 4), Skip()
    with FrozenModel(model, precision="bf16") as frozen:
        torch.testing.assert_close(frozen.logits(x), model(x).detach(), rtol=0.05, atol=0.05)
        frozen.input_gradient(x, loss)


@pytest.mark.parametrize("network", [Residual, Branching])
def test_a_layer_that_is_read_twice_is_not_merged(network: type[nn.Module]) -> None:
    x = torch.rand(4, 2, 6, 6)
    model = trained_statistics(network(), x)
    logits, _, grad = plain(model, x)
    with FrozenModel(model) as frozen:
        torch.testing.assert_close(frozen.logits(x), logits)
        torch.testing.assert_close(frozen.input_gradient(x, loss)[1], grad)
    if network is Branching:
        assert frozen.report.method == "pairs"
        assert frozen.report.folded == ("norm",)
        assert "something else" in frozen.report.kept["other"]
        assert "torch.fx" in frozen.report.reason
    else:
        assert "something else reads" in frozen.report.kept["norm"]


def test_a_layer_that_runs_twice_is_not_merged() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.layer(torch.relu(self.layer(x.flatten(1))))))

    x = torch.rand(5, 1, 2, 2)
    model = trained_statistics(Twice(), x)
    with FrozenModel(model) as frozen:
        torch.testing.assert_close(frozen.logits(x), model(x).detach())
    assert frozen.report.folded == ()


def test_batch_norm_without_statistics_or_with_hooks_stays() -> None:
    x = torch.rand(4, 2, 5, 5)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3),
        nn.Flatten(),
    ).eval()  # fmt: skip
    model[3].register_forward_hook(lambda module, inputs, output: 2 * output)
    with FrozenModel(model) as frozen:
        torch.testing.assert_close(frozen.logits(x), model(x).detach())
    assert "frozen statistics" in frozen.report.kept["1"]
    assert "hooks" in frozen.report.kept["3"]


def test_normalization_outside_the_model() -> None:
    x = torch.rand(3, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    expected = model((x - 0.5) / 0.25).detach()
    with FrozenModel(model, normalize=(0.5, 0.25)) as frozen:
        torch.testing.assert_close(frozen.logits(x), expected)


def test_the_callers_model_is_left_alone() -> None:
    x = torch.rand(4, 3, 32, 32)
    model = bdfast.models.build("preact_resnet18", num_classes=5, seed=0)
    model.conv1.weight.requires_grad_(False)
    model.linear.weight.grad = torch.ones_like(model.linear.weight)
    before = copy.deepcopy(model.state_dict())
    flags = [(p.requires_grad, p.grad is not None, p.stride()) for p in model.parameters()]

    def fails(logits: Tensor) -> Tensor:
        raise KeyError("no loss")

    with FrozenModel(model, precision="bf16") as frozen:
        frozen.logits(x)
        with pytest.raises(KeyError):
            frozen.input_gradient(x, fails)
    assert model.training
    assert all(module.training for module in model.modules())
    assert flags == [(p.requires_grad, p.grad is not None, p.stride()) for p in model.parameters()]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_copy_does_not_follow_the_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(3, 1, 2, 2)
    with FrozenModel(model) as frozen:
        before = frozen.logits(x)
        nn.init.zeros_(model[1].weight)
        assert torch.equal(frozen.logits(x), before)


def test_inside_inference_mode_and_autocast() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = torch.rand(3, 1, 2, 2)
    with FrozenModel(model) as frozen:
        expected = frozen.input_gradient(x, loss)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert all(map(torch.equal, frozen.input_gradient(x, loss), expected))
        logits = frozen.logits(x)
        assert not logits.requires_grad
        assert not logits.is_inference()  # it may enter a loss


def test_channels_last_and_double_inputs_come_back_as_they_were() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2))
    x = torch.rand(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    with FrozenModel(model) as frozen:
        _, grad = frozen.input_gradient(x, loss)
        _, double = frozen.input_gradient(x.double().contiguous(), loss)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    assert double.dtype == torch.float64
    assert double.is_contiguous()


def test_output_with_logits() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Output:
            return Output(self.linear(x.flatten(1)))

    x, model = torch.rand(3, 1, 2, 2), Wrapped()
    with FrozenModel(model) as frozen:
        torch.testing.assert_close(frozen.logits(x), model(x).logits.detach())


@pytest.mark.parametrize(
    ("x", "pattern"),
    [
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), r"`x` expected float images.*got torch.uint8 \[2, 1, 2, 2\]"),
        (torch.zeros(2, 4), r"`x` expected float images \[N, C, H, W\], got torch.float32 \[2, 4\]"),
    ],
)
def test_wrong_images(x: Tensor, pattern: str) -> None:
    with FrozenModel(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))) as frozen, pytest.raises(ValueError, match=pattern):
        frozen.logits(x)


def test_errors() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(3, 1, 2, 2)
    with pytest.raises(TypeError, match=r"`model` expected a torch.nn.Module, got int"):
        FrozenModel(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`precision` expected fp32 or bf16, got 'fp8'"):
        FrozenModel(model, precision="fp8")  # type: ignore[arg-type]
    with FrozenModel(model) as frozen, pytest.raises(ValueError, match=r"`loss_function` expected losses \[3\], got"):
        frozen.input_gradient(x, lambda logits: logits.sum())
    with FrozenModel(nn.Flatten(0)) as frozen, pytest.raises(ValueError, match=r"`model` expected an output of logits"):
        frozen.logits(x)
    with FrozenModel(model) as frozen:
        pass
    with pytest.raises(RuntimeError, match="`self` expected an open model"):
        frozen.logits(x)
    model.register_buffer("state", torch.ones(1, requires_grad=True) * 2)
    with pytest.raises(ValueError, match=r"copy.deepcopy can copy, got RuntimeError"):
        FrozenModel(model)
