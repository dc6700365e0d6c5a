"""Cases of masked_pgd_step_, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops import patches
from bdfast.ops.masked_pgd_step import STEP, masked_pgd_step_
from bdfast.testing.draws import seeded
from bdfast.testing.ops.clipped_relu import arrange
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
_BOUNDS = ("step_size", "eps", "lower", "upper")


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int, int, int],
    radius: int | None,
    at: str = "inside",
    bounds: str = "number",
    step_size: float = 2 / 255,
    layout: str = "contiguous",
    special: str = "",
) -> Inputs:
    """Images in [0, 1], perturbed inside their patches, and gradients of which a tenth is 0.

    ``at``: centers "inside", on the "corners" or "outside" the images. ``bounds``: one "number" for all channels or one
    for each "channel". ``layout``: that of all tensors, or "mixed": gradients in channels_last alone.
    """
    generator = seeded(0)
    samples, channels, height, width = shape
    x = torch.rand(shape, generator=generator)
    centers = draw_centers(generator, samples, height, width, at)
    grad = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.1)
    noise = (torch.rand(shape, generator=generator) * 2 - 1) * 8 / 255
    if special == "nan" and x.numel():
        grad.view(-1)[::5] = torch.nan
        x.view(-1)[::7] = torch.nan
    if special == "outside":
        x = x * 3 - 1
    mask = patches.patch_mask(x, centers, patches.WHOLE if radius is None else radius)
    x = x.to(dtype)
    x_adv = torch.where(mask, (x + noise).to(dtype), x)
    values: dict[str, Any] = {"step_size": step_size, "eps": 8 / 255, "lower": 0.0, "upper": 1.0}
    if bounds == "channel":
        factors = torch.linspace(0.5, 1.5, channels)
        values = {name: (factors * (value or -0.2)).to(device) for name, value in values.items()}
    tensors = {
        "x_adv": arrange(x_adv, "contiguous" if layout == "mixed" else layout).to(device),
        "x": arrange(x, "contiguous" if layout == "mixed" else layout).to(device),
        "grad": arrange(grad.to(dtype), "channels_last" if layout == "mixed" else layout).to(device),
    }
    return tensors | {"centers": centers.to(device), "radius": radius} | values


def draw_centers(generator: torch.Generator, samples: int, height: int, width: int, at: str) -> Tensor:
    """Centers ``[N, 2]`` inside images, on their corners, or around and far outside them."""
    rows = torch.randint(max(1, height), (samples,), generator=generator)
    columns = torch.randint(max(1, width), (samples,), generator=generator)
    index = torch.arange(samples)
    if at == "corners":
        rows, columns = (height - 1) * (index % 2), (width - 1) * (index // 2 % 2)
    if at == "outside":
        rows, columns = rows + (index % 3 - 1) * height, columns - (index % 2) * width
        rows[::4], columns[1::4] = 2**62, -(2**63)
    return torch.stack((rows, columns), dim=1)


def run(inputs: Inputs, backend: str) -> Outputs:
    """The stepped images."""
    return {"x_adv": masked_pgd_step_(**inputs, backend=backend)}


def usual_form(
    x_adv: Tensor, x: Tensor, grad: Tensor, mask: Tensor, step_size: Any, eps: Any, lower: Any, upper: Any
) -> Tensor:
    """As users write it, with a mask tensor."""
    delta = torch.clamp(x_adv + step_size * grad.sign() - x, -eps, eps)
    return torch.clamp(x + mask * delta, lower, upper)


def _usual_arguments(inputs: Inputs) -> tuple[Any, ...]:
    x = inputs["x"]
    radius = patches.WHOLE if inputs["radius"] is None else inputs["radius"]
    mask = patches.patch_mask(x, inputs["centers"], radius).to(x.dtype)
    return inputs["x_adv"], x, inputs["grad"], mask, *(inputs[name] for name in _BOUNDS)


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return {"x_adv": usual_form(*_usual_arguments(inputs))}


def _timed(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    arguments = _usual_arguments(inputs)  # the mask is made once a batch, not once a step
    return lambda: function(*arguments)


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One step, over and over."""
    return lambda: masked_pgd_step_(**inputs, backend=backend)


def bytes_moved(inputs: Inputs) -> int:
    """3 reads and 1 write inside the patches."""
    x: Tensor = inputs["x"]
    radius = patches.WHOLE if inputs["radius"] is None else inputs["radius"]
    pixels = int(patches.patch_mask(x, inputs["centers"], radius).sum())
    return 4 * pixels * x.shape[1] * x.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    x = inputs["x"]
    centers, radius = patches.check_patch("", inputs["centers"], inputs["radius"], x)
    split = [patches.channel_value("", name, inputs[name], x, finite=False) for name in _BOUNDS]
    values, tensors = zip(*split, strict=True)
    return [(STEP.call, (inputs["x_adv"], x, inputs["grad"], centers, radius, *values, *tensors, "auto"))]


_BATCH = (256, 3, 32, 32)
# fmt: off
CASES = (
    Case("cifar10", "AdvrBD's batch: r = H / 4", {"shape": _BATCH, "radius": 8}, (torch.float32, torch.bfloat16),
         benchmark=True),
    Case("cifar10-channels-last", "the same", {"shape": _BATCH, "radius": 8, "layout": "channels_last"},
         benchmark=True),
    Case("cifar10-whole", "GIC's batch: whole images", {"shape": _BATCH, "radius": None, "step_size": -1 / 255},
         benchmark=True),
    Case("imagenet", "r = H / 4", {"shape": (16, 3, 224, 224), "radius": 56}, benchmark=True),
    Case("odd", "odd sizes", {"shape": (7, 3, 9, 13), "radius": 2}, _ALL),
    Case("odd-channels-last", "the same", {"shape": (7, 3, 9, 13), "radius": 2, "layout": "channels_last"}, _ALL),
    Case("vectors", "rows of whole vectors", {"shape": (6, 3, 12, 24), "radius": 6}, _ALL),
    Case("vectors-channels-last", "the same", {"shape": (6, 4, 12, 24), "radius": 6, "layout": "channels_last"}, _ALL),
    Case("corners", "cut on two sides", {"shape": (8, 3, 10, 8), "radius": 3, "at": "corners"}, _ALL),
    Case("outside", "cut away in part or whole", {"shape": (9, 3, 10, 8), "radius": 6, "at": "outside"}, _ALL),
    Case("radius-0", "one pixel", {"shape": (5, 3, 6, 7), "radius": 0}, _ALL),
    Case("radius>H", "whole images by radius", {"shape": (3, 3, 6, 7), "radius": 100}, _ALL),
    Case("whole", "whole images", {"shape": (3, 3, 6, 7), "radius": None}, _ALL),
    Case("whole-channels-last", "the same", {"shape": (3, 3, 6, 7), "radius": None, "layout": "channels_last"}, _ALL),
    Case("grayscale", "one channel: both layouts in one", {"shape": (5, 1, 28, 28), "radius": 7}, _ALL),
    Case("many-channels", "five channels", {"shape": (3, 5, 11, 6), "radius": 2, "layout": "channels_last"}),
    Case("per-channel", "normalised space", {"shape": (4, 3, 9, 12), "radius": 3, "bounds": "channel"}, _ALL),
    Case("per-channel-channels-last", "the same",
         {"shape": (4, 3, 9, 12), "radius": 3, "bounds": "channel", "layout": "channels_last"}, _ALL),
    Case("mixed", "gradients laid out differently", {"shape": (4, 3, 9, 12), "radius": 3, "layout": "mixed"}, _ALL),
    Case("mixed-per-channel", "the same",
         {"shape": (4, 3, 9, 12), "radius": 3, "layout": "mixed", "bounds": "channel"}),
    Case("transposed", "samples next to each other", {"shape": (4, 3, 9, 12), "radius": 3, "layout": "transposed"}),
    Case("sliced", "rows further apart", {"shape": (4, 3, 9, 12), "radius": 3, "layout": "sliced"}, _ALL),
    Case("descend", "negative step", {"shape": (4, 3, 9, 12), "radius": 3, "step_size": -2 / 255}, _ALL),
    Case("nan", "no step for a NaN gradient; NaN images stay NaN",
         {"shape": (4, 3, 9, 12), "radius": 3, "special": "nan"}, _ALL),
    Case("outside-bounds", "images past [0, 1]", {"shape": (4, 3, 9, 12), "radius": 3, "special": "outside"}, _ALL),
    Case("bands", "one image, several chunks", {"shape": (1, 3, 400, 130), "radius": 190}),
    Case("empty", "no samples", {"shape": (0, 3, 4, 4), "radius": 1}, _ALL),
    Case("empty-plane", "no pixels", {"shape": (2, 3, 0, 4), "radius": None}),
    Case("2^31", "more than 2^31 elements", {"shape": (15000, 3, 224, 224), "radius": 56}, (torch.bfloat16,),
         large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (512, 3, 224, 224), "radius": None}, benchmark=True,
         large=True),
)
# fmt: on

SUITE = OpSuite(
    name="masked_pgd_step_",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "eager": lambda inputs: _timed(usual_form, inputs),
        "compile": lambda inputs: _timed(torch.compile(usual_form, dynamic=False), inputs),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
