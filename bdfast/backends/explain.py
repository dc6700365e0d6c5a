"""Ask which backend an op takes, and why not the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bdfast.backends import selection
from bdfast.backends.registry import BackendUnavailableError, find
from bdfast.errors import message


@dataclass(frozen=True)
class Explanation:
    """Which backend runs, and the reason of each that does not.

    Attributes:
        op: name of the public function.
        chosen: the backend that would run; ``None`` where a named one cannot.
        reasons: backend -> ``None`` (can run) or a sentence, in order of preference.
        requested: what argument, context or environment asked for.
    """

    op: str
    chosen: str | None
    reasons: dict[str, str | None]
    requested: str

    def __str__(self) -> str:
        lines = [f"{self.op}: requested {self.requested!r}, runs on {self.chosen!r}"]
        for name, reason in self.reasons.items():
            mark = "*" if name == self.chosen else " "
            lines.append(f" {mark} {name:<9} {'can run' if reason is None else reason}")
        return "\n".join(lines)


def explain(
    op: str | Callable[..., Any],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Explanation:
    """Say which backend ``op`` runs on for tensors of one device and dtype, and why not on the others.

    Args:
        op: a function of :mod:`bdfast.ops`, or its name.
        device: where the tensors would be.
        dtype: of the floating-point tensors.
        backend: as passed to the op.

    Raises:
        ValueError: unknown op, device or backend.

    Example:
        >>> import torch, bdfast
        >>> bdfast.explain("hinge_cross_entropy", dtype=torch.float64).chosen
        'reference'
    """
    found = find(op if isinstance(op, str) else getattr(op, "__name__", repr(op)))
    wish = selection.requested(backend, "explain")
    probe = _Probe(_device(device), dtype)
    try:
        chosen: str | None = found.choose(wish, probe).backend
    except BackendUnavailableError:
        chosen = None
    return Explanation(found.public, chosen, found.reasons(probe), wish)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(message("explain", "device", "a device", repr(device), 'pass "cpu" or "cuda"')) from None


@dataclass(frozen=True)
class _Probe:
    """Answers for device and dtype like a tensor, so that no device is needed to ask about one."""

    device: torch.device
    dtype: torch.dtype

    @property
    def is_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"
