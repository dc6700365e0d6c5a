"""Which implementation of an op runs, who decides, and how to ask why.

Every op has a ``reference`` in plain PyTorch and faster implementations (``cpp`` on the CPU, ``cuda`` and ``triton`` on
a GPU). ``backend="auto"`` takes the first that can run, in the measured order of the op; a named backend runs or raises
its reason. The choice is made by, in this order: the ``backend=`` argument, ``with bdfast.backend(...)``, the
environment variable ``BDFAST_BACKEND``, the op's own order.
"""

from bdfast.backends.explain import Explanation, explain
from bdfast.backends.registry import BackendUnavailableError, Implementation, Op, find, registered
from bdfast.backends.selection import BACKENDS, BackendName, backend, debug, debug_enabled, requested

__all__ = [
    "BACKENDS",
    "BackendName",
    "BackendUnavailableError",
    "Explanation",
    "Implementation",
    "Op",
    "backend",
    "debug",
    "debug_enabled",
    "explain",
    "find",
    "registered",
    "requested",
]
