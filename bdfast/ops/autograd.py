"""What the autograd functions of ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, function

from bdfast.errors import message

_transforms_active = torch._C._are_functorch_transforms_active


def wants_gradient(op: str, *inputs: Tensor | None) -> bool:
    """Whether autograd is to record ``op``.

    Raises:
        NotImplementedError: an input carries a tangent, which ops would drop without a word.
    """
    if forward_ad._current_level >= 0 and any(t is not None and _tangent(t) is not None for t in inputs):
        remedy = "differentiate in reverse mode: backward(), torch.func.grad or torch.func.vjp"
        raise NotImplementedError(message(op, "input", "no tangent of forward mode", "a dual tensor", remedy))
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def _tangent(tensor: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(tensor).tangent  # type: ignore[no-untyped-call]
    return tangent


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's decorator, at no cost where nobody differentiates twice: with ``create_graph`` a backward records."""
    checked: Callable[..., Any] = function.once_differentiable(backward)
    op = backward.__module__.rpartition(".")[2]

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        try:
            return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)
        except RuntimeError as error:
            if any(isinstance(grad, Tensor) and _is_batched(grad) for grad in grads):
                raise _no_batches(op) from error
            raise

    return once


def _is_batched(tensor: Tensor) -> bool:
    """Whether it stands for many, as it does in torch.autograd.grad with ``is_grads_batched=True``."""
    return "Batched" in str(torch._C._dispatch_keys(tensor))


def _no_batches(op: str) -> NotImplementedError:
    remedy = "call it once for each gradient: is_grads_batched=False, vectorize=False or torch.func.vjp in a loop"
    return NotImplementedError(message(op, "grad_outputs", "one gradient", "a batch of them", remedy))


def apply(op: type[torch.autograd.Function], *inputs: Any) -> Any:
    """``op.apply(*inputs)``, also under ``torch.func.grad`` and ``torch.func.vjp``.

    Those ask for a forward without a context. In that form ``apply`` binds its arguments by name on every call of
    anybody: 27 us instead of 6, where a loss of 256 x 10 logits and its gradient take 50. So only a transform meets an
    op in it, and not while ``torch.compile`` traces one, which makes such a form of its own.
    """
    if not _transforms_active() or torch.compiler.is_compiling():
        return op.apply(*inputs)  # type: ignore[no-untyped-call]
    *results, context = _Transformed.apply(op, *inputs)  # type: ignore[no-untyped-call]
    outputs = tuple(results[: context.outputs])
    return outputs if context.several else outputs[0]


class _Context:
    """Takes the place of autograd's context, and remembers what the forward of an op leaves in it."""

    outputs: int  # of the op: further results are what it saves
    several: bool  # whether the op returns a tuple
    places: list[int | None]  # of saved tensors among inputs and results: every level of transforms wraps its own
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor | None, ...] = ()
    constants: tuple[Tensor, ...] = ()  # outputs without a derivative
    constant_places: list[int]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        self.constants = outputs

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing to remember: no gradients are materialised for any op here."""


class _Transformed(torch.autograd.Function):
    """An op in the form that transforms ask for: what its backward needs comes out as results."""

    @staticmethod
    def forward(op: type[torch.autograd.Function], *inputs: Any) -> tuple[Any, ...]:
        context = _Context()
        returned = op.forward(context, *inputs)
        context.several = isinstance(returned, tuple)
        results = list(returned) if context.several else [returned]
        context.outputs = len(results)
        context.places = []
        for tensor in context.saved_tensors:
            known = [*inputs, *results]
            place = next((i for i, other in enumerate(known) if other is tensor), len(known))
            if place == len(known) and tensor is not None:
                results.append(tensor)
            context.places.append(None if tensor is None else place)
        context.constant_places = [i for i, result in enumerate(results) if any(result is c for c in context.constants)]
        context.saved_tensors = context.constants = ()
        return *results, context

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        (ctx.op, *given), (*results, ctx.context) = inputs, output
        known = [*given, *results]
        ctx.save_for_backward(*(None if place is None else known[place] for place in ctx.context.places))
        ctx.mark_non_differentiable(*(results[i] for i in ctx.context.constant_places))
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, *_: Any) -> Any:
        """Of an input, by torch.func.vmap around torch.func.grad."""
        remedy = 'loop over the samples, or take reduction="none" and differentiate the sum'
        where = op.__module__.rpartition(".")[2]
        raise NotImplementedError(message(where, "input", "one input to differentiate", "a batch of them", remedy))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grads, needs = grads[: ctx.context.outputs], ctx.needs_input_grad[1:]
        apply_gradient: Any = _Gradient.apply
        return None, *apply_gradient(ctx.op, ctx.context, needs, *grads, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The backward of an op: a function of its own, so that a transform around another finds that it ends here."""

    @staticmethod
    def forward(
        op: Any, context: _Context, needs_input_grad: tuple[bool, ...], *tensors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        context.needs_input_grad, context.saved_tensors = needs_input_grad, tensors[context.outputs :]
        grads: tuple[Tensor | None, ...] = op.backward.__wrapped__(context, *tensors[: context.outputs])
        context.saved_tensors = ()
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.name = inputs[0].__name__

    @staticmethod
    def vmap(info: Any, in_dims: Any, op: Any, *_: Any) -> Any:
        """Of a gradient, by torch.func.vmap around torch.func.vjp, or by torch.func.jacrev."""
        raise _no_batches(op.__module__.rpartition(".")[2])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(f"{ctx.name.lstrip('_')}: trying to differentiate twice what is once_differentiable")
