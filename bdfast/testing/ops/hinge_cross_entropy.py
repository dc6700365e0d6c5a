"""Cases of hinge_cross_entropy, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.hinge_cross_entropy import BACKWARD, FORWARD, FORWARD_WITH_GRADIENT, hinge_cross_entropy
from bdfast.testing.draws import seeded
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    margin: float = 0.1,
    reduction: str = "mean",
    hinge: str = "sample",
    scale: float = 3.0,
    layout: str = "contiguous",
    special: str = "",
) -> Inputs:
    """Logits of spread ``scale`` with the label raised in half of the rows, so that both sides of the hinge occur."""
    generator = seeded(0)
    n, c = shape
    logits = torch.randn(n, c, generator=generator) * scale
    target = torch.randint(c, (n,), generator=generator)
    logits[torch.arange(0, n, 2), target[::2]] += 4.0 * scale
    if special == "outliers" and n:
        logits[::3] *= 1e3
        logits[0, 0] = -torch.inf
    if special == "nan" and n:
        logits[n // 2, c // 2] = torch.nan
    grad = torch.randn(n if reduction == "none" else (), generator=generator)
    logits = logits.to(device, dtype)
    if layout == "transposed":
        logits = logits.t().contiguous().t()
    if layout == "padded rows":
        logits = F.pad(logits, (3, 5))[:, 3 : 3 + c]
    return {
        "logits": logits,
        "target": target.to(device),
        "grad": grad.to(device),
        "margin": margin,
        "reduction": reduction,
        "hinge": hinge,
    }


def run(inputs: Inputs, backend: str) -> Outputs:
    """Loss and gradient."""
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    loss = hinge_cross_entropy(
        logits, inputs["target"], inputs["margin"], inputs["reduction"], inputs["hinge"], backend=backend
    )
    (grad,) = torch.autograd.grad(loss, logits, inputs["grad"].to(loss.dtype))
    return {"loss": loss.detach(), "grad": grad}


def usual_loss(logits: Tensor, target: Tensor, margin: float, reduction: str, hinge: str) -> Tensor:
    """The hinge as users write it."""
    ce = F.cross_entropy(logits, target, reduction="none" if hinge == "sample" else "mean")
    rows = (ce - margin).clamp_min(0.0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


def eager(inputs: Inputs) -> Outputs:
    """Loss and gradient by the usual form."""
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    loss = usual_loss(logits, inputs["target"], inputs["margin"], inputs["reduction"], inputs["hinge"])
    (grad,) = torch.autograd.grad(loss, logits, inputs["grad"].to(loss.dtype))
    return {"loss": loss.detach(), "grad": grad}


def _timed(inputs: Inputs, loss: Callable[..., Tensor]) -> Callable[[], Any]:
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    options = (inputs["target"], inputs["margin"], inputs["reduction"], inputs["hinge"])

    def step() -> None:
        logits.grad = None
        loss(logits, *options).backward()  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward and backward, as in a training step."""
    return _timed(inputs, lambda *arguments: hinge_cross_entropy(*arguments, backend=backend))


def eager_step(inputs: Inputs) -> Callable[[], Any]:
    """Forward and backward of the usual form."""
    return _timed(inputs, usual_loss)


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """Forward and backward of the usual form under ``torch.compile``."""
    return _timed(inputs, torch.compile(usual_loss, dynamic=False))


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the logits; backward reads them and writes their gradient."""
    logits: Tensor = inputs["logits"]
    return 3 * logits.numel() * logits.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    logits, target = inputs["logits"].detach(), inputs["target"]
    options = (inputs["margin"], inputs["reduction"], inputs["hinge"], "auto")
    loss, stats = FORWARD.call(logits, target, *options)
    grad = inputs["grad"].to(loss.dtype)
    calls = [(FORWARD.call, (logits, target, *options)), (BACKWARD.call, (grad, logits, target, stats, loss, *options))]
    if inputs["hinge"] == "sample":
        calls.append((FORWARD_WITH_GRADIENT.call, (logits, target, inputs["margin"], inputs["reduction"], "auto")))
    return calls


CASES = (
    Case("d3-cifar10", "D3's batch: launch-bound", {"shape": (256, 10)}, _ALL, benchmark=True),
    Case("tiny-imagenet", "D3 on 200 classes", {"shape": (256, 200)}, _ALL, benchmark=True),
    Case("imagenet", "bandwidth-bound", {"shape": (4096, 1000)}, _ALL, benchmark=True),
    Case("empty", "no rows: the mean is NaN, the gradient empty", {"shape": (0, 10)}, _ALL),
    Case("empty-sum", "no rows: the sum is 0", {"shape": (0, 10), "reduction": "sum"}),
    Case("one-class", "cross entropy is 0 everywhere", {"shape": (5, 1)}, _ALL),
    Case("one-row", "a single row", {"shape": (1, 7)}, _ALL),
    Case("lanes-1", "one row short of a vector of rows", {"shape": (15, 10)}, _ALL),
    Case("lanes+1", "one row past a vector of rows", {"shape": (17, 10)}, _ALL),
    Case("chunk+1", "one row past a chunk, odd classes", {"shape": (65, 33)}, _ALL),
    Case("odd-wide", "classes past powers of two", {"shape": (3, 1025)}, _ALL),
    Case("very-wide", "a row of several tiles", {"shape": (2, 20001)}, (torch.float32, torch.bfloat16)),
    Case("rows", "one loss a row", {"shape": (33, 10), "reduction": "none"}, _ALL),
    Case("sum", "sum over rows", {"shape": (130, 12), "reduction": "sum"}, _ALL),
    Case("batch-active", "hinge of the mean, above the margin", {"shape": (33, 10), "hinge": "batch"}, _ALL),
    Case("batch-inactive", "hinge of the mean, under it", {"shape": (33, 10), "hinge": "batch", "margin": 50.0}),
    Case("margin-0", "eps = 0: plain cross entropy", {"shape": (32, 10), "margin": 0.0}, _ALL),
    Case("transposed", "classes not contiguous", {"shape": (37, 10), "layout": "transposed"}, _ALL),
    Case("padded-rows", "rows further apart than their length", {"shape": (37, 10), "layout": "padded rows"}, _ALL),
    Case("outliers", "logits of thousands and -inf", {"shape": (40, 11), "special": "outliers", "reduction": "none"}),
    Case("nan", "NaN logits are not masked", {"shape": (20, 10), "special": "nan", "reduction": "none"}, _ALL),
    Case("2^31", "more than 2^31 logits", {"shape": (2_200_000, 1000)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (131_072, 1000)}, benchmark=True, large=True),
)

SUITE = OpSuite(
    name="hinge_cross_entropy",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"eager": eager_step, "compile": compiled_step},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
