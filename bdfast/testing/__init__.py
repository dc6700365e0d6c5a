"""What tests, benchmarks, ``bdfast doctor`` and the GPU check share: for every op one list of cases, one way to run
them on any backend, and one table of tolerances. An op appears everywhere by adding its suite module here.
"""

from bdfast.testing.parity import Mismatch, compare, parity
from bdfast.testing.suite import Case, Inputs, OpSuite, Outputs, drawn_there, suites, upcast
from bdfast.testing.tolerances import TOLERANCES, Tolerance

__all__ = [
    "TOLERANCES",
    "Case",
    "Inputs",
    "Mismatch",
    "OpSuite",
    "Outputs",
    "Tolerance",
    "compare",
    "drawn_there",
    "parity",
    "suites",
    "upcast",
]
