"""What is special to the Triton kernels of hinge_cross_entropy: tiling, several programs, masks, launch choices.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import runs_triton
from bdfast.ops.hinge_cross_entropy import reference, reference_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := runs_triton(torch.empty(0, device=DEVICE), dtypes=(torch.float32,))) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from bdfast.triton_kernels import hinge_cross_entropy as kernels  # noqa: E402
from bdfast.triton_kernels import row_sum  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")
Launch = kernels.Launch


def draw(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    return logits.to(DEVICE, dtype), target.to(DEVICE)


def launch(monkeypatch: pytest.MonkeyPatch, block_n: int, block_c: int) -> None:
    """Small blocks, so that few rows already need several programs and tiles."""

    def choose(cls: type[Launch], classes: int, row_stride: int) -> Launch:
        return cls(block_n, block_c, -(-classes // block_c), 1, 4)

    monkeypatch.setattr(Launch, "choose", classmethod(choose))


def check(logits: Tensor, target: Tensor, margin: float = 0.7, reduction: str = "mean", hinge: str = "sample") -> None:
    loss, stats = kernels.forward(logits, target, margin, reduction, hinge)
    exact_loss, exact_stats = reference(logits.double(), target, margin, reduction, hinge)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=2e-6, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(stats, exact_stats.float(), rtol=2e-6, atol=0, equal_nan=True)

    grad_loss = torch.linspace(0.5, 1.5, max(1, loss.numel()), device=DEVICE)[: loss.numel()].reshape(loss.shape)
    grad = kernels.backward(grad_loss, logits, target, stats, loss, margin, reduction, hinge)
    exact = reference_backward(
        grad_loss.double(), logits.double(), target, exact_stats, exact_loss, margin, reduction, hinge
    )
    assert grad.dtype == logits.dtype
    assert grad.is_contiguous()
    eps = torch.finfo(logits.dtype).eps
    torch.testing.assert_close(grad, exact.to(grad.dtype), rtol=max(4e-6, eps), atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 8), (5, 9), (8, 16), (13, 17), (33, 31)])
def test_any_number_of_blocks_and_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int, classes: int, reduction: str
) -> None:
    launch(monkeypatch, block_n=4, block_c=8)
    check(*draw(rows, classes), reduction=reduction)


def test_a_program_walks_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, block_n=2, block_c=8)
    monkeypatch.setattr(row_sum, "MAX_PROGRAMS", 4)
    for reduction in ("none", "sum"):
        check(*draw(23, 11), reduction=reduction)


@pytest.mark.parametrize("margin", [0.0, 1.0, 50.0])
def test_batch_hinge_over_several_programs(monkeypatch: pytest.MonkeyPatch, margin: float) -> None:
    launch(monkeypatch, block_n=4, block_c=8)
    check(*draw(13, 17), margin=margin, hinge="batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(256, 10), (6, 200), (3, 1000), (2, 5000)])
def test_the_launches_that_users_get(dtype: torch.dtype, rows: int, classes: int) -> None:
    check(*draw(rows, classes, dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction: str) -> None:
    loss, stats = kernels.forward(*draw(0, 10), 0.1, reduction, "sample")
    assert stats.shape == (0, 2)
    expected = {"none": torch.empty(0), "sum": torch.tensor(0.0), "mean": torch.tensor(float("nan"))}[reduction]
    torch.testing.assert_close(loss.cpu(), expected, equal_nan=True)
    grad = kernels.backward(torch.ones_like(loss), *draw(0, 10), stats, loss, 0.1, reduction, "sample")
    assert grad.shape == (0, 10)


def test_strided_rows_and_labels() -> None:
    logits, target = draw(9, 24)
    check(logits[:, 2:19], target % 17)
    check(logits.T.contiguous().T, target)
    check(logits[:1].expand(9, 24), target)
    check(logits[:, :12], (target % 12).repeat_interleave(2)[::2])


def test_broadcast_gradient_of_a_sum() -> None:
    logits, target = draw(5, 7)
    loss, stats = kernels.forward(logits, target, 0.1, "none", "sample")
    ones = torch.ones((), device=DEVICE)
    broadcast = kernels.backward(ones.expand(5), logits, target, stats, loss, 0.1, "none", "sample")
    assert torch.equal(broadcast, kernels.backward(ones, logits, target, stats, loss, 0.1, "sum", "sample"))


@pytest.mark.parametrize("label", [-1, -100, 17, 2**40])
def test_label_out_of_range_is_nan_and_never_an_address(label: int) -> None:
    wide, target = draw(4, 40)
    logits = wide[:, :17]  # the neighbours of a row are there to be read by mistake
    target = target % 17
    target[2] = label
    loss, stats = kernels.forward(logits, target, 0.1, "none", "sample")
    assert torch.isnan(loss).tolist() == [False, False, True, False]
    assert torch.isnan(kernels.forward(logits, target, 0.1, "mean", "sample")[0])
    grad = kernels.backward(torch.ones_like(loss), logits, target, stats, loss, 0.1, "none", "sample")
    torch.testing.assert_close(grad[2], logits[2].softmax(dim=0))  # as the reference: no class is the label
    assert torch.isfinite(grad).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
def test_non_finite_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    launch(monkeypatch, block_n=4, block_c=8)
    infinity, nan = float("inf"), float("nan")
    logits, target = draw(7, 20)
    target.fill_(19)
    logits[0, :8] = -infinity  # a first tile of nothing but -inf, then finite ones: an ordinary loss
    logits[1] = -infinity
    logits[2, 3] = infinity
    logits[3, 12] = nan
    logits[4] = nan
    logits[5, 19] = -infinity  # the label itself: an infinite loss
    loss, stats = kernels.forward(logits, target, 0.1, "none", "sample")
    exact, exact_stats = reference(logits.double(), target, 0.1, "none", "sample")
    torch.testing.assert_close(loss, exact.float(), equal_nan=True)
    assert torch.isnan(loss).tolist() == [False, True, True, True, True, False, False]
    grad = kernels.backward(torch.ones_like(loss), logits, target, stats, loss, 0.1, "none", "sample")
    exact_grad = reference_backward(
        torch.ones_like(exact), logits.double(), target, exact_stats, exact, 0.1, "none", "sample"
    )
    torch.testing.assert_close(grad, exact_grad.float(), equal_nan=True, rtol=4e-6, atol=1e-7)


def test_at_equality_the_gradient_is_zero() -> None:
    logits, target = torch.zeros(3, 1, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
    loss, stats = kernels.forward(logits, target, 0.0, "none", "sample")  # one class: CE = 0 = margin
    grad = kernels.backward(torch.full_like(loss, float("nan")), logits, target, stats, loss, 0.0, "none", "sample")
    assert torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_large_logits_do_not_overflow() -> None:
    logits, target = draw(6, 12)
    check(logits * 1e4, target)
    check(logits - 3e38, target)


@pytest.mark.parametrize("classes", [1, 2, 10, 16, 33, 100, 200, 1000, 4096, 32_000, 151_936])
def test_launch_choice(classes: int) -> None:
    chosen = Launch.choose(classes, classes)
    elements = chosen.block_n * chosen.block_c
    assert 1024 <= elements <= 4096
    assert elements // (32 * chosen.num_warps) in (8, 16)
    assert chosen.block_c * (chosen.tiles - 1) < classes <= chosen.block_c * chosen.tiles
    assert classes % chosen.grain == 0
    assert chosen.grain & (chosen.grain - 1) == 0


def test_d3s_batch_is_one_program() -> None:
    assert Launch.choose(10, 10).block_n >= 256


def test_grain_divides_the_stride_too() -> None:
    assert Launch.choose(1000, 1000).grain == 8
    assert Launch.choose(1000, 1001).grain == 1
    assert Launch.choose(1000, 0).grain == 8  # an expanded row


@pytest.mark.large
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 20 GB")
def test_offsets_beyond_2_to_the_31() -> None:
    rows, classes = 70_000, 32_000
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    target = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    logits[-1, 0] = 5.0
    loss, stats = kernels.forward(logits, target, 0.0, "none", "sample")
    grad = kernels.backward(torch.ones_like(loss), logits, target, stats, loss, 0.0, "none", "sample")
    last, _ = reference(logits[-1:].double(), target[-1:], 0.0, "none", "sample")
    torch.testing.assert_close(loss[-1:], last.float())
    assert float(grad[-1, 0]) == pytest.approx(float(torch.softmax(logits[-1].double(), 0)[0]) - 1, rel=1e-2)
