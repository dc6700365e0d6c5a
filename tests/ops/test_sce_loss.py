"""sce_loss: hand-computed values, gradients, parity with the usual formula, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bdfast
from bdfast.backends import BackendUnavailableError
from bdfast.errors import LabelRangeError
from bdfast.ops import hinge_cross_entropy, sce_loss
from bdfast.testing import Case, parity, suites
from bdfast.testing.logits import draw_logits

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
TARGET = torch.tensor([0, 2])
CE = [math.log(1 + 2 * math.exp(-2)), math.log(3)]
DOUBT = [2 / (math.exp(2) + 2), 2 / 3]  # 1 - p_y
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@BACKENDS
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [CE[0] + 4 * DOUBT[0], CE[1] + 4 * DOUBT[1]]),
        ({"alpha": 2.0, "beta": 0.0}, [2 * CE[0], 2 * CE[1]]),
        ({"alpha": 0.0, "beta": 0.5, "log_zero": -6.0}, [3 * DOUBT[0], 3 * DOUBT[1]]),
        ({"reduction": "sum"}, sum(CE) + 4 * sum(DOUBT)),
        ({"reduction": "mean"}, (sum(CE) + 4 * sum(DOUBT)) / 2),
    ],
)
def test_by_hand(backend: str, options: dict[str, Any], expected: float | list[float]) -> None:
    loss = sce_loss(LOGITS, TARGET, backend=backend, **options)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@BACKENDS
def test_gradient_by_hand(backend: str) -> None:
    """(p_j - [j = y]) (alpha + beta |A| p_y) of a uniform row."""
    logits = torch.zeros(1, 4, requires_grad=True)
    sce_loss(logits, torch.tensor([1]), alpha=0.5, beta=2.0, backend=backend).backward()
    expected = torch.tensor([[0.25, -0.75, 0.25, 0.25]]) * (0.5 + 2.0 * 4.0 * 0.25)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("clamp", [None, 1e-7])
def test_gradcheck_of_reference(reduction: Any, clamp: float | None) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3, 4, 0])

    def loss(z: torch.Tensor) -> torch.Tensor:
        return sce_loss(z, target, alpha=0.3, beta=0.7, reduction=reduction, clamp=clamp)

    assert torch.autograd.gradcheck(loss, logits)


def usual(logits: torch.Tensor, target: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    """The formula of the SCE authors: probabilities from 1e-7, one-hot from 1e-4."""
    p = torch.clamp(F.softmax(logits, dim=1), min=1e-7, max=1.0)
    q = torch.clamp(F.one_hot(target, logits.shape[1]).float(), min=1e-4, max=1.0)
    return alpha * F.cross_entropy(logits, target, reduction="none") + beta * (-1 * torch.sum(p * torch.log(q), dim=1))


@pytest.mark.parametrize("scale", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("classes", [2, 10, 100])
def test_clamp_is_the_usual_formula_bit_for_bit(scale: float, classes: int) -> None:
    logits = torch.randn(200, classes) * scale
    target = torch.randint(classes, (200,))
    options: Any = {"alpha": 0.1, "beta": 1.0, "log_zero": math.log(1e-4), "clamp": 1e-7}
    theirs, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = usual(theirs, target, 0.1, 1.0)
    got = sce_loss(ours, target, **options)
    assert torch.equal(got, expected)
    expected.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=5e-6)


def test_clamp_runs_on_the_reference_only() -> None:
    with pytest.raises(BackendUnavailableError, match="sce_loss: backend 'cpp' cannot run: this op has no such impl"):
        sce_loss(LOGITS, TARGET, clamp=1e-7, backend="cpp")
    with bdfast.backend("cpp"), pytest.raises(BackendUnavailableError):
        sce_loss(LOGITS, TARGET, clamp=1e-7)


def test_clamp_keeps_dtypes_and_reduces() -> None:
    logits = LOGITS.bfloat16().requires_grad_()
    rows = sce_loss(logits, TARGET, clamp=1e-7)
    torch.testing.assert_close(sce_loss(logits, TARGET, clamp=1e-7, reduction="mean"), rows.mean())
    torch.testing.assert_close(sce_loss(logits, TARGET, clamp=1e-7, reduction="sum"), rows.sum())
    rows.sum().backward()
    assert rows.dtype == torch.float32
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_beta_zero_is_cross_entropy() -> None:
    logits, target = torch.randn(64, 10) * 3, torch.randint(10, (64,))
    torch.testing.assert_close(
        sce_loss(logits, target, beta=0.0, reduction="mean"), hinge_cross_entropy(logits, target, 0.0)
    )


@BACKENDS
def test_confident_rows_keep_loss_and_gradient(backend: str) -> None:
    """p_y is 1 in float32, and the loss still falls as e^-m, down to the smallest normal number."""
    height = torch.tensor([20.0, 30.0, 60.0, 87.0])
    logits = torch.zeros(4, 2)
    logits[:, 0] = height
    logits.requires_grad_()
    loss = sce_loss(logits, torch.zeros(4, dtype=torch.int64), backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    exact = 5.0 * torch.exp(-height.double())
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double(), torch.stack((-exact, exact), dim=1), rtol=2e-6, atol=0)


@BACKENDS
def test_hopeless_rows_stay_finite(backend: str) -> None:
    """p_y underflows: CE keeps its value, RCE is |A|, and the gradient of CE does not vanish."""
    logits = torch.tensor([[0.0, 500.0]], requires_grad=True)
    loss = sce_loss(logits, torch.tensor([0]), backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == pytest.approx(504.0)
    torch.testing.assert_close(grad, torch.tensor([[-1.0, 1.0]]))


@BACKENDS
@pytest.mark.parametrize("classes", [10, 50])
def test_gradients_of_a_row_sum_to_zero(backend: str, classes: int) -> None:
    logits = (torch.randn(50, classes) * 4).requires_grad_()
    loss = sce_loss(logits, torch.randint(classes, (50,)), alpha=0.1, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    assert grad.sum(dim=1).abs().max() < 3e-6
    assert grad.abs().sum() > 1


@BACKENDS
def test_non_finite_logits(backend: str) -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[nan, 0.0], [0.0, inf], [inf, 0.0], [-inf, 0.0], [0.0, -inf], [-inf, -inf]])
    loss = sce_loss(logits, torch.zeros(6, dtype=torch.int64), backend=backend)
    torch.testing.assert_close(loss, torch.tensor([nan, nan, nan, inf, 0.0, nan]), equal_nan=True)


def test_empty_batch() -> None:
    logits, target = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for clamp in (None, 1e-7):
        assert sce_loss(logits, target, clamp=clamp).shape == (0,)
        assert sce_loss(logits, target, clamp=clamp, reduction="sum") == 0
        assert sce_loss(logits, target, clamp=clamp, reduction="mean").isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_errs_no_more_than_twice_as_much_as_pytorch(dtype: torch.dtype) -> None:
    logits, target = (torch.randn(128, 100) * 4).to(dtype), torch.randint(100, (128,))

    def plain(z: torch.Tensor) -> torch.Tensor:
        p = z.softmax(dim=1).gather(1, target[:, None])[:, 0]
        return (F.cross_entropy(z, target, reduction="none") + 4.0 * (1.0 - p)).mean()

    def loss_and_grad(z: torch.Tensor, f: Any) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().requires_grad_()
        loss = f(z)
        return loss.detach().double(), torch.autograd.grad(loss, z)[0].double()

    exact, theirs = loss_and_grad(logits.double(), plain), loss_and_grad(logits, plain)
    ours = loss_and_grad(logits, lambda z: sce_loss(z, target, reduction="mean"))
    for name, a, b, e in zip(("loss", "grad"), ours, theirs, exact, strict=True):
        assert (a - e).abs().max() <= 2 * (b - e).abs().max(), name


def test_no_second_derivative() -> None:
    logits = LOGITS.clone().requires_grad_()
    for clamp in (None, 1e-7):
        loss = sce_loss(logits, TARGET, reduction="sum", clamp=clamp)
        (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
            grad.sum().backward()


def test_backward_of_a_mean_is_made_with_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 on the CPU, where logits are read once; rows with gradients of their own are left to the backward."""
    from bdfast.backends import find

    ran: list[str] = []
    kind = type(find("sce_loss_bwd"))
    call = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *arguments: ran.append(self.name) or call(self, *arguments))
    for reduction in ("mean", "none"):
        sce_loss(LOGITS.clone().requires_grad_(), TARGET, reduction=reduction, backend="cpp").sum().backward()
    assert ran == ["sce_loss_fwd_grad", "sce_loss_fwd", "sce_loss_bwd"]


@pytest.mark.parametrize("special", ["", "confident", "-inf", "non-finite"])
@pytest.mark.parametrize("classes", [1, 10, 33, 1000])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_made_ahead_has_the_bits_of_a_later_one(reduction: Any, classes: int, special: str) -> None:
    """It serves once, and a retained graph makes its own; the statistics of both are those of a loss alone."""
    logits, target = draw_logits(torch.device("cpu"), torch.float32, (70, classes), special=special)
    loss = sce_loss(logits.requires_grad_(), target, alpha=0.1, reduction=reduction, backend="cpp")
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first.isnan(), second.isnan())
    assert torch.equal(first.nan_to_num(), second.nan_to_num())


@pytest.mark.parametrize("classes", [10, 1000])
def test_gradient_made_ahead_is_scaled(classes: int) -> None:
    logits, target = (torch.randn(70, classes) * 4).requires_grad_(), torch.randint(classes, (70,))
    loss = sce_loss(logits, target, reduction="mean", backend="cpp")
    first, second = (torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("classes", [2, 33, 65, 1000])
def test_label_at_an_end_of_its_row(classes: int, place: str) -> None:
    """Wide rows are read on both sides of the label, of which one is empty here."""
    logits = torch.randn(5, classes, requires_grad=True)
    target = torch.full((5,), 0 if place == "first" else classes - 1)
    loss, exact = sce_loss(logits, target, backend="cpp"), sce_loss(logits.double(), target)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    for reduction in ("none", "sum"):
        ours, theirs = (
            torch.autograd.grad(sce_loss(z, target, reduction=reduction).sum(), logits)[0]
            for z in (logits, logits.double())
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clamp", [None, 1e-7])
def test_compiles_without_graph_break(clamp: float | None) -> None:
    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sce_loss(z * 2, y, alpha=0.1, reduction="mean", clamp=clamp) + 1

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, y = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    b = a.detach().clone().requires_grad_()
    compiled(a, y).backward()
    loss(b, y).backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_backward_stays_on_the_backend_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from bdfast.backends import find

    ran: list[str] = []
    kind = type(find("sce_loss_bwd"))
    choose = kind.choose
    monkeypatch.setattr(
        kind, "choose", lambda self, wish, key: ran.append(f"{self.name}:{wish}") or choose(self, wish, key)
    )
    logits = LOGITS.clone().requires_grad_()
    with bdfast.backend("reference"):
        loss = sce_loss(logits, TARGET, reduction="sum")
    loss.backward()
    assert ran[-2:] == ["sce_loss_fwd:reference", "sce_loss_bwd:reference"]


def test_opcheck_of_the_clamped_ops() -> None:
    from bdfast.ops.sce_loss import CLAMPED_BACKWARD, CLAMPED_FORWARD

    options = (0.1, 1.0, -4.0, 1e-7, "mean", "auto")
    torch.library.opcheck(CLAMPED_FORWARD.call, (LOGITS, TARGET, *options))
    torch.library.opcheck(CLAMPED_BACKWARD.call, (torch.tensor(1.0), LOGITS.softmax(dim=1), TARGET, *options))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 10.0, 300.0]),
    alpha=st.sampled_from([0.0, 0.1, 6.0]),
    beta=st.sampled_from([0.0, 1.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    special=st.sampled_from(["", "confident", "-inf"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(
    rows: int, classes: int, scale: float, alpha: float, beta: float, reduction: str, special: str, dtype: torch.dtype
) -> None:
    options = {"shape": (rows, classes), "scale": scale, "alpha": alpha, "beta": beta}
    case = Case("drawn", "", {**options, "reduction": reduction, "special": special})
    assert not parity(suites()["sce_loss"], case, "auto", "cpu", dtype)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((LOGITS[0], TARGET), {}, ValueError, r"sce_loss: `logits` expected shape \[N, C\]"),
        ((LOGITS, TARGET.int()), {}, TypeError, r"convert it with .long\(\)"),
        ((LOGITS, TARGET), {"alpha": -0.1}, ValueError, "`alpha` expected a finite weight >= 0, got -0.1"),
        ((LOGITS, TARGET), {"beta": math.nan}, ValueError, "`beta` expected a finite weight >= 0, got nan"),
        ((LOGITS, TARGET), {"log_zero": 0.0}, ValueError, "`log_zero` expected a finite number below 0, got 0.0"),
        ((LOGITS, TARGET), {"log_zero": -math.inf}, ValueError, "`log_zero` expected a finite number below 0"),
        ((LOGITS, TARGET), {"clamp": 0.0}, ValueError, r"`clamp` expected a probability in \(0, 1\), or None, got 0.0"),
        ((LOGITS, TARGET), {"reduction": "max"}, ValueError, "`reduction` expected one of none, sum, mean"),
        ((LOGITS, TARGET), {"backend": "gpu"}, ValueError, "`backend` expected one of auto"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        sce_loss(*arguments, **options)


@pytest.mark.parametrize("options", [{}, {"backend": "cpp"}, {"backend": "reference"}, {"clamp": 1e-7}])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range(options: Any, label: int) -> None:
    with pytest.raises(LabelRangeError, match=rf"sce_loss: .* labels in \[0, 3\), got {label} at index 1"):
        sce_loss(LOGITS, torch.tensor([0, label]), **options)
