"""Cases of bounded_ascent_cross_entropy, and the PyTorch that users write for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.bounded_ascent_cross_entropy import (
    BACKWARD,
    FORWARD,
    FORWARD_WITH_GRADIENT,
    bounded_ascent_cross_entropy,
)
from bdfast.testing.logits import draw_logits
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    num_descend: int,
    mu: float = 0.7,
    tau: float | None = None,
    **options: Any,
) -> Inputs:
    """Logits and labels (see :func:`bdfast.testing.logits.draw_logits`), tau (``2 ln C``), a gradient of the loss."""
    logits, target = draw_logits(device, dtype, shape, **options)
    return {
        "logits": logits,
        "target": target,
        "grad": torch.tensor(0.6, device=device),
        "num_descend": num_descend,
        "mu": mu,
        "tau": 2.0 * math.log(shape[1]) if tau is None else tau,
    }


def _options(inputs: Inputs) -> tuple[int, float, float]:
    return inputs["num_descend"], inputs["mu"], inputs["tau"]


def fused_loss(
    logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float, backend: str = "auto"
) -> Tensor:
    """The op, its options by position."""
    return bounded_ascent_cross_entropy(logits, target, num_descend, mu=mu, tau=tau, backend=backend)


def usual_loss(logits: Tensor, target: Tensor, num_descend: int, mu: float, tau: float) -> Tensor:
    """The loss as users write it."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ce[:num_descend].mean() - mu * ce[num_descend:].clamp_max(tau).mean()


def _outputs(inputs: Inputs, loss: Callable[..., Tensor], *backend: str) -> Outputs:
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    value = loss(logits, inputs["target"], *_options(inputs), *backend)
    (grad,) = torch.autograd.grad(value, logits, inputs["grad"].to(value.dtype))
    return {"loss": value.detach(), "grad": grad}


def run(inputs: Inputs, backend: str) -> Outputs:
    """Loss and gradient."""
    return _outputs(inputs, fused_loss, backend)


def eager(inputs: Inputs) -> Outputs:
    """Loss and gradient by the usual form."""
    return _outputs(inputs, usual_loss)


def _timed(inputs: Inputs, loss: Callable[..., Tensor], *backend: str) -> Callable[[], Any]:
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    arguments = (inputs["target"], *_options(inputs), *backend)

    def step() -> None:
        logits.grad = None
        loss(logits, *arguments).backward()  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward and backward, as in a training step."""
    return _timed(inputs, fused_loss, backend)


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the logits; backward reads them and writes their gradient."""
    logits: Tensor = inputs["logits"]
    return 3 * logits.numel() * logits.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the three raw ops."""
    logits, target, options = inputs["logits"].detach(), inputs["target"], (*_options(inputs), "auto")
    loss, stats = FORWARD.call(logits, target, *options)
    return [
        (FORWARD.call, (logits, target, *options)),
        (FORWARD_WITH_GRADIENT.call, (logits, target, *options)),
        (BACKWARD.call, (inputs["grad"].to(loss.dtype), logits, target, stats, *options)),
    ]


CASES = (
    Case(
        "advrbd-cifar10",
        "AdvrBD's pair of batches: launch-bound",
        {"shape": (256, 10), "num_descend": 128},
        _ALL,
        benchmark=True,
    ),
    Case("imagenet", "wide rows", {"shape": (256, 1000), "num_descend": 128}, _ALL, benchmark=True),
    Case("empty", "no rows: 0, the gradient empty", {"shape": (0, 10), "num_descend": 0}, _ALL),
    Case("all-descend", "no ascent: mean cross entropy", {"shape": (33, 10), "num_descend": 33, "scale": 1.0}, _ALL),
    Case("all-ascend", "no descent", {"shape": (33, 10), "num_descend": 0}, _ALL),
    Case("one-class", "cross entropy is 0 everywhere, and tau", {"shape": (5, 1), "num_descend": 2}, _ALL),
    Case("one-row-each", "a row a part", {"shape": (2, 7), "num_descend": 1}, _ALL),
    Case("odd", "neither part a whole vector of rows", {"shape": (67, 13), "num_descend": 17}, _ALL),
    Case("widest-narrow", "the most classes of 16 rows a vector", {"shape": (47, 32), "num_descend": 31}, _ALL),
    Case("chunk+1", "one row past a chunk in a part, odd classes", {"shape": (130, 33), "num_descend": 65}, _ALL),
    Case("odd-wide", "classes past powers of two", {"shape": (5, 1025), "num_descend": 2}, _ALL),
    Case("very-wide", "a row of several tiles", {"shape": (4, 20001), "num_descend": 1}, (torch.float32, _ALL[2])),
    Case("at-rest", "every ascending row above tau", {"shape": (40, 10), "num_descend": 9, "tau": 0.0}, _ALL),
    Case("at-rest-wide", "the same in wide rows", {"shape": (40, 70), "num_descend": 9, "tau": 0.0}, _ALL),
    Case("unbounded", "the paper's loss", {"shape": (40, 10), "num_descend": 20, "tau": math.inf}, _ALL),
    Case("no-ascent", "mu = 0", {"shape": (40, 10), "num_descend": 20, "mu": 0.0}),
    Case("transposed", "classes not contiguous", {"shape": (37, 10), "num_descend": 12, "layout": "transposed"}, _ALL),
    Case("padded-rows", "rows apart", {"shape": (37, 10), "num_descend": 12, "layout": "padded rows"}, _ALL),
    Case("outliers", "logits of thousands", {"shape": (40, 11), "num_descend": 20, "special": "outliers"}),
    Case("non-finite", "NaN is not masked", {"shape": (28, 10), "num_descend": 14, "special": "non-finite"}, _ALL),
    Case("2^31", "more than 2^31 logits", {"shape": (2_200_000, 1000), "num_descend": 9}, (_ALL[2],), large=True),
    Case(
        "past-l2",
        "far past the L2 of a GPU",
        {"shape": (131_072, 1000), "num_descend": 65_536},
        benchmark=True,
        large=True,
    ),
)

SUITE = OpSuite(
    name="bounded_ascent_cross_entropy",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "eager": lambda inputs: _timed(inputs, usual_loss),
        "compile": lambda inputs: _timed(inputs, torch.compile(usual_loss, dynamic=False)),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
