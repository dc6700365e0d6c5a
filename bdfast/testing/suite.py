"""The description of an op that tests, benchmarks, doctor and GPU check run."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]  # keyword arguments of `run`: tensors, lists of tensors and options
Outputs = dict[str, Tensor]  # everything that an op returns, changes or differentiates, by name


@dataclass(frozen=True)
class Case:
    """One set of inputs of an op.

    Attributes:
        name: as it appears in test ids and benchmark rows.
        why: what this shape or these values are there to catch.
        options: arguments of the suite's ``make``, besides device and dtype.
        dtypes: the dtypes it is run in.
        conditioning: how much the case itself amplifies a rounding of its inputs, by cancellation; multiplies the
            tolerance.
        benchmark: whether it is timed.
        large: whether it needs gigabytes (run on a GPU only).
    """

    name: str
    why: str
    options: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    conditioning: float = 1.0
    benchmark: bool = False
    large: bool = False


@dataclass(frozen=True)
class OpSuite:
    """How to make inputs for an op, run it, run what a user would write instead, and count its bytes.

    Attributes:
        name: of the op's public function.
        make: ``make(device, dtype, **case.options) -> Inputs``; deterministic.
        run: ``run(inputs, backend) -> Outputs``, forward and backward, or the changed state; may change ``inputs``.
        eager: the same outputs from plain PyTorch as users write it: the baseline of the benchmarks.
        cases: all cases.
        step: ``step(inputs, backend) -> callable`` for timing: one call repeats the op on the same inputs.
        baselines: name -> ``f(inputs) -> callable``: what to time beside it, such as ``eager`` and ``compile``.
        bytes_moved: the least that a step has to read and write, in bytes.
        opcheck_arguments: the raw ops and arguments that ``torch.library.opcheck`` is run on.
    """

    name: str
    make: Callable[..., Inputs]
    run: Callable[[Inputs, str], Outputs]
    eager: Callable[[Inputs], Outputs]
    cases: tuple[Case, ...]
    step: Callable[[Inputs, str], Callable[[], Any]]
    baselines: Mapping[str, Callable[[Inputs], Callable[[], Any]]]
    bytes_moved: Callable[[Inputs], int]
    opcheck_arguments: Callable[[Inputs], list[tuple[Any, tuple[Any, ...]]]]

    def inputs(self, case: Case, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
        """Fresh inputs of a case."""
        return self.make(torch.device(device), dtype, **case.options)


def drawn_there(suite: OpSuite) -> OpSuite:
    """The suite with inputs that are drawn on the device where they are used: other numbers, and no wait for a CPU.

    Example:
        >>> suite = drawn_there(suites()["sce_margin"])
        >>> suite.inputs(suite.cases[0])["logits"].shape
        torch.Size([50000, 10])
    """

    def make(device: torch.device, dtype: torch.dtype, **options: Any) -> Inputs:
        with device:  # the default of whatever is made inside, and of nothing else
            return suite.make(device, dtype, **options)

    return replace(suite, make=make)


def upcast(inputs: Inputs) -> Inputs:
    """A copy of ``inputs`` with every floating-point tensor in float64, strides kept."""
    return {name: _upcast(value) for name, value in inputs.items()}


def _upcast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float64) if value.is_floating_point() else value
    if isinstance(value, list):
        return [_upcast(item) for item in value]
    return value


@functools.cache
def suites() -> dict[str, OpSuite]:
    """Every op's suite, by op name: the modules of :mod:`bdfast.testing.ops`."""
    package = importlib.import_module("bdfast.testing.ops")
    found: dict[str, OpSuite] = {}
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        suite: OpSuite = importlib.import_module(module.name).SUITE
        found[suite.name] = suite
    return found
