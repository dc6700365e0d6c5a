"""Cases of scale_to_ball_, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.scale_to_ball import SCALE, _radius, scale_to_ball_
from bdfast.testing.draws import seeded
from bdfast.testing.ops.clipped_relu import arrange
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
_SHRINK = 1.0 - 1e-5  # of the radius, a call


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    p: int = 2,
    radius: str | float = "number",
    layout: str = "contiguous",
    special: str = "",
) -> Inputs:
    """Normal noise whose scale differs from image to image, so that about half of the images are outside the ball.

    ``radius``: "number", "tensor" ([N]), or a number itself.
    """
    generator = seeded(0)
    d = torch.randn(shape, generator=generator)
    images, numel = shape[0], d[0].numel() if shape[0] else 1
    d = d * (0.5 + torch.arange(images) / max(1, images)).reshape(-1, *(1,) * (len(shape) - 1))
    if special == "zero":
        d[::2] = 0.0
    if special == "non-finite":
        d.view(images, -1)[0, 0], d.view(images, -1)[1, 0] = torch.nan, torch.inf
    typical = float(numel) * 0.8 if p == 1 else float(numel) ** 0.5
    r: Any = typical if radius == "number" else radius
    if radius == "tensor":
        r = (typical * torch.linspace(0.25, 2.0, images)).to(device)
    return {"perturbation": arrange(d.to(dtype), layout).to(device), "radius": r, "p": p}


def run(inputs: Inputs, backend: str) -> Outputs:
    """The scaled perturbations."""
    return {"perturbation": scale_to_ball_(**inputs, backend=backend)}


def image_loop(perturbation: Tensor, radius: Any, p: int) -> Tensor:
    """As it is commonly written: a loop over images, with a norm each as a Python number."""
    radii = radius.tolist() if isinstance(radius, Tensor) else [radius] * len(perturbation)
    for i, r in enumerate(radii):
        norm = perturbation[i].norm(p).item()
        if norm > r:
            perturbation[i] *= r / norm
    return perturbation


def batched_form(perturbation: Tensor, radius: Any, p: int) -> Tensor:
    """All images at once."""
    norm = perturbation.flatten(1).norm(p, dim=1)
    scale = (radius / norm.clamp_min(1e-12)).clamp_max(1.0)
    return perturbation.mul_(scale.reshape(-1, *(1,) * (perturbation.dim() - 1)).to(perturbation.dtype))


def eager(inputs: Inputs) -> Outputs:
    """The same by the batched form."""
    return {"perturbation": batched_form(**inputs)}


def _timed(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    # Scaled once, images would stay inside. The radius shrinks instead, on every side and where a CUDA graph sees it:
    # images that were outside are so in each call, by more than rounding, and about half of all stay so for long.
    d = inputs["perturbation"].clone()
    radius = torch.as_tensor(inputs["radius"], dtype=torch.float32, device=d.device).expand(len(d)).contiguous()

    def call() -> None:
        radius.mul_(_SHRINK)
        function(d, radius, inputs["p"])

    return call


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Images of which half are outside, scaled to a ball that is a little smaller each time."""
    return _timed(lambda d, radius, p: scale_to_ball_(d, radius, p, backend=backend), inputs)


def bytes_moved(inputs: Inputs) -> int:
    """A read of every image, and a write of those outside: half of them."""
    d: Tensor = inputs["perturbation"]
    return 3 * d.numel() * d.element_size() // 2


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    d = inputs["perturbation"]
    return [(SCALE.call, (d, *_radius(inputs["radius"], d), inputs["p"], "auto"))]


_BATCH = (256, 3, 32, 32)
# fmt: off
CASES = (
    Case("cifar10", "a batch", {"shape": _BATCH}, benchmark=True),
    Case("cifar10-l1", "the same", {"shape": _BATCH, "p": 1}, benchmark=True),
    Case("imagenet", "large images", {"shape": (8, 3, 224, 224)}, benchmark=True),
    Case("odd", "images of odd size", {"shape": (5, 3, 7, 11)}, _ALL),
    Case("odd-l1", "the same", {"shape": (5, 3, 7, 11), "p": 1}, _ALL),
    Case("vectors", "images of whole vectors", {"shape": (4, 3, 8, 40), "radius": "tensor"}, _ALL),
    Case("tensor", "a radius an image", {"shape": (6, 3, 5, 5), "radius": "tensor", "p": 1}, _ALL),
    Case("radius-0", "everything goes", {"shape": (4, 1, 5, 5), "radius": 0.0}, _ALL),
    Case("zero", "norm 0 stays", {"shape": (5, 2, 3, 3), "special": "zero"}, _ALL),
    Case("non-finite", "NaN and infinity", {"shape": (4, 2, 3, 3), "special": "non-finite"}, _ALL),
    Case("channels-last", "not copied", {"shape": (4, 3, 6, 5), "layout": "channels_last"}, _ALL),
    Case("transposed", "copied and written back", {"shape": (4, 3, 6, 5), "layout": "transposed"}, _ALL),
    Case("sliced", "copied and written back", {"shape": (4, 3, 6, 5), "layout": "sliced"}, _ALL),
    Case("2-d", "vectors", {"shape": (9, 33)}),
    Case("1-d", "numbers", {"shape": (9,)}),
    Case("empty", "no images", {"shape": (0, 3, 4, 4)}, _ALL),
    Case("empty-images", "images of no pixels", {"shape": (3, 0)}),
    Case("2^31", "more than 2^31 elements", {"shape": (15000, 3, 224, 224)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (512, 3, 224, 224)}, benchmark=True, large=True),
)
# fmt: on

SUITE = OpSuite(
    name="scale_to_ball_",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": lambda inputs: _timed(image_loop, inputs),
        "eager": lambda inputs: _timed(batched_form, inputs),
        "compile": lambda inputs: _timed(torch.compile(batched_form, dynamic=False), inputs),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
