"""Triton kernels of bounded_ascent_cross_entropy: several programs and tiles, whatever the parts' sizes.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from bdfast.backends.availability import runs_triton
from bdfast.ops.bounded_ascent_cross_entropy import reference, reference_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := runs_triton(torch.empty(0, device=DEVICE), dtypes=(torch.float32,))) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

from bdfast.triton_kernels import bounded_ascent_cross_entropy as kernels  # noqa: E402
from bdfast.triton_kernels import row_sum  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")
Launch = kernels.Launch


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few rows already need several programs and tiles, and a program several blocks."""

    def choose(cls: type[Launch], classes: int, row_stride: int) -> Launch:
        return cls(4, 8, -(-classes // 8), 1, 4)

    monkeypatch.setattr(Launch, "choose", classmethod(choose))
    monkeypatch.setattr(row_sum, "MAX_PROGRAMS", 4)


@pytest.mark.parametrize("tau", [0.0, 2.5, math.inf])
@pytest.mark.parametrize(
    ("rows", "classes", "num_descend"), [(1, 1, 0), (4, 8, 4), (5, 9, 2), (13, 17, 6), (33, 31, 33), (33, 10, 0)]
)
def test_any_number_of_blocks_and_tiles(rows: int, classes: int, num_descend: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(rows * 1009 + classes)
    logits = (3 * torch.randn(rows, classes, generator=generator)).to(DEVICE)
    target = torch.randint(classes, (rows,), generator=generator).to(DEVICE)
    options = (num_descend, 0.7, tau)
    loss, stats = kernels.forward(logits, target, *options)
    exact_loss, exact_stats = reference(logits.double(), target, *options)
    torch.testing.assert_close(loss, exact_loss.float(), rtol=4e-6, atol=2e-6)
    grad_loss = torch.tensor(1.5, device=DEVICE)
    grad = kernels.backward(grad_loss, logits, target, stats, *options)
    exact = reference_backward(grad_loss.double(), logits.double(), target, exact_stats, *options)
    torch.testing.assert_close(grad, exact.float(), rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("label", [-1, 17, 2**40])
def test_label_out_of_range_is_nan_and_never_an_address(label: int) -> None:
    logits = torch.zeros(6, 40, device=DEVICE)[:, :17]  # the neighbours of a row are there to be read by mistake
    target = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    target[4] = label
    loss, stats = kernels.forward(logits, target, 2, 1.0, 9.0)
    assert loss.isnan()
    grad = kernels.backward(torch.ones((), device=DEVICE), logits, target, stats, 2, 1.0, 9.0)
    torch.testing.assert_close(grad[4], torch.full((17,), -1.0 / (4 * 17)))  # as the reference: no class is the label
