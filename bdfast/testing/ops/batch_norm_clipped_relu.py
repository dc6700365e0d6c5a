"""Cases of batch_norm_clipped_relu, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.ops.batch_norm_clipped_relu import FORWARD, batch_norm_clipped_relu
from bdfast.ops.clipped_relu import BACKWARD
from bdfast.testing.draws import seeded
from bdfast.testing.ops import clipped_relu as plain
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
_EPS = 1e-5
_PARAMETERS = ("running_mean", "running_var", "weight", "bias")


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    bound: str | float | None = "channel",
    needs: str = "both",
    layout: str = "contiguous",
    special: str = "",
    affine: bool = True,
    parameter_dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Activations that no rounding of the batch norm carries across 0 or a bound, where a gradient jumps."""
    generator = seeded(1)
    c = shape[1]
    mean, bias = torch.randn(2, c, generator=generator).to(parameter_dtype)
    var, weight = (0.5 + torch.rand(2, c, generator=generator)).to(parameter_dtype)
    weight[::3] *= -1.0
    parameters = (mean, var, weight, bias) if affine else (mean, var, None, None)
    number = 1.0 if bound is None else bound
    inputs = plain.make(device, dtype, shape=shape, bound=number, needs=needs, layout=layout, special=special)
    inputs["x"] = _away_from_jumps(inputs["x"], parameters, inputs["bound"])
    inputs["bound"] = None if bound is None else inputs["bound"]
    values = (None if p is None else p.to(device) for p in parameters)
    return inputs | dict(zip(_PARAMETERS, values, strict=True))


def _away_from_jumps(x: Tensor, parameters: tuple[Tensor | None, ...], bound: Any) -> Tensor:
    """``x`` with 1 added, as often as it takes, where the output of the batch norm is next to 0 or to its bound."""
    if x.numel() > 2**28:  # compared by norms of chunks, which a few elements do not move
        return x
    where = x.device
    mean, var, weight, bias = (torch.zeros(1, device=where) if p is None else p.to(where).double() for p in parameters)
    scale = (var + _EPS).rsqrt() * (1.0 if parameters[2] is None else weight)
    shift = bias - mean * scale
    z = torch.as_tensor(bound, dtype=torch.float64, device=where).flatten().expand(len(scale))
    channels = ch.per_channel(torch.arange(len(scale), device=where), x).expand_as(x).reshape(-1)
    values, near = x.reshape(-1).clone(), torch.arange(x.numel(), device=where)
    while len(near):
        c = channels[near]
        t = values[near].double() * scale[c] + shift[c]
        near = near[(t.abs() < 1e-3) | ((t - z[c]).abs() < 1e-3)]
        values[near] += 1.0
    return x.copy_(values.reshape(x.shape))  # strides kept


def run(inputs: Inputs, backend: str) -> Outputs:
    """Activations, and the gradients that are asked for."""
    return plain.outputs(_bind(batch_norm_clipped_relu, inputs, backend=backend), inputs)


def _bind(function: Callable[..., Tensor], inputs: Inputs, **options: Any) -> Callable[[Tensor, Any], Tensor]:
    parameters = [inputs[name] for name in _PARAMETERS]
    return lambda x, bound: function(x, *parameters, bound, _EPS, **options)


def usual_form(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, bound: Any, eps: float
) -> Tensor:
    """As users write it."""
    y = F.relu(F.batch_norm(x, mean, var, weight, bias, eps=eps))
    if bound is None:
        return y
    z = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    return torch.minimum(y, z.reshape(-1, *(1,) * (x.dim() - 2)) if z.dim() else z)


def folded_form(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, bound: Any, eps: float
) -> Tensor:
    """The fewest kernels in plain PyTorch: batch norm folded into one multiply-add, and one clamp."""
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - mean * scale
    scale, shift = (ch.per_channel(v.to(x.dtype), x) for v in (scale, shift))
    t = torch.addcmul(shift, x, scale)
    return F.relu(t) if bound is None else plain.one_kernel_form(t, bound)


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return plain.outputs(_bind(usual_form, inputs), inputs)


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward, and backward where gradients are asked for."""
    return plain.timed(_bind(batch_norm_clipped_relu, inputs, backend=backend), inputs)


def _timed(form: Callable[..., Tensor], inputs: Inputs) -> Callable[[], Any]:
    return plain.timed(_bind(form, inputs), inputs)


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """The usual form under ``torch.compile``."""
    return plain.timed(_bind(torch.compile(usual_form, dynamic=False), inputs), inputs)


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    x, names = inputs["x"].detach(), plain.NEEDS[inputs["needs"]]
    bound = inputs["bound"]
    z, limit = (None, float("inf")) if bound is None else ch.split_bound("", bound, x)
    values = (None if (p := inputs[name]) is None else p.float() for name in _PARAMETERS)
    needs = ("x" in names, "bound" in names)
    arguments = (x, *values, _EPS, z, limit, *needs, "auto")
    _, bits, scale = FORWARD.call(*arguments)
    found = [(FORWARD.call, arguments)]
    if names:
        options = (scale, ch.is_channels_last(x), *needs, 1 if z is None else z.numel(), "auto")
        found.append((BACKWARD.call, (inputs["grad"], bits, *options)))
    return found


_STEM = (128, 64, 32, 32)
# fmt: off
CASES = (
    Case("stem", "CIFAR-10's first stage, both gradients", {"shape": _STEM},
         (torch.float32, torch.bfloat16), benchmark=True),
    Case("stem-forward", "inference", {"shape": _STEM, "needs": "none"}, benchmark=True),
    Case("x-only", "one bit an element", {"shape": (5, 7, 6, 5), "needs": "x"}, _ALL),
    Case("bound-only", "the first clip of a network: nothing goes further back",
         {"shape": (5, 7, 6, 5), "needs": "bound"}, _ALL),
    Case("no-gradient", "no bits", {"shape": (5, 7, 6, 5), "needs": "none"}, _ALL),
    Case("no-bound", "batch norm and ReLU", {"shape": (5, 7, 6, 5), "bound": None, "needs": "x"}, _ALL),
    Case("no-affine", "weight and bias None", {"shape": (5, 7, 6, 5), "affine": False}, _ALL),
    Case("bf16-statistics", "a network in half precision", {"shape": (5, 7, 6, 5), "parameter_dtype": torch.bfloat16},
         (torch.bfloat16,)),
    Case("odd", "planes that end inside a word", {"shape": (3, 5, 7, 3)}, _ALL),
    Case("odd-channels-last", "rows that end inside a word", {"shape": (3, 5, 7, 3), "layout": "channels_last"}, _ALL),
    Case("block+1", "one element past a block", {"shape": (1, 27, 19)}, _ALL),
    Case("chunk+", "several chunks, planes longer than a block", {"shape": (5, 7, 31, 33)}, _ALL),
    Case("chunk+channels-last", "several chunks of rows", {"shape": (5, 7, 31, 33), "layout": "channels_last"}, _ALL),
    Case("whole-blocks", "planes of a multiple of a block", {"shape": (3, 5, 32, 32)}, _ALL),
    Case("whole-words", "planes of a multiple of 16", {"shape": (3, 5, 12, 12)}, _ALL),
    Case("whole-words-channels-last", "channels of a multiple of 16",
         {"shape": (3, 48, 5, 5), "layout": "channels_last"}, _ALL),
    Case("tiny-planes", "hundreds of channels a block", {"shape": (9, 130, 2, 2)}, _ALL),
    Case("many-small-planes", "too many for a table", {"shape": (2, 1000, 6, 6)}, _ALL),
    Case("wide-channels-last", "more channels than a block", {"shape": (7, 1030, 2, 1), "layout": "channels_last"},
         _ALL),
    Case("2-d", "features [N, C]", {"shape": (37, 33)}, _ALL),
    Case("2-d-transposed", "copied", {"shape": (37, 33), "layout": "transposed"}, _ALL),
    Case("sliced", "rows further apart than their length", {"shape": (3, 4, 5, 6), "layout": "sliced"}, _ALL),
    Case("scalar", "one bound for all, as a tensor", {"shape": (3, 5, 20, 20), "bound": "scalar"}, _ALL),
    Case("scalar-channels-last", "the same", {"shape": (3, 5, 9, 9), "bound": "scalar", "layout": "channels_last"}),
    Case("number", "one bound for all, as a number", {"shape": (3, 5, 7, 3), "bound": 1.5, "needs": "x"}, _ALL),
    Case("column", "[C, 1, 1]", {"shape": (3, 5, 7, 3), "bound": "column"}, _ALL),
    Case("one-channel", "grayscale", {"shape": (6, 1, 9, 9)}, _ALL),
    Case("bound-0", "everything is clipped", {"shape": (3, 5, 7, 3), "bound": 0.0, "needs": "x"}, _ALL),
    Case("nan", "NaN goes through and has no gradient", {"shape": (4, 6, 5, 5), "special": "nan"}, _ALL),
    Case("bounds", "0, infinite, NaN and negative bounds", {"shape": (3, 6, 5, 5), "special": "bounds"}, _ALL),
    Case("empty", "no samples: bounds get 0", {"shape": (0, 3, 4, 4)}, _ALL),
    Case("2^31", "more than 2^31 activations", {"shape": (2100, 1024, 32, 32)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (128, 64, 112, 112)}, benchmark=True, large=True),
)
# fmt: on

SUITE = OpSuite(
    name="batch_norm_clipped_relu",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": partial(_timed, usual_form), "eager": partial(_timed, folded_form), "compile": compiled_step,
    },
    bytes_moved=plain.bytes_moved,
    opcheck_arguments=opcheck_arguments,
)  # fmt: skip
