"""csrc/cuda/scale_to_ball.cu, run on the CPU, against the reference."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.ops.scale_to_ball import BLOCKS, PART, _on_dense_images, _parts, _radius
from bdfast.testing import Case, compare, suites, upcast
from tests.cuda_on_cpu.images import offset_by_an_element
from tests.cuda_on_cpu.library import build

SUITE = suites()["scale_to_ball_"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("scale_to_ball", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.scale.restype = ctypes.c_char_p
    return built


def run(library: ctypes.CDLL, inputs: dict[str, Any], parts: int = 1) -> dict[str, Tensor]:
    d = inputs["perturbation"]

    def call(
        _: Tensor, address: int, dtype: int, images: int, numel: int, radius: float, radii: int, one: bool
    ) -> None:
        sizes = (ctypes.c_int64(images), ctypes.c_int64(numel))
        radius_of = (ctypes.c_double(radius), ctypes.c_void_p(radii))
        partials = (ctypes.c_double * (images * parts))(*[math.nan] * (images * parts))  # whatever scratch holds
        scratch = (ctypes.c_int64(parts), partials)
        message = library.scale(ctypes.c_void_p(address), dtype, *sizes, *radius_of, int(one), *scratch)
        assert not message, message

    _on_dense_images(call, d, *_radius(inputs["radius"], d), inputs["p"])
    return {"perturbation": d}


CASES = [c for c in SUITE.cases if not c.large and c.name not in ("cifar10", "cifar10-l1")]


@pytest.mark.parametrize("parts", [1, 3, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_cases(library: ctypes.CDLL, case: Case, parts: int) -> None:
    for dtype in case.dtypes:
        got = run(library, SUITE.inputs(case, "cpu", dtype), parts)
        expected = SUITE.run(upcast(SUITE.inputs(case, "cpu", dtype)), "reference")
        assert not compare(got, expected, SUITE)


@pytest.mark.parametrize("parts", [1, 5])
def test_at_an_odd_address(library: ctypes.CDLL, parts: int) -> None:
    case = Case("odd address", "", {"shape": (3, 4, 8, 16)})
    inputs = SUITE.inputs(case)
    expected = run(library, SUITE.inputs(case))["perturbation"]
    inputs["perturbation"] = offset_by_an_element(inputs["perturbation"])
    torch.testing.assert_close(run(library, inputs, parts)["perturbation"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("numel", [1, 7, 2052, 8191, 3 * PART])
@pytest.mark.parametrize("parts", [2, 4, BLOCKS])
def test_parts_of_an_image(library: ctypes.CDLL, parts: int, numel: int, p: int) -> None:
    """Empty parts and uneven ends, a radius an image, images of zeros, NaN and infinity."""
    d = torch.randn(6, numel, generator=torch.Generator().manual_seed(numel))
    d[1], d[2, -1], d[3, 0] = 0.0, math.nan, math.inf
    radius = torch.tensor([0.5, 0.0, 1.0, 1.0, 1e9, -1.0])
    expected = d.clone()
    SUITE.run({"perturbation": expected, "radius": radius, "p": p}, "reference")
    inside = d[4].clone()
    got = run(library, {"perturbation": d, "radius": radius, "p": p}, parts)["perturbation"]
    torch.testing.assert_close(got, expected, rtol=2e-7, atol=1e-44, equal_nan=True)
    assert torch.equal(got[4], inside)


@pytest.mark.parametrize(
    ("images", "numel", "parts"),
    [
        (8, 150528, 36),
        (128, 150528, 4),
        (256, 150528, 2),
        (512, 150528, 1),
        (256, 3072, 1),
        (1, 10**9, BLOCKS),
        (0, 0, 1),
    ],
)
def test_number_of_parts(images: int, numel: int, parts: int) -> None:
    assert _parts(images, numel) == parts
