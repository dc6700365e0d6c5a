"""What this machine and this installation are made of."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from bdfast._version import __version__
from bdfast.backends import availability
from bdfast.runtime import winograd

EXTRAS = {  # import name -> (extra that brings it, what for)
    "triton": ("triton", "Triton kernels on a GPU"),
    "sklearn": ("data", "the digits data set"),
    "PIL": ("data", "JPEG and PNG files"),
    "safetensors": ("cli", ".safetensors files"),
    "matplotlib": ("cli", "pictures and reports"),
    "yaml": ("cli", "YAML configs"),
    "torchvision": ("models", "its architectures by name"),
    "timm": ("models", "its architectures by name"),
}
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "Pillow", "yaml": "PyYAML"}


def versions() -> dict[str, str]:
    """The versions that results depend on.

    Example:
        >>> list(versions())
        ['bdfast', 'python', 'torch', 'numpy', 'system']
    """
    return {
        "bdfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "system": f"{platform.system()} {platform.machine()}",
    }


def extras() -> dict[str, str | None]:
    """Optional package -> its version, or None where it is missing. Nothing is imported."""
    return {name: _version(name) for name in EXTRAS}


def _version(name: str) -> str | None:
    try:
        if importlib.util.find_spec(name) is None:
            return None
    except (ImportError, ValueError):  # an import hook that refuses it, or a module without a spec
        return None
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def extension() -> dict[str, Any]:
    """How the compiled module was built, or why it is missing."""
    reason = availability.cpp_missing()
    if reason is not None:
        return {"missing": reason}
    module = availability.native()
    build = json.loads(module.build_info) if module.build_info else {}
    return {"version": module.version, "cpu_isa": module.cpu_isa, "has_cuda": module.has_cuda, **build}


def cpu() -> dict[str, Any]:
    """Cores, threads, the vector instructions that torch sees, and who runs convolutions."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "openmp": torch.backends.openmp.is_available(),  # type: ignore[no-untyped-call]
        "convolutions": "PyTorch's: " + reason if (reason := winograd.unavailable()) else "Winograd, 3x3 of stride 1",
    }


def gpu() -> dict[str, Any]:
    """The GPUs, the driver, and CUDA as torch was built with it."""
    visible = torch.cuda.is_available()
    devices = []
    for i in range(torch.cuda.device_count() if visible else 0):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {
        "devices": devices,
        "driver": driver_version(),
        "torch_cuda": torch.version.cuda,
        "device_files": device_files(),
    }


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of the NVIDIA kernel driver."""
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", path.read_text(errors="replace"))
    except OSError:
        return None
    return found[0] if found else None


def device_files() -> int:
    """GPUs that the system has given to this process, whether or not torch can use them (Linux)."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return 0 if hidden else len(list(Path("/dev").glob("nvidia[0-9]*")))
