"""hinge_cross_entropy: hand-computed values, gradients, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import bdfast
from bdfast.backends import BackendUnavailableError
from bdfast.errors import LabelRangeError
from bdfast.ops import hinge_cross_entropy

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
TARGET = torch.tensor([0, 2])
CE_0 = math.log(1 + 2 * math.exp(-2))  # 0.2395
CE_1 = math.log(3)  # 1.0986


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"margin": 0.0, "reduction": "none"}, [CE_0, CE_1]),
        ({"margin": 0.5, "reduction": "none"}, [0.0, CE_1 - 0.5]),
        ({"margin": 0.5, "reduction": "mean"}, (CE_1 - 0.5) / 2),
        ({"margin": 0.5, "reduction": "sum"}, CE_1 - 0.5),
        ({"margin": 0.5, "hinge": "batch"}, (CE_0 + CE_1) / 2 - 0.5),
        ({"margin": 5.0, "hinge": "batch"}, 0.0),
    ],
)
def test_by_hand(backend: str, options: dict[str, Any], expected: float | list[float]) -> None:
    loss = hinge_cross_entropy(LOGITS, TARGET, backend=backend, **options)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("reduction", "hinge"), [("none", "sample"), ("sum", "sample"), ("mean", "sample"), ("mean", "batch")]
)
def test_gradcheck_of_reference(reduction: Any, hinge: Any) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    assert torch.autograd.gradcheck(lambda z: hinge_cross_entropy(z, target, 0.7, reduction, hinge), logits)


def test_margin_zero_is_cross_entropy() -> None:
    logits = torch.randn(64, 10)
    target = torch.randint(10, (64,))
    torch.testing.assert_close(hinge_cross_entropy(logits, target, 0.0), F.cross_entropy(logits, target))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equality_has_no_gradient(backend: str) -> None:
    """Strictly above the margin: a row whose loss equals it is at rest."""
    logits = torch.zeros(2, 1, requires_grad=True)
    hinge_cross_entropy(logits, torch.zeros(2, dtype=torch.int64), 0.0, backend=backend).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 1))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_inactive_rows_are_exactly_zero_and_others_sum_to_zero(backend: str) -> None:
    logits = torch.randn(50, 12) * 5
    logits[::2, 3] += 100
    logits.requires_grad_()
    target = torch.full((50,), 3)
    loss = hinge_cross_entropy(logits, target, 0.1, "sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad[::2], torch.zeros(25, 12))
    assert grad[1::2].abs().sum() > 0
    assert grad.sum(dim=1).abs().max() < 1e-5


def test_empty_batch() -> None:
    logits, target = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert hinge_cross_entropy(logits, target, 0.1).isnan()
    assert hinge_cross_entropy(logits, target, 0.1, "sum") == 0
    assert hinge_cross_entropy(logits, target, 0.1, "none").shape == (0,)
    assert hinge_cross_entropy(logits, target, 0.1, hinge="batch").isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    logits = (torch.randn(128, 100) * 4).to(dtype)
    target = torch.randint(100, (128,))

    def loss_and_grad(z: torch.Tensor, f: Any) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().requires_grad_()
        loss = f(z)
        return loss.detach().double(), torch.autograd.grad(loss, z)[0].double()

    exact = loss_and_grad(logits.double(), lambda z: (F.cross_entropy(z, target, reduction="none") - 0.1).relu().mean())
    usual = loss_and_grad(logits, lambda z: (F.cross_entropy(z, target, reduction="none") - 0.1).relu().mean())
    ours = loss_and_grad(logits, lambda z: hinge_cross_entropy(z, target, 0.1))
    for name, a, b, e in zip(("loss", "grad"), ours, usual, exact, strict=True):
        assert (a - e).abs().max() <= 2 * (b - e).abs().max(), name


def test_loss_is_float32_and_gradient_keeps_the_dtype() -> None:
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = hinge_cross_entropy(logits, torch.zeros(4, dtype=torch.int64), 0.1)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_backward_stays_on_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdfast.backends import find

    ran: list[str] = []
    backward = find("hinge_cross_entropy_bwd")
    choose = type(backward).choose
    monkeypatch.setattr(
        type(backward), "choose", lambda self, wish, key: ran.append(f"{self.name}:{wish}") or choose(self, wish, key)
    )
    logits = LOGITS.clone().requires_grad_()
    with bdfast.backend("reference"):
        loss = hinge_cross_entropy(logits, TARGET, 0.1)
    loss.backward()
    assert ran[-2:] == ["hinge_cross_entropy_fwd:reference", "hinge_cross_entropy_bwd:reference"]


@pytest.mark.parametrize("classes", [10, 40, 1000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_made_ahead_is_that_of_the_backward(classes: int, reduction: Any) -> None:
    """Backward twice, and with a factor: the gradient that the forward made serves once, and is scaled."""
    logits = (torch.randn(70, classes) * 4).requires_grad_()
    target = torch.randint(classes, (70,))
    loss = hinge_cross_entropy(logits, target, 0.5, reduction, backend="cpp")
    first = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, logits, torch.tensor(3.0))[0]
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6 * float(second.abs().max()))


@pytest.mark.parametrize("classes", [10, 33, 1000])
def test_gradient_made_ahead_has_the_bits_of_a_later_one(classes: int) -> None:
    logits = (torch.randn(70, classes) * 4).requires_grad_()
    loss = hinge_cross_entropy(logits, torch.randint(classes, (70,)), 0.5, backend="cpp")
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("classes", [30, 1000])
def test_small_probabilities_keep_their_relative_precision(classes: int) -> None:
    """Down to the smallest normal number, under which they are 0."""
    logits = torch.cat((torch.zeros(1), -torch.linspace(0.0, 86.0, classes - 2), torch.tensor([-120.0])))[None]
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(hinge_cross_entropy(logits, torch.zeros(1).long(), 0.0, "sum", backend="cpp"), logits)
    exact = logits.detach().double().softmax(1)
    torch.testing.assert_close(grad[0, 1:-1].double(), exact[0, 1:-1], rtol=6e-7, atol=0)
    assert grad[0, -1] == 0


def test_no_second_derivative() -> None:
    logits = LOGITS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(hinge_cross_entropy(logits, TARGET, 0.1), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("hinge", ["sample", "batch"])
def test_compiles_without_graph_break(hinge: Any) -> None:
    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return hinge_cross_entropy(z * 2, y, 0.1, hinge=hinge) + 1

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    c = a.detach().clone().requires_grad_()
    loss(a, b).backward()
    compiled(c, b).backward()
    torch.testing.assert_close(c.grad, a.grad, rtol=0, atol=0)
    with pytest.raises((LabelRangeError, RuntimeError), match="labels in"):
        compiled(a, b + 9)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((LOGITS[0], TARGET, 0.1), ValueError, r"`logits` expected shape \[N, C\]"),
        ((LOGITS[:, :0], TARGET, 0.1), ValueError, "C >= 1"),
        ((LOGITS.int(), TARGET, 0.1), TypeError, "`logits` expected float32"),
        ((LOGITS.tolist(), TARGET, 0.1), TypeError, "`logits` expected a tensor"),
        ((LOGITS, TARGET.int(), 0.1), TypeError, r"convert it with .long\(\)"),
        ((LOGITS, TARGET[:1], 0.1), ValueError, r"`target` expected one label a row of logits, \[2\], got \[1\]"),
        ((LOGITS, TARGET, -0.1), ValueError, "`margin` expected a finite number of nats >= 0, got -0.1"),
        ((LOGITS, TARGET, float("nan")), ValueError, "`margin`"),
        ((LOGITS, TARGET, 0.1, "max"), ValueError, "`reduction` expected one of none, sum, mean"),
        ((LOGITS, TARGET, 0.1, "mean", "row"), ValueError, "`hinge` expected one of sample, batch"),
        ((LOGITS, TARGET, 0.1, "sum", "batch"), ValueError, "a hinged mean is one number"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        hinge_cross_entropy(*arguments)


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range(backend: str, label: int) -> None:
    target = torch.tensor([0, label])
    for kind in (IndexError, ValueError):
        with pytest.raises(kind, match=rf"labels in \[0, 3\), got {label} at index 1"):
            hinge_cross_entropy(LOGITS, target, 0.1, backend=backend)


def test_named_backend_raises_its_reason() -> None:
    with pytest.raises(ValueError, match=r"hinge_cross_entropy: backend 'cuda' cannot run"):  # as a wrong argument
        hinge_cross_entropy(LOGITS, TARGET, 0.1, backend="cuda")
    with pytest.raises(BackendUnavailableError, match="supports float32, float16, bfloat16, got float64"):
        hinge_cross_entropy(LOGITS.double(), TARGET, 0.1, backend="cpp")
    with pytest.raises(ValueError, match="`backend` expected one of auto, reference, cpp, cuda, triton, got 'gpu'"):
        hinge_cross_entropy(LOGITS, TARGET, 0.1, backend="gpu")
