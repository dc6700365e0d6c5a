"""What is special to the Triton kernels of the SCE ops: tiling, several programs, labels that are no address.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import runs_triton
from bdfast.ops.linear_sce_margin import reference as reference_linear
from bdfast.ops.sce_loss import reference, reference_backward
from bdfast.ops.sce_margin import reference as reference_margin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := runs_triton(torch.empty(0, device=DEVICE), dtypes=(torch.float32,))) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from bdfast.triton_kernels import linear_sce_margin, row_sum, sce_loss, sce_margin  # noqa: E402
from bdfast.triton_kernels.rows import Launch  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
]


def draw(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    logits = 3 * torch.randn(rows, classes, generator=generator)
    return logits.to(DEVICE), torch.randint(classes, (rows,), generator=generator).to(DEVICE)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows and classes already need several programs, blocks and tiles."""

    def choose(cls: type[Launch], classes: int, row_stride: int) -> Launch:
        return cls(4, 8, -(-classes // 8), 1, 4)

    monkeypatch.setattr(Launch, "choose", classmethod(choose))
    monkeypatch.setattr(row_sum, "MAX_PROGRAMS", 4)


def small_products(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Tiles of 16 x 16 logits in programs that share rows by ``splits``."""

    def choose(cls: type[Any], rows: int, classes: int, dtype: torch.dtype) -> Any:
        blocks = (classes + 15) // 16
        tiles = (blocks + splits - 1) // splits
        return cls(16, 16, 16, 4, tiles, (blocks + tiles - 1) // tiles)

    monkeypatch.setattr(linear_sce_margin.Launch, "choose", classmethod(choose))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 8), (5, 9), (13, 17), (41, 23)])
def test_loss_over_any_number_of_blocks_and_tiles(rows: int, classes: int, reduction: str) -> None:
    logits, target = draw(rows, classes)
    loss, stats = sce_loss.forward(logits, target, 0.1, 4.0, reduction)
    exact_loss, exact_stats = reference(logits.double(), target, 0.1, 4.0, reduction)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(stats, exact_stats.float(), rtol=2e-6, atol=0)
    grad_loss = torch.linspace(0.5, 1.5, max(1, loss.numel()), device=DEVICE)[: loss.numel()].reshape(loss.shape)
    grad = sce_loss.backward(grad_loss, logits, target, stats, 0.1, 4.0, reduction)
    exact = reference_backward(grad_loss.double(), logits.double(), target, exact_stats, 0.1, 4.0, reduction)
    torch.testing.assert_close(grad, exact.float(), rtol=4e-6, atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (4, 8), (5, 9), (13, 17), (41, 23)])
def test_margins_over_any_number_of_tiles(rows: int, classes: int) -> None:
    logits, target = draw(rows, classes)
    exact = reference_margin(logits.double(), target).float()
    torch.testing.assert_close(sce_margin.forward(logits, target), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 9), (41, 23)])
def test_margins_of_a_layer_over_any_number_of_tiles(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, splits: int
) -> None:
    small_products(monkeypatch, splits)
    features, target = draw(rows, width)
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((70, width), (70,)))
    for row in (0, rows // 2):  # the label in the first and in the last tile
        target[row] = 69 * (row % 2)
    for b in (None, bias):
        exact = reference_linear(features.double(), weight.double(), None if b is None else b.double(), target)
        got = linear_sce_margin.forward(features, weight, b, target)
        torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_are_not_finite_come_last(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Whichever of the programs that share a row has seen it; a label out of range is NaN all the same."""
    small_products(monkeypatch, splits)
    bias = torch.zeros(70, device=DEVICE)
    target = torch.tensor([2, 30, 69, 70, -1], device=DEVICE)
    margins = {}
    for place in (0, 40, 69):
        for value in (float("inf"), float("-inf"), float("nan")):
            b = bias.clone()
            b[place] = value
            weight = torch.zeros(70, 3, device=DEVICE)
            margins[place, value] = linear_sce_margin.forward(torch.ones(5, 3, device=DEVICE), weight, b, target)
    for margin in margins.values():
        assert margin.tolist() == [float("inf")] * 5
    finite = linear_sce_margin.forward(torch.ones(5, 3, device=DEVICE), torch.zeros(70, 3, device=DEVICE), bias, target)
    torch.testing.assert_close(finite[:3], torch.full((3,), 69.0, device=DEVICE).log())
    assert finite[3:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "classes"), [(1, 1), (1000, 1000), (500, 20_000), (33, 1_000_000), (10**6, 10)])
def test_programs_of_a_layer(rows: int, classes: int, dtype: torch.dtype) -> None:
    """They cover all classes, and what they leave to be joined does not grow with the batch."""
    launch = linear_sce_margin.Launch.choose(rows, classes, dtype)
    assert (
        (launch.splits - 1) * launch.tiles * launch.block_c < classes <= launch.splits * launch.tiles * launch.block_c
    )
    assert launch.splits == 1 or launch.splits * rows <= 2 * 512 * launch.block_n


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_the_batch(dtype: torch.dtype) -> None:
    """10,000 x 20,000 logits would be 800 MB; keys are exact, and a graph captures them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    features = torch.randn(10_000, 64, device=DEVICE, dtype=dtype, generator=generator)
    weight = torch.randn(20_000, 64, device=DEVICE, dtype=dtype, generator=generator)
    target = torch.arange(10_000, device=DEVICE)
    exact = reference_linear(features[:200].double(), weight.double(), None, target[:200]).float()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    margin = linear_sce_margin.forward(features, weight, None, target)
    assert torch.cuda.max_memory_allocated() - held < 4e6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_sce_margin.forward(features, weight, None, target)
    graph.replay()
    torch.testing.assert_close(margin[:200], exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(captured, margin)


def test_strided_rows_and_labels() -> None:
    logits, target = draw(9, 24)
    for z, y in (
        (logits[:, 2:19], target % 17),
        (logits.T.contiguous().T, target),
        (logits[:1].expand(9, 24), target),
        (logits[:, :12], (target % 12).repeat_interleave(2)[::2]),
    ):
        torch.testing.assert_close(sce_margin.forward(z, y), reference_margin(z.double(), y).float())


@pytest.mark.parametrize("label", [-1, -100, 17, 2**40])
def test_label_out_of_range_is_nan_and_never_an_address(label: int) -> None:
    wide, target = draw(4, 40)
    logits = wide[:, :17]  # the neighbours of a row are there to be read by mistake
    target = target % 17
    target[2] = label
    expected = [False, False, True, False]
    assert sce_margin.forward(logits, target).isnan().tolist() == expected
    assert linear_sce_margin.forward(logits, torch.eye(17, device=DEVICE), None, target).isnan().tolist() == expected
    loss, stats = sce_loss.forward(logits, target, 1.0, 4.0, "none")
    assert loss.isnan().tolist() == expected
    assert sce_loss.forward(logits, target, 1.0, 4.0, "mean")[0].isnan()
    grad = sce_loss.backward(torch.ones_like(loss), logits, target, stats, 1.0, 4.0, "none")
    assert grad.isnan().any(dim=1).tolist() == expected


def test_broadcast_gradient_of_a_sum() -> None:
    logits, target = draw(5, 7)
    _, stats = sce_loss.forward(logits, target, 0.1, 4.0, "none")
    ones = torch.ones((), device=DEVICE)
    broadcast = sce_loss.backward(ones.expand(5), logits, target, stats, 0.1, 4.0, "none")
    assert torch.equal(broadcast, sce_loss.backward(ones, logits, target, stats, 0.1, 4.0, "sum"))
