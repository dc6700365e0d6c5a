"""Numbers among the arguments of ops: what is none is refused by name, and numpy's are numbers too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bdfast import ops

LOGITS, TARGET = torch.zeros(2, 3), torch.tensor([0, 1])
IMAGES, CENTERS = torch.full((2, 3, 4, 5), 0.5), torch.zeros(2, 2, dtype=torch.int64)
STATISTICS = (torch.zeros(3), torch.ones(3))


def pgd(**numbers: Any) -> object:
    given = {"step_size": 0.1, "eps": 0.1} | numbers
    return ops.masked_pgd_step_(IMAGES.clone(), IMAGES, IMAGES, CENTERS, 1, **given)


def projected(**numbers: Any) -> object:
    w, w0, g, v = (torch.full((2, 2), float(i)) for i in range(1, 5))
    given = {"lr": 0.1, "momentum": 0.5, "distance_weight": 0.1} | numbers
    return ops.projected_sgd_step_([w], [w0], [g], [v], norms=torch.ones(1), **given)


ARGUMENTS: dict[tuple[str, str], Callable[[Any], object]] = {
    ("hinge_cross_entropy", "margin"): lambda x: ops.hinge_cross_entropy(LOGITS, TARGET, x),
    ("sce_loss", "alpha"): lambda x: ops.sce_loss(LOGITS, TARGET, alpha=x),
    ("sce_loss", "beta"): lambda x: ops.sce_loss(LOGITS, TARGET, beta=x),
    ("sce_loss", "log_zero"): lambda x: ops.sce_loss(LOGITS, TARGET, log_zero=x),
    ("bounded_ascent_cross_entropy", "mu"): lambda x: ops.bounded_ascent_cross_entropy(LOGITS, TARGET, 1, mu=x, tau=1),
    ("bounded_ascent_cross_entropy", "tau"): lambda x: ops.bounded_ascent_cross_entropy(LOGITS, TARGET, 1, mu=1, tau=x),
    ("masked_pgd_step_", "step_size"): lambda x: pgd(step_size=x),
    ("masked_pgd_step_", "eps"): lambda x: pgd(eps=x),
    ("masked_pgd_step_", "lower"): lambda x: pgd(lower=x),
    ("masked_pgd_step_", "upper"): lambda x: pgd(upper=x),
    ("clipped_relu", "bound"): lambda x: ops.clipped_relu(IMAGES, x),
    ("batch_norm_clipped_relu", "eps"): lambda x: ops.batch_norm_clipped_relu(IMAGES, *STATISTICS, None, None, eps=x),
    ("batch_norm_relu", "eps"): lambda x: ops.batch_norm_relu(IMAGES, *STATISTICS, eps=x).y,
    ("batch_norm_relu", "momentum"): lambda x: ops.batch_norm_relu(IMAGES, *STATISTICS, momentum=x).y,
    ("scale_to_ball_", "radius"): lambda x: ops.scale_to_ball_(IMAGES.clone(), x),
    ("histogram_entropy", "step_size"): lambda x: ops.histogram_entropy(LOGITS, x),
    ("projected_sgd_step_", "lr"): lambda x: projected(lr=x),
    ("projected_sgd_step_", "momentum"): lambda x: projected(momentum=x),
    ("projected_sgd_step_", "distance_weight"): lambda x: projected(distance_weight=x),
}


@pytest.mark.parametrize("value", ["0.5", None, True, [0.5], 1j], ids=repr)
@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
def test_what_is_no_number_is_refused_by_name(op: str, argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"^{op}: `{argument}` expected a .*, got {type(value).__name__}; "):
        ARGUMENTS[op, argument](value)


@pytest.mark.parametrize(("op", "argument"), ARGUMENTS)
def test_numbers_of_numpy_are_numbers(op: str, argument: str) -> None:
    number = -0.5 if argument == "log_zero" else 0.5
    for kind in (np.float32, np.float64):
        ours, numpys = ARGUMENTS[op, argument](number), ARGUMENTS[op, argument](kind(number))
        assert ours is numpys is None or torch.equal(ours, numpys)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 0.5, torch.zeros(2, 2)])
def test_lists_of_tensors_are_lists(value: Any) -> None:
    layer = [torch.ones(2, 2)]
    with pytest.raises(TypeError, match=r"^projected_sgd_step_: `grads` expected a list of tensors, got "):
        ops.projected_sgd_step_(
            layer, layer, value, layer, lr=0.1, momentum=0.5, distance_weight=0.1, norms=torch.ones(1)
        )


def test_float64_weights_take_a_float64_rate() -> None:
    w = torch.full((2,), 1.0, dtype=torch.float64)
    options: dict[str, Any] = {"momentum": 0.0, "distance_weight": 0.0, "norms": w.norm()[None]}
    rates = (0.25, torch.tensor(0.25, dtype=torch.float64))
    steps = []
    for rate in rates:
        stepped, rest = w.clone(), [torch.zeros_like(w)]
        ops.projected_sgd_step_([stepped], rest, [torch.tensor([1.0, 0.0]).double()], [w.clone()], lr=rate, **options)
        steps.append(stepped)
    assert torch.equal(*steps)
    assert steps[0][0] < steps[0][1]
