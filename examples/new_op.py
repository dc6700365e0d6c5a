"""Write an op: reference, Triton kernel, autograd, cases; check it against float64 and with opcheck.

    python examples/new_op.py                        # the Triton kernel runs where there is a GPU, ...
    TRITON_INTERPRET=1 python examples/new_op.py     # ... or in Triton's interpreter

The op is the squared ReLU, y = max(x, 0)^2 with dL/dx = 2 max(x, 0) dL/dy. In the package its parts would lie in
bdfast/ops, csrc/triton and bdfast/testing/ops, each as squared_relu.py; here they are in one file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import runs_triton
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.testing import Case, OpSuite, parity

try:
    import triton
    import triton.language as tl
except ImportError:  # the op exists all the same: runs_triton gives the reason
    triton = None

BLOCK = 1024

# --- the public function: checks, then the raw op ---------------------------------------------------------------------


def squared_relu(
    x: Tensor,  # any shape
    *,
    backend: str = "auto",
) -> Tensor:
    """``max(x, 0)^2``, differentiable in ``x``."""
    if not x.is_floating_point():
        raise TypeError(message("squared_relu", "x", "a floating-point tensor", str(x.dtype), "convert with .float()"))
    return SquaredReLU.apply(x, requested(backend, "squared_relu"))


class SquaredReLU(torch.autograd.Function):
    """The backward runs on the backend that the forward was asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.backend = backend
        return FORWARD.call(x, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return BACKWARD.call(grad, *ctx.saved_tensors, ctx.backend), None


# --- reference: the equations in plain PyTorch ------------------------------------------------------------------------


def reference(x: Tensor) -> Tensor:
    """The specification: readable, and run in float64 by the checks."""
    return x.clamp_min(0).square()


def reference_backward(grad: Tensor, x: Tensor) -> Tensor:
    """``2 max(x, 0) grad``."""
    return 2 * x.clamp_min(0) * grad


# --- Triton -----------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def forward_kernel(p_x, p_y, size, BLOCK: tl.constexpr):
        # y = max(x, 0)^2. A program owns BLOCK elements; reads and writes each once; float32 arithmetic.
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o, mask=o < size).to(tl.float32)
        b_x = tl.maximum(b_x, 0.0)
        tl.store(p_y + o, b_x * b_x, mask=o < size)

    @triton.jit
    def backward_kernel(p_grad, p_x, p_dx, size, BLOCK: tl.constexpr):
        # dx = 2 max(x, 0) grad. A program owns BLOCK elements; two reads, one write; float32 arithmetic.
        o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        b_x = tl.load(p_x + o, mask=o < size).to(tl.float32)
        b_grad = tl.load(p_grad + o, mask=o < size).to(tl.float32)
        tl.store(p_dx + o, 2.0 * tl.maximum(b_x, 0.0) * b_grad, mask=o < size)


def launch(kernel: Any, *inputs: Tensor) -> Tensor:
    """One program a block, over contiguous copies where strides need them."""
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    out = torch.empty_like(inputs[0])
    if out.numel():
        kernel[(triton.cdiv(out.numel(), BLOCK),)](*inputs, out, out.numel(), BLOCK=BLOCK)
    return out


# --- the raw ops: schema, fake kernel, implementations in the order of preference -------------------------------------

FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # float64 is left to the reference
can_run_triton = partial(runs_triton, dtypes=FLOATS)

FORWARD = Op(
    name="squared_relu_fwd",
    public="squared_relu",
    schema="(Tensor x, str backend) -> Tensor",
    fake=lambda x, backend: torch.empty_like(x, memory_format=torch.contiguous_format),
    key=lambda x, *_: x,
    implementations=(
        Implementation("triton", lambda x: launch(forward_kernel, x), can_run_triton),
        Implementation("reference", reference, always),
    ),
)

BACKWARD = Op(
    name="squared_relu_bwd",
    public="squared_relu",
    schema="(Tensor grad, Tensor x, str backend) -> Tensor",
    fake=lambda grad, x, backend: torch.empty_like(grad, memory_format=torch.contiguous_format),
    key=lambda grad, x, *_: x,
    implementations=(
        Implementation("triton", lambda grad, x: launch(backward_kernel, grad, x), can_run_triton),
        Implementation("reference", reference_backward, always),
    ),
)

# --- cases: one list for tests, doctor and benchmarks -----------------------------------------------------------------


def make(device: torch.device, dtype: torch.dtype, *, shape: tuple[int, ...]) -> dict[str, Any]:
    """The same inputs on every device."""
    x, grad = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return {"x": x, "grad": grad}


def run(inputs: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Everything that the op returns or differentiates."""
    x = inputs["x"].detach().requires_grad_()
    y = squared_relu(x, backend=backend)
    (grad,) = torch.autograd.grad(y, x, inputs["grad"])
    return {"y": y.detach(), "grad": grad}


def eager(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same as users write it."""
    x = inputs["x"].detach().requires_grad_()
    y = torch.relu(x) ** 2
    (grad,) = torch.autograd.grad(y, x, inputs["grad"])
    return {"y": y.detach(), "grad": grad}


SUITE = OpSuite(
    name="squared_relu",
    make=make,
    run=run,
    eager=eager,
    cases=(
        Case("empty", "nothing to do", {"shape": (0,)}),
        Case("block+1", "one element past a block", {"shape": (BLOCK + 1,)}, FLOATS),
        Case("images", "several axes", {"shape": (4, 3, 8, 8)}, FLOATS),
    ),
    step=lambda inputs, backend: partial(run, inputs, backend),
    baselines={"eager": lambda inputs: partial(eager, inputs)},
    bytes_moved=lambda inputs: 5 * inputs["x"].numel() * inputs["x"].element_size(),
    opcheck_arguments=lambda inputs: [
        (FORWARD.call, (inputs["x"], "auto")),
        (BACKWARD.call, (inputs["grad"], inputs["x"], "auto")),
    ],
)


def main() -> None:
    """What the tests do with it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for backend, reason in FORWARD.reasons(torch.empty(0, device=device)).items():
        if reason is not None:
            print(f"{backend:<9} left out: {reason}")
            continue
        checks = [(case, dtype) for case in SUITE.cases for dtype in case.dtypes]
        wrong = [str(m) for case, dtype in checks for m in parity(SUITE, case, backend, device, dtype)]
        print(f"{backend:<9} {len(checks)} checks against float64, {len(wrong)} mismatches {wrong or ''}".rstrip())
    for op, arguments in SUITE.opcheck_arguments(make(device, torch.float32, shape=(3, 5))):
        torch.library.opcheck(op, arguments)
        print(f"opcheck   {op}: schema, fake kernel and dispatch agree")
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    print(f"gradcheck {torch.autograd.gradcheck(squared_relu, (x,))}")


if __name__ == "__main__":
    main()
