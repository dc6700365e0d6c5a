"""Philox, patch_centers and masked_random_start: published values, what results may depend on, distribution, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import cpp_missing, native
from bdfast.ops import masked_random_start, patch_centers
from bdfast.ops.philox import philox4x32, stream_key
from bdfast.testing import suites

BACKENDS = ["cpp", "reference"]

# counter, key and output of philox4x32 with 10 rounds, from Random123's kat_vectors.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def wide(low: int, high: int) -> int:
    return high << 32 | low


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]) -> None:
    low, high = (torch.tensor(wide(*counter[i : i + 2]), dtype=torch.uint64).view(torch.int64) for i in (0, 2))
    assert tuple(int(word) for word in philox4x32(wide(*key), low, high)) == words
    if (reason := cpp_missing()) is not None:
        pytest.skip(reason)
    assert tuple(native().philox4x32(wide(*key), wide(*counter[:2]), wide(*counter[2:]))) == words


def test_keys_differ_by_seed_round_and_purpose() -> None:
    keys = {stream_key(s, purpose, r) for s in (0, 1, -1) for r in (0, 1, 2) for purpose in ("a", "b")}
    assert len(keys) == 18
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("backend", BACKENDS)
def test_centers_depend_on_the_id_alone(backend: str) -> None:
    ids = torch.tensor([5, 2**40, -3, 5, 0])
    centers = patch_centers(ids, 10, 300, seed=4, round=2, backend=backend)
    assert centers.dtype == torch.int32
    assert centers.shape == (5, 2)
    assert torch.equal(centers[0], centers[3])
    for i in range(5):
        assert torch.equal(patch_centers(ids[i : i + 1], 10, 300, seed=4, round=2, backend=backend)[0], centers[i])
    for other in ({"seed": 5, "round": 2}, {"seed": 4, "round": 3}):
        assert not torch.equal(patch_centers(ids, 10, 300, **other, backend=backend), centers)


def test_centers_are_uniform() -> None:
    """60,000 ids over 5 x 7 pixels: chi-squared with 34 degrees of freedom stays under its 99.9 % point, 65.2."""
    centers = patch_centers(torch.arange(60_000), 5, 7, seed=0).long()
    counts = torch.bincount(centers[:, 0] * 7 + centers[:, 1], minlength=35).double()
    assert len(counts) == 35
    assert ((counts - 60_000 / 35) ** 2).sum() / (60_000 / 35) < 65.2


def start(x: Tensor, ids: Tensor, centers: Tensor | None, radius: int | None, **options: Any) -> Tensor:
    return masked_random_start(x, ids, centers, radius, **{"eps": 0.25, "seed": 3, "round": 1} | options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_depends_on_id_and_position_alone(backend: str) -> None:
    x, ids = torch.rand(6, 3, 9, 10), torch.tensor([5, 2**40, -3, 8, 0, 7])
    whole = start(x, ids, None, None, lower=-9.0, upper=9.0, backend=backend)
    for i in range(6):  # alone
        assert torch.equal(start(x[i : i + 1], ids[i : i + 1], None, None, lower=-9.0, upper=9.0)[0], whole[i])
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.equal(start(x[order], ids[order], None, None, lower=-9.0, upper=9.0, backend=backend), whole[order])
    last = start(x.to(memory_format=torch.channels_last), ids, None, None, lower=-9.0, upper=9.0, backend=backend)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, whole)
    centers = patch_centers(ids, 9, 10, seed=0)
    patched = start(x, ids, centers, 2, lower=-9.0, upper=9.0, backend=backend)
    inside = (torch.arange(9)[:, None] - centers[:, :1, None]).abs().le(2)
    inside = (inside & (torch.arange(10) - centers[:, 1:, None]).abs().le(2))[:, None].expand_as(x)
    assert torch.equal(patched, torch.where(inside, whole, x))
    for other in ({"seed": 4}, {"round": 2}):
        assert (
            start(x, ids, None, None, **other, lower=-9.0, upper=9.0, backend=backend) != whole
        ).double().mean() > 0.99


def test_thread_count_does_not_change_a_bit() -> None:
    threads = torch.get_num_threads()
    x, ids = torch.rand(64, 3, 32, 32), torch.arange(64)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(start(x, ids, None, None))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("case", suites()["masked_random_start"].cases, ids=lambda c: c.name)
def test_backends_agree_to_the_bit(case: Any) -> None:
    for dtype in case.dtypes:
        inputs = suites()["masked_random_start"].inputs(case, "cpu", dtype)
        got, expected = (masked_random_start(**inputs, backend=backend) for backend in BACKENDS)
        assert got.stride() == expected.stride()
        assert torch.equal(got.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))


def test_noise_is_uniform_in_the_ball() -> None:
    """120,000 values: mean 0 within 4 standard errors, variance eps^2 / 3, decile counts even; no lag correlation."""
    x = torch.zeros(40, 3, 25, 40)
    noise = start(x, torch.arange(40), None, None, eps=0.5, lower=-1.0, upper=1.0)
    assert noise.min() >= -0.5
    assert noise.max() < 0.5
    count = noise.numel()
    assert abs(noise.double().mean()) < 4 * 0.5 / math.sqrt(3 * count)
    assert abs(noise.double().var() * 3 / 0.25 - 1) < 0.01
    deciles = torch.histc(noise, 10, -0.5, 0.5).double()
    assert ((deciles - count / 10) ** 2).sum() / (count / 10) < 27.9  # 99.9 % point, 9 degrees of freedom
    flat = noise.flatten().double() * 2
    for lag in (1, 2, 3, 4, 40, 1000, 3000):
        assert abs((flat[:-lag] * flat[lag:]).mean() * 3) < 5 / math.sqrt(count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clips_inside_and_copies_bits_outside(backend: str) -> None:
    x = torch.tensor([-0.0, math.nan, 2.0, 0.999, -3.0, 0.001]).reshape(1, 1, 1, 6)
    out = start(x, torch.tensor([1]), torch.tensor([[0, 4]]), 1, eps=0.5, backend=backend)
    assert torch.equal(out.view(torch.int32)[..., :3], x.view(torch.int32)[..., :3])
    assert out.data_ptr() != x.data_ptr()
    assert ((out[..., 3:] >= 0) & (out[..., 3:] <= 1)).all()
    assert out[..., 4] == 0


@pytest.mark.slow
def test_compile_without_graph_break() -> None:
    def draw(x: Tensor, ids: Tensor, round: int) -> Tensor:
        return start(x, ids, patch_centers(ids, 6, 7, seed=1, round=round), 2, round=round) + 0

    x, ids = torch.rand(3, 2, 6, 7), torch.arange(3)
    compiled = torch.compile(draw, fullgraph=True, backend="aot_eager")
    for round in (0, 1, 2):
        assert torch.equal(compiled(x, ids, round), draw(x, ids, round))


IDS = torch.arange(2)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([0, 1], 4, 4), TypeError, r"`ids` expected a tensor \[N\], got list"),
        ((IDS.int(), 4, 4), TypeError, "`ids` expected int64 sample ids, got torch.int32"),
        ((IDS[None], 4, 4), ValueError, r"`ids` expected shape \[N\], got \[1, 2\]"),
        ((IDS, 0, 4), ValueError, r"`height` expected an integer in \[1, 2\^31\), got 0"),
        ((IDS, 4, 2**31), ValueError, r"`width` expected an integer in \[1, 2\^31\)"),
    ],
)
def test_errors_of_centers(arguments: tuple[Any, ...], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match="patch_centers: " + text):
        patch_centers(*arguments, seed=0)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.rand(2, 3)}, ValueError, r"`x` expected shape \[N, C, H, W\]"),
        ({"ids": torch.arange(3)}, ValueError, r"`ids` expected one id an image, \[2\], got \[3\]"),
        ({"ids": IDS.to("meta")}, ValueError, "`ids` expected the device of x, cpu, got meta"),
        ({"centers": torch.zeros(2, 3).long()}, ValueError, "`centers` expected"),
        ({"eps": -1.0}, ValueError, "`eps` expected a finite number >= 0"),
        ({"lower": 1.0, "upper": 0.0}, ValueError, "`lower` expected a number <= upper"),
        ({"seed": 0.5}, TypeError, "`seed` expected an integer, got float"),
        ({"seed": 2**63}, ValueError, "`seed` expected an integer of 64 bits"),
        ({"round": "1"}, TypeError, "`round` expected an integer, got str"),
    ],
)
def test_errors_of_the_start(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"x": torch.rand(2, 1, 4, 4), "ids": IDS, "centers": torch.zeros(2, 2).long()}
    arguments |= {"radius": 1, "eps": 0.1, "seed": 0}
    with pytest.raises(error, match="masked_random_start: " + text):
        masked_random_start(**arguments | change)
