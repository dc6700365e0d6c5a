"""csrc/cuda/projected_sgd_step.cu, run on the CPU block by block, against the float64 reference of the op.

The same source that nvcc compiles goes through g++ over tests/cuda_on_cpu/cuda_on_cpu.h. Layers of up to 32,768 weights
take one launch; a larger one anywhere in the group sends the whole group down the path of two launches.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from bdfast.backends.availability import cuda_missing
from bdfast.ops.projected_sgd_step import projected_sgd_step_, reference
from tests.cuda_on_cpu.library import build

SMALL, LARGE = 32_768, 32_769
RUN = 1024  # weights that a block of the large path takes at a time
GUARD = 8  # floats around every array, which nobody may touch
SENTINEL = -12345.0


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("projected_sgd_step", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.scratch_doubles.restype = ctypes.c_int64
    built.step.restype = ctypes.c_char_p
    built.set_machine(1, 0)
    return built


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """The tensors are small: spinning OpenMP threads would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Layers:
    """The state of a step, each tensor with guards around it and ``offset`` floats away from 16-byte alignment."""

    weights: list[Tensor]
    anchors: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    norms: Tensor
    distances: Tensor | None
    guarded: list[Tensor] = field(default_factory=list)

    @classmethod
    def draw(cls, sizes: Sequence[int], *, carried: str = "unknown", near: float = 0.0, offset: int = 0) -> Layers:
        """Random layers; ``carried``: "none", "known", "unknown" or "mixed"; ``near``: relative distance, 0 for far."""
        generator = torch.Generator().manual_seed(sum(sizes) + len(sizes))
        layers = cls([], [], [], [], torch.empty(0), None)

        def place(values: Tensor) -> Tensor:
            buffer = torch.full((len(values) + 2 * GUARD + offset,), SENTINEL)
            layers.guarded.append(buffer)
            inner = buffer[GUARD + offset : GUARD + offset + len(values)]
            return inner.copy_(values)

        for size in sizes:
            w0, noise, g, v = (torch.randn(size, generator=generator) for _ in range(4))
            w = w0 + near * noise if near else noise
            w = w * (w0.norm() / w.norm().clamp_min(1e-30))
            for arrays, values in zip(layers.lists(), (w, w0, 0.1 * g, 0.1 * v), strict=True):
                arrays.append(place(values))
        pairs = list(zip(layers.weights, layers.anchors, strict=True))
        layers.norms = torch.stack([w0.double().norm().float() for _, w0 in pairs])
        if carried != "none":
            layers.distances = torch.stack([(w.double() - w0.double()).norm().float() for w, w0 in pairs])
            if carried == "unknown":
                layers.distances.zero_()
            elif carried == "mixed":
                layers.distances[::2] = torch.tensor([float("nan"), -1.0, 0.0]).repeat(len(pairs))[: len(pairs[::2])]
        return layers

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.weights, self.anchors, self.grads, self.momentum_buffers


@dataclass
class Outcome:
    weights: list[Tensor]
    momentum_buffers: list[Tensor]
    distances: Tensor | None

    def assert_same_bits(self, other: Outcome) -> None:
        for ours, theirs in zip(self.tensors(), other.tensors(), strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.momentum_buffers, *([] if self.distances is None else [self.distances])]


LR, MOMENTUM, DISTANCE_WEIGHT = 0.05, 0.9, 0.8


def step(
    library: ctypes.CDLL,
    layers: Layers,
    *,
    lr: float = LR,
    lr_pointer: Tensor | None = None,
    momentum: float = MOMENTUM,
    distance_weight: float = DISTANCE_WEIGHT,
) -> Outcome:
    """One step on copies of ``layers``; also checks that nothing was written out of place."""
    kept = [buffer.clone() for buffer in layers.guarded]
    distances = None if layers.distances is None else layers.distances.clone()
    count = len(layers.weights)
    sizes = [w.numel() for w in layers.weights]
    numels = (ctypes.c_int64 * count)(*sizes)
    doubles = library.scratch_doubles(numels, count)
    # Fresh memory holds anything: as doubles these bits are NaN, as a ticket they are not 0.
    scratch = torch.full((doubles + GUARD,), -1, dtype=torch.int64).view(torch.float64)
    scratch[doubles:] = SENTINEL
    addresses = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in arrays)) for arrays in layers.lists()]
    message = library.step(
        *addresses, numels, ctypes.c_int64(count), ctypes.c_float(lr), _address(lr_pointer), ctypes.c_float(momentum),
        ctypes.c_float(distance_weight), _address(layers.norms), _address(distances), _address(scratch),
    )  # fmt: skip
    assert message == b""
    outcome = Outcome([w.clone() for w in layers.weights], [v.clone() for v in layers.momentum_buffers], distances)
    assert bool((scratch[doubles:] == SENTINEL).all())
    for buffer, size in zip(layers.guarded, (size for size in sizes for _ in range(4)), strict=True):
        assert int((buffer == SENTINEL).sum()) == len(buffer) - size
    for arrays, copies in ((layers.anchors, kept[1::4]), (layers.grads, kept[2::4])):
        for array, copy in zip(arrays, copies, strict=True):
            start = array.storage_offset()
            assert torch.equal(array.view(torch.int32), copy[start : start + len(array)].view(torch.int32))
    for buffer, copy in zip(layers.guarded, kept, strict=True):
        buffer.copy_(copy)
    return outcome


def exact(
    layers: Layers, *, lr: float = LR, momentum: float = MOMENTUM, distance_weight: float = DISTANCE_WEIGHT
) -> Outcome:
    w, w0, g, v = ([t.double() for t in arrays] for arrays in layers.lists())
    distances = None if layers.distances is None else layers.distances.double()
    reference(w, w0, g, v, lr, None, momentum, distance_weight, layers.norms.double(), distances)
    return Outcome(w, v, distances)


def assert_close(got: Outcome, want: Outcome, rtol: float = 2e-6) -> None:
    """Within ``rtol`` of the largest element of each tensor (distances: of each)."""
    for ours, theirs in zip(got.weights + got.momentum_buffers, want.weights + want.momentum_buffers, strict=True):
        size = float(theirs.nan_to_num().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=rtol * size, equal_nan=True)
    if want.distances is not None:
        assert got.distances is not None
        torch.testing.assert_close(got.distances, want.distances.float(), rtol=1e-5, atol=0, equal_nan=True)


def assert_on_sphere(outcome: Outcome, layers: Layers) -> None:
    for w, norm in zip(outcome.weights, layers.norms, strict=True):
        assert abs(float(w.double().norm()) / float(norm) - 1) < 1e-6


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(0 if tensor is None else tensor.data_ptr())


SIZES = [[1], [3], [4], [5], [1023], [4096], [4097], [8193], [SMALL], [LARGE], [33 * RUN - 1], [36 * RUN + 5]]


@pytest.mark.parametrize("carried", ["known", "unknown"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sizes_around_the_edges(library: ctypes.CDLL, sizes: list[int], carried: str) -> None:
    layers = Layers.draw(sizes, carried=carried)
    outcome = step(library, layers)
    assert_close(outcome, exact(layers))
    assert_on_sphere(outcome, layers)


@pytest.mark.parametrize("carried", ["none", "known", "mixed"])
@pytest.mark.parametrize("sizes", [[5, 0, 700, 1], [LARGE, 5, 0, 2 * LARGE + 3, 1024]], ids=["small", "large"])
def test_several_layers(library: ctypes.CDLL, sizes: list[int], carried: str) -> None:
    layers = Layers.draw(sizes, carried=carried)
    assert_close(step(library, layers), exact(layers))


@pytest.mark.parametrize("last", [7, LARGE], ids=["small", "large"])
def test_more_layers_than_one_launch_takes(library: ctypes.CDLL, last: int) -> None:
    layers = Layers.draw([*range(1, 66), last], carried="mixed")
    assert_close(step(library, layers), exact(layers))


@pytest.mark.parametrize("size", [4098, LARGE])
@pytest.mark.parametrize("carried", ["known", "unknown"])
def test_alignment_does_not_change_a_bit(library: ctypes.CDLL, size: int, carried: str) -> None:
    aligned, shifted = (step(library, Layers.draw([size], carried=carried, offset=offset)) for offset in (0, 1))
    aligned.assert_same_bits(shifted)


@pytest.mark.parametrize("carried", ["known", "unknown"])
@pytest.mark.parametrize("near", [0.0, 1e-3], ids=["far", "near"])
def test_order_of_blocks_does_not_change_a_bit(library: ctypes.CDLL, carried: str, near: float) -> None:
    layers = Layers.draw([LARGE, 2000, 40_000], carried=carried, near=near)
    library.set_machine(2, 0)
    forwards = step(library, layers)
    again = step(library, layers)
    library.set_machine(2, 1)
    backwards = step(library, layers)
    library.set_machine(1, 0)
    forwards.assert_same_bits(again)
    forwards.assert_same_bits(backwards)


@pytest.mark.parametrize("size", [500, LARGE])
@pytest.mark.parametrize("carried", ["known", "unknown"])
@pytest.mark.parametrize("near", [1e-2, 1e-4, 1e-6])
def test_near_the_anchor_the_distance_is_summed(library: ctypes.CDLL, size: int, carried: str, near: float) -> None:
    layers = Layers.draw([size], carried=carried, near=near)
    layers.grads[0].mul_(near)
    layers.momentum_buffers[0].mul_(near)
    options = {"lr": 0.01, "distance_weight": 10 * near}
    outcome = step(library, layers, **options)
    # The update itself moves W~ by roundings of W, which the distance shows: 6e-8 of the norm.
    want = exact(layers, **options)
    assert want.distances is not None
    assert outcome.distances is not None
    torch.testing.assert_close(outcome.distances, want.distances.float(), rtol=1e-5, atol=1e-7 * float(layers.norms[0]))
    true = (outcome.weights[0].double() - layers.anchors[0].double()).norm()
    torch.testing.assert_close(outcome.distances[0], true.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [500, LARGE])
def test_on_the_anchor_there_is_no_pull(library: ctypes.CDLL, size: int) -> None:
    layers = Layers.draw([size])
    layers.weights[0].copy_(layers.anchors[0])
    layers.momentum_buffers[0].zero_()
    layers.grads[0].zero_()
    outcome = step(library, layers)
    torch.testing.assert_close(outcome.weights[0], layers.anchors[0], rtol=1e-6, atol=0)
    assert torch.equal(outcome.momentum_buffers[0], torch.zeros(size))


@pytest.mark.parametrize("size", [500, LARGE])
@pytest.mark.parametrize("carried", ["none", "known", "unknown"])
def test_a_step_to_zero_stays_there(library: ctypes.CDLL, size: int, carried: str) -> None:
    """W~ = W - 1 * W: the sum of squares that the products of W and G predict is not exactly 0."""
    layers = Layers.draw([size, size], carried=carried)
    layers.grads[0].copy_(layers.weights[0])
    outcome = step(library, layers, lr=1.0, momentum=0.0, distance_weight=0.0)
    assert torch.equal(outcome.weights[0], torch.zeros(size))
    if outcome.distances is not None:
        torch.testing.assert_close(outcome.distances[0], layers.anchors[0].double().norm().float())
    assert abs(float(outcome.weights[1].double().norm()) / float(layers.norms[1]) - 1) < 1e-6


@pytest.mark.parametrize("carried", ["known", "unknown"])
def test_a_step_that_nearly_cancels_is_projected(library: ctypes.CDLL, carried: str) -> None:
    layers = Layers.draw([LARGE, 40_001], carried=carried)
    for w, g in zip(layers.weights, layers.grads, strict=True):
        g.copy_(w * (1 - 1e-5))
    options = {"lr": 1.0, "momentum": 0.0, "distance_weight": 0.0}
    outcome = step(library, layers, **options)
    assert_on_sphere(outcome, layers)
    library.set_machine(2, 1)
    other = step(library, layers, **options)
    library.set_machine(1, 0)
    for ours, theirs in zip(outcome.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [500, LARGE])
def test_zero_weights(library: ctypes.CDLL, size: int) -> None:
    layers = Layers.draw([size])
    for arrays in (layers.weights, layers.grads, layers.momentum_buffers):
        arrays[0].zero_()
    outcome = step(library, layers, distance_weight=0.0)
    assert torch.equal(outcome.weights[0], torch.zeros(size))
    assert_close(outcome, exact(layers, distance_weight=0.0))


@pytest.mark.parametrize("size", [500, LARGE])
@pytest.mark.parametrize("carried", ["known", "unknown"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_non_finite_step_makes_its_layer_nan(library: ctypes.CDLL, size: int, carried: str, value: float) -> None:
    layers = Layers.draw([size, size], carried=carried)
    layers.grads[0][size // 2] = value
    outcome = step(library, layers, lr=10.0)
    assert bool(outcome.weights[0].isnan().all())
    assert outcome.distances is not None
    assert outcome.distances.isnan().tolist() == [True, False]
    assert bool(outcome.weights[1].isfinite().all())


@pytest.mark.parametrize("sizes", [[777], [LARGE]], ids=str)
def test_momentum_zero_and_rate_from_a_pointer(library: ctypes.CDLL, sizes: list[int]) -> None:
    layers = Layers.draw(sizes, carried="mixed")
    by_value = step(library, layers, momentum=0.0, lr=0.3)
    assert_close(by_value, exact(layers, momentum=0.0, lr=0.3))
    by_value.assert_same_bits(step(library, layers, momentum=0.0, lr=7.0, lr_pointer=torch.tensor(0.3)))


@pytest.mark.parametrize("sizes", [[2000, 33], [LARGE, 33]], ids=["small", "large"])
def test_twenty_steps_carry_the_distance(library: ctypes.CDLL, sizes: list[int]) -> None:
    layers = Layers.draw(sizes)
    w, w0, g, v = ([t.double() for t in arrays] for arrays in layers.lists())
    for _ in range(20):
        outcome = step(library, layers)
        for arrays, results in ((layers.weights, outcome.weights), (layers.momentum_buffers, outcome.momentum_buffers)):
            for array, result in zip(arrays, results, strict=True):
                array.copy_(result)
        layers.distances = outcome.distances
        reference(w, w0, g, v, LR, None, MOMENTUM, DISTANCE_WEIGHT, layers.norms.double(), None)
    assert_on_sphere(outcome, layers)
    for ours, theirs in zip(layers.weights, w, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(cuda_missing() is not None, reason=str(cuda_missing()))
@pytest.mark.parametrize("sizes", [[2000, 33], [LARGE, 33]], ids=["small", "large"])
def test_a_captured_graph_follows_the_rate(sizes: list[int]) -> None:
    layers = Layers.draw(sizes)
    assert layers.distances is not None
    norms, distances, rate = layers.norms.cuda(), layers.distances.cuda(), torch.tensor(LR, device="cuda")
    captured = [[t.cuda() for t in arrays] for arrays in layers.lists()]
    eager = [[t.cuda() for t in arrays] for arrays in layers.lists()]
    eager_distances = distances.clone()

    def run(lists: list[list[Tensor]], lr: float | Tensor, state: Tensor) -> None:
        options = {"momentum": MOMENTUM, "distance_weight": DISTANCE_WEIGHT}
        projected_sgd_step_(*lists, lr=lr, **options, norms=norms, distances=state, backend="cuda")

    warm_up = [[t.clone() for t in arrays] for arrays in captured]
    run(warm_up, rate, distances.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured, rate, distances)
    for lr in (0.05, 0.02, 0.3):
        rate.fill_(lr)
        graph.replay()
        run(eager, lr, eager_distances)
        ours = [*captured[0], *captured[3], distances]
        for replayed, direct in zip(ours, [*eager[0], *eager[3], eager_distances], strict=True):
            assert torch.equal(replayed, direct)
