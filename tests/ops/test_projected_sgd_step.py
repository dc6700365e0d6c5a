"""projected_sgd_step_: hand-computed values, the sphere, edges and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast.ops import projected_sgd_step_

BACKENDS = ["cpp", "reference"]


def state(seed: int = 0, shape: tuple[int, ...] = (40, 30)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    anchor = torch.randn(shape, generator=generator)
    weight = torch.randn(shape, generator=generator)
    return {
        "weights": [weight * (anchor.norm() / weight.norm())],
        "anchors": [anchor],
        "grads": [torch.randn(shape, generator=generator)],
        "momentum_buffers": [torch.zeros(shape)],
        "lr": 0.01,
        "momentum": 0.9,
        "distance_weight": 0.1,
        "norms": anchor.norm()[None],
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """W = (4, 3), W0 = (3, 4): d = sqrt 2, the pull is (1, -1) / sqrt 2."""
    w, v = torch.tensor([4.0, 3.0]), torch.tensor([1.0, 0.0])
    projected_sgd_step_(
        [w], [torch.tensor([3.0, 4.0])], [torch.tensor([0.0, 2.0])], [v],
        lr=0.1, momentum=0.5, distance_weight=1.0, norms=torch.tensor([5.0]), backend=backend,
    )  # fmt: skip
    velocity = torch.tensor([0.5 - 1 / math.sqrt(2), 2 + 1 / math.sqrt(2)])
    stepped = torch.tensor([4.0, 3.0]) - 0.1 * velocity
    torch.testing.assert_close(v, velocity)
    torch.testing.assert_close(w, stepped * 5 / stepped.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("carried", [False, True])
def test_hundred_steps_against_float64(backend: str, carried: bool) -> None:
    """Weights within 1e-5 of float64, norm kept to 1e-6, carried distance that of the weights."""
    single, double = state(), {k: [t.double() for t in v] if isinstance(v, list) else v for k, v in state().items()}
    double["norms"] = double["norms"].double()
    distances = torch.zeros(1) if carried else None
    for step in range(100):
        gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(step))
        single["grads"], double["grads"] = [gradient], [gradient.double()]
        projected_sgd_step_(**single, distances=distances, backend=backend)
        projected_sgd_step_(**double)
    w, exact = single["weights"][0].double(), double["weights"][0]
    assert (w - exact).norm() / exact.norm() < 1e-5
    assert abs(w.norm() / single["norms"].double() - 1) < 1e-6
    if distances is not None:
        torch.testing.assert_close(distances[0].double(), (w - single["anchors"][0].double()).norm(), rtol=1e-6, atol=0)


def usual(s: dict[str, Any], steps: int) -> Tensor:
    """D3's step by autograd, ``torch.optim.SGD`` and a projection under ``no_grad``."""
    w = torch.nn.Parameter(s["weights"][0].clone())
    optimizer = torch.optim.SGD([w], lr=s["lr"], momentum=s["momentum"])
    for _ in range(steps):
        optimizer.zero_grad()
        (w * s["grads"][0]).sum().sub(s["distance_weight"] * torch.norm(w - s["anchors"][0])).backward()
        optimizer.step()
        with torch.no_grad():
            w.mul_(s["norms"][0] / w.norm())
    return w.detach()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_as_autograd_sgd_and_projection(backend: str) -> None:
    expected = usual(state(), 20)
    s = state()
    for _ in range(20):
        projected_sgd_step_(**s, backend=backend)
    torch.testing.assert_close(s["weights"][0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_anchor_the_distance_has_no_gradient(backend: str) -> None:
    s = state()
    s["weights"], s["grads"] = [s["anchors"][0].clone()], [torch.zeros(40, 30)]
    projected_sgd_step_(**s, backend=backend)
    torch.testing.assert_close(s["weights"][0], s["anchors"][0], rtol=2e-7, atol=0)
    assert torch.equal(s["momentum_buffers"][0], torch.zeros(40, 30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounding_noise_around_the_anchor_is_distance_zero(backend: str) -> None:
    s = state()
    s["weights"], s["grads"] = [torch.nextafter(s["anchors"][0], torch.tensor(torch.inf))], [torch.zeros(40, 30)]
    projected_sgd_step_(**s, backend=backend)
    assert torch.equal(s["momentum_buffers"][0], torch.zeros(40, 30))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_norm_zero_stay(backend: str) -> None:
    s = state()
    s["weights"], s["grads"], s["distance_weight"] = [torch.zeros(40, 30)], [torch.zeros(40, 30)], 0.0
    projected_sgd_step_(**s, backend=backend)
    assert torch.equal(s["weights"][0], torch.zeros(40, 30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_gives_nan_in_its_layer_only(backend: str, bad: float) -> None:
    a, b = state(0), state(1)
    a["grads"][0][3, 3] = bad
    merged = {k: a[k] + b[k] if isinstance(a[k], list) else a[k] for k in a}
    merged["norms"] = torch.cat([a["norms"], b["norms"]])
    projected_sgd_step_(**merged, backend=backend)
    assert merged["weights"][0].isnan().all()
    assert merged["weights"][1].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_projection_is_idempotent(backend: str) -> None:
    s = state()
    s["lr"] = 0.0
    projected_sgd_step_(**s, backend=backend)
    once = s["weights"][0].clone()
    projected_sgd_step_(**s, backend=backend)
    torch.testing.assert_close(s["weights"][0], once, rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_do_not_depend_on_their_company(backend: str) -> None:
    together = [state(seed, (seed + 2, 7)) for seed in range(4)]
    alone = [state(seed, (seed + 2, 7)) for seed in range(4)]
    merged = {
        k: [t for s in together for t in s[k]] if isinstance(together[0][k], list) else together[0][k]
        for k in together[0]
    }
    merged["norms"] = torch.cat([s["norms"] for s in together])
    projected_sgd_step_(**merged, backend=backend)
    for j, s in enumerate(alone):
        projected_sgd_step_(**s, backend=backend)
        assert torch.equal(s["weights"][0], merged["weights"][j])


def test_channels_last_weights_keep_their_storage() -> None:
    s = state(0, (8, 4, 3, 3))
    for name in ("weights", "anchors", "grads", "momentum_buffers"):
        s[name] = [t.to(memory_format=torch.channels_last) for t in s[name]]
    address = s["weights"][0].data_ptr()
    projected_sgd_step_(**s)
    assert s["weights"][0].data_ptr() == address
    assert s["weights"][0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backward_through_the_old_weights_raises(backend: str) -> None:
    s = state()
    scale = torch.ones((), requires_grad=True)
    product = (scale * s["weights"][0]).sum()
    projected_sgd_step_(**s, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        s = state()
        before = s["weights"][0].clone()
        projected_sgd_step_(**s)
        assert not torch.equal(s["weights"][0], before)


@pytest.mark.slow
def test_compiles_without_graph_break() -> None:
    def step(w: Tensor, a: Tensor, g: Tensor, v: Tensor, n: Tensor, d: Tensor) -> Tensor:
        projected_sgd_step_([w], [a], [g], [v], lr=0.01, momentum=0.9, distance_weight=0.1, norms=n, distances=d)
        return w * 2

    eager, compiled = state(), state()
    results = []
    for s, function in ((eager, step), (compiled, torch.compile(step, fullgraph=True, backend="aot_eager"))):
        d = torch.zeros(1)
        lists = [s[k][0] for k in ("weights", "anchors", "grads", "momentum_buffers")]
        results.append((function(*lists, s["norms"], d), *lists, d))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"anchors": []}, ValueError, "`anchors` expected 1 tensors, one a weight, got 0"),
        ({"grads": [torch.zeros(3)]}, ValueError, r"`grads\[0\]` expected shape \[40, 30\] of its weight, got \[3\]"),
        ({"grads": [None]}, TypeError, r"`grads\[0\]` expected a tensor, got NoneType"),
        (
            {"momentum_buffers": [torch.zeros(40, 30).half()]},
            TypeError,
            r"`momentum_buffers\[0\]` expected torch.float32",
        ),
        ({"norms": torch.zeros(2)}, ValueError, r"`norms` expected a tensor \[1\], got \[2\]"),
        ({"norms": [1.0]}, TypeError, r"`norms` expected a tensor \[1\], got list; pass one value a weight"),
        ({"norms": torch.zeros(1).int()}, TypeError, "`norms` expected float32"),
        ({"distances": torch.zeros(1, 1)}, ValueError, "`distances` expected a tensor"),
        ({"lr": -1.0}, ValueError, "`lr` expected a finite number >= 0, got -1.0"),
        ({"lr": torch.zeros(1)}, ValueError, "`lr` expected a float, or a 0-dim float32 tensor on cpu"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, ValueError, r"got torch.float64 \[\] on cpu"),
        ({"momentum": 1.0}, ValueError, r"`momentum` expected a number in \[0, 1\)"),
        ({"distance_weight": math.inf}, ValueError, "`distance_weight` expected a finite number"),
    ],
)
def test_errors_name_the_argument_and_change_nothing(change: dict[str, Any], error: type[Exception], text: str) -> None:
    s = state() | change
    before = s["weights"][0].clone()
    with pytest.raises(error, match=text):
        projected_sgd_step_(**s)
    assert torch.equal(s["weights"][0], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "other"), [("weights", "anchors"), ("weights", "momentum_buffers"), ("momentum_buffers", "grads")]
)
def test_shared_memory_is_refused(changed: str, other: str, backend: str) -> None:
    """Anchors made by ``detach()`` follow their weights: the distance would stay 0."""
    s = state()
    s[other] = [s[changed][0].detach()]
    before = s[changed][0].clone()
    with pytest.raises(ValueError, match=r"expected memory of its own, got the memory of .*\[0\]; clone one"):
        projected_sgd_step_(**s, backend=backend)
    assert torch.equal(s[changed][0], before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_without_weights_and_shared_gradients_are_allowed(backend: str) -> None:
    zeros = torch.zeros(3)
    layers = [torch.ones(3), torch.ones(3) * 2, torch.ones(0)]
    projected_sgd_step_(
        layers, [-w for w in layers], [zeros, zeros, zeros[:0]], [torch.zeros_like(w) for w in layers],
        lr=0.1, momentum=0.9, distance_weight=0.1, norms=torch.ones(3), backend=backend,
    )  # fmt: skip
    assert layers[0].norm() == pytest.approx(1.0)


def test_half_precision_weights_are_refused() -> None:
    s = {k: [t.half() for t in v] if isinstance(v, list) else v for k, v in state().items()}
    with pytest.raises(TypeError, match="keep float32 master weights"):
        projected_sgd_step_(**s)


def test_no_layers_is_no_work() -> None:
    projected_sgd_step_([], [], [], [], lr=0.1, momentum=0.9, distance_weight=0.1, norms=torch.zeros(0))
