"""What is special to the Triton kernels of kl_divergence: tiling, several programs, strides.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import runs_triton
from bdfast.ops.kl_divergence import reference, reference_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := runs_triton(torch.empty(0, device=DEVICE), dtypes=(torch.float32,))) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from bdfast.triton_kernels import kl_divergence, row_sum  # noqa: E402
from bdfast.triton_kernels.rows import Launch  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


def draw(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    return tuple(3 * torch.randn(rows, classes, generator=generator).to(DEVICE) for _ in range(2))  # type: ignore[return-value]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and classes already need several programs, blocks and tiles."""

    def choose(cls: type[Launch], classes: int, row_stride: int) -> Launch:
        return cls(4, 8, -(-classes // 8), 1, 4)

    monkeypatch.setattr(Launch, "choose", classmethod(choose))
    monkeypatch.setattr(row_sum, "MAX_PROGRAMS", 4)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 8), (5, 9), (13, 17), (41, 23)])
def test_any_number_of_blocks_and_tiles(rows: int, classes: int, reduction: str) -> None:
    p, q = draw(rows, classes)
    loss, stats = kl_divergence.forward(p, q, reduction, True)
    exact_loss, exact_stats = reference(p.double(), q.double(), reduction, True)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=4e-6, atol=1e-9)
    torch.testing.assert_close(stats, exact_stats.float(), rtol=4e-6, atol=1e-9)
    assert torch.equal(kl_divergence.forward(p, q, reduction, False)[0], loss)
    grad_loss = torch.linspace(0.5, 1.5, max(1, loss.numel()), device=DEVICE)[: loss.numel()].reshape(loss.shape)
    for wants_p, wants_q in ((True, True), (True, False), (False, True)):
        grads = kl_divergence.backward(grad_loss, p, q, stats, reduction, wants_p, wants_q)
        exact = reference_backward(grad_loss.double(), p.double(), q.double(), exact_stats, reduction, wants_p, wants_q)
        for grad, expected in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad, expected.float(), rtol=4e-6, atol=4e-6)


def test_strided_rows() -> None:
    p, q = draw(9, 24)
    for a, b in ((p[:, 2:19], q[:, :17]), (p.T.contiguous().T, q), (p[:1].expand(9, 24), q), (p, q[:1].expand(9, 24))):
        exact = reference(a.double(), b.double(), "none", False)[0]
        torch.testing.assert_close(kl_divergence.forward(a, b, "none", False)[0], exact.float(), rtol=4e-6, atol=0)


def test_broadcast_gradient_of_a_sum() -> None:
    p, q = draw(5, 7)
    _, stats = kl_divergence.forward(p, q, "none", True)
    ones = torch.ones((), device=DEVICE)
    broadcast = kl_divergence.backward(ones.expand(5), p, q, stats, "none", True, True)
    for grad, other in zip(broadcast, kl_divergence.backward(ones, p, q, stats, "sum", True, True), strict=True):
        assert torch.equal(grad, other)


@pytest.mark.parametrize("classes", [1, 2, 10, 32])
def test_narrow_rows_that_are_not_summed_spread(classes: int) -> None:
    """The same rows in programs of an eighth of the size; no bit of a row depends on it."""
    whole, spread = Launch.choose(classes, classes), Launch.spread(classes, classes)
    assert (8 * spread.block_n, 4 * spread.num_warps) == (whole.block_n, whole.num_warps)
    assert (spread.block_c, spread.grain) == (whole.block_c, whole.grain)
    p, q = draw(whole.block_n // 8 + 3, classes)
    loss, stats = kl_divergence.forward(p, q, "none", True)
    _, stats_of_sum = kl_divergence.forward(p, q, "sum", True)
    assert torch.equal(stats, stats_of_sum)
    assert torch.equal(loss, stats[:, 4])


def test_wide_rows_do_not() -> None:
    assert Launch.spread(1000, 1000) == Launch.choose(1000, 1000)


@pytest.mark.parametrize(("classes", "warps"), [(10, 4), (33, 2), (1000, 2), (1025, 4), (32_000, 8)])
def test_warps_of_rows_that_are_not_summed(classes: int, warps: int) -> None:
    """Few where a row fits into them; the tile is that of the other kernels."""
    launch = Launch.few_warps(classes, classes)
    assert launch == replace(Launch.spread(classes, classes), num_warps=warps)
