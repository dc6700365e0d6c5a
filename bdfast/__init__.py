"""bdfast: fast kernels and end-to-end defenses against backdoors in neural networks."""

from bdfast import _startup  # noqa: F401  isort: skip

# torch first: its wheel carries the OpenMP runtime that bdfast._C is to share, not to duplicate.
import torch as _torch  # noqa: F401  isort: skip

from bdfast import attacks, backends, data, defenses, metrics, models, nn, ops, optim, patch, training
from bdfast._version import __version__
from bdfast.backends import backend, debug, explain
from bdfast.backends.availability import warn_without_links as _warn_without_links

__all__ = [
    "__version__",
    "attacks",
    "backend",
    "backends",
    "data",
    "debug",
    "defenses",
    "explain",
    "metrics",
    "models",
    "nn",
    "ops",
    "optim",
    "patch",
    "training",
]

_warn_without_links(__path__[0])
