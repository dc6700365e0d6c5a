"""Cases of masked_random_start, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import patches
from bdfast.ops.masked_random_start import START, masked_random_start
from bdfast.testing.draws import seeded
from bdfast.testing.ops.clipped_relu import arrange
from bdfast.testing.ops.masked_pgd_step import draw_centers
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
_BOUNDS = ("eps", "lower", "upper")


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int],
    radius: int | None,
    at: str = "inside",
    bounds: str = "number",
    layout: str = "contiguous",
    seed: int = 0,
    special: str = "",
) -> Inputs:
    """Images in [0, 1] whose ids go down from 2^40; the other options as for masked_pgd_step_."""
    generator = seeded(0)
    samples, channels, height, width = shape
    x = torch.rand(shape, generator=generator)
    if special == "nan" and x.numel():
        x.view(-1)[::7] = torch.nan
    values: dict[str, Any] = {"eps": 8 / 255, "lower": 0.0, "upper": 1.0}
    if bounds == "channel":
        factors = torch.linspace(0.5, 1.5, channels)
        values = {name: (factors * (value or -0.2)).to(device) for name, value in values.items()}
    inputs = {
        "x": arrange(x.to(dtype), layout).to(device),
        "ids": (2**40 - torch.arange(samples)).to(device),
        "centers": draw_centers(generator, samples, height, width, at).to(device),
        "radius": radius,
        "seed": seed,
        "round": 3,
    }
    return inputs | values


def run(inputs: Inputs, backend: str) -> Outputs:
    """The perturbed images."""
    return {"x_adv": masked_random_start(**inputs, backend=backend)}


def eager(inputs: Inputs) -> Outputs:
    """The same numbers in int64 arithmetic of torch."""
    return run(inputs, "reference")


def generator_form(inputs: Inputs) -> Callable[[], Any]:
    """What users write, with a mask tensor. (Other numbers, and bound to order and batch.)"""
    x, eps, lower, upper = inputs["x"], *(inputs[name] for name in _BOUNDS)
    mask = patches.patch_mask(x, inputs["centers"], patches.WHOLE if inputs["radius"] is None else inputs["radius"])
    mask = mask.to(x.dtype)

    def draw() -> Tensor:
        noise = torch.empty_like(x).uniform_(-eps, eps)
        return torch.clamp(x + mask * noise, lower, upper)

    return draw


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One start."""
    return lambda: masked_random_start(**inputs, backend=backend)


def bytes_moved(inputs: Inputs) -> int:
    """Reads x and writes x_adv."""
    x: Tensor = inputs["x"]
    return 2 * x.numel() * x.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    x = inputs["x"]
    centers, radius = patches.check_patch("", inputs["centers"], inputs["radius"], x)
    split = [patches.channel_value("", name, inputs[name], x, finite=False) for name in _BOUNDS]
    values, tensors = zip(*split, strict=True)
    numbers = (inputs["seed"], inputs["round"])
    return [(START.call, (x, inputs["ids"], centers, radius, *numbers, *values, *tensors, "auto"))]


# fmt: off
CASES = (
    Case("cifar10", "AdvrBD's batch: r = H / 4", {"shape": (256, 3, 32, 32), "radius": 8}, benchmark=True),
    Case("odd", "rows that end inside a quad", {"shape": (7, 3, 9, 13), "radius": 2}, _ALL),
    Case("odd-channels-last", "the same", {"shape": (7, 3, 9, 13), "radius": 2, "layout": "channels_last"}, _ALL),
    Case("whole", "whole images", {"shape": (3, 3, 6, 7), "radius": None}, _ALL),
    Case("radius-0", "one pixel", {"shape": (5, 3, 6, 7), "radius": 0}, _ALL),
    Case("radius>H", "whole images by radius", {"shape": (3, 3, 6, 7), "radius": 100, "seed": 2**62}),
    Case("corners", "cut on two sides", {"shape": (8, 3, 10, 8), "radius": 3, "at": "corners"}, _ALL),
    Case("outside", "cut away in part or whole", {"shape": (9, 3, 10, 8), "radius": 6, "at": "outside"}, _ALL),
    Case("grayscale", "one channel", {"shape": (5, 1, 28, 28), "radius": 7, "seed": -5}, _ALL),
    Case("per-channel", "normalised space", {"shape": (4, 3, 9, 12), "radius": 3, "bounds": "channel"}, _ALL),
    Case("transposed", "samples next to each other", {"shape": (4, 3, 9, 12), "radius": 3, "layout": "transposed"}),
    Case("sliced", "made dense", {"shape": (4, 3, 9, 12), "radius": 3, "layout": "sliced"}, _ALL),
    Case("nan", "NaN stays NaN", {"shape": (4, 3, 9, 12), "radius": 3, "special": "nan"}, _ALL),
    Case("empty", "no samples", {"shape": (0, 3, 4, 4), "radius": 1}, _ALL),
    Case("empty-plane", "no pixels", {"shape": (2, 3, 0, 4), "radius": None}),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (512, 3, 224, 224), "radius": None}, benchmark=True,
         large=True),
)
# fmt: on

SUITE = OpSuite(
    name="masked_random_start",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": generator_form, "eager": lambda inputs: lambda: masked_random_start(**inputs, backend="reference"),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)  # fmt: skip
