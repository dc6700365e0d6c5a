"""Allowed error against the float64 reference, by dtype of the inputs.

``float32``: a row of 1,000 exponentials summed in vector lanes stays within 1e-6 relative; gradients of
probabilities are absolute errors of one rounding. ``float16`` and ``bfloat16``: one rounding of the result (2^-11,
2^-8) where an output has that dtype; outputs kept in float32 are held to the float32 row. ``float64`` is the reference
against itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """``|got - expected| <= relative * |expected| + absolute * max |expected| + spacing``, the maximum over the output.

    Relative to the output's own size, because a gradient of a mean over 4,096 rows is as small as it should be.
    ``spacing`` is that of the dtype's subnormal numbers, below which nothing can be told apart; in float32 the smallest
    normal number, since exponentials below it may be flushed to zero.
    """

    relative: float
    absolute: float
    spacing: float


TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-12, 1e-12, 0.0),
    torch.float32: Tolerance(2e-6, 1e-6, 2.0**-126),
    torch.float16: Tolerance(2.0**-10, 1e-6, 2.0**-24),
    torch.bfloat16: Tolerance(2.0**-7, 1e-6, 2.0**-133),
}
