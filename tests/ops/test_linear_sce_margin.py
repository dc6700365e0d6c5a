"""linear_sce_margin: hand-computed values, agreement with sce_margin, memory, edges and errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bdfast
from bdfast.errors import LabelRangeError
from bdfast.ops import linear_sce_margin, sce_margin
from bdfast.testing import Case, parity, suites

FEATURES = torch.tensor([[1.0, 2.0], [0.0, -1.0]])
WEIGHT = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
BIAS = torch.tensor([0.5, 0.0, -1.0])
TARGET = torch.tensor([1, 0])
BACKENDS = pytest.mark.parametrize("backend", ["cpp", "reference"])


@BACKENDS
def test_by_hand(backend: str) -> None:
    """Logits (1.5, 2, 2) and (0.5, -1, -2)."""
    expected = torch.tensor([math.log(math.exp(1.5) + math.exp(2)) - 2, math.log(math.exp(-1) + math.exp(-2)) - 0.5])
    torch.testing.assert_close(linear_sce_margin(FEATURES, WEIGHT, BIAS, TARGET, backend=backend), expected)
    expected = torch.tensor([math.log(math.exp(1) + math.exp(3)) - 2, math.log(2 * math.exp(-1))])
    torch.testing.assert_close(linear_sce_margin(FEATURES, WEIGHT, None, TARGET, backend=backend), expected)


@pytest.mark.parametrize("classes", [10, 1023, 1024, 1025, 4097])
def test_blocks_of_classes_change_nothing(classes: int) -> None:
    """The label in the first, in a middle and in the last block; blocks end anywhere."""
    features, weight, bias = torch.randn(70, 16), torch.randn(classes, 16), torch.randn(classes)
    target = torch.linspace(0, classes - 1, 70).long()
    exact = sce_margin(torch.nn.functional.linear(features.double(), weight.double(), bias.double()), target)
    got = linear_sce_margin(features, weight, bias, target, backend="cpp")
    torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_tile() -> None:
    features, weight = torch.randn(1500, 8), torch.randn(5000, 8)  # 1,024 rows a tile
    target = torch.randint(5000, (1500,))
    whole = linear_sce_margin(features, weight, None, target)
    torch.testing.assert_close(linear_sce_margin(features[1100:], weight, None, target[1100:]), whole[1100:])


@BACKENDS
def test_rows_that_are_not_finite_come_last(backend: str) -> None:
    features = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [1.0, 1.0], [3e38, 3e38]])
    margin = linear_sce_margin(features, WEIGHT, BIAS, torch.zeros(4, dtype=torch.int64), backend=backend)
    assert margin.isfinite().tolist() == [False, False, True, False]
    assert margin[[0, 1, 3]].tolist() == [math.inf] * 3


@BACKENDS
def test_edges(backend: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert linear_sce_margin(torch.zeros(0, 2), WEIGHT, BIAS, none, backend=backend).shape == (0,)
    one = linear_sce_margin(FEATURES, WEIGHT[:1], None, torch.zeros(2, dtype=torch.int64), backend=backend)
    assert one.tolist() == [-math.inf] * 2
    wide = linear_sce_margin(torch.zeros(2, 0), torch.zeros(3, 0), BIAS, TARGET, backend=backend)
    torch.testing.assert_close(wide, sce_margin(BIAS.expand(2, 3), TARGET))


PEAK = """
import resource, torch, bdfast
torch.set_num_threads(1)
features, weight = torch.randn(1000, 16), torch.randn(20000, 16)
target = torch.randint(20000, (1000,))
bdfast.ops.linear_sce_margin(features[:300], weight, None, target[:300], backend="{backend}")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bdfast.ops.linear_sce_margin(features, weight, None, target, backend="{backend}")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
@BACKENDS
def test_peak_memory_does_not_grow_with_the_batch(backend: str) -> None:
    """1,000 x 20,000 logits would be 80 MB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(bdfast.__file__).parents[1])}
    command = [sys.executable, "-c", PEAK.format(backend=backend)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(result.stdout) * unit < 32e6


def test_is_not_differentiable() -> None:
    layer = torch.nn.Linear(2, 3)
    assert not linear_sce_margin(FEATURES, layer.weight, layer.bias, TARGET).requires_grad


def test_compiles_without_graph_break() -> None:
    compiled = torch.compile(lambda f: linear_sce_margin(f, WEIGHT, BIAS, TARGET), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(FEATURES), linear_sce_margin(FEATURES, WEIGHT, BIAS, TARGET))


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 90),
    classes=st.integers(1, 90),
    width=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_any_shape(rows: int, classes: int, width: int, bias: bool, dtype: torch.dtype) -> None:
    options = {"shape": (rows, classes), "width": width, "bias": bias}
    assert not parity(
        suites()["linear_sce_margin"], Case("drawn", "", options, conditioning=40.0), "auto", "cpu", dtype
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((FEATURES[0], WEIGHT, BIAS, TARGET), ValueError, r"linear_sce_margin: `features` expected shape \[N, D\]"),
        ((FEATURES.int(), WEIGHT, BIAS, TARGET), TypeError, "`features` expected float32"),
        ((FEATURES, WEIGHT.tolist(), BIAS, TARGET), TypeError, r"`weight` expected a tensor \[C, D\], got list"),
        (
            (FEATURES, WEIGHT.t(), BIAS, TARGET),
            ValueError,
            r"`weight` expected shape \[C, 2\] with C >= 1, got \[2, 3\]",
        ),
        ((FEATURES, WEIGHT[:0], None, TARGET), ValueError, "C >= 1"),
        (
            (FEATURES, WEIGHT.double(), BIAS, TARGET),
            TypeError,
            "`weight` expected the dtype of features, torch.float32",
        ),
        ((FEATURES, WEIGHT, BIAS[:2], TARGET), ValueError, r"`bias` expected a tensor \[3\] or None, got \[2\]"),
        ((FEATURES, WEIGHT, 0.0, TARGET), ValueError, "`bias` expected .* got float"),
        ((FEATURES, WEIGHT, BIAS.double(), TARGET), TypeError, "`bias` expected the dtype of features"),
        ((FEATURES, WEIGHT, BIAS, TARGET[:1]), ValueError, r"one label a row of features, \[2\], got \[1\]"),
        ((FEATURES, WEIGHT.to("meta"), BIAS, TARGET), ValueError, "`weight` expected the device of features, cpu"),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        linear_sce_margin(*arguments)


@pytest.mark.parametrize("backend", ["auto", "cpp", "reference"])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_label_out_of_range(backend: str, label: int) -> None:
    target = torch.tensor([0, label])
    with pytest.raises(LabelRangeError, match=rf"linear_sce_margin: .* labels in \[0, 3\), got {label} at index 1"):
        linear_sce_margin(FEATURES, WEIGHT, BIAS, target, backend=backend)
