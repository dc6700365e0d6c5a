"""The rates of a model together, and what a defence made of them: DER and RIR."""

from __future__ import annotations

import json
import math
import numbers
from dataclasses import asdict, dataclass
from typing import overload

from bdfast.errors import message
from bdfast.metrics.checks import describe


@dataclass(frozen=True)
class Metrics:
    """A model's rates (fractions in [0, 1], NaN where nothing counts) and the numbers of images behind them."""

    acc: float  # clean test images
    asr: float  # triggered images of another true class than the attack label
    ra: float = math.nan  # the same images against their true labels
    asr_with_target: float = math.nan  # all triggered images
    asr_others: float = math.nan  # triggered images that asr leaves out, of other classes than the label: TaCT's
    acc_without_target: float = math.nan  # clean images of other classes than the single attack label, if it is single
    n_clean: int = 0
    n_triggered: int = 0
    n_eligible: int = 0  # triggered images behind asr and ra
    n_nonfinite: int = 0  # clean and triggered images with a NaN or an infinity among their logits: counted as wrong

    def to_dict(self) -> dict[str, float | int]:
        """The fields by name."""
        return asdict(self)

    def to_json(self) -> str:
        """One JSON object; NaN becomes null.

        Example:
            >>> Metrics(acc=0.5, asr=1.0).to_json()[:38]
            '{"acc": 0.5, "asr": 1.0, "ra": null, "'
        """
        values = {name: None if math.isnan(value) else value for name, value in self.to_dict().items()}
        return json.dumps(values, allow_nan=False)


@overload
def defense_effectiveness_rating(before: Metrics, after: Metrics, /) -> float: ...
@overload
def defense_effectiveness_rating(acc0: float, asr0: float, acc1: float, asr1: float) -> float: ...
def defense_effectiveness_rating(  # type: ignore[misc]
    acc0: Metrics | float,
    asr0: Metrics | float,
    acc1: float | None = None,
    asr1: float | None = None,
) -> float:
    """DER = (max(0, ASR0 - ASR1) - max(0, ACC0 - ACC1) + 1) / 2 (D3, Eq. 5).

    Takes the :class:`Metrics` before and after a defence, or the four fractions. 1 is a perfect defence, 0.5 one that
    changes nothing, 0 one that only destroys. BackdoorBench's helper adds the ACC term; the paper subtracts it.

    Returns:
        A number in [0, 1]; NaN if a rate is NaN.

    Raises:
        TypeError, ValueError: arguments that are neither, or a rate outside [0, 1], such as a percentage.

    Example:
        >>> defense_effectiveness_rating(acc0=0.9, asr0=1.0, acc1=0.8, asr1=0.0)
        0.95
    """
    where = "defense_effectiveness_rating"
    if isinstance(acc0, Metrics) and isinstance(asr0, Metrics):
        before, after = acc0, asr0
        return _rating(where, before.acc, after.acc, after.asr, before.asr)
    return _rating(where, acc0, acc1, asr1, asr0)


@overload
def robust_improvement_rating(before: Metrics, after: Metrics, /) -> float: ...
@overload
def robust_improvement_rating(acc0: float, ra0: float, acc1: float, ra1: float) -> float: ...
def robust_improvement_rating(  # type: ignore[misc]
    acc0: Metrics | float,
    ra0: Metrics | float,
    acc1: float | None = None,
    ra1: float | None = None,
) -> float:
    """RIR = (max(0, RA1 - RA0) - max(0, ACC0 - ACC1) + 1) / 2: DER for the robust accuracy.

    Takes the :class:`Metrics` before and after a defence, or the four fractions.

    Returns:
        A number in [0, 1]; NaN if a rate is NaN.

    Raises:
        TypeError, ValueError: arguments that are neither, or a rate outside [0, 1], such as a percentage.

    Example:
        >>> robust_improvement_rating(acc0=0.9, ra0=0.0, acc1=0.9, ra1=0.8)
        0.9
    """
    where = "robust_improvement_rating"
    if isinstance(acc0, Metrics) and isinstance(ra0, Metrics):
        before, after = acc0, ra0
        return _rating(where, before.acc, after.acc, before.ra, after.ra)
    return _rating(where, acc0, acc1, ra0, ra1)


def _rating(where: str, acc0: object, acc1: object, low: object, high: object) -> float:
    """(max(0, high - low) - max(0, acc0 - acc1) + 1) / 2."""
    rates = []
    for rate in (acc0, acc1, low, high):
        expected, remedy = "two Metrics, or four fractions in [0, 1]", "pass both, before and after the defence"
        if isinstance(rate, bool) or not isinstance(rate, numbers.Real):
            raise TypeError(message(where, "arguments", expected, describe(rate), remedy))
        rates.append(float(rate))  # numpy's numbers, too
        if rates[-1] < 0 or rates[-1] > 1:
            raise ValueError(message(where, "arguments", expected, str(rate), "divide percentages by 100"))
    if any(math.isnan(rate) for rate in rates):
        return math.nan  # max(0, NaN) would be 0
    acc0, acc1, low, high = rates
    return (max(0.0, high - low) - max(0.0, acc0 - acc1) + 1) / 2
