"""kl_divergence: hand-computed values, gradients, rows that nearly agree, non-finite rows and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bdfast.backends import BackendUnavailableError
from bdfast.ops import kl_divergence
from bdfast.testing import suites, upcast
from bdfast.testing.ops.kl_divergence import usual_loss

BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])
P = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.5, 0.5]]).log()
Q = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]).log() + 3.0  # a shift of the logits changes nothing
KL = (0.75 * math.log(1.5) + 0.25 * math.log(0.5), 0.5 * math.log(4 / 3), 0.0)


@BACKENDS
def test_by_hand(backend: str) -> None:
    torch.testing.assert_close(kl_divergence(P, Q, backend=backend), torch.tensor(KL), rtol=1e-6, atol=1e-12)
    for reduction, expected in (("sum", sum(KL)), ("mean", sum(KL) / 3)):
        got = kl_divergence(P, Q, reduction, backend=backend)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)


@BACKENDS
def test_gradients_by_hand(backend: str) -> None:
    p, q = P.clone().requires_grad_(), Q.clone().requires_grad_()
    kl_divergence(p, q, "sum", backend=backend).backward()
    first = 0.75 * (math.log(1.5) - KL[0])
    second = 0.5 * (math.log(2) - KL[1])
    torch.testing.assert_close(p.grad, torch.tensor([[first, -first], [second, -second], [0.0, 0.0]]))
    torch.testing.assert_close(q.grad, torch.tensor([[-0.25, 0.25], [-0.25, 0.25], [0.0, 0.0]]))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck_of_reference(reduction: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(4, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: kl_divergence(a, b, reduction), (p, q))
    assert torch.autograd.gradcheck(lambda b: kl_divergence(p.detach(), b, reduction), q)
    assert torch.autograd.gradcheck(lambda a: kl_divergence(a, q.detach(), reduction), p)


def test_is_what_pytorch_calls_kl_div() -> None:
    p, q = torch.randn(20, 7, dtype=torch.float64), torch.randn(20, 7, dtype=torch.float64)
    usual = F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(kl_divergence(p, q, "mean"), usual)


@BACKENDS
@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 0.3])
def test_rows_that_nearly_agree_keep_their_digits(backend: str, classes: int, apart: float) -> None:
    """Where the usual float32 sum is a difference of numbers far larger than itself."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, classes, generator=generator)
    q = p + apart * torch.randn(64, classes, generator=generator)
    exact = (p.double().softmax(1) * (p.double().log_softmax(1) - q.double().log_softmax(1))).sum(1)
    error = ((kl_divergence(p, q, backend=backend).double() - exact) / exact).abs().max()
    assert error < 2e-6 + 1e-6 / apart
    if apart == 1e-3:
        assert ((usual_loss(p, q, "none").double() - exact) / exact).abs().max() > 10 * error


@BACKENDS
@pytest.mark.parametrize("classes", [10, 200])
def test_confident_rows_keep_their_digits(backend: str, classes: int) -> None:
    """Both rows are certain of one class to the last bit of float32: what is left is in the others."""
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(32, classes, generator=generator), torch.randn(32, classes, generator=generator)
    p[:, 3] += 30.0
    q[:, 3] += 25.0
    exact = (p.double().softmax(1) * (p.double().log_softmax(1) - q.double().log_softmax(1))).sum(1)
    assert exact.max() < 1e-7
    torch.testing.assert_close(kl_divergence(p, q, backend=backend).double(), exact, rtol=5e-6, atol=2e-15)


@BACKENDS
@pytest.mark.parametrize("classes", [6, 50])
def test_gradient_is_not_cut_where_the_divergence_rounds_to_zero(backend: str, classes: int) -> None:
    p = torch.randn(8, classes)
    q = p.clone()
    q[:, 0] += 1e-6
    q.requires_grad_()
    kl = kl_divergence(p, q, backend=backend)
    assert (kl >= 0).all()
    kl.sum().backward()
    assert q.grad is not None
    assert (q.grad[:, 0] > 0).any()


@BACKENDS
@pytest.mark.parametrize("classes", [5, 70])
def test_classes_without_weight(backend: str, classes: int) -> None:
    """p = 0 adds nothing, whatever q; q = 0 < p is an infinite divergence."""
    p, q = torch.zeros(4, classes), torch.zeros(4, classes)
    p[0, 1] = -math.inf
    p[1, 1] = q[1, 1] = -math.inf
    q[2, 1] = -math.inf
    p[3, 1] = -1e4  # underflows: as good as -inf
    log = math.log(classes / (classes - 1))
    got = kl_divergence(p, q, backend=backend)
    torch.testing.assert_close(got, torch.tensor([log, 0.0, math.inf, log]), rtol=1e-5, atol=1e-7)
    p.requires_grad_()
    q.requires_grad_()
    finite = torch.tensor([0, 1, 3])
    kl_divergence(p[finite], q[finite], "sum", backend=backend).backward()
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad[finite].isfinite().all()
    assert q.grad[finite].isfinite().all()
    assert p.grad[1, 1] == 0


@BACKENDS
@pytest.mark.parametrize("classes", [5, 70])
@pytest.mark.parametrize("side", ["p", "q"])
def test_nan_goes_through_where_the_maths_says_so(backend: str, classes: int, side: str) -> None:
    p, q = torch.zeros(5, classes), torch.zeros(5, classes)
    bad = p if side == "p" else q
    bad[1, 2], bad[2, 0], bad[3] = math.nan, math.inf, -math.inf
    p.requires_grad_()
    q.requires_grad_()
    kl = kl_divergence(p, q, backend=backend)
    assert kl.isnan().tolist() == [False, True, True, True, False]
    kl.sum().backward()
    for leaf in (p, q):
        assert leaf.grad is not None
        assert leaf.grad[[0, 4]].isfinite().all()
        assert leaf.grad[1:4].isnan().any(dim=1).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    apart=st.sampled_from([0.5, 5.0, 50.0]),
    wants=st.sampled_from(["", "p", "q", "pq"]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(
    rows: int, classes: int, scale: float, apart: float, wants: str, reduction: str, dtype: torch.dtype
) -> None:
    """Gradients in absolute terms: those of rows that agree are differences of equal numbers."""
    suite = suites()["kl_divergence"]
    options = {"shape": (rows, classes), "scale": scale, "apart": apart, "wants": wants, "reduction": reduction}
    got = suite.run(suite.make(torch.device("cpu"), dtype, **options), "cpp")
    exact = suite.run(upcast(suite.make(torch.device("cpu"), dtype, **options)), "reference")
    torch.testing.assert_close(got["loss"].double(), exact["loss"], rtol=1e-4, atol=1e-30, equal_nan=True)
    for name in sorted(got.keys() - {"loss"}):
        spacing = torch.finfo(dtype).eps * (1 + 100 * (dtype == torch.float32))
        torch.testing.assert_close(got[name].double(), exact[name], rtol=spacing, atol=1e-5 * (1 + apart))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 70), classes=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_never_negative_and_zero_for_equal_rows(rows: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = 5 * torch.randn(rows, classes, generator=generator)
    q = p + 10.0 ** torch.randint(-8, 2, (rows, 1), generator=generator) * torch.randn(p.shape, generator=generator)
    assert (kl_divergence(p, q) >= 0).all()
    assert torch.equal(kl_divergence(p, p), torch.zeros(rows))


def test_empty_batch() -> None:
    p = torch.zeros(0, 3)
    assert kl_divergence(p, p).shape == (0,)
    assert kl_divergence(p, p, "sum") == 0
    assert kl_divergence(p, p, "mean").isnan()


def test_loss_is_float32_and_gradients_keep_the_dtype() -> None:
    p, q = (torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    loss = kl_divergence(p, q, "mean")
    loss.backward()
    assert loss.dtype == torch.float32
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad.dtype == q.grad.dtype == torch.bfloat16


@BACKENDS
def test_a_constant_side_gets_no_gradient(backend: str) -> None:
    p, q = P.clone(), Q.clone().requires_grad_()
    kl_divergence(p, q, backend=backend).sum().backward()
    assert p.grad is None
    assert q.grad is not None


def test_no_second_derivative() -> None:
    q = Q.clone().requires_grad_()
    (grad,) = torch.autograd.grad(kl_divergence(P, q, "sum"), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def loss(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return kl_divergence(p * 2, q, "mean") + 1

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    p, q = torch.randn(6, 4), torch.randn(6, 4, requires_grad=True)
    r = q.detach().clone().requires_grad_()
    loss(p, q).backward()
    compiled(p, r).backward()
    torch.testing.assert_close(r.grad, q.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((P[0], Q), ValueError, r"`logits_p` expected shape \[N, C\]"),
        ((P, Q[:, :0]), ValueError, "`logits_q` expected shape .* C >= 1"),
        ((P.int(), Q), TypeError, "`logits_p` expected float32"),
        ((P, Q.tolist()), TypeError, "`logits_q` expected a tensor"),
        ((P, Q[:1]), ValueError, r"`logits_q` expected the shape of logits_p, \[3, 2\], got \[1, 2\]"),
        ((P, Q.double()), TypeError, "the dtype of logits_p, torch.float32, got torch.float64"),
        ((P, Q.to("meta")), ValueError, "the device of logits_p, cpu, got meta"),
        ((P, Q, "max"), ValueError, "`reduction` expected one of none, sum, mean"),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"kl_divergence: {text}" if text.startswith("`") else text):
        kl_divergence(*arguments)


def test_named_backend_raises_its_reason() -> None:
    with pytest.raises(BackendUnavailableError, match=r"kl_divergence: backend 'cuda' cannot run"):
        kl_divergence(P, Q, backend="cuda")
