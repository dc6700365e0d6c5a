"""Same seed, same bits: random state that is put back, and deterministic kernels where they are asked for."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def stream_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose, derived from the user's, in [0, 2^63).

    Used as it is, a seed repeats what others drew from it: a first layer built after ``torch.manual_seed(0)`` and a
    uniform tensor from a generator of seed 0 point in the very same direction.

    Example:
        >>> stream_seed(0, "warm-up") == stream_seed(0, "warm-up") != stream_seed(0, "epoch 1")
        True
    """
    return int.from_bytes(hashlib.sha256(f"bdfast/{purpose}/{seed}".encode()).digest()[:8], "little") >> 1


@contextmanager
def isolated_rng(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed the global generators of torch (CPU, and ``device``), NumPy and Python inside; restore them on leaving.

    Dropout draws from the global generator, transforms of a data set from any of them.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated_rng(3):
        ...     a = torch.rand(1)
        >>> with isolated_rng(3):
        ...     b = torch.rand(1)
        >>> torch.equal(a, b), torch.equal(torch.get_rng_state(), before)
        (True, True)
    """
    # NumPy's global generator is the one that other people's transforms use.
    on_cuda = device is not None and device.type == "cuda"
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if on_cuda else [], device_type="cuda"):
        try:
            seed_host(seed)
            if on_cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def in_float32() -> Iterator[None]:
    """Modules that are built inside draw and keep float32 weights, whatever the caller's default dtype.

    For modules of our own alone: a default dtype is of the whole process, and a caller's model may count on it.

    Example:
        >>> with in_float32():
        ...     torch.nn.Linear(1, 1).weight.dtype
        torch.float32
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seed_host(seed: int) -> None:
    """Seed the global generators of torch on the CPU, NumPy and Python; for the inside of :func:`isolated_rng`."""
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every GPU
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def host_random_state() -> tuple[object, ...]:
    """That of PyTorch's, Python's and NumPy's global generators: equal as long as nobody draws from them."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  (a model may draw from it)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), kind, np.asarray(keys).tobytes(), *rest


@contextmanager
def searched_kernels(device: torch.device, repeated: bool = True) -> Iterator[None]:
    """On a GPU: the convolutions that cuDNN finds fastest, for shapes that are ``repeated``.

    A search takes some 2.5 s for the shapes of a ResNet-18, which a training run's whole batches pay back, and the
    last one of an epoch does not. With deterministic kernels nothing is searched for.

    Example:
        >>> with searched_kernels(torch.device("cpu")):
        ...     torch.backends.cudnn.benchmark
        False
    """
    before = torch.backends.cudnn.benchmark
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = repeated and not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def deterministic_kernels(enabled: bool, device: torch.device) -> Iterator[None]:
    """Make a GPU compute the same bits in every run, or raise where it cannot; the CPU does so anyway.

    Example:
        >>> with deterministic_kernels(True, torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        False
    """
    if not enabled or device.type != "cuda":
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(_WORKSPACE),
    )
    try:
        os.environ.setdefault(_WORKSPACE, ":4096:8")  # torch refuses cuBLAS in deterministic mode without it
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]
        if before[3] is None:
            os.environ.pop(_WORKSPACE, None)
