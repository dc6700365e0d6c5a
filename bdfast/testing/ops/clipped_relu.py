"""Cases of clipped_relu, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops import channels as ch
from bdfast.ops.clipped_relu import BACKWARD, FORWARD, clipped_relu
from bdfast.testing.draws import seeded
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)
NEEDS = {"both": ("x", "bound"), "x": ("x",), "bound": ("bound",), "none": ()}


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, ...],
    bound: str | float = "channel",
    needs: str = "both",
    layout: str = "contiguous",
    special: str = "",
) -> Inputs:
    """Activations of spread 2 and bounds in [0.5, 2], so that a third each is 0, kept and clipped.

    ``bound``: "channel" and "column" are [C] and [C, 1, 1], "scalar" 0-dim, and a number is itself.
    """
    generator = seeded(0)
    x = 2.0 * torch.randn(shape, generator=generator)
    grad = torch.randn(shape, generator=generator)
    z = 0.5 + 1.5 * torch.rand(shape[1], generator=generator)
    if special == "nan" and x.numel():
        x.view(-1)[:: max(1, x.numel() // 7)] = torch.nan
        grad = torch.where(x.isnan(), torch.nan, grad)  # where x has no gradient, that of y does not matter
    if special == "ties":
        x = torch.round(x)
        z = torch.round(z)
    if special == "bounds":  # 0, infinity, NaN and a negative one
        z[0], z[1], z[2], z[3] = 0.0, torch.inf, torch.nan, -1.0
    return {
        "x": arrange(x.to(dtype), layout).to(device),
        "bound": {"channel": z, "column": z[:, None, None], "scalar": z.mean()}[bound].to(device)
        if isinstance(bound, str)
        else bound,
        "grad": grad.to(device, dtype),
        "needs": needs,
    }


def arrange(x: Tensor, layout: str) -> Tensor:
    """The same values in another order of memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return F.pad(x, (1, 2))[..., 1 : 1 + x.shape[-1]]
    return x


def run(inputs: Inputs, backend: str) -> Outputs:
    """Activations, and the gradients that are asked for."""
    return outputs(lambda x, bound: clipped_relu(x, bound, backend=backend), inputs)


def outputs(function: Callable[[Tensor, Any], Tensor], inputs: Inputs) -> Outputs:
    """What ``function`` returns, and the gradients of the tensors that ``inputs["needs"]`` names."""
    values = {name: v.detach() if isinstance(v := inputs[name], Tensor) else v for name in ("x", "bound")}
    wanted = [values[name].requires_grad_() for name in NEEDS[inputs["needs"]]]
    y = function(values["x"], values["bound"])
    found = {"y": y.detach()}
    if wanted:
        grads = torch.autograd.grad(y, wanted, inputs["grad"])
        found |= {f"grad_{name}": g for name, g in zip(NEEDS[inputs["needs"]], grads, strict=True)}
    return found


def usual_form(x: Tensor, bound: Any) -> Tensor:
    """As users write it."""
    z = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    return torch.minimum(F.relu(x), z.reshape(-1, *(1,) * (x.dim() - 2)) if z.dim() else z)


def one_kernel_form(x: Tensor, bound: Any) -> Tensor:
    """The fewest kernels in plain PyTorch."""
    z = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
    z = z.reshape(-1, *(1,) * (x.dim() - 2)) if z.dim() else z
    return torch.clamp(x, torch.zeros((), dtype=x.dtype, device=x.device), z)


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return outputs(usual_form, inputs)


def timed(function: Callable[[Tensor, Any], Tensor], inputs: Inputs) -> Callable[[], Any]:
    """One call: the forward, and the backward of what ``inputs["needs"]`` names."""
    x, bound, grad, names = inputs["x"].detach(), inputs["bound"], inputs["grad"], NEEDS[inputs["needs"]]
    bound = bound.detach() if isinstance(bound, Tensor) else bound
    if not names:

        def forward() -> None:
            with torch.no_grad():
                function(x, bound)

        return forward
    wanted = [{"x": x, "bound": bound}[name].requires_grad_() for name in names]
    grad = ch.dense(grad, ch.is_channels_last(x))  # as the convolution behind it leaves it

    def step() -> None:
        for tensor in wanted:
            tensor.grad = None
        function(x, bound).backward(grad)  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward, and backward where gradients are asked for."""
    return timed(lambda x, bound: clipped_relu(x, bound, backend=backend), inputs)


def usual_step(inputs: Inputs) -> Callable[[], Any]:
    """The same in the usual form."""
    return timed(usual_form, inputs)


def eager_step(inputs: Inputs) -> Callable[[], Any]:
    """The same with the fewest kernels."""
    return timed(one_kernel_form, inputs)


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """The usual form under ``torch.compile``."""
    return timed(torch.compile(usual_form, dynamic=False), inputs)


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads x and writes y; backward reads a gradient and writes one; a bit an element is written and read."""
    x: Tensor = inputs["x"]
    names = NEEDS[inputs["needs"]]
    passes = 2 + bool(names) + ("x" in names)
    return passes * x.numel() * x.element_size() + 2 * len(names) * x.numel() // 8


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    x, names = inputs["x"].detach(), NEEDS[inputs["needs"]]
    z, limit = ch.split_bound("clipped_relu", inputs["bound"], x)
    needs = ("x" in names, "bound" in names)
    _, bits = FORWARD.call(x, z, limit, *needs, "auto")
    found: list[tuple[Any, tuple[Any, ...]]] = [(FORWARD.call, (x, z, limit, *needs, "auto"))]
    if names:
        options = (None, ch.is_channels_last(x), *needs, 1 if z is None else z.numel(), "auto")
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
    Case("odd", "planes that end inside a word", {"shape": (3, 5, 7, 3)}, _ALL),
    Case("odd-channels-last", "rows that end inside a word", {"shape": (3, 5, 7, 3), "layout": "channels_last"}, _ALL),
    Case("block-1", "one element short of a block", {"shape": (1, 7, 73)}, _ALL),
    Case("block", "one block", {"shape": (2, 4, 8, 8)}, _ALL),
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
    Case("3-d", "[N, C, L]", {"shape": (4, 3, 50)}),
    Case("5-d-channels-last", "video", {"shape": (2, 5, 3, 4, 3), "layout": "channels_last"}, _ALL),
    Case("sliced", "rows further apart than their length", {"shape": (3, 4, 5, 6), "layout": "sliced"}, _ALL),
    Case("scalar", "one bound for all, as a tensor", {"shape": (3, 5, 20, 20), "bound": "scalar"}, _ALL),
    Case("number", "one bound for all, as a number", {"shape": (3, 5, 7, 3), "bound": 1.5, "needs": "x"}, _ALL),
    Case("column", "[C, 1, 1]", {"shape": (3, 5, 7, 3), "bound": "column"}, _ALL),
    Case("one-channel", "grayscale", {"shape": (6, 1, 9, 9)}, _ALL),
    Case("bound-0", "everything is clipped", {"shape": (3, 5, 7, 3), "bound": 0.0, "needs": "x"}, _ALL),
    Case("bound-inf", "a ReLU", {"shape": (3, 5, 7, 3), "bound": float("inf"), "needs": "x"}, _ALL),
    Case("ties", "x equal to 0 and to the bound", {"shape": (4, 6, 8, 8), "special": "ties"}, _ALL),
    Case("nan", "NaN goes through and has no gradient", {"shape": (4, 6, 5, 5), "special": "nan"}, _ALL),
    Case("bounds", "0, infinite, NaN and negative bounds", {"shape": (3, 6, 5, 5), "special": "bounds"}, _ALL),
    Case("empty", "no samples: bounds get 0", {"shape": (0, 3, 4, 4)}, _ALL),
    Case("empty-plane", "no pixels", {"shape": (2, 3, 0, 4)}),
    Case("2^31", "more than 2^31 activations", {"shape": (2100, 1024, 32, 32)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (128, 64, 112, 112)}, benchmark=True, large=True),
)
# fmt: on

SUITE = OpSuite(
    name="clipped_relu",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"usual": usual_step, "eager": eager_step, "compile": compiled_step},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
