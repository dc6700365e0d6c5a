"""Cases of batch_norm_stat_distance, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bdfast.ops.batch_norm_stat_distance import BACKWARD, FORWARD, batch_norm_stat_distance
from bdfast.ops.precision import compute_dtype
from bdfast.testing.draws import seeded
from bdfast.testing.ops.clipped_relu import arrange
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    offset: float = 1.0,
    special: str = "",
) -> Inputs:
    """Activations of spread 2 around ``offset``, and running statistics some way from theirs."""
    generator = seeded(0)
    x = 2.0 * torch.randn(shape, generator=generator) + offset
    if special == "nan":
        x.view(-1)[0] = torch.nan
    return {
        "x": arrange(x.to(dtype), layout).to(device),
        "running_mean": (offset + 0.5 + torch.rand(shape[1], generator=generator)).to(device),
        "running_var": (2.0 * torch.rand(shape[1], generator=generator)).to(device),
        "grad": torch.tensor(-0.75, device=device),
    }


def run(inputs: Inputs, backend: str) -> Outputs:
    """The distance and the gradient of x."""
    return outputs(lambda x, mean, var: batch_norm_stat_distance(x, mean, var, backend=backend), inputs)


def outputs(function: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    """What ``function`` returns and its gradient."""
    x = inputs["x"].detach().requires_grad_()
    distance = function(x, inputs["running_mean"], inputs["running_var"])
    (grad_x,) = torch.autograd.grad(distance, x, inputs["grad"].to(distance.dtype))
    return {"distance": distance.detach(), "grad_x": grad_x}


def usual_form(x: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """As users write it."""
    dims = [d for d in range(x.dim()) if d != 1]
    mean, var = x.mean(dims), x.var(dims, unbiased=False)
    return (mean - running_mean).pow(2).sum() + (var - running_var).pow(2).sum()


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return outputs(usual_form, inputs)


def _timed(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    return lambda: outputs(function, inputs)


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward and backward."""
    return _timed(lambda x, mean, var: batch_norm_stat_distance(x, mean, var, backend=backend), inputs)


def bytes_moved(inputs: Inputs) -> int:
    """Two reads of x and one write of its gradient."""
    x: Tensor = inputs["x"]
    return 3 * x.numel() * x.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    x, dtype = inputs["x"].detach(), compute_dtype(inputs["x"])
    statistics = inputs["running_mean"].to(dtype), inputs["running_var"].to(dtype)
    distance, stats = FORWARD.call(x, *statistics, "auto")
    grad = inputs["grad"].to(distance.dtype)
    return [(FORWARD.call, (x, *statistics, "auto")), (BACKWARD.call, (x, *statistics, stats, grad, "auto"))]


# fmt: off
CASES = (
    Case("stem", "CIFAR-10's first stage", {"shape": (128, 64, 32, 32)}, (torch.float32, torch.bfloat16),
         benchmark=True),
    Case("stem-channels-last", "the same", {"shape": (128, 64, 32, 32), "layout": "channels_last"}, benchmark=True),
    Case("late", "small planes", {"shape": (128, 512, 4, 4)}, benchmark=True),
    Case("odd", "planes of odd size", {"shape": (3, 5, 7, 3)}, _ALL),
    Case("odd-channels-last", "rows of odd length", {"shape": (3, 5, 7, 3), "layout": "channels_last"}, _ALL),
    Case("chunk+", "several chunks", {"shape": (5, 7, 31, 33)}, _ALL),
    Case("chunk+channels-last", "several chunks of rows", {"shape": (5, 7, 31, 33), "layout": "channels_last"}, _ALL),
    Case("whole-vectors", "planes of a multiple of 16", {"shape": (3, 5, 12, 12)}, _ALL),
    Case("whole-vectors-channels-last", "channels of a multiple of 16",
         {"shape": (3, 48, 5, 5), "layout": "channels_last"}, _ALL),
    Case("tiny-planes", "hundreds of channels", {"shape": (9, 130, 2, 2)}, _ALL),
    Case("2-d", "features [N, C]", {"shape": (37, 33)}, _ALL),
    Case("3-d", "[N, C, L]", {"shape": (4, 3, 50)}),
    Case("transposed", "copied", {"shape": (6, 5, 4, 3), "layout": "transposed"}, _ALL),
    Case("sliced", "copied", {"shape": (3, 4, 5, 6), "layout": "sliced"}, _ALL),
    Case("one-channel", "grayscale", {"shape": (6, 1, 9, 9)}, _ALL),
    Case("one-value", "variance 0", {"shape": (1, 6)}, _ALL),
    Case("far", "a mean a thousand times the spread", {"shape": (4, 3, 9, 9), "offset": 2000.0}),
    Case("nan", "NaN goes through", {"shape": (4, 3, 5, 5), "special": "nan"}, _ALL),
    Case("2^31", "more than 2^31 activations", {"shape": (2100, 1024, 32, 32)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (128, 64, 112, 112)}, benchmark=True, large=True),
)
# fmt: on

SUITE = OpSuite(
    name="batch_norm_stat_distance",
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
