"""Cases of batch_norm_relu, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.ops.batch_norm_relu import BACKWARD, FORWARD, batch_norm_relu
from bdfast.ops.precision import compute_dtype
from bdfast.testing.draws import seeded
from bdfast.testing.ops.clipped_relu import arrange
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
_EPS, _MOMENTUM = 1e-5, 0.1
_NEXT_TO_0 = 2e-3  # further than any rounding of y in float32 carries it, in all cases but "far"


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    residual: bool = False,
    relu: bool = True,
    running: bool = True,
    offset: float = 1.0,
    special: str = "",
) -> Inputs:
    """Activations of spread 2 around ``offset``; no gradient arrives where a rounding decides about the ReLU's mask."""
    generator = seeded(2)
    x = 2.0 * torch.randn(shape, generator=generator) + offset
    if special == "nan":
        x.view(-1)[0] = torch.nan
    if special == "outlier":  # where a pivot may be looked for
        x[0] = 100.0
    x, c = x.to(dtype), shape[1]
    added = torch.randn(shape, generator=generator).to(dtype) if residual else None
    weight, bias = 0.5 + torch.rand(c, generator=generator), torch.randn(c, generator=generator)
    weight[::3] *= -1.0
    grad = torch.randn(shape, generator=generator)
    if relu and x.numel() <= 2**28:  # larger ones are compared by norms
        grad[_usual(x.double(), weight.double(), bias.double(), added).abs() < _NEXT_TO_0] = 0.0
    running_mean, running_var = torch.randn(c, generator=generator), torch.rand(c, generator=generator)
    return {
        "x": arrange(x, layout).to(device),
        "weight": weight.to(device),
        "bias": bias.to(device),
        "residual": None if added is None else arrange(added, layout).to(device),
        "running_mean": running_mean.to(device) if running else None,
        "running_var": running_var.to(device) if running else None,
        "grad": arrange(grad.to(dtype), layout).to(device),
        "relu": relu,
    }


def _usual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, *running: Tensor | None) -> Tensor:
    """Batch norm and shortcut in PyTorch, without the ReLU."""
    mean, var = running or (None, None)
    if x.numel() == x.shape[1]:  # one value a channel, which torch refuses
        return ch.per_channel(bias, x).expand_as(x) + (0 if residual is None else residual)
    y = F.batch_norm(x, mean, var, weight, bias, True, _MOMENTUM, _EPS)
    return y if residual is None else y + residual


def run(inputs: Inputs, backend: str) -> Outputs:
    """All that is returned, all gradients, and the running statistics."""

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return batch_norm_relu(
            x, weight, bias, residual, running_mean=inputs["running_mean"], running_var=inputs["running_var"],
            momentum=_MOMENTUM, eps=_EPS, relu=inputs["relu"], backend=backend,
        )  # fmt: skip

    return _outputs(ours, inputs)


def usual_form(
    inputs: Inputs, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """As users write it; what torch does not return is computed beside it."""
    y = _usual(x, weight, bias, residual, inputs["running_mean"], inputs["running_var"])
    dims = [d for d in range(x.dim()) if d != 1]
    values = x.detach().to(compute_dtype(x))
    return F.relu(y) if inputs["relu"] else y, values.mean(dims), values.var(dims, unbiased=False)


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return _outputs(lambda *tensors: usual_form(inputs, *tensors), inputs)


def _outputs(function: Callable[..., tuple[Tensor, Tensor, Tensor]], inputs: Inputs) -> Outputs:
    names = [name for name in ("x", "weight", "bias", "residual") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    y, mean, var = function(leaves["x"], leaves["weight"], leaves["bias"], leaves.get("residual"))
    grads = torch.autograd.grad(y, list(leaves.values()), inputs["grad"])
    found = {"y": y.detach(), "mean": mean, "var": var}
    found |= {f"grad_{name}": g for name, g in zip(names, grads, strict=True)}
    running = {name: inputs[name] for name in ("running_mean", "running_var") if inputs[name] is not None}
    return found | {name: value.clone() for name, value in running.items()}


def _timed(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    """One call: forward and backward."""
    names = [name for name in ("x", "weight", "bias", "residual") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}

    def step() -> None:
        for leaf in leaves.values():
            leaf.grad = None
        y = function(leaves["x"], leaves["weight"], leaves["bias"], leaves.get("residual"))
        y.backward(inputs["grad"])  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward and backward."""

    def ours(*tensors: Any) -> Tensor:
        return batch_norm_relu(
            *tensors, running_mean=inputs["running_mean"], running_var=inputs["running_var"], relu=inputs["relu"],
            backend=backend,
        ).y  # fmt: skip

    return _timed(ours, inputs)


def _usual_step(inputs: Inputs) -> Callable[..., Tensor]:
    def usual(*tensors: Any) -> Tensor:
        y = _usual(*tensors, inputs["running_mean"], inputs["running_var"])
        return F.relu(y) if inputs["relu"] else y

    return usual


def bytes_moved(inputs: Inputs) -> int:
    """Three passes forward and five backward; with a residual, one and two more."""
    x: Tensor = inputs["x"]
    passes = 8 if inputs["residual"] is None else 11 if inputs["relu"] else 9
    return passes * x.numel() * x.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    x, relu = inputs["x"].detach(), inputs["relu"]
    names = ("weight", "bias", "residual", "running_mean", "running_var")
    forward = (x, *(inputs[name] for name in names), _MOMENTUM, _EPS, relu, "auto")
    y, _, _, saved = FORWARD.call(*forward)
    masked = relu and inputs["residual"] is not None
    return [(FORWARD.call, forward), (BACKWARD.call, (inputs["grad"], x, y if masked else None, saved, relu, "auto"))]


_LAST: dict[str, Any] = {"layout": "channels_last"}
# fmt: off
CASES = (
    Case("stem", "planes", {"shape": (128, 64, 32, 32)}, benchmark=True),
    Case("stem-channels-last", "CIFAR-10's first stage", {"shape": (256, 64, 32, 32), **_LAST},
         (torch.bfloat16, torch.float32), benchmark=True),
    Case("stem-residual", "the same, the end of a block", {"shape": (256, 64, 32, 32), "residual": True, **_LAST},
         (torch.bfloat16,), benchmark=True),
    Case("late", "small planes", {"shape": (256, 512, 4, 4), **_LAST}, (torch.bfloat16,), benchmark=True),
    Case("odd", "planes of odd size", {"shape": (3, 5, 7, 3)}, _ALL),
    Case("odd-residual", "planes of odd size", {"shape": (3, 5, 7, 3), "residual": True}, _ALL),
    Case("odd-channels-last", "rows of odd length", {"shape": (3, 5, 7, 3), **_LAST}, _ALL),
    Case("odd-channels-last-residual", "rows of odd length", {"shape": (3, 5, 7, 3), "residual": True, **_LAST}, _ALL),
    Case("no-relu", "in front of an addition elsewhere", {"shape": (3, 5, 7, 3), "relu": False}, _ALL),
    Case("no-relu-residual", "an addition alone", {"shape": (3, 8, 4, 4), "relu": False, "residual": True, **_LAST},
         _ALL),
    Case("no-running", "statistics that nobody keeps", {"shape": (3, 5, 7, 3), "running": False}),
    Case("several-tiles", "and a part of one", {"shape": (5, 64, 11, 12), "residual": True, **_LAST}, _ALL),
    Case("chunk+", "several tiles of planes", {"shape": (5, 7, 31, 33)}, _ALL),
    Case("whole-vectors", "planes of a multiple of 16", {"shape": (3, 5, 12, 12), "residual": True}, _ALL),
    Case("whole-vectors-channels-last", "channels of a multiple of 16", {"shape": (3, 48, 5, 5), **_LAST}, _ALL),
    Case("tiny-planes", "hundreds of channels", {"shape": (9, 130, 2, 2), "residual": True}, _ALL),
    Case("2-d", "features [N, C]", {"shape": (37, 33)}, _ALL),
    Case("3-d", "[N, C, L]", {"shape": (4, 3, 50), "residual": True}),
    Case("transposed", "copied", {"shape": (6, 5, 4, 3), "layout": "transposed", "residual": True}, _ALL),
    Case("sliced", "copied", {"shape": (3, 4, 5, 6), "layout": "sliced", "residual": True}, _ALL),
    Case("one-channel", "grayscale", {"shape": (6, 1, 9, 9)}, _ALL),
    Case("one-value", "variance 0: the bias", {"shape": (1, 6)}, _ALL),
    # float32 keeps 2^-13 of the deviation of x in its inputs, and of the mean in what is returned.
    Case("far", "a mean a thousand times the spread", {"shape": (4, 3, 9, 9), "offset": 2000.0}, conditioning=10.0),
    Case("outlier", "a first sample far from the others", {"shape": (64, 3, 9, 9), "special": "outlier"},
         conditioning=10.0),
    Case("nan", "NaN takes its channel", {"shape": (4, 3, 5, 5), "special": "nan"}, _ALL),
    Case("2^31", "more than 2^31 activations", {"shape": (2100, 1024, 32, 32)}, (torch.bfloat16,), large=True),
)
# fmt: on

SUITE = OpSuite(
    name="batch_norm_relu",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "eager": lambda inputs: _timed(_usual_step(inputs), inputs),
        "compile": lambda inputs: _timed(torch.compile(_usual_step(inputs), dynamic=False), inputs),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
