"""Cases of projected_sgd_step_, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.projected_sgd_step import STEP, projected_sgd_step_
from bdfast.testing.draws import seeded
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

Shapes = tuple[tuple[int, ...], ...]


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shapes: Shapes,
    start: str = "random",
    carried: str = "",
    steps: int = 3,
    momentum: float = 0.9,
    distance_weight: float = 1.0 / 11.0,
    lr: float = 0.01,
    lr_tensor: bool = False,
    layout: str = "contiguous",
) -> Inputs:
    """Layers on their spheres, started as D3 starts them, with unit-norm gradients.

    ``carried``: "" measures the distance every step, "unknown" carries it from zeros, "known" from the true distance.
    """
    generator = seeded(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        t = torch.randn(shape, generator=generator).to(device, dtype)
        if layout == "channels_last" and t.dim() == 4:
            return t.to(memory_format=torch.channels_last)
        if layout == "transposed" and t.dim() == 2:
            return t.t().contiguous().t()
        return t

    anchors = [draw(shape) for shape in shapes]
    norms = torch.stack([a.norm().to(torch.float32) for a in anchors])
    weights = [_start(start, anchor, draw(tuple(anchor.shape))) for anchor in anchors]
    grads = [g / g.norm().clamp_min(1e-30) for g in (draw(shape) for shape in shapes)]
    if layout == "mixed":
        grads = [g.t().contiguous().t() if g.dim() == 2 else g for g in grads]
    distances = None
    if carried:
        distances = torch.zeros(len(shapes), device=device)
        if carried == "known":
            distances = torch.stack(
                [(w.double() - a.double()).norm().float() for w, a in zip(weights, anchors, strict=True)]
            )
    return {
        "weights": weights,
        "anchors": anchors,
        "grads": grads,
        "momentum_buffers": [torch.zeros_like(w) for w in weights],
        "norms": norms,
        "distances": distances,
        "lr": torch.tensor(lr, device=device) if lr_tensor else lr,
        "momentum": momentum,
        "distance_weight": distance_weight,
        "steps": steps,
    }


def _start(start: str, anchor: Tensor, noise: Tensor) -> Tensor:
    if start == "random":
        return noise.mul(anchor.norm() / noise.norm())
    if start == "far":
        return -anchor
    if start == "near":
        return anchor.clone()
    if start == "close":
        moved = anchor + 1e-3 * noise
        return moved.mul(anchor.norm() / moved.norm())
    if start == "nan":
        moved = noise.clone()
        moved.view(-1)[0] = torch.nan
        return moved
    return torch.zeros_like(anchor)  # "zero"


def run(inputs: Inputs, backend: str) -> Outputs:
    """Several steps; the state that they leave."""
    arguments = {name: value for name, value in inputs.items() if name != "steps"}
    if isinstance(inputs["lr"], Tensor):
        arguments["lr"] = inputs["lr"].float()  # float32 also where the weights are upcast
    for _ in range(inputs["steps"]):
        projected_sgd_step_(**arguments, backend=backend)
    return _state(inputs)


def _state(inputs: Inputs) -> Outputs:
    state = {f"weights[{j}]": w for j, w in enumerate(inputs["weights"])}
    state |= {f"momentum_buffers[{j}]": v for j, v in enumerate(inputs["momentum_buffers"])}
    if inputs["distances"] is not None:
        state["distances"] = inputs["distances"]
    return state


def usual_step(inputs: Inputs) -> Callable[[], Any]:
    """As D3 is usually written: autograd for the distance, ``torch.optim.SGD``, projection under ``no_grad``."""
    weights = [torch.nn.Parameter(w.detach().clone()) for w in inputs["weights"]]
    anchors, grads, norms, c = inputs["anchors"], inputs["grads"], inputs["norms"], inputs["distance_weight"]
    optimizer = torch.optim.SGD(weights, lr=float(inputs["lr"]), momentum=inputs["momentum"])

    def step() -> None:
        for w, g in zip(weights, grads, strict=True):
            w.grad = g.clone()  # what the network's backward leaves
        distance = sum(torch.norm(w - a) for w, a in zip(weights, anchors, strict=True))
        (-c * distance).backward()
        optimizer.step()
        with torch.no_grad():
            for j, w in enumerate(weights):
                w.mul_(norms[j] / w.norm())

    return step


def _inplace(
    weights: list[Tensor], anchors: list[Tensor], grads: list[Tensor], buffers: list[Tensor], norms: Tensor,
    lr: float, momentum: float, c: float,
) -> None:  # fmt: skip
    for j, (w, a, g, v) in enumerate(zip(weights, anchors, grads, buffers, strict=True)):
        difference = w - a
        v.mul_(momentum).add_(g).sub_(difference.mul_(c / difference.norm()))
        w.sub_(v, alpha=lr)
        w.mul_(norms[j] / w.norm())


def _inplace_step(inputs: Inputs, function: Callable[..., None]) -> Callable[[], Any]:
    lists = [[t.detach().clone() for t in inputs[n]] for n in ("weights", "anchors", "grads", "momentum_buffers")]
    scalars = (inputs["norms"], float(inputs["lr"]), inputs["momentum"], inputs["distance_weight"])

    def step() -> None:
        with torch.no_grad():
            function(*lists, *scalars)

    return step


def inplace_step(inputs: Inputs) -> Callable[[], Any]:
    """The best in-place form in plain PyTorch: no autograd, one temporary."""
    return _inplace_step(inputs, _inplace)


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """The in-place form under ``torch.compile``."""
    return _inplace_step(inputs, torch.compile(_inplace, dynamic=False))


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One step, over and over."""
    arguments = {name: value for name, value in inputs.items() if name != "steps"}
    return lambda: projected_sgd_step_(**arguments, backend=backend)


def eager(inputs: Inputs) -> Outputs:
    """The in-place form's state after the same steps (distances measured)."""
    for _ in range(inputs["steps"]):
        _inplace(
            inputs["weights"], inputs["anchors"], inputs["grads"], inputs["momentum_buffers"], inputs["norms"],
            float(inputs["lr"]), inputs["momentum"], inputs["distance_weight"],
        )  # fmt: skip
    if inputs["distances"] is not None:
        pairs = zip(inputs["weights"], inputs["anchors"], strict=True)
        inputs["distances"].copy_(torch.stack([(w - a).norm() for w, a in pairs]))
    return _state(inputs)


def bytes_moved(inputs: Inputs) -> int:
    """5 reads and 3 writes a weight with the distance carried; 40 bytes a float32 weight without."""
    weights: list[Tensor] = inputs["weights"]
    passes = 8 if inputs["distances"] is not None else 10
    return passes * sum(w.numel() * w.element_size() for w in weights)


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    lr = inputs["lr"]
    rate, rate_tensor = (0.0, lr) if isinstance(lr, Tensor) else (lr, None)
    lists = (inputs["weights"], inputs["anchors"], inputs["grads"], inputs["momentum_buffers"])
    scalars = (rate, rate_tensor, inputs["momentum"], inputs["distance_weight"], inputs["norms"], inputs["distances"])
    return [(STEP.call, (*lists, *scalars, "auto"))]


_HEAD: Shapes = ((512, 10),)
_VGG19_HEAD: Shapes = ((4096, 25088), (4096, 4096), (10, 4096))
# fmt: off
CASES = (
    Case("d3-cifar10", "PreAct-ResNet18's head", {"shapes": _HEAD, "carried": "known"}, benchmark=True),
    Case("d3-cifar10-measured", "the same, distance measured", {"shapes": _HEAD}, benchmark=True),
    Case("vit-head", "768 x 1000", {"shapes": ((1000, 768),), "carried": "known"}, benchmark=True),
    Case("4096x4096", "bandwidth-bound", {"shapes": ((4096, 4096),), "carried": "known"}, benchmark=True),
    Case("4096x4096-measured", "the same, distance measured", {"shapes": ((4096, 4096),)}, benchmark=True),
    Case("unknown-distance", "the state starts from zeros", {"shapes": ((33, 65), (17,)), "carried": "unknown"}),
    Case("one-weight", "a layer of one weight", {"shapes": ((1,),), "carried": "unknown"}),
    Case("edges", "around vector widths", {"shapes": ((3,), (7, 1), (16,), (17,), (31, 33))}),
    Case("chunk+1", "one past a chunk", {"shapes": ((16385,), (16384,), (5,)), "carried": "known"}),
    Case("conv", "convolution weights", {"shapes": ((8, 4, 3, 3), (10, 8)), "carried": "known"}),
    Case("channels-last", "kept, not copied", {"shapes": ((8, 4, 3, 3),), "layout": "channels_last"}),
    Case("transposed", "dense but not contiguous", {"shapes": ((12, 31),), "layout": "transposed"}),
    Case("mixed-strides", "gradient laid out differently", {"shapes": ((12, 31), (5, 5)), "layout": "mixed"}),
    Case("many-layers", "several launch groups", {"shapes": tuple((5, 3 + j) for j in range(70)), "carried": "known"}),
    Case("empty-layer", "a layer without weights", {"shapes": ((0, 4), (4, 4)), "carried": "unknown"}),
    Case("far", "at the maximum", {"shapes": _HEAD, "start": "far", "carried": "known"}),
    Case("near", "distance 0: no pull", {"shapes": _HEAD, "start": "near", "carried": "unknown", "steps": 1},
         conditioning=1e4),  # ||W|| = 71 moves by 0.01
    Case("close", "the expansion cancels: direct sum", {"shapes": ((64, 50),), "start": "close", "carried": "known"},
         conditioning=1e3),  # W - W0 is a thousandth of W
    Case("zero", "weights of norm 0, no step", {"shapes": ((6, 6),), "start": "zero", "lr": 0.0, "carried": "unknown"}),
    Case("nan", "a NaN weight spoils its layer", {"shapes": ((6, 6), (4,)), "start": "nan", "carried": "unknown"}),
    Case("no-momentum", "momentum 0", {"shapes": ((20, 30),), "momentum": 0.0}),
    Case("no-pull", "distance weight 0: projected SGD alone", {"shapes": ((20, 30),), "distance_weight": 0.0}),
    Case("lr-tensor", "a captured graph's schedule", {"shapes": _HEAD, "lr_tensor": True, "carried": "known"}),
    Case("vgg19-head", "119.5 M weights", {"shapes": _VGG19_HEAD, "carried": "known", "steps": 1}, large=True,
         benchmark=True),
)
# fmt: on

SUITE = OpSuite(
    name="projected_sgd_step_",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"usual": usual_step, "eager": inplace_step, "compile": compiled_step},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
