from __future__ import annotations

import numpy as np
import pytest
import torch

from bdfast.attacks.quantize import from_pixels, to_pixels


def test_clips_and_truncates_toward_zero() -> None:
    pixels = torch.tensor([-7.0, -0.5, 0.0, 0.99, 1.0, 127.5, 254.999, 255.0, 261.0], dtype=torch.float64)
    assert from_pixels(pixels, torch.uint8, True).tolist() == [0, 0, 0, 0, 1, 127, 254, 255, 255]


def test_round_off_below_a_level_counts_as_the_level() -> None:
    pixels = torch.tensor([42 - 1e-12, 42 - 1e-10, 42 - 1e-6], dtype=torch.float64)
    assert from_pixels(pixels, torch.uint8, True).tolist() == [42, 42, 41]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_8_bit_level_survives_a_float_image(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    floats = levels.to(dtype) / 255
    assert torch.equal(from_pixels(to_pixels(floats, snap=True), torch.uint8, True), levels)
    assert torch.equal(from_pixels(to_pixels(floats, snap=True), dtype, True), floats)


@pytest.mark.parametrize("alpha_percent", [10, 15, 20, 35])
def test_blending_all_levels_truncates_the_exact_value(alpha_percent: int) -> None:
    x, t = torch.arange(256, dtype=torch.float64)[:, None], torch.arange(256, dtype=torch.float64)[None]
    a = alpha_percent / 100
    exact = ((100 - alpha_percent) * np.arange(256)[:, None] + alpha_percent * np.arange(256)[None]) // 100
    assert np.array_equal(from_pixels((1 - a) * x + a * t, torch.uint8, True).numpy(), exact)


def test_snapping_gives_whole_levels_and_leaves_the_rest() -> None:
    floats = torch.tensor([3 / 255, 0.5, 200 / 255])
    assert to_pixels(floats, snap=True).tolist() == [3.0, 127.5, 200.0]
    assert to_pixels(floats).tolist() != [3.0, 127.5, 200.0]


def test_without_quantising_fractions_stay() -> None:
    pixels = torch.tensor([0.3, 300.0], dtype=torch.float64)
    assert torch.allclose(from_pixels(pixels, torch.float32, False), torch.tensor([0.3 / 255, 1.0]))
