"""csrc/cuda/{masked_pgd_step,patch_centers,masked_random_start}.cu, run on the CPU, against the references."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.ops import masked_pgd_step_, masked_random_start, patch_centers
from bdfast.ops.philox import stream_key
from bdfast.ops.rows import DTYPE_CODE
from bdfast.testing import Case, suites
from tests.cuda_on_cpu.images import bounds, geometry, integers, offset_by_an_element
from tests.cuda_on_cpu.library import build

STEP, START, CENTERS = (suites()[name] for name in ("masked_pgd_step_", "masked_random_start", "patch_centers"))
STEPS = [c for c in STEP.cases if not c.benchmark and not c.large and c.name != "bands"]  # which is 1,200 blocks


def load(name: str, function: str, folder: Path) -> Any:
    entry = getattr(build(name, folder), function)
    entry.restype = ctypes.c_char_p
    return entry


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("masked_pgd_step", "step", tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("masked_random_start", "start", tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="module")
def draw(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("patch_centers", "draw", tmp_path_factory.mktemp("cuda_on_cpu"))


def same(got: Tensor, expected: Tensor) -> bool:
    return torch.equal(got.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


def step_on_cpu(step: Any, reverse: bool = False, **inputs: Any) -> Tensor:
    images = [inputs[name] for name in ("x_adv", "x", "grad")]
    x = images[0]
    pointers = (ctypes.c_void_p * 3)(*(t.data_ptr() for t in images))
    strides = integers([s for t in images for s in t.stride()])
    numbers, kept = bounds([inputs[name] for name in ("step_size", "eps", "lower", "upper")], x)
    where = geometry(x, inputs["centers"], inputs["radius"])
    message = step(pointers, DTYPE_CODE[x.dtype], integers(x.shape), strides, *where, *numbers, int(reverse))
    assert not message, message
    del kept
    return x


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.name)
def test_step(step: Any, case: Case) -> None:
    for dtype in case.dtypes:
        expected = masked_pgd_step_(**STEP.inputs(case, "cpu", dtype), backend="reference")
        for reverse in (False, True):
            assert same(step_on_cpu(step, reverse, **STEP.inputs(case, "cpu", dtype)), expected)


@pytest.mark.parametrize("name", ["x_adv", "x", "grad"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_step_at_odd_addresses(step: Any, name: str, layout: str) -> None:
    case = Case("odd address", "", {"shape": (3, 4, 8, 16), "radius": 3, "layout": layout})
    for dtype in (torch.float32, torch.bfloat16):
        inputs = STEP.inputs(case, "cpu", dtype)
        expected = masked_pgd_step_(**STEP.inputs(case, "cpu", dtype), backend="reference")
        inputs[name] = offset_by_an_element(inputs[name])
        assert same(step_on_cpu(step, **inputs), expected)


def start_on_cpu(start: Any, x_adv: Tensor, x: Tensor, inputs: dict[str, Any]) -> Tensor:
    numbers, kept = bounds([inputs[name] for name in ("eps", "lower", "upper")], x_adv)
    key = stream_key(inputs["seed"], "masked_random_start", inputs["round"])
    message = start(
        ctypes.c_void_p(x_adv.data_ptr()), ctypes.c_void_p(x.data_ptr()), DTYPE_CODE[x.dtype], integers(x_adv.shape),
        integers(x_adv.stride()), *geometry(x_adv, inputs["centers"], inputs["radius"]),
        ctypes.c_void_p(inputs["ids"].data_ptr()), ctypes.c_uint64(key), *numbers,
    )  # fmt: skip
    assert not message, message
    del kept
    return x_adv


@pytest.mark.parametrize("case", [c for c in START.cases if not c.benchmark], ids=lambda c: c.name)
def test_start(start: Any, case: Case) -> None:
    for dtype in case.dtypes:
        inputs = START.inputs(case, "cpu", dtype)
        expected = masked_random_start(**inputs, backend="reference")
        x_adv = torch.empty_like(inputs["x"]).copy_(inputs["x"])
        assert same(start_on_cpu(start, x_adv, x_adv, inputs), expected)
        if inputs["radius"] is None and x_adv.stride() == inputs["x"].stride():
            assert same(start_on_cpu(start, torch.full_like(x_adv, 7.0), inputs["x"], inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("radius", [None, 1, 5])
@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (2, 2, 70, 132), (2, 3, 5, 6), (3, 1, 9, 3)])
def test_start_in_quads(start: Any, shape: tuple[int, ...], radius: int | None, dtype: torch.dtype) -> None:
    """Rows of whole quads and of others, aligned and not, patches that begin within a quad, many quads a thread."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(shape, generator=generator).to(dtype)
    x.view(-1)[::7] *= 1e-30  # whose sum with the noise float64 rounds
    centers = torch.tensor([[0, 0], [shape[2] - 1, shape[3] - 1], [4, 6]])[: shape[0]]
    eps = torch.linspace(1e-3, 0.3, shape[1])
    inputs = {"x": x, "ids": torch.arange(shape[0]) * 2**33, "centers": None if radius is None else centers}
    inputs |= {"radius": radius, "eps": eps, "seed": 5, "round": 2, "lower": 0.0, "upper": 1.0}
    expected = masked_random_start(**inputs, backend="reference")
    for images in (x.clone(), offset_by_an_element(x)):
        assert same(start_on_cpu(start, images, images, inputs), expected)


@pytest.mark.parametrize("case", [c for c in CENTERS.cases if not c.benchmark], ids=lambda c: c.name)
def test_centers(draw: Any, case: Case) -> None:
    inputs = CENTERS.inputs(case)
    ids = inputs["ids"].contiguous()
    centers = torch.full((len(ids), 2), -7, dtype=torch.int32)
    key = ctypes.c_uint64(stream_key(inputs["seed"], "patch_centers", inputs["round"]))
    sizes = [ctypes.c_int64(value) for value in (len(ids), inputs["height"], inputs["width"])]
    message = draw(ctypes.c_void_p(ids.data_ptr()), *sizes, key, ctypes.c_void_p(centers.data_ptr()))
    assert not message, message
    assert torch.equal(centers, patch_centers(**inputs, backend="reference"))
