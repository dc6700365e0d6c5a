"""Cases of linear_sce_margin, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.linear_sce_margin import LINEAR_MARGIN, linear_sce_margin
from bdfast.testing.draws import seeded
from bdfast.testing.ops.sce_margin import closed_form
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    width: int,
    bias: bool = True,
    layout: str = "contiguous",
    special: str = "",
) -> Inputs:
    """Features ``[N, D]`` drawn around the weight of their label, so that half of the keys are confident."""
    generator = seeded(0)
    n, c = shape
    weight = torch.randn(c, width, generator=generator) / max(width, 1) ** 0.5
    target = torch.randint(c, (n,), generator=generator)
    features = torch.randn(n, width, generator=generator)
    features[::2] += 6.0 * weight[target[::2]]
    if special == "non-finite":
        features[1, 0] = torch.nan
        features[3] = torch.inf
        weight[c - 1, :] *= 1e38
    tensors = [t.to(device, dtype) for t in (features, weight, torch.randn(c, generator=generator))]
    if layout == "transposed":
        tensors[:2] = [t.t().contiguous().t() for t in tensors[:2]]
    if layout == "padded rows":
        tensors[:2] = [F.pad(t, (1, 2))[:, 1 : 1 + width] for t in tensors[:2]]
    return {
        "features": tensors[0],
        "weight": tensors[1],
        "bias": tensors[2] if bias else None,
        "target": target.to(device),
    }


def run(inputs: Inputs, backend: str) -> Outputs:
    """The margins."""
    return {"margin": linear_sce_margin(**inputs, backend=backend)}


def usual(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """All logits, then the margin."""
    return closed_form(F.linear(features, weight, bias), target)


def eager(inputs: Inputs) -> Outputs:
    """The margins by way of all logits."""
    return {"margin": usual(**inputs)}


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One scoring pass."""
    return lambda: linear_sce_margin(**inputs, backend=backend)


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """The usual form under ``torch.compile``."""
    compiled = torch.compile(usual, dynamic=False)
    return lambda: compiled(**inputs)


def bytes_moved(inputs: Inputs) -> int:
    """Features, weights and one float a row."""
    tensors: list[Tensor] = [inputs["features"], inputs["weight"]]
    return sum(t.numel() * t.element_size() for t in tensors) + 4 * tensors[0].shape[0]


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    return [(LINEAR_MARGIN.call, (*inputs.values(), "auto"))]


# Logits are sums of `width` products: rounding them (and BLAS's order of summation) is amplified by their cancellation
# in the margin.
_SUMS = 8.0

CASES = (
    Case(
        "imagenet", "PAD-FT's scoring", {"shape": (1000, 1000), "width": 512}, _ALL, conditioning=_SUMS, benchmark=True
    ),
    Case(
        "20000-classes",
        "logits larger than the inputs by far",
        {"shape": (500, 20_000), "width": 128},
        _ALL,
        conditioning=_SUMS,
        benchmark=True,
    ),
    Case("empty", "no rows", {"shape": (0, 10), "width": 4}, _ALL),
    Case("no-features", "width 0: the bias alone", {"shape": (5, 4), "width": 0}),
    Case("one-class", "no other class: -inf", {"shape": (5, 1), "width": 8}, _ALL),
    Case("narrow", "few classes", {"shape": (70, 10), "width": 32}, _ALL, conditioning=_SUMS),
    Case("odd", "nothing a multiple of a tile", {"shape": (67, 129), "width": 37}, _ALL, conditioning=_SUMS),
    Case(
        "blocks+1",
        "one class past a block, and rows past a tile",
        {"shape": (1026, 1025), "width": 8},
        (torch.float32,),
        conditioning=_SUMS,
    ),
    Case("no-bias", "bias = None", {"shape": (33, 70), "width": 16, "bias": False}, _ALL, conditioning=_SUMS),
    Case(
        "transposed", "features not contiguous", {"shape": (37, 10), "width": 16, "layout": "transposed"}, _ALL, _SUMS
    ),
    Case("padded-rows", "rows further apart", {"shape": (37, 10), "width": 16, "layout": "padded rows"}, _ALL, _SUMS),
    Case("non-finite", "NaN and infinite logits: +inf", {"shape": (9, 70), "width": 16, "special": "non-finite"}),
)

SUITE = OpSuite(
    name="linear_sce_margin",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"eager": lambda inputs: lambda: usual(**inputs), "compile": compiled_step},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
