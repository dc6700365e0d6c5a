"""csrc/cuda/scale_to_ball.cu, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.ops.scale_to_ball import _on_dense_images, _radius
from bdfast.testing import Case, compare, suites, upcast
from tests.cuda_on_cpu.images import offset_by_an_element
from tests.cuda_on_cpu.library import build

SUITE = suites()["scale_to_ball_"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("scale_to_ball", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.scale.restype = ctypes.c_char_p
    return built


def run(library: ctypes.CDLL, inputs: dict[str, Any]) -> dict[str, Tensor]:
    d = inputs["perturbation"]

    def call(
        _: Tensor, address: int, dtype: int, images: int, numel: int, radius: float, radii: int, one: bool
    ) -> None:
        sizes = (ctypes.c_int64(images), ctypes.c_int64(numel))
        radius_of = (ctypes.c_double(radius), ctypes.c_void_p(radii))
        message = library.scale(ctypes.c_void_p(address), dtype, *sizes, *radius_of, int(one))
        assert not message, message

    _on_dense_images(call, d, *_radius(inputs["radius"], d), inputs["p"])
    return {"perturbation": d}


CASES = [c for c in SUITE.cases if not c.large and c.name not in ("cifar10", "cifar10-l1")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cases(library: ctypes.CDLL, case: Case) -> None:
    for dtype in case.dtypes:
        got = run(library, SUITE.inputs(case, "cpu", dtype))
        expected = SUITE.run(upcast(SUITE.inputs(case, "cpu", dtype)), "reference")
        assert not compare(got, expected, SUITE)


def test_at_an_odd_address(library: ctypes.CDLL) -> None:
    case = Case("odd address", "", {"shape": (3, 4, 8, 16)})
    inputs = SUITE.inputs(case)
    expected = run(library, SUITE.inputs(case))["perturbation"]
    inputs["perturbation"] = offset_by_an_element(inputs["perturbation"])
    torch.testing.assert_close(run(library, inputs)["perturbation"], expected, rtol=1e-6, atol=0)
