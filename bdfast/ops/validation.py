"""Checks of op arguments: metadata only on the GPU, so that they never sync."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from bdfast.backends import debug_enabled
from bdfast.errors import LabelRangeError, message

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_logits(op: str, logits: Tensor, name: str = "logits") -> None:
    """``logits`` is a floating-point ``[N, C]`` with at least one class."""
    check_floating(op, logits, name, "[N, C]")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(
            message(op, name, "shape [N, C] with C >= 1", str(list(logits.shape)), "flatten to one row a sample")
        )


def check_floating(op: str, tensor: Tensor, name: str, shape: str) -> None:
    """``tensor`` is a floating-point tensor; ``shape`` says in the message what else it should be."""
    if not isinstance(tensor, Tensor):
        raise TypeError(message(op, name, f"a tensor {shape}", type(tensor).__name__, "pass a torch.Tensor"))
    if tensor.dtype not in FLOATING:
        raise TypeError(
            message(op, name, "float32, float16, bfloat16 or float64", str(tensor.dtype), "convert it with .float()")
        )
    if tensor.layout is not torch.strided:
        raise TypeError(message(op, name, "a dense tensor", str(tensor.layout), "convert it with .to_dense()"))


def check_target(op: str, target: Tensor, rows: Tensor, rows_name: str = "logits", name: str = "target") -> None:
    """``target`` is an int64 ``[N]``, one a row of ``rows``, on their device; values are checked where the op runs."""
    if not isinstance(target, Tensor):
        raise TypeError(message(op, name, "a tensor [N]", type(target).__name__, "pass a torch.Tensor"))
    if target.dtype != torch.int64:
        raise TypeError(message(op, name, "int64 class labels", str(target.dtype), "convert it with .long()"))
    if target.dim() != 1 or target.shape[0] != rows.shape[0]:
        raise ValueError(
            message(
                op,
                name,
                f"one label a row of {rows_name}, [{rows.shape[0]}]",
                str(list(target.shape)),
                "pass labels for exactly these rows",
            )
        )
    if target.device != rows.device:
        raise ValueError(
            message(op, name, f"the device of {rows_name}, {rows.device}", str(target.device), "move it there")
        )


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number: Python's and numpy's, no bool, and no tensor, which may be on a GPU."""
    return isinstance(value, (int, float, numbers.Real)) and not isinstance(value, bool)


def check_number(op: str, name: str, value: float, remedy: str = "pass one") -> None:
    """``value`` is a real number; its range is for the caller to check."""
    if type(value) is not float and not is_number(value):  # the first of the two is quick, and most often enough
        raise TypeError(message(op, name, "a number", type(value).__name__, remedy))


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    """``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(message(op, name, f"one of {', '.join(choices)}", repr(value), "correct it"))


def check_label_range(op: str, target: Tensor, classes: int, name: str = "target") -> None:
    """Labels lie in ``[0, classes)``: checked on the CPU always; on a GPU, where that syncs, in debug mode only."""
    if target.numel() == 0 or not (target.is_cpu or debug_enabled()):
        return
    outside = (target < 0) | (target >= classes)
    if bool(outside.any()):
        raise_label_range(op, target, classes, int(outside.nonzero()[0]), name)


def raise_label_range(op: str, target: Tensor, classes: int, index: int, name: str = "target") -> None:
    """Raise the error for the label at ``index``."""
    raise LabelRangeError(
        message(op, name, f"labels in [0, {classes})", f"{int(target[index])} at index {index}", "correct the labels")
    )
