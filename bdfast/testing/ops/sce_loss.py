"""Cases of sce_loss, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.sce_loss import BACKWARD, FORWARD, FORWARD_WITH_GRADIENT, sce_loss
from bdfast.testing.draws import seeded
from bdfast.testing.logits import draw_logits
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    alpha: float = 0.1,
    beta: float = 1.0,
    log_zero: float = -4.0,
    reduction: str = "mean",
    **options: Any,
) -> Inputs:
    """Logits and labels (see :func:`bdfast.testing.logits.draw_logits`), a gradient of the loss, the options."""
    logits, target = draw_logits(device, dtype, shape, **options)
    generator = seeded(1)
    grad = torch.randn(shape[0] if reduction == "none" else (), generator=generator).to(device)
    weights = {"alpha": alpha, "beta": beta, "log_zero": log_zero, "reduction": reduction}
    return {"logits": logits, "target": target, "grad": grad, "options": weights}


def run(inputs: Inputs, backend: str) -> Outputs:
    """Loss and gradient."""
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    loss = sce_loss(logits, inputs["target"], **inputs["options"], backend=backend)
    (grad,) = torch.autograd.grad(loss, logits, inputs["grad"].to(loss.dtype))
    return {"loss": loss.detach(), "grad": grad}


def usual_loss(logits: Tensor, target: Tensor, *, alpha: float, beta: float, log_zero: float, reduction: str) -> Tensor:
    """The loss as users write it: softmax, clamp, one-hot, log, sum."""
    p = logits.float().softmax(dim=1).clamp(1e-7, 1.0)
    q = F.one_hot(target, logits.shape[1]).float().clamp_min(torch.tensor(log_zero).exp().item())
    rows = alpha * F.cross_entropy(logits.float(), target, reduction="none") - beta * (p * q.log()).sum(dim=1)
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


def closed_form(
    logits: Tensor, target: Tensor, *, alpha: float, beta: float, log_zero: float, reduction: str
) -> Tensor:
    """The loss without one-hot and clamp, which is what there is to beat."""
    log_p = F.log_softmax(logits.float(), dim=1).gather(1, target[:, None])[:, 0]
    rows = -alpha * log_p - beta * log_zero * (1.0 - log_p.exp())
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


def eager(inputs: Inputs) -> Outputs:
    """Loss and gradient by the closed form."""
    logits: Tensor = inputs["logits"].detach().requires_grad_()
    loss = closed_form(logits, inputs["target"], **inputs["options"])
    (grad,) = torch.autograd.grad(loss, logits, inputs["grad"].to(loss.dtype))
    return {"loss": loss.detach(), "grad": grad}


def _timed(inputs: Inputs, loss: Callable[..., Tensor]) -> Callable[[], Any]:
    logits: Tensor = inputs["logits"].detach().requires_grad_()

    def step() -> None:
        logits.grad = None
        loss(logits, inputs["target"], **inputs["options"]).backward()  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Forward and backward, as in a training step."""
    return _timed(inputs, lambda *arguments, **options: sce_loss(*arguments, **options, backend=backend))


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the logits; backward reads them and writes their gradient."""
    logits: Tensor = inputs["logits"]
    return 3 * logits.numel() * logits.element_size()


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw ops."""
    logits, target, options = inputs["logits"].detach(), inputs["target"], inputs["options"]
    arguments = (options["alpha"], -options["beta"] * options["log_zero"], options["reduction"], "auto")
    loss, stats = FORWARD.call(logits, target, *arguments)
    grad = inputs["grad"].to(loss.dtype)
    return [
        (FORWARD.call, (logits, target, *arguments)),
        (FORWARD_WITH_GRADIENT.call, (logits, target, *arguments)),
        (BACKWARD.call, (grad, logits, target, stats, *arguments)),
    ]


CASES = (
    Case("pad-ft-cifar10", "PAD-FT's batch: launch-bound", {"shape": (256, 10)}, _ALL, benchmark=True),
    Case("tiny-imagenet", "a batch of 200 classes", {"shape": (256, 200)}, _ALL, benchmark=True),
    Case("imagenet", "bandwidth-bound", {"shape": (4096, 1000)}, _ALL, benchmark=True),
    Case("empty", "no rows: the mean is NaN, the gradient empty", {"shape": (0, 10)}, _ALL),
    Case("empty-sum", "no rows: the sum is 0", {"shape": (0, 10), "reduction": "sum"}),
    Case("one-class", "loss and gradient are 0 everywhere", {"shape": (5, 1)}, _ALL),
    Case("one-row", "a single row", {"shape": (1, 7)}, _ALL),
    Case("lanes-1", "one row short of a vector of rows", {"shape": (15, 10)}, _ALL),
    Case("lanes+1", "one row past a vector of rows", {"shape": (17, 10)}, _ALL),
    Case("widest-narrow", "the most classes of 16 rows a vector", {"shape": (32, 32)}, _ALL),
    Case("chunk+1", "one row past a chunk, odd classes", {"shape": (65, 33)}, _ALL),
    Case("odd-wide", "classes past powers of two", {"shape": (3, 2049)}, _ALL),
    Case("very-wide", "a row of several tiles", {"shape": (2, 20001)}, (torch.float32, torch.bfloat16)),
    Case("rows", "one loss a row", {"shape": (33, 10), "reduction": "none"}, _ALL),
    Case("sum", "sum over rows", {"shape": (130, 12), "reduction": "sum"}, _ALL),
    Case("ce", "beta = 0: cross entropy", {"shape": (33, 10), "alpha": 1.0, "beta": 0.0}),
    Case("rce", "alpha = 0: reverse cross entropy alone", {"shape": (33, 10), "alpha": 0.0}),
    Case("cifar100", "weights of the SCE authors for CIFAR-100", {"shape": (64, 100), "alpha": 6.0, "beta": 0.1}, _ALL),
    Case("transposed", "classes not contiguous", {"shape": (37, 10), "layout": "transposed"}, _ALL),
    Case("padded-rows", "rows further apart than their length", {"shape": (37, 10), "layout": "padded rows"}, _ALL),
    Case("confident", "p_y rounds to 1", {"shape": (40, 10), "special": "confident", "reduction": "none"}, _ALL),
    Case("outliers", "logits of thousands", {"shape": (40, 11), "special": "outliers", "reduction": "none"}),
    Case("masked", "classes at -inf", {"shape": (40, 11), "special": "-inf", "reduction": "none"}),
    Case("non-finite", "NaN and infinities", {"shape": (20, 10), "special": "non-finite", "reduction": "none"}, _ALL),
    Case(
        "non-finite-wide",
        "the same in rows of several vectors",
        {"shape": (20, 100), "special": "non-finite", "reduction": "none"},
        _ALL,
    ),
    Case("2^31", "more than 2^31 logits", {"shape": (2_200_000, 1000)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (131_072, 1000)}, benchmark=True, large=True),
)

SUITE = OpSuite(
    name="sce_loss",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={
        "usual": lambda inputs: _timed(inputs, usual_loss),
        "eager": lambda inputs: _timed(inputs, closed_form),
        "compile": lambda inputs: _timed(inputs, torch.compile(closed_form, dynamic=False)),
    },
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
