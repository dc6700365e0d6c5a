"""bounded_ascent_cross_entropy: hand-computed values, gradients against autograd, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bdfast.backends.availability import runs_triton
from bdfast.errors import LabelRangeError
from bdfast.ops import bounded_ascent_cross_entropy

_TRITON = runs_triton(torch.empty(0), dtypes=(torch.float32,))
BACKENDS = pytest.mark.parametrize(
    "backend",
    ["cpp", "reference", pytest.param("triton", marks=pytest.mark.skipif(_TRITON is not None, reason=str(_TRITON)))],
)
LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [-9.0, 0.0, 0.0]])
TARGET = torch.tensor([0, 2, 0])
CE = (math.log(1 + 2 * math.exp(-2)), math.log(3), math.log(2 * math.exp(9) + 1))


def usual(logits: torch.Tensor, target: torch.Tensor, num_descend: int, mu: float, tau: float) -> torch.Tensor:
    """The loss as users write it."""
    ce = F.cross_entropy(logits, target, reduction="none")
    descend, ascend = ce[:num_descend], ce[num_descend:].clamp_max(tau)
    return sum((part.mean() * sign for part, sign in ((descend, 1.0), (ascend, -mu)) if len(part)), torch.zeros(()))


@BACKENDS
@pytest.mark.parametrize(
    ("num_descend", "tau", "expected"),
    [
        (1, 4.0, CE[0] - 0.5 * (CE[1] + 4.0) / 2),
        (1, math.inf, CE[0] - 0.5 * (CE[1] + CE[2]) / 2),
        (1, 0.0, CE[0]),
        (3, 4.0, sum(CE) / 3),
        (0, 1.0, -0.5 * (CE[0] + 1.0 + 1.0) / 3),
    ],
)
def test_by_hand(backend: str, num_descend: int, tau: float, expected: float) -> None:
    loss = bounded_ascent_cross_entropy(LOGITS, TARGET, num_descend, mu=0.5, tau=tau, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-6, atol=1e-7)


@BACKENDS
@pytest.mark.parametrize(("rows", "classes", "num_descend"), [(40, 10, 17), (40, 10, 0), (9, 50, 9), (30, 70, 4)])
def test_gradient_is_that_of_the_usual_form(backend: str, rows: int, classes: int, num_descend: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(rows, classes, generator=generator)).requires_grad_()
    target = torch.randint(classes, (rows,), generator=generator)
    arguments = (logits, target, num_descend)
    loss = bounded_ascent_cross_entropy(*arguments, mu=1.3, tau=3.0, backend=backend)
    exact = usual(logits.double(), target, num_descend, 1.3, 3.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(3.0 * loss, logits)
    (expected,) = torch.autograd.grad(3.0 * exact, logits)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)


def test_gradcheck_of_reference() -> None:
    logits = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda z: bounded_ascent_cross_entropy(z, target, 3, mu=0.7, tau=1.8), logits)


@BACKENDS
def test_rows_at_tau_are_at_rest_and_certain_rows_are_not(backend: str) -> None:
    """At equality with tau the gradient is 0; a cross entropy that rounds to 0 still has one."""
    logits = torch.zeros(2, 4)
    logits[1, 0] = 20.0
    logits.requires_grad_()
    tau = float(F.cross_entropy(logits[:1].detach(), torch.tensor([0])))
    bounded_ascent_cross_entropy(logits, torch.tensor([0, 0]), 0, mu=1.0, tau=tau, backend=backend).backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[0], torch.zeros(4))
    torch.testing.assert_close(logits.grad[1, 1:], torch.full((3,), -math.exp(-20) / 2))


@BACKENDS
def test_nan_goes_through(backend: str) -> None:
    logits = LOGITS.clone()
    logits[2, 1] = math.nan
    logits.requires_grad_()
    loss = bounded_ascent_cross_entropy(logits, TARGET, 1, mu=1.0, tau=4.0, backend=backend)
    loss.backward()
    assert loss.isnan()
    assert logits.grad is not None
    assert logits.grad[2].isnan().any()
    assert logits.grad[:2].isfinite().all()


def test_no_rows_add_nothing() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = bounded_ascent_cross_entropy(logits, TARGET[:0], 0, mu=1.0, tau=4.0)
    assert loss == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(dtype: torch.dtype) -> None:
    logits = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).to(dtype).t().requires_grad_()
    target = torch.arange(20) % 10
    loss = bounded_ascent_cross_entropy(logits, target, 7, mu=1.0, tau=4.0)
    torch.testing.assert_close(loss, usual(logits.float(), target, 7, 1.0, 4.0))
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype


def test_threads_and_reruns_do_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(700, 100, generator=generator), torch.randint(100, (700,), generator=generator)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            z = logits.clone().requires_grad_()
            loss = bounded_ascent_cross_entropy(z, target, 300, mu=1.0, tau=5.0)
            found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("classes", [10, 70])
def test_gradient_made_ahead_is_that_of_the_backward(classes: int) -> None:
    """A second backward of a retained graph makes its own gradient; the first was scaled and given away."""
    logits = torch.randn(40, classes, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = bounded_ascent_cross_entropy(logits, torch.arange(40) % classes, 15, mu=0.7, tau=3.0)
    first = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)[0]
    again = torch.autograd.grad(loss, logits, torch.tensor(3.0))[0]
    torch.testing.assert_close(first, again, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return bounded_ascent_cross_entropy(z * 2, y, 2, mu=1.0, tau=2.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, y = torch.randn(6, 4, requires_grad=True), torch.randint(4, (6,))
    b = a.detach().clone().requires_grad_()
    loss(a, y).backward()
    compiled(b, y).backward()
    torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((LOGITS[0], TARGET, 1), {}, ValueError, r"`logits` expected shape \[N, C\]"),
        ((LOGITS, TARGET.int(), 1), {}, TypeError, "`target` expected int64"),
        ((LOGITS, TARGET, 4), {}, ValueError, "`num_descend` expected 0 to 3 rows, got 4"),
        ((LOGITS, TARGET, -1), {}, ValueError, "`num_descend` expected 0 to 3 rows, got -1"),
        ((LOGITS, TARGET, 1.5), {}, TypeError, "`num_descend` expected an integer, got float"),
        ((LOGITS, TARGET, 1), {"mu": -1.0}, ValueError, "`mu` expected a finite weight >= 0, got -1.0"),
        ((LOGITS, TARGET, 1), {"tau": math.nan}, ValueError, "`tau` expected a number of nats >= 0, got nan"),
        ((LOGITS, TARGET + 1, 1), {}, LabelRangeError, r"`target` expected labels in \[0, 3\), got 3 at index 1"),
        ((LOGITS, TARGET, 1), {"backend": "gpu"}, ValueError, "`backend` expected one of"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"bounded_ascent_cross_entropy: {text}"):
        bounded_ascent_cross_entropy(*arguments, **{"mu": 1.0, "tau": 4.0, **options})
