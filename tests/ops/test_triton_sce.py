"""What is special to the Triton kernels of the SCE ops: tiling, several programs, labels that are no address.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

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
    for name, size in (("BLOCK_N", 16), ("BLOCK_C", 16), ("BLOCK_D", 16)):
        monkeypatch.setattr(linear_sce_margin, name, size)


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
    features, weight = logits, torch.randn(29, classes, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = reference_linear(features.double(), weight.double(), None, target).float()
    got = linear_sce_margin.forward(features, weight, None, target)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)


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
