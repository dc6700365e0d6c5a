"""``torch.save`` for old readers: numpy arrays under the module name that numpy 1 and numpy 2 both know."""

from __future__ import annotations

import os
import pickle
from types import SimpleNamespace
from typing import Any

import torch

from bdfast.files import atomic_write

_PythonPickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # the one in C has no such hook


class _Pickler(_PythonPickler):
    """Writes ``numpy.core`` where numpy 2 would write ``numpy._core``, which numpy 1 does not have."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core."):
            super().save_global(obj, name)
            return
        old = module.replace("numpy._core.", "numpy.core.", 1)
        self.write(pickle.GLOBAL + f"{old}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)


_MODULE = SimpleNamespace(Pickler=_Pickler, __name__="bdfast.pickle")


def torch_save(value: Any, path: str | os.PathLike[str]) -> None:
    """Save ``value`` whole or not at all.

    Args:
        value: of plain containers, tensors, numpy arrays and Pillow images.
        path: in a folder that exists.
    """
    with atomic_write(path, "wb") as file:
        torch.save(value, file, pickle_module=_MODULE, pickle_protocol=2)
