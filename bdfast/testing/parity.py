"""Compare a backend with the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdfast.testing.suite import Case, OpSuite, Outputs, upcast
from bdfast.testing.tolerances import TOLERANCES, Tolerance


@dataclass(frozen=True)
class Mismatch:
    """An output that is further from the float64 reference than allowed.

    Attributes:
        output: its name.
        worst: index of the worst element.
        got: what the backend computed there.
        expected: the float64 reference there.
        excess: the error as a multiple of the allowed one.
    """

    output: str
    worst: tuple[int, ...]
    got: float
    expected: float
    excess: float

    def __str__(self) -> str:
        return (
            f"{self.output}{list(self.worst)}: got {self.got!r}, expected {self.expected!r} "
            f"({self.excess:.3g} times the allowed error)"
        )


def parity(suite: OpSuite, case: Case, backend: str, device: torch.device | str, dtype: torch.dtype) -> list[Mismatch]:
    """Run a case on a backend and on the float64 reference, and list what differs by more than the tolerances."""
    got = suite.run(suite.inputs(case, device, dtype), backend)
    expected = suite.run(upcast(suite.inputs(case, device, dtype)), "reference")
    return compare(got, expected, suite, case.conditioning)


def compare(got: Outputs, expected: Outputs, suite: OpSuite, conditioning: float = 1.0) -> list[Mismatch]:
    """The outputs of ``got`` that are outside the tolerance of their own dtype (NaN equals NaN).

    ``conditioning`` is how much the case amplifies a rounding of its inputs (see :class:`Case`).
    """
    if got.keys() != expected.keys():
        raise ValueError(f"{suite.name}: outputs {sorted(got)} and {sorted(expected)} differ in name")
    found = (_worst(name, value, expected[name], TOLERANCES[value.dtype], conditioning) for name, value in got.items())
    return [mismatch for mismatch in found if mismatch is not None]


def _worst(name: str, got: Tensor, expected: Tensor, tolerance: Tolerance, conditioning: float) -> Mismatch | None:
    if got.shape != expected.shape:
        raise ValueError(f"{name}: shape {list(got.shape)}, expected {list(expected.shape)}")
    if got.numel() == 0:
        return None
    a, b = got.detach().double(), expected.detach().to(got.device).double()
    finite = b.abs()[b.isfinite()]
    largest = float(finite.max()) if len(finite) else 0.0
    allowed = conditioning * (tolerance.relative * b.abs() + tolerance.absolute * largest) + tolerance.spacing
    same = (a == b) | (a.isnan() & b.isnan())
    excess = torch.where(same, torch.zeros_like(a), (a - b).abs() / allowed).nan_to_num(nan=float("inf"))
    index = int(excess.flatten().argmax())
    if float(excess.flatten()[index]) <= 1.0:
        return None
    position = tuple(int(i) for i in torch.unravel_index(torch.tensor(index), got.shape))
    return Mismatch(name, position, float(a[position]), float(b[position]), float(excess[position]))
