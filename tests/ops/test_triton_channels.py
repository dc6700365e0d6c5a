"""What is special to the Triton kernels over channels: tiles of any shape, several of them a program.

Parity with the reference on the shared cases is in test_parity.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import runs_triton
from bdfast.ops import channels as ch
from bdfast.ops.batch_norm_relu import reference as reference_norm
from bdfast.ops.batch_norm_relu import reference_backward as reference_norm_backward
from bdfast.ops.batch_norm_stat_distance import reference as reference_distance
from bdfast.ops.batch_norm_stat_distance import reference_backward as reference_distance_backward
from bdfast.ops.clipped_relu import reference, reference_backward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if (reason := runs_triton(torch.empty(0, device=DEVICE), dtypes=(torch.float32,))) is not None:
    pytest.skip(f"triton: {reason}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from bdfast.triton_kernels import batch_norm_relu, batch_norm_stat_distance, channels, clipped_relu  # noqa: E402
from bdfast.triton_kernels import batch_norm_relu_backward as norm_backward  # noqa: E402
from bdfast.triton_kernels.channels import Launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("poisoned_empty")

SHAPES = [(3, 5, 4, 8), (7, 2, 5, 7), (5, 6, 1, 1), (1, 1, 4, 16), (2, 9, 3, 2)]


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 2 samples, 4 channels and 8 elements, and programs that walk over several of them.

    Samples are added where there are elements, and kept apart where there are none.
    """

    def choose(cls: type[Launch], numel: int, count: int, inner: int, tile: int = 0, programs: int = 0) -> Launch:
        return cls(2, 4, 1 if inner == 1 else 8, channels.grain(count, inner), 2, 4)

    monkeypatch.setattr(Launch, "choose", classmethod(choose))
    monkeypatch.setattr(channels, "SUMS", 4 * 4 * 8)


def draw(shape: tuple[int, ...], *, channels_last: bool) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(DEVICE)
    return ch.dense(x, channels_last)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_clipping_over_any_number_of_tiles(shape: tuple[int, ...], channels_last: bool) -> None:
    x = draw(shape, channels_last=channels_last)
    channels_last = ch.is_channels_last(x)
    for bound in (torch.linspace(0.1, 1.0, shape[1], device=DEVICE), torch.tensor(0.5, device=DEVICE)):
        y, bits = clipped_relu.forward(x, bound, 0.0, True, True)
        expected = reference(x.double(), bound.double(), 0.0, True, True)
        torch.testing.assert_close(y, expected[0].float(), rtol=0, atol=0)
        assert torch.equal(bits, expected[1])
        scale = torch.linspace(0.5, 2.0, shape[1], device=DEVICE) if bound.dim() else None
        options = (channels_last, True, True, bound.numel())
        grads = clipped_relu.backward(x, bits, scale, *options)
        exact = reference_backward(x.double(), bits, None if scale is None else scale.double(), *options)
        for grad, wanted in zip(grads, exact, strict=True):
            torch.testing.assert_close(grad, wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_distance_over_any_number_of_tiles(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], channels_last: bool
) -> None:
    monkeypatch.setattr(batch_norm_stat_distance, "PROGRAMS", 2)  # of channels, too, in the last program's sum
    x = draw(shape, channels_last=channels_last)
    mean, var = torch.linspace(-1, 1, shape[1], device=DEVICE), torch.linspace(0.5, 2, shape[1], device=DEVICE)
    distance, stats = batch_norm_stat_distance.forward(x, mean, var)
    exact, exact_stats = reference_distance(x.double(), mean.double(), var.double())
    torch.testing.assert_close(distance, exact.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats, exact_stats, rtol=1e-12, atol=1e-12)
    grad = torch.tensor(0.75, device=DEVICE)
    got = batch_norm_stat_distance.backward(x, mean, var, stats, grad)
    wanted = reference_distance_backward(x.double(), mean.double(), var.double(), exact_stats, grad.double())
    torch.testing.assert_close(got, wanted.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
def test_norm_over_any_number_of_tiles(shape: tuple[int, ...], channels_last: bool, has_residual: bool) -> None:
    x = draw(shape, channels_last=channels_last)
    weight, bias = torch.linspace(-1, 1.5, shape[1], device=DEVICE), torch.linspace(0.5, 2, shape[1], device=DEVICE)
    residual = x.flip(0) if has_residual else None
    running = (torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE))
    kept = [r.double() for r in running]
    y, mean, var, saved = batch_norm_relu.forward(x, weight, bias, residual, *running, 0.25, 0.5, True)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    exact = reference_norm(*wide, *kept, 0.25, 0.5, True)
    for got, wanted in zip((y, mean, var, *running), (*exact[:3], *kept), strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-6)
    grad = torch.where(exact[0].abs() < 1e-4, 0.0, x.double().flip(0))  # a mask that a rounding may change
    got = norm_backward.backward(grad.float(), x, y if has_residual else None, saved, True)
    exact_grads = reference_norm_backward(grad, wide[0], exact[0] if has_residual else None, exact[3], True)
    for value, wanted in zip(got, exact_grads, strict=True):
        torch.testing.assert_close(value, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inner", [1, 16, 49, 64, 196, 784, 1024, 3136, 12544, 10**6])
@pytest.mark.parametrize("count", [1, 3, 64, 96, 512, 2048])
@pytest.mark.parametrize("samples", [1, 7, 128])
def test_launch(samples: int, count: int, inner: int) -> None:
    """Tiles are of the size that registers allow, and cover every channel, however few programs share it."""
    samples *= 1024 if inner == 1 else 1
    launch = Launch.choose(samples * count * inner, count, inner)
    assert launch.block_s * launch.block_c * launch.block_i <= channels.TILE
    assert (launch.block_i == 1) == (inner == 1)
    assert (count if inner == 1 else inner) % launch.grain == 0
    assert -(-inner // launch.block_i) * launch.block_i < 2 * inner
    assert 1 <= launch.parts <= channels.PARTS
    assert launch.programs(count) <= max(4096, count) + launch.parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 2, 32, 32), (5, 3, 48, 48), (3, 2, 52, 77), (2, 1, 64, 64), (3, 40, 16, 16)])
def test_clipping_of_planes_of_many_blocks(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = draw(shape, channels_last=False).to(dtype)
    size = x.element_size()
    walk = channels.Walk.choose(x.numel(), shape[1], math.prod(shape[2:]), size)
    assert (walk is None) == (shape[2] == 16 or (shape[2] == 52 and size == 2))
    for bound in (torch.linspace(0.1, 1.0, shape[1], device=DEVICE), torch.tensor(0.5, device=DEVICE)):
        y, bits = clipped_relu.forward(x, bound, 0.0, True, True)
        expected = reference(x.double(), bound.double(), 0.0, True, True)
        torch.testing.assert_close(y, expected[0].to(dtype), atol=0, rtol=0 if size == 4 else 2**-7)
        assert torch.equal(bits, expected[1])
        scale = torch.linspace(0.5, 2.0, shape[1], device=DEVICE) if bound.dim() else None
        options = (False, True, True, bound.numel())
        grad_x, grad_bound = clipped_relu.backward(x.flip(0), bits, scale, *options)
        exact = reference_backward(x.flip(0).double(), bits, None if scale is None else scale.double(), *options)
        torch.testing.assert_close(grad_x, exact[0].to(dtype))
        torch.testing.assert_close(grad_bound, exact[1].float(), rtol=1e-6, atol=1e-6)


@triton.jit
def _tile_kernel(
    p_out, block, numel, count, inner, GRAIN: tl.constexpr, LAST: tl.constexpr, CYCLE: tl.constexpr,
    PLANES: tl.constexpr, LOW: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = block.to(tl.int64)
    o_x, m_x, b_c, b_plane = channels.memory_tile(block, numel, count, inner, GRAIN, LAST, CYCLE, PLANES, LOW, BLOCKS)
    b_c = (b_c + b_plane) % count + tl.zeros_like(o_x)  # planes count from the first one's channel
    tl.store(p_out + (o_x - block * BLOCK), tl.where(m_x, b_c, -1))


@pytest.mark.parametrize(
    ("count", "inner", "samples"),
    [
        *((3, 12544, 2), (2, 1024, 7), (3, 2049, 9), (5, 4096, 3), (5, 784, 9), (7, 49, 99), (64, 1, 99), (24, 1, 999)),
        *((64, 12544, 2**12), (3, 2**30 + 256, 3), (7, 4, 2**28)),  # of more than 2^31 elements
    ],
)
@pytest.mark.parametrize("size", [2, 4])
def test_channels_of_a_tile(count: int, inner: int, samples: int, size: int) -> None:
    """Of the first, the last and some other tile, however large the tensor."""
    numel, constants = count * inner * samples, channels.order(count, inner, size)
    tile = constants["BLOCKS"] * ch.BLOCK
    last = (numel - 1) // tile
    for number in {0, last // 3, last - 1, last} - {-1}:
        out = torch.full((tile,), -2, dtype=torch.int64, device=DEVICE)
        _tile_kernel[(1,)](out, number * constants["BLOCKS"], numel, count, inner, BLOCK=ch.BLOCK, **constants)
        o = torch.arange(tile) + number * tile
        assert torch.equal(out.cpu(), torch.where(o < numel, o // inner % count, -1))


@triton.jit
def _bits_kernel(p_bits, p_out, first, BLOCK: tl.constexpr, LANES: tl.constexpr, COUNT: tl.constexpr):
    o = tl.arange(0, COUNT)
    start = p_bits - first // BLOCK * LANES  # as if all words before them were there
    m = channels.load_bits(start, first.to(tl.int64) + o, o >= 0)
    tl.store(p_out + o, m.to(tl.int32))


@pytest.mark.parametrize("first", [0, 2**31 - 1024, 2**31, 2**31 + 512, 2**32 - 512, 2**33])
def test_bits_of_elements_beyond_32_bits(first: int) -> None:
    mask = torch.rand(2 * ch.BLOCK, generator=torch.Generator().manual_seed(0)) < 0.5
    bits = ch.pack(mask.to(DEVICE), False)
    out = torch.empty(len(mask), dtype=torch.int32, device=DEVICE)
    _bits_kernel[(1,)](bits, out, first, BLOCK=ch.BLOCK, LANES=ch.LANES, COUNT=len(mask))
    assert torch.equal(out.cpu().bool(), mask)
