"""Cases of histogram_entropy, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.histogram_entropy import ENTROPY, histogram_entropy
from bdfast.testing.draws import seeded
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    bins: int = 64,
    step: float = 0.125,
    low: float = -4.0,
    compat: bool = True,
    special: str = "",
    layout: str = "contiguous",
) -> Inputs:
    """Bell-shaped rows whose elements keep away from edges, so that no rounding carries one into the next bin.

    ``special``: "edges" (a third of the elements lie on one), "equal" (one value), "nan", "inf".
    """
    generator = seeded(0)
    bell = bins / 2 + bins / 8 * torch.randn(shape, generator=generator, dtype=torch.float64)
    inside = 0.25 + 0.5 * torch.rand(shape, generator=generator, dtype=torch.float64).mul(2).round().div(2)
    place = bell.floor().clamp(0, bins - 1) + inside  # 0.25, 0.5 or 0.75 into its bin: exact in half precision too
    if special == "edges":
        place.view(-1)[::3] = place.view(-1)[::3].floor()
    if place.numel() > 1:
        place.view(-1)[0], place.view(-1)[-1] = 0.0, bins + 0.5  # the range, half a bin more than whole ones
    x = (torch.full_like(place, 3.0) if special == "equal" else low + step * place).to(device, dtype)
    if special in ("nan", "inf"):
        x.view(-1)[len(x) // 2] = float(special)
    if layout == "transposed":
        x = x.t().contiguous().t()
    return {"x": x, "step_size": step, "compat": compat}


def run(inputs: Inputs, backend: str) -> Outputs:
    """The entropies."""
    return {"entropy": histogram_entropy(**inputs, backend=backend)}


def bin_loop(x: Tensor, step_size: float, compat: bool) -> Tensor:
    """What users write: a pass over x for every bin."""
    low, high = x.min(), x.max()
    bins = int((high - low) / step_size)
    entropy = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for n in range(bins):
        p = ((x > low + n * step_size) & (x < low + (n + 1) * step_size)).sum(dim=1) / x.shape[1]
        entropy -= p * p.log().nan_to_num(0.0)
    return entropy


def bincount(x: Tensor, step_size: float, compat: bool) -> Tensor:
    """The fewest passes in plain PyTorch: a bin number an element, and one count of row and bin together."""
    low = x.min()
    place = (x - low) / step_size
    bins = int(place.max())
    n = torch.where((place < bins) & (place > place.floor()), place, bins).long()
    rows = torch.arange(len(x), device=x.device)[:, None] * (bins + 1)
    counts = torch.bincount((n + rows).flatten(), minlength=len(x) * (bins + 1)).view(len(x), -1)[:, :bins]
    terms: Tensor = torch.special.entr(counts / x.shape[1])
    return terms.sum(dim=1)


def eager(inputs: Inputs) -> Outputs:
    """The same by a loop over bins."""
    return {"entropy": bin_loop(**inputs)}


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One call."""
    return lambda: histogram_entropy(**inputs, backend=backend)


def bytes_moved(inputs: Inputs) -> int:
    """One read of x; a second one for the range comes from the cache at these sizes."""
    x: Tensor = inputs["x"]
    return x.numel() * x.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    return [(ENTROPY.call, (*inputs.values(), "auto"))]


# fmt: off
CASES = (
    Case("layer", "a stage of ResNet18 and a batch, as EP measures it", {"shape": (256, 512)}, benchmark=True),
    Case("wide", "512 channels, 4,096 samples", {"shape": (512, 4096), "bins": 100}, benchmark=True),
    Case("one-row", "one channel", {"shape": (1, 300)}, _ALL),
    Case("one-column", "one sample a channel: entropy 0", {"shape": (40, 1)}, _ALL),
    Case("one-element", "no range, no bins", {"shape": (1, 1)}, _ALL),
    Case("one-bin", "a range of one bin", {"shape": (3, 50), "bins": 1}, _ALL),
    Case("edges", "what lies on an edge is left out", {"shape": (17, 129), "special": "edges"}, _ALL),
    Case("edges-closed", "what lies on an edge belongs to the bin above it",
         {"shape": (17, 129), "special": "edges", "compat": False}, _ALL),
    Case("closed", "every element counts", {"shape": (17, 129), "compat": False}, _ALL),
    Case("equal", "no range: 0", {"shape": (4, 9), "special": "equal"}, _ALL),
    Case("equal-closed", "one bin for all: 0", {"shape": (4, 9), "special": "equal", "compat": False}, _ALL),
    Case("nan", "no range: NaN", {"shape": (4, 9), "special": "nan"}, _ALL),
    Case("inf", "no range: NaN", {"shape": (4, 9), "special": "inf"}, _ALL),
    Case("transposed", "copied", {"shape": (33, 70), "layout": "transposed"}, _ALL),
    Case("many-bins", "more than a block of the GPU holds at once", {"shape": (3, 500), "bins": 9000, "low": 0.0}),
    Case("chunks", "several chunks of rows", {"shape": (67, 1025)}),
    Case("empty", "no channels", {"shape": (0, 5)}, _ALL),
    Case("no-samples", "NaN", {"shape": (5, 0)}, _ALL),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (4096, 32_768)}, benchmark=True, large=True),
)
# fmt: on

SUITE = OpSuite(
    name="histogram_entropy",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": lambda inputs: lambda: bin_loop(**inputs),
        "eager": lambda inputs: lambda: bincount(**inputs),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
