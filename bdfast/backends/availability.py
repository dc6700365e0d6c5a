"""What is there to run on: the compiled extension, its CUDA half, Triton. Each answers ``None`` or a reason."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_LINKS = (
    "bdfast/triton_kernels is a symbolic link to csrc/triton: on a checkout without links, enable them (git config "
    "core.symlinks true) and check out again"
)

HALF_OR_FLOAT = (torch.float32, torch.float16, torch.bfloat16)  # what most kernels take


@functools.cache
def extension() -> ModuleType | ImportError:
    """The compiled module ``bdfast._C``, or the error of its import."""
    try:
        return importlib.import_module("bdfast._C")
    except ImportError as error:
        return error


def native() -> Any:
    """``bdfast._C``; only called where :func:`cpp_missing` is ``None``."""
    return extension()


@functools.cache
def cpp_missing() -> str | None:
    """Why the C++ kernels cannot run here, or ``None``."""
    module = extension()
    if isinstance(module, ImportError):
        return (
            f"the compiled extension bdfast._C could not be imported ({module}); "
            "build it with: pip install --no-build-isolation -e ."
        )
    return None


@functools.cache
def cuda_missing() -> str | None:
    """Why the CUDA C++ kernels cannot run here, or ``None``."""
    if (reason := cpp_missing()) is not None:
        return reason
    if not native().has_cuda:
        return "bdfast._C was built without CUDA; install nvcc and rebuild with BDFAST_CUDA=1"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def triton_missing() -> str | None:
    """Why Triton cannot be imported, or ``None``."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton could not be imported ({error}); install it with: pip install 'bdfast[triton]'"
    try:
        importlib.import_module("bdfast.triton_kernels")
    except ImportError as error:
        return f"the Triton sources could not be imported ({error}); {_LINKS}"
    return None


def warn_without_links(package: str) -> None:
    """Say what to do where git left a file with the link's text in its place, as it does on Windows."""
    if Path(package, "triton_kernels").is_file():
        warnings.warn(f"bdfast: no Triton kernels; {_LINKS}", RuntimeWarning, stacklevel=3)


@functools.cache
def triton_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors (``TRITON_INTERPRET=1`` at its first import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_cpp(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_OR_FLOAT) -> str | None:
    """Why the C++ kernel of an op cannot take ``tensor``, or ``None``."""
    if not tensor.is_cpu:
        return _elsewhere("CPU tensors", tensor.device.type)
    return _dtype_reason(tensor, dtypes) or cpp_missing()


def runs_cuda(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_OR_FLOAT) -> str | None:
    """Why the CUDA C++ kernel of an op cannot take ``tensor``, or ``None``."""
    if not tensor.is_cuda:
        return _elsewhere("CUDA tensors", tensor.device.type)
    return _dtype_reason(tensor, dtypes) or cuda_missing()


def runs_triton(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF_OR_FLOAT) -> str | None:
    """Why the Triton kernel of an op cannot take ``tensor``, or ``None``."""
    if not tensor.is_cuda and not (tensor.is_cpu and triton_interpreted()):
        return _elsewhere("CUDA tensors (or TRITON_INTERPRET=1 for CPU tensors)", tensor.device.type)
    return _dtype_reason(tensor, dtypes) or triton_missing()


@functools.cache  # asked at every call by the backends that are not for its device
def _elsewhere(needed: str, kind: str) -> str:
    return f"needs {needed}, got {kind}"


def _dtype_reason(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if tensor.dtype in dtypes:
        return None
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"supports {names}, got {str(tensor.dtype).removeprefix('torch.')}"
