"""Cases of sce_margin, and the PyTorch that users write to rank by symmetric cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdfast.ops.sce_margin import MARGIN, sce_margin
from bdfast.testing.logits import draw_logits
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs

_ALL = (torch.float32, torch.float16, torch.bfloat16)


def make(device: torch.device, dtype: torch.dtype, *, shape: tuple[int, int], **options: Any) -> Inputs:
    """Logits and labels; see :func:`bdfast.testing.logits.draw_logits`."""
    logits, target = draw_logits(device, dtype, shape, **options)
    return {"logits": logits, "target": target}


def run(inputs: Inputs, backend: str) -> Outputs:
    """The margins."""
    return {"margin": sce_margin(inputs["logits"], inputs["target"], backend=backend)}


def closed_form(logits: Tensor, target: Tensor) -> Tensor:
    """The margin as one would write it in PyTorch."""
    label = target[:, None]
    others = logits.float().scatter(1, label, -torch.inf)
    return others.logsumexp(dim=1) - logits.float().gather(1, label)[:, 0]


def usual(logits: Tensor, target: Tensor) -> Tensor:
    """The score that users rank by: SCE of softmax, clamp and one-hot, which ties confident rows."""
    p = logits.float().softmax(dim=1).clamp(1e-7, 1.0)
    q = F.one_hot(target, logits.shape[1]).float().clamp(1e-4, 1.0)
    return F.cross_entropy(logits.float(), target, reduction="none") - (p * q.log()).sum(dim=1)


def eager(inputs: Inputs) -> Outputs:
    """The margins by the closed form."""
    return {"margin": closed_form(inputs["logits"], inputs["target"])}


def step(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """One scoring pass."""
    return lambda: sce_margin(inputs["logits"], inputs["target"], backend=backend)


def _step_of(function: Callable[..., Tensor]) -> Callable[[Inputs], Callable[[], Any]]:
    return lambda inputs: lambda: function(inputs["logits"], inputs["target"])


def compiled_step(inputs: Inputs) -> Callable[[], Any]:
    """The closed form under ``torch.compile``."""
    return _step_of(torch.compile(closed_form, dynamic=False))(inputs)


def bytes_moved(inputs: Inputs) -> int:
    """One read of the logits, one float a row."""
    logits: Tensor = inputs["logits"]
    return logits.numel() * logits.element_size() + 4 * logits.shape[0]


def opcheck_arguments(inputs: Inputs) -> list[tuple[Any, tuple[Any, ...]]]:
    """Arguments of the raw op."""
    return [(MARGIN.call, (inputs["logits"], inputs["target"], "auto"))]


CASES = (
    Case("cifar10", "scoring a whole training set of narrow rows", {"shape": (50_000, 10)}, _ALL, benchmark=True),
    Case("tiny-imagenet", "200 classes", {"shape": (10_000, 200)}, _ALL, benchmark=True),
    Case("imagenet", "bandwidth-bound", {"shape": (8192, 1000)}, _ALL, benchmark=True),
    Case(
        "imagenet-train",
        "scoring all of ImageNet-1k",
        {"shape": (1_281_167, 1000)},
        (torch.bfloat16,),
        benchmark=True,
        large=True,
    ),
    Case("empty", "no rows", {"shape": (0, 10)}, _ALL),
    Case("one-class", "no other class: -inf", {"shape": (5, 1)}, _ALL),
    Case("two-classes", "one other class: a difference of logits", {"shape": (33, 2)}, _ALL),
    Case("one-row", "a single row", {"shape": (1, 7)}, _ALL),
    Case("lanes-1", "one row short of a vector of rows", {"shape": (15, 10)}, _ALL),
    Case("lanes+1", "one row past a vector of rows", {"shape": (17, 10)}, _ALL),
    Case("widest-narrow", "the most classes of 16 rows a vector", {"shape": (32, 32)}, _ALL),
    Case("chunk+1", "one row past a chunk, odd classes", {"shape": (65, 33)}, _ALL),
    Case("odd-wide", "classes past powers of two", {"shape": (3, 2049)}, _ALL),
    Case("very-wide", "a row of several tiles", {"shape": (2, 20001)}, (torch.float32, torch.bfloat16)),
    Case("transposed", "classes not contiguous", {"shape": (37, 10), "layout": "transposed"}, _ALL),
    Case("padded-rows", "rows further apart than their length", {"shape": (37, 10), "layout": "padded rows"}, _ALL),
    Case("confident", "p_y rounds to 1", {"shape": (40, 10), "special": "confident"}, _ALL),
    Case("outliers", "logits of thousands", {"shape": (40, 11), "special": "outliers"}),
    Case("large", "logits whose difference nears the float32 maximum", {"shape": (20, 40), "scale": 1e37}),
    Case("non-finite", "NaN and infinities: +inf", {"shape": (20, 10), "special": "non-finite"}, _ALL),
    Case("non-finite-wide", "the same in rows of several vectors", {"shape": (20, 100), "special": "non-finite"}, _ALL),
    Case("2^31", "more than 2^31 logits", {"shape": (2_200_000, 1000)}, (torch.bfloat16,), large=True),
)

SUITE = OpSuite(
    name="sce_margin",
    make=make,
    run=run,
    eager=eager,
    cases=CASES,
    step=step,
    baselines={"usual": _step_of(usual), "eager": _step_of(closed_form), "compile": compiled_step},
    bytes_moved=bytes_moved,
    opcheck_arguments=opcheck_arguments,
)
