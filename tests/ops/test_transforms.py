"""Transforms of torch.func over the differentiable ops, against torch.autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bdfast import ops

N, C = 20, 7
TARGET = torch.arange(N) % C
MEAN, VAR = torch.linspace(-0.5, 0.5, C), torch.linspace(0.5, 1.5, C)
LOGITS, IMAGES, CHANNELS = (N, C), (3, C, 4, 4), (C,)

Function = Callable[..., Tensor]
CASES: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "sce_loss none": (lambda z, **b: ops.sce_loss(z, TARGET, **b), (LOGITS,)),
    "sce_loss mean": (lambda z, **b: ops.sce_loss(z, TARGET, reduction="mean", **b), (LOGITS,)),
    "sce_loss clamped": (lambda z, **_: ops.sce_loss(z, TARGET, clamp=1e-7), (LOGITS,)),
    "hinge_cross_entropy mean": (lambda z, **b: ops.hinge_cross_entropy(z, TARGET, 0.5, **b), (LOGITS,)),
    "hinge_cross_entropy none": (lambda z, **b: ops.hinge_cross_entropy(z, TARGET, 0.5, "none", **b), (LOGITS,)),
    "hinge_cross_entropy batch": (
        lambda z, **b: ops.hinge_cross_entropy(z, TARGET, 0.5, hinge="batch", **b),
        (LOGITS,),
    ),
    "bounded_ascent_cross_entropy": (
        lambda z, **b: ops.bounded_ascent_cross_entropy(z, TARGET, N // 2, mu=0.5, tau=3.0, **b),
        (LOGITS,),
    ),
    "kl_divergence none": (lambda p, q, **b: ops.kl_divergence(p, q, **b), (LOGITS, LOGITS)),
    "kl_divergence sum": (lambda p, q, **b: ops.kl_divergence(p, q, reduction="sum", **b), (LOGITS, LOGITS)),
    "clipped_relu": (lambda x, **b: ops.clipped_relu(x, 0.5, **b), (IMAGES,)),
    "clipped_relu bound": (lambda x, z, **b: ops.clipped_relu(x, z, **b), (IMAGES, CHANNELS)),
    "batch_norm_clipped_relu": (
        lambda x, z, **b: ops.batch_norm_clipped_relu(x, MEAN, VAR, None, None, z, **b),
        (IMAGES, CHANNELS),
    ),
    "batch_norm_relu": (
        lambda x, w, b, **o: ops.batch_norm_relu(x, w, b, **o).y,
        (IMAGES, CHANNELS, CHANNELS),
    ),
    "batch_norm_relu residual": (
        lambda x, w, b, r, **o: ops.batch_norm_relu(x, w, b, r, **o).y,
        (IMAGES, CHANNELS, CHANNELS, IMAGES),
    ),
    "batch_norm_stat_distance": (lambda x, **b: ops.batch_norm_stat_distance(x, MEAN, VAR, **b), (IMAGES,)),
}
ALL = pytest.mark.parametrize("name", CASES)


def drawn(name: str) -> tuple[Function, tuple[Tensor, ...], Tensor]:
    """The op, its inputs, and a gradient of its output."""
    op, shapes = CASES[name]
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    return op, inputs, torch.randn(op(*inputs).shape, generator=generator)


def expected(op: Function, inputs: tuple[Tensor, ...], weight: Tensor, **backend: str) -> tuple[Tensor, ...]:
    """The gradients by torch.autograd."""
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    return torch.autograd.grad(op(*leaves, **backend), leaves, weight)


def assert_equal(got: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-7)


@ALL
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_grad(name: str, backend: str) -> None:
    op, inputs, weight = drawn(name)

    def loss(*x: Tensor) -> Tensor:
        return (op(*x, backend=backend) * weight).sum()

    got = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
    assert_equal(got, expected(op, inputs, weight, backend=backend))
    (alone,) = torch.func.grad(loss, argnums=(0,))(*inputs)  # the other inputs are constants
    assert_equal((alone,), expected(op, inputs, weight, backend=backend)[:1])


@ALL
def test_vjp_serves_twice(name: str) -> None:
    """A gradient that the forward made is given away by the first call."""
    op, inputs, weight = drawn(name)
    output, pull = torch.func.vjp(op, *inputs)
    torch.testing.assert_close(output, op(*inputs))
    first, second = pull(weight), pull(2.0 * weight)
    assert_equal(first, expected(op, inputs, weight))
    assert_equal(second, expected(op, inputs, 2.0 * weight))


@ALL
def test_an_outer_transform_is_differentiated_through_an_inner_one(name: str) -> None:
    """The op is a function of the outer variable alone, and its gradient comes through the level within."""
    op, inputs, weight = drawn(name)

    def outer(x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: y * (op(x, *inputs[1:]) * weight).sum())(torch.tensor(1.0))

    assert_equal((torch.func.grad(outer)(inputs[0]),), expected(op, inputs, weight)[:1])


@ALL
def test_no_second_derivative(name: str) -> None:
    op, inputs, weight = drawn(name)
    power = 2.0 if name.startswith("clipped_relu") else 1.0  # whose own second derivative is 0

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: (op(z, *inputs[1:]) ** power * weight).sum())(x).square().sum()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.func.grad(gradient)(inputs[0])


@ALL
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode_is_refused(name: str, backend: str) -> None:
    """Of any input: a tangent that is dropped would read as a derivative of 0."""
    op, inputs, _ = drawn(name)
    for i, x in enumerate(inputs):

        def moved(value: Tensor, place: int = i) -> Tensor:
            return op(*inputs[:place], value, *inputs[place + 1 :], backend=backend)

        with pytest.raises(NotImplementedError, match=f"{name.split()[0]}: `input` expected no tangent"):
            torch.func.jvp(moved, (x,), (torch.ones_like(x),))
        with torch.autograd.forward_ad.dual_level():
            torch.testing.assert_close(moved(x), op(*inputs))  # without a tangent nothing changes
            with pytest.raises(NotImplementedError, match="reverse mode"):
                moved(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("name", [name for name in CASES if name != "sce_loss clamped"])  # plain PyTorch
def test_a_batch_of_gradients_is_refused_by_name(name: str) -> None:
    op, inputs, weight = drawn(name)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    two = torch.stack((weight, weight))
    says = f"{name.split()[0]}: `grad_outputs` expected one gradient, got a batch of them; call it once for each"
    with pytest.raises(NotImplementedError, match=says):
        torch.autograd.grad(op(*leaves), leaves, two, is_grads_batched=True)
    with pytest.raises(NotImplementedError, match=says):
        torch.func.vmap(torch.func.vjp(op, *inputs)[1])(two)
    says = f"{name.split()[0]}: `input` expected one input to differentiate, got a batch of them; loop over"
    with pytest.raises(NotImplementedError, match=says):
        torch.func.vmap(torch.func.grad(lambda x: op(x, *inputs[1:]).sum()))(torch.stack((inputs[0], inputs[0])))


@ALL
def test_leaves_of_autograd_within_a_transform(name: str) -> None:
    """A model's parameters, say, beside the variable of the transform."""
    op, inputs, weight = drawn(name)
    leaf = inputs[0].clone().requires_grad_()
    value = torch.func.grad(lambda y: y * (op(leaf, *inputs[1:]) * weight).sum())(torch.tensor(1.0))
    assert_equal(torch.autograd.grad(value, leaf), expected(op, inputs, weight)[:1])


def test_running_statistics_are_updated_once() -> None:
    x, ones = torch.randn(IMAGES), torch.ones(C)
    mean, var = torch.zeros(C), torch.ones(C)
    plain: Any = (torch.zeros(C), torch.ones(C))

    def loss(x: Tensor) -> Tensor:
        return ops.batch_norm_relu(x, ones, ones, running_mean=mean, running_var=var).y.square().sum()

    torch.func.grad(loss)(x)
    ops.batch_norm_relu(x, ones, ones, running_mean=plain[0], running_var=plain[1])
    assert torch.equal(mean, plain[0])
    assert torch.equal(var, plain[1])


def test_compiles_without_graph_break() -> None:
    def loss(x: Tensor) -> Tensor:
        return ops.hinge_cross_entropy(x * 2, TARGET, 0.5)

    logits = torch.randn(LOGITS)
    gradient = torch.func.grad(loss)
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), gradient(logits))
