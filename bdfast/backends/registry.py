"""Raw ops of the ``bdfast::`` namespace: one schema, a fake kernel, and an implementation a backend.

An op is defined in Python, so it exists with or without a compiler. Its CPU and CUDA entries are the chooser: the last
argument of every schema is the requested backend, and the entry calls the first implementation that can run, or the
one that was named. ``Library.define`` + ``impl`` cost 5 us a call from Python where ``custom_op`` costs 14; autograd is
written in the public function, because registered autograd would add 5-20 us a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from bdfast.backends import selection
from bdfast.backends.availability import triton_interpreted

# Lives as long as the process. (torch.library is not annotated: hence the casts to Any.)
_LIBRARY: Any = cast(Any, torch.library.Library)("bdfast", "DEF")
_OPS: dict[str, Op] = {}

CanRun = Callable[[Any], str | None]


class BackendUnavailableError(RuntimeError, ValueError):
    """The backend that `backend` names cannot run on these inputs; the message is its reason."""


@dataclass(frozen=True)
class Implementation:
    """One backend of an op.

    Attributes:
        backend: ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``.
        function: takes the schema's arguments without the last (the requested backend).
        can_run: takes the op's key tensor (or a stand-in with its ``device`` and ``dtype``); ``None``, or the reason
            why this implementation cannot run on it.
    """

    backend: str
    function: Callable[..., Any]
    can_run: CanRun


@dataclass
class Op:
    """A raw op: ``torch.ops.bdfast.<name>``.

    Attributes:
        name: of the op in the ``bdfast`` namespace.
        public: name of the function in :mod:`bdfast.ops` that users call.
        schema: without the name; its last argument is ``str backend``.
        fake: shape and dtype function for tracing; takes all arguments of the schema.
        key: takes all arguments of the schema; the tensor among them whose device and dtype decide the backend.
        implementations: in the measured order of preference; the last is the reference.
    """

    name: str
    public: str
    schema: str
    fake: Callable[..., Any]
    key: Callable[..., Tensor]
    implementations: tuple[Implementation, ...]
    call: Any = field(init=False)
    _mutated: list[int] = field(init=False)

    def __post_init__(self) -> None:
        _LIBRARY.define(f"{self.name}{self.schema}", tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._entry, key)
        torch.library.register_fake(f"bdfast::{self.name}", self.fake, lib=_LIBRARY)
        self.call = getattr(torch.ops.bdfast, self.name).default
        arguments = self.call._schema.arguments
        self._mutated = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        _OPS[self.name] = self

    def __call__(self, *arguments: Any) -> Any:
        """Run the op: through torch's dispatcher where something may be watching, else straight to the chooser.

        The dispatcher costs 5 us a call from Python, as much as a kernel on a CIFAR-10 batch of logits.
        """
        key = self.key(*arguments)
        if torch.compiler.is_compiling() or not is_plain(key):
            return self.call(*arguments)
        return self._run(key, arguments)

    def _entry(self, *arguments: Any) -> Any:
        return self._run(self.key(*arguments), arguments)

    def _run(self, key: Tensor, arguments: tuple[Any, ...]) -> Any:
        inputs = arguments[:-1]
        result = self.choose(arguments[-1], key).function(*inputs)
        if self._mutated:
            self._increment_versions(inputs)
        return result

    def _increment_versions(self, inputs: tuple[Any, ...]) -> None:
        """Writes through raw pointers are news to autograd: a backward through the old values must raise."""
        for i in self._mutated:
            changed = inputs[i]
            if changed is not None:
                torch.autograd.graph.increment_version(changed)  # passes over inference tensors

    def choose(self, wish: str, key: Any) -> Implementation:
        """The implementation that runs for this key tensor.

        Raises:
            BackendUnavailableError: ``wish`` names a backend that cannot run here; the message gives its reason.
        """
        if wish == "auto":
            wish = selection.from_environment()
        if wish == "auto":
            for implementation in self.implementations:
                interpreted = implementation.backend == "triton" and triton_interpreted()  # for tests: never by itself
                if not interpreted and implementation.can_run(key) is None:
                    return implementation
        reason: str | None = "this op has no such implementation"
        for implementation in self.implementations:
            if implementation.backend == wish:
                reason = implementation.can_run(key)
                if reason is None:
                    return implementation
        raise BackendUnavailableError(
            f"{self.public}: backend {wish!r} cannot run: {reason}; "
            f'pass backend="auto", or one of {[name for name, why in self.reasons(key).items() if why is None]}'
        )

    def reasons(self, key: Any) -> dict[str, str | None]:
        """For each backend ``None`` (it can run on this key tensor) or the reason why not, in order of preference."""
        return {item.backend: item.can_run(key) for item in self.implementations}


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def is_plain(tensor: Tensor) -> bool:
    """Whether a call on this tensor is seen by nobody but the kernel: no subclass, no mode, no transform, no tracer."""
    return (
        type(tensor) in _PLAIN_TYPES
        and (tensor.is_cpu or tensor.is_cuda)
        and _dispatch_modes() == 0
        and not _transforms_active()
        and _tracing_state() is None
    )


def registered() -> Iterator[Op]:
    """All raw ops, in the order of their definition."""
    return iter(tuple(_OPS.values()))


def find(name: str) -> Op:
    """The raw op of this name, or the first (the forward) of the public function of this name.

    Raises:
        ValueError: there is none.
    """
    if name in _OPS:
        return _OPS[name]
    for op in _OPS.values():
        if op.public == name:
            return op
    known = sorted({op.public for op in _OPS.values()})
    raise ValueError(f"explain: `op` expected one of {known}, got {name!r}; correct the name")


def always(_: Any) -> str | None:
    """``can_run`` of the references: plain PyTorch runs everywhere."""
    return None
