"""Cases of patch_centers, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.patch_centers import CENTERS, patch_centers, reference
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int],
    size: tuple[int, int],
    ids: str = "range",
    seed: int = 0,
    round: int = 0,
) -> Inputs:
    """Sample ids (``dtype`` has no say): "range", "strided" in memory, or "wide": past 32 bits and negative."""
    numbers = torch.arange(shape[0])
    if ids == "wide":
        numbers = numbers * 2**40 - 2**41
    if ids == "strided":
        numbers = torch.stack((numbers, -numbers), dim=1)[:, 0]
    return {"ids": numbers.to(device), "height": size[0], "width": size[1], "seed": seed, "round": round}


def run(inputs: Inputs, backend: str) -> Outputs:
    """The centers, as float64, which holds them exactly."""
    return {"centers": patch_centers(**inputs, backend=backend).double()}


def eager(inputs: Inputs) -> Outputs:
    """The same numbers in int64 arithmetic of torch."""
    return {"centers": reference(**inputs).double()}


def generator_form(inputs: Inputs) -> Callable[[], Any]:
    """What users write: a draw for the whole data set from a seeded generator. (Other numbers, and bound to order.)"""
    count, height, width = len(inputs["ids"]), inputs["height"], inputs["width"]
    device = inputs["ids"].device

    def draw() -> Tensor:
        generator = torch.Generator(device).manual_seed(inputs["seed"])
        rows = torch.randint(height, (count,), generator=generator, device=device)
        return torch.stack((rows, torch.randint(width, (count,), generator=generator, device=device)), dim=1)

    return draw


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One draw."""
    return lambda: patch_centers(**inputs, backend=backend)


def bytes_moved(inputs: Inputs) -> int:
    """Reads ids, writes centers."""
    return 16 * len(inputs["ids"])


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    return [(CENTERS.call, (*inputs.values(), "auto"))]


CASES = (
    Case("cifar10", "a whole data set", {"shape": (50_000,), "size": (32, 32)}, benchmark=True),
    Case("batch", "odd sizes", {"shape": (257,), "size": (7, 224)}),
    Case("wide", "ids past 32 bits", {"shape": (9,), "size": (5, 6), "ids": "wide", "seed": -1, "round": 2**40}),
    Case("strided", "copied", {"shape": (33,), "size": (64, 64), "ids": "strided", "seed": 2**63 - 1}),
    Case("pixel", "one place to be", {"shape": (5,), "size": (1, 1)}),
    Case("largest", "sizes up to 2^31 - 1", {"shape": (100,), "size": (2**31 - 1, 2**31 - 1)}),
    Case("empty", "no ids", {"shape": (0,), "size": (32, 32)}),
    Case(
        "past-l2", "far past the L2 of a GPU", {"shape": (20_000_000,), "size": (224, 224)}, benchmark=True, large=True
    ),
)

SUITE = OpSuite(
    name="patch_centers",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"usual": generator_form, "eager": lambda inputs: lambda: reference(**inputs)},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
