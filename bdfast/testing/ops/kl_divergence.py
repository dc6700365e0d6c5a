"""Cases of kl_divergence, and the PyTorch that users write for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.kl_divergence import BACKWARD, FORWARD, kl_divergence
from bdfast.testing.draws import seeded
from bdfast.testing.logits import draw_logits
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(
    device: torch.device,
    dtype: torch.dtype,
    *,
    shape: tuple[int, int],
    apart: float = 4.0,
    reduction: str = "none",
    wants: str = "pq",
    **options: Any,
) -> Inputs:
    """Logits p (see :func:`bdfast.testing.logits.draw_logits`), q about ``apart`` from them, a gradient of the loss.

    ``wants`` names what is differentiated: ``"p"``, ``"q"``, ``"pq"``, or nothing, which times a scoring pass.
    """
    p, _ = draw_logits(device, dtype, shape, **options)
    generator = seeded(1)
    noise = apart * torch.randn(shape, generator=generator)
    q = (draw_logits(noise.device, torch.float32, shape, scale=options.get("scale", 3.0))[0] + noise).to(p)
    if options.get("special") == "-inf":
        q = torch.where(p.isinf(), p, q)
    if options.get("special") == "non-finite":
        q = q.flip(0).contiguous()
    if options.get("layout", "contiguous") != "contiguous":
        p, q = q, p  # one contiguous, one not
    grad = torch.randn(shape[0] if reduction == "none" else (), generator=generator).to(device)
    return {"logits_p": p, "logits_q": q, "grad": grad, "reduction": reduction, "wants": wants}


def _leaves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    p, q = inputs["logits_p"].detach(), inputs["logits_q"].detach()
    return p.requires_grad_("p" in inputs["wants"]), q.requires_grad_("q" in inputs["wants"])


def usual_loss(logits_p: Tensor, logits_q: Tensor, reduction: str) -> Tensor:
    """The divergence as users write it."""
    log_p, log_q = F.log_softmax(logits_p.float(), dim=1), F.log_softmax(logits_q.float(), dim=1)
    rows = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]


def _outputs(inputs: Inputs, loss: Callable[..., Tensor]) -> Outputs:
    p, q = _leaves(inputs)
    value = loss(p, q, inputs["reduction"])
    found = {"loss": value.detach()}
    leaves = {f"grad_{name}": leaf for name, leaf in (("p", p), ("q", q)) if leaf.requires_grad}
    if leaves:
        grads = torch.autograd.grad(value, list(leaves.values()), inputs["grad"].to(value.dtype))
        found |= dict(zip(leaves, grads, strict=True))
    return found


def run(inputs: Inputs, backend: str) -> Outputs:
    """Loss and the gradients wanted."""
    return _outputs(inputs, lambda *arguments: kl_divergence(*arguments, backend=backend))


def eager(inputs: Inputs) -> Outputs:
    """The same by the usual form."""
    return _outputs(inputs, usual_loss)


def _timed(inputs: Inputs, loss: Callable[..., Tensor]) -> Callable[[], Any]:
    p, q = _leaves(inputs)
    grad, reduction = inputs["grad"], inputs["reduction"]
    if not inputs["wants"]:
        return lambda: loss(p, q, reduction)

    def step() -> None:
        p.grad = q.grad = None
        loss(p, q, reduction).backward(grad)  # type: ignore[no-untyped-call]

    return step


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """A scoring pass, or forward and backward where a gradient is wanted."""
    return _timed(inputs, lambda *arguments: kl_divergence(*arguments, backend=backend))


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads both rows; backward reads them again and writes the gradients wanted."""
    p: Tensor = inputs["logits_p"]
    wanted = len(inputs["wants"])
    return (2 + (2 + wanted if wanted else 0)) * p.numel() * p.element_size() + 4 * p.shape[0]


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of both raw ops."""
    p, q, reduction = inputs["logits_p"].detach(), inputs["logits_q"].detach(), inputs["reduction"]
    loss, stats = FORWARD.call(p, q, reduction, True, "auto")
    grad, wants = inputs["grad"].to(loss.dtype), inputs["wants"]
    return [
        (FORWARD.call, (p, q, reduction, False, "auto")),
        (FORWARD.call, (p, q, reduction, True, "auto")),
        (BACKWARD.call, (grad, p, q, stats, reduction, "p" in wants, "q" in wants, "auto")),
    ]


CASES = (
    Case("cifar10", "scoring a whole set of narrow rows", {"shape": (50_000, 10), "wants": ""}, _ALL, benchmark=True),
    Case("advrbd-cifar10", "a step of the attack", {"shape": (256, 10), "wants": "q"}, benchmark=True),
    Case("tiny-imagenet", "200 classes", {"shape": (10_000, 200), "wants": "q", "reduction": "sum"}, benchmark=True),
    Case("imagenet", "scoring, far past the caches", {"shape": (16_384, 1000), "wants": ""}, benchmark=True),
    Case("imagenet-step", "bandwidth-bound gradients", {"shape": (4096, 1000)}, conditioning=4.0, benchmark=True),
    Case("empty", "no rows: the mean is NaN, the gradients empty", {"shape": (0, 10), "reduction": "mean"}, _ALL),
    Case("empty-sum", "no rows: the sum is 0", {"shape": (0, 10), "reduction": "sum"}),
    Case("one-class", "divergence and gradients are 0", {"shape": (5, 1)}, _ALL),
    Case("one-row", "a single row, in which d - KL cancels", {"shape": (1, 7)}, _ALL, conditioning=2.0),
    Case("lanes-1", "one row short of a vector of rows", {"shape": (15, 10)}, _ALL),
    Case("lanes+1", "one row past a vector of rows", {"shape": (17, 10)}, _ALL),
    Case("narrow-chunk", "a chunk of rows and more", {"shape": (75, 13)}, _ALL),
    Case("widest-narrow", "the most classes of 16 rows a vector", {"shape": (32, 32)}, _ALL),
    Case("chunk+1", "one row past a chunk, odd classes", {"shape": (65, 33)}, _ALL),
    Case("odd-wide", "classes past powers of two", {"shape": (3, 2049)}, _ALL),
    Case("very-wide", "a row of several tiles", {"shape": (2, 20001)}, (torch.float32, torch.bfloat16)),
    Case("mean", "mean over rows", {"shape": (33, 10), "reduction": "mean"}, _ALL),
    Case("sum", "sum over rows", {"shape": (130, 12), "reduction": "sum"}, _ALL),
    Case("p-only", "the gradient of p alone", {"shape": (33, 10), "wants": "p"}, _ALL),
    Case("q-only-wide", "the gradient of q alone", {"shape": (33, 100), "wants": "q"}, _ALL),
    Case("close", "rows that nearly agree", {"shape": (50, 10), "apart": 0.01}, conditioning=100.0),
    Case("far", "classes certain on one side and absent on the other", {"shape": (50, 40), "apart": 30.0}),
    Case("transposed", "classes not contiguous", {"shape": (37, 10), "layout": "transposed"}, _ALL),
    Case("padded-rows", "rows further apart than their length", {"shape": (37, 10), "layout": "padded rows"}, _ALL),
    Case("confident", "p_y rounds to 1", {"shape": (40, 10), "special": "confident"}, _ALL, conditioning=1e4),
    Case("outliers", "logits of thousands", {"shape": (40, 11), "special": "outliers"}),
    Case("masked", "classes at -inf in both", {"shape": (40, 11), "special": "-inf"}),
    Case(
        "non-finite", "NaN and infinities in one", {"shape": (20, 10), "special": "non-finite"}, _ALL, conditioning=4.0
    ),
    Case(
        "non-finite-wide",
        "the same in rows of several vectors",
        {"shape": (20, 100), "special": "non-finite"},
        _ALL,
        conditioning=4.0,
    ),
    Case("2^31", "more than 2^31 logits", {"shape": (2_200_000, 1000)}, (torch.bfloat16,), large=True),
    Case("past-l2", "far past the L2 of a GPU", {"shape": (131_072, 1000), "wants": ""}, benchmark=True, large=True),
)

SUITE = OpSuite(
    name="kl_divergence",
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
