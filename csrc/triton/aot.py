"""Compilation ahead of time: checks kernels for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class AotVariant:
    """One specialisation of a kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        types: Triton type of every argument that is not a constant, such as ``{"p_logits": "*bf16", "N": "i32"}``.
        constants: value of every ``tl.constexpr``.
        num_warps: of a program.
        aligned: arguments that are multiples of 16, as whole tensors and padded strides are.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool | float]
    num_warps: int
    aligned: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, kernel: Any, types: Mapping[str, str], constants: Mapping[str, int | bool | float], num_warps: int
    ) -> AotVariant:
        """The specialisation for whole tensors: every pointer aligned.

        ``constants`` may name integers of value 1, too: Triton's own launcher turns those into constants.
        """
        types = {name: kind for name, kind in types.items() if name not in constants}
        pointers = tuple(name for name, kind in types.items() if kind.startswith("*"))
        return cls(kernel, types, constants, num_warps, pointers)

    def __str__(self) -> str:
        values = ",".join(f"{name}={value}" for name, value in self.constants.items())
        pointers = ",".join(sorted({kind for kind in self.types.values() if kind.startswith("*")}))
        return f"{self.kernel.__name__}[{pointers},{values}]"

    def compile(self, capability: int) -> Any:
        """The compiled kernel, its ``asm`` holding PTX and cubin, for compute capability ``capability`` (90 is 9.0)."""
        names = self.kernel.arg_names
        signature = {name: self.types.get(name, "constexpr") for name in names}
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, signature, dict(self.constants), attributes)
        return triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": self.num_warps})
