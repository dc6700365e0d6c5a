r"""D3's whole update of the projected layers: distance gradient, momentum, step and projection, fused over layers.

For every layer :math:`j` with weights :math:`W`, anchor :math:`W_0`, data gradient :math:`G` and momentum :math:`V`:

.. math::

    d &= \lVert W - W_0 \rVert_F \\
    V &\leftarrow \mu V + G - \tfrac{c}{d} (W - W_0) \\
    \tilde W &= W - \eta V \\
    W &\leftarrow \tilde W \, n_0 / \lVert \tilde W \rVert_F

This is SGD with momentum on :math:`\lambda h - \sum_j d_j` scaled by :math:`c`, followed by the projection on the
sphere of norm :math:`n_0` (D3, arXiv 2411.09585, eq. 4; momentum is neither rescaled nor projected, as in the authors'
release).

Bytes moved a weight: 32 with ``distances`` carried from step to step (5 reads, 3 writes), 40 without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bdfast.backends import Implementation, Op, requested
from bdfast.backends.availability import native, runs_cpp, runs_cuda
from bdfast.backends.devices import on_device_of, stream_of
from bdfast.backends.registry import always
from bdfast.errors import message
from bdfast.ops.precision import norm_of
from bdfast.ops.validation import check_number

NAME = "projected_sgd_step_"
Layer = tuple[int, int, int, int, int]  # addresses of W, W0, G and V, and the number of their elements


def projected_sgd_step_(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    distance_weight: float,
    norms: Tensor,  # [L]
    distances: Tensor | None = None,  # [L]
    backend: str = "auto",
) -> None:
    """One D3 step, in place on ``weights`` and ``momentum_buffers``: move away from the anchors, stay on their sphere.

    Args:
        weights: L float32 tensors of any shapes (float64 runs on the reference).
        anchors: the weights to move away from; same shapes.
        grads: gradients of the data term (already scaled by D3's c * lambda); same shapes.
        momentum_buffers: same shapes; zeros before the first step.
        lr: learning rate; a 0-dim float32 tensor lets a captured CUDA graph follow a schedule.
        momentum: mu, in [0, 1).
        distance_weight: c, the weight of the distance term, >= 0.
        norms: ``[L]`` float32, the Frobenius norm that each layer is projected to.
        distances: ``[L]`` float32 state, or None. Positive entries are taken for ``||W - W0||`` before the step, which
            saves the pass that measures it; others are measured. All are replaced by the distances after the step.
        backend: ``"auto"``, or the implementation to run or raise for.

    Notes:
        A distance below 4 eps(float32) * norm has no gradient (as ``torch.norm`` at 0). A stepped weight of norm 0
        stays as it is; one whose norm is not finite becomes NaN. On a GPU: at most two launches for up to 64 layers,
        no sync, and reruns are bit-identical.

    Raises:
        TypeError: wrong dtypes.
        ValueError: lengths, shapes, devices or scalars are wrong, or a weight or momentum buffer shares its
            memory with another tensor.

    Example:
        >>> import torch, bdfast
        >>> w0 = torch.tensor([3.0, 4.0]); w = torch.tensor([4.0, 3.0]); v = torch.zeros(2)
        >>> bdfast.ops.projected_sgd_step_([w], [w0], [torch.zeros(2)], [v], lr=0.1, momentum=0.9,
        ...                                distance_weight=1.0, norms=torch.tensor([5.0]))
        >>> w, w.norm()
        (tensor([4.0584, 2.9205]), tensor(5.))
    """
    lists = (
        _check_list("weights", weights),
        _check_list("anchors", anchors),
        _check_list("grads", grads),
        _check_list("momentum_buffers", momentum_buffers),
    )
    _check_lists(*lists)
    _check_scalars(lr, momentum, distance_weight, lists[0])
    _check_state("norms", norms, lists[0])
    if distances is not None:
        _check_state("distances", distances, lists[0])
    wish = requested(backend, NAME)
    if not lists[0]:
        return
    rate, rate_tensor = (0.0, lr) if isinstance(lr, Tensor) else (float(lr), None)
    STEP(*lists, rate, rate_tensor, momentum, distance_weight, norms, distances, wish)


# --- reference: the equations in plain PyTorch -----------------------------------------------------------------------


@torch.no_grad()
def reference(
    weights: list[Tensor],
    anchors: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: float,
    lr_tensor: Tensor | None,
    momentum: float,
    distance_weight: float,
    norms: Tensor,  # [L]
    distances: Tensor | None,  # [L]
) -> None:
    """The update layer by layer; norms and distances in float64."""
    _check_memory(_layers(weights, anchors, grads, momentum_buffers))
    _check_expanded(weights, momentum_buffers)
    rate = lr if lr_tensor is None else lr_tensor
    for j, (w, w0, g, v) in enumerate(zip(weights, anchors, grads, momentum_buffers, strict=True)):
        d = _distance(w, w0)
        if distances is not None:
            d = torch.where(distances[j] > 0, distances[j].to(d.dtype), d)
        vanishes = d < 4.0 * torch.finfo(torch.float32).eps * norms[j].to(d.dtype)
        pull = torch.where(vanishes, torch.zeros_like(d), distance_weight / d).to(w.dtype)
        v.mul_(momentum).add_(g - pull * (w - w0))
        w.sub_(rate * v)
        length = norm_of(w)
        scale = torch.where(length == 0, torch.ones_like(length), norms[j].to(length.dtype) / length)
        scale = torch.where(torch.isfinite(length), scale, length - length)
        w.copy_(scale * w.double())
        if distances is not None:
            distances[j] = _distance(w, w0)


def _distance(w: Tensor, w0: Tensor) -> Tensor:
    return norm_of(w.double() - w0.double())


# --- compiled implementations ----------------------------------------------------------------------------------------


def _alike(w: Tensor, w0: Tensor, g: Tensor, v: Tensor) -> bool:
    """Whether the tensors fill their storage in one and the same order, so that kernels may walk them linearly."""
    if w.is_contiguous() and w0.is_contiguous() and g.is_contiguous() and v.is_contiguous():
        return True
    channels_last = w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last)
    return channels_last and w0.stride() == g.stride() == v.stride() == w.stride()


def _layers(
    weights: list[Tensor], anchors: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]
) -> list[Layer]:
    return list(map(_layer, weights, anchors, grads, momentum_buffers))


def _layer(w: Tensor, w0: Tensor, g: Tensor, v: Tensor) -> Layer:
    return w.data_ptr(), w0.data_ptr(), g.data_ptr(), v.data_ptr(), w.numel()


def _on_dense_tensors(
    run: Any,
    weights: list[Tensor],
    anchors: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *scalars: Any,
) -> None:
    """Call ``run`` with tensors of equal dense layout; copies are made, and written back, only where layouts differ."""
    layers = _layers(weights, anchors, grads, momentum_buffers)
    _check_memory(layers)
    if all(map(_alike, weights, anchors, grads, momentum_buffers)):
        run(weights[0], layers, *scalars)
        return
    _check_expanded(weights, momentum_buffers)
    w, w0, g, v = list(weights), list(anchors), list(grads), list(momentum_buffers)
    for j, layer in enumerate(zip(weights, anchors, grads, momentum_buffers, strict=True)):
        if not _alike(*layer):
            w[j], w0[j], g[j], v[j] = (t.contiguous() for t in layer)
    run(weights[0], _layers(w, w0, g, v), *scalars)
    for given, dense in zip((*weights, *momentum_buffers), (*w, *v), strict=True):
        if dense is not given:
            given.copy_(dense)


def _cpp_dense(
    _: Tensor, layers: list[Layer], lr: float, lr_tensor: Tensor | None, momentum: float, distance_weight: float,
    norms: Tensor, distances: Tensor | None,
) -> None:  # fmt: skip
    norms = norms.contiguous()
    state = None if distances is None else distances.contiguous()
    native().projected_sgd_step(
        layers, lr if lr_tensor is None else lr_tensor.item(), momentum, distance_weight, norms.data_ptr(),
        0 if state is None else state.data_ptr(),
    )  # fmt: skip
    if distances is not None and state is not None and state is not distances:
        distances.copy_(state)


def _cuda_dense(
    weight: Tensor, layers: list[Layer], lr: float, lr_tensor: Tensor | None, momentum: float, distance_weight: float,
    norms: Tensor, distances: Tensor | None,
) -> None:  # fmt: skip
    norms = norms.contiguous()
    state = None if distances is None else distances.contiguous()
    with on_device_of(weight):
        # Partial sums of the blocks: scratch from torch's allocator, so that CUDA graphs can capture the call.
        doubles = native().projected_sgd_step_scratch([numel for *_, numel in layers])
        scratch = torch.empty(doubles, dtype=torch.float64, device=weight.device)
        native().projected_sgd_step_cuda(
            layers, lr, 0 if lr_tensor is None else lr_tensor.data_ptr(), momentum, distance_weight, norms.data_ptr(),
            0 if state is None else state.data_ptr(), scratch.data_ptr(), stream_of(weight),
        )  # fmt: skip
    if distances is not None and state is not None and state is not distances:
        distances.copy_(state)


def _fake(*_: Any) -> None:
    return None


STEP = Op(
    name="projected_sgd_step_",
    public=NAME,
    schema="(Tensor(a!)[] weights, Tensor[] anchors, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, "
    "Tensor? lr_tensor, float momentum, float distance_weight, Tensor norms, Tensor(c!)? distances, str backend) -> ()",
    fake=_fake,
    key=lambda weights, *_: weights[0],
    implementations=(
        Implementation("cpp", partial(_on_dense_tensors, _cpp_dense), partial(runs_cpp, dtypes=(torch.float32,))),
        Implementation("cuda", partial(_on_dense_tensors, _cuda_dense), partial(runs_cuda, dtypes=(torch.float32,))),
        Implementation("reference", reference, always),
    ),
)


# --- validation ------------------------------------------------------------------------------------------------------


LISTS = ("weights", "anchors", "grads", "momentum_buffers")
DTYPES = (torch.float32, torch.float64)


def _check_list(name: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, list):
        return tensors
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        raise TypeError(message(NAME, name, "a list of tensors", type(tensors).__name__, "pass one tensor a layer"))
    return list(tensors)


def _check_lists(
    weights: list[Tensor], anchors: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]
) -> None:
    lists = (weights, anchors, grads, momentum_buffers)
    if not len(anchors) == len(grads) == len(momentum_buffers) == len(weights):
        name, tensors = next((n, t) for n, t in zip(LISTS, lists, strict=True) if len(t) != len(weights))
        expected = f"{len(weights)} tensors, one a weight"
        raise ValueError(message(NAME, name, expected, str(len(tensors)), "pass lists of one length"))
    if not all(map(_match, *lists)):  # the errors are worked out only where there is one
        for j, layer in enumerate(zip(*lists, strict=True)):
            for name, tensor in zip(LISTS, layer, strict=True):
                _check_tensor(f"{name}[{j}]", tensor, layer[0])
    if weights and weights[0].dtype not in DTYPES:
        remedy = "keep float32 master weights and cast after"
        raise TypeError(message(NAME, "weights[0]", "float32", str(weights[0].dtype), remedy))
    for j in range(1, len(weights)):
        first, weight = weights[0], weights[j]
        if weight.dtype != first.dtype or weight.device != first.device:
            expected = f"{first.dtype} on {first.device} like weights[0]"
            got = f"{weight.dtype} on {weight.device}"
            remedy = "step the groups of one device and dtype in one call each"
            raise ValueError(message(NAME, f"weights[{j}]", expected, got, remedy))


def _match(w: Tensor, w0: Tensor, g: Tensor, v: Tensor) -> bool:
    if not (isinstance(w, Tensor) and isinstance(w0, Tensor) and isinstance(g, Tensor) and isinstance(v, Tensor)):
        return False
    return (
        w0.shape == g.shape == v.shape == w.shape
        and w0.dtype is g.dtype is v.dtype is w.dtype
        and ((w0.is_cpu and g.is_cpu and v.is_cpu and w.is_cpu) or w0.device == g.device == v.device == w.device)
    )


def _check_tensor(name: str, tensor: Tensor, weight: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(message(NAME, name, "a tensor", type(tensor).__name__, "pass torch.Tensors"))
    if tensor.shape != weight.shape:
        raise ValueError(
            message(
                NAME, name, f"shape {list(weight.shape)} of its weight", str(list(tensor.shape)), "pass matching lists"
            )
        )
    if tensor.dtype != weight.dtype:
        raise TypeError(message(NAME, name, f"{weight.dtype} like its weight", str(tensor.dtype), "convert it"))
    if tensor.device != weight.device:
        raise ValueError(message(NAME, name, f"device {weight.device}", str(tensor.device), "move it to its weight"))


def _check_expanded(weights: list[Tensor], momentum_buffers: list[Tensor]) -> None:
    """What is changed has memory of its own; looked at where a kernel does not show it by running on dense tensors."""
    for name, tensors in (("weights", weights), ("momentum_buffers", momentum_buffers)):
        for j, tensor in enumerate(tensors):
            if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
                expected = "memory of its own for every element"
                raise ValueError(message(NAME, f"{name}[{j}]", expected, "an expanded tensor", "pass .clone() of it"))


def _check_memory(layers: list[Layer]) -> None:
    """What is changed shares no memory: anchors that are views of their weights would never be left.

    Where the kernels are called, since tracing has no addresses. Compares where tensors begin.
    """
    weights, anchors, grads, momentum_buffers, numels = zip(*layers, strict=True)
    changed = {*weights, *momentum_buffers}
    if len(changed) == 2 * len(layers) and changed.isdisjoint(anchors) and changed.isdisjoint(grads):
        return
    seen = {
        address: f"{name}[{j}]" for name, of in (("anchors", anchors), ("grads", grads)) for j, address in enumerate(of)
    }
    for name, of in (("weights", weights), ("momentum_buffers", momentum_buffers)):
        for j, address in enumerate(of):
            if numels[j] > 0 and address in seen:
                expected, got = "memory of its own", f"the memory of {seen[address]}"
                raise ValueError(message(NAME, f"{name}[{j}]", expected, got, "clone one of them"))
            seen[address] = f"{name}[{j}]"


def _check_state(name: str, state: Tensor, weights: list[Tensor]) -> None:
    count = len(weights)
    if not isinstance(state, Tensor):
        raise TypeError(message(NAME, name, f"a tensor [{count}]", type(state).__name__, "pass one value a weight"))
    if state.shape != (count,):
        expected = f"a tensor [{count}]"
        raise ValueError(message(NAME, name, expected, str(list(state.shape)), "pass one value a weight"))
    if not weights:
        return
    if state.dtype is not torch.float32 and state.dtype is not weights[0].dtype:
        raise TypeError(message(NAME, name, "float32", str(state.dtype), "convert it with .float()"))
    if state.device != weights[0].device:
        raise ValueError(message(NAME, name, f"device {weights[0].device}", str(state.device), "move it there"))


def _check_scalars(lr: float | Tensor, momentum: float, distance_weight: float, weights: list[Tensor]) -> None:
    if isinstance(lr, Tensor):
        device = weights[0].device if weights else lr.device
        dtypes = (torch.float32, weights[0].dtype if weights else torch.float64)
        if lr.dim() != 0 or lr.dtype not in dtypes or lr.device != device:
            expected = f"a float, or a 0-dim float32 tensor on {device}"
            got = f"{lr.dtype} {list(lr.shape)} on {lr.device}"
            raise ValueError(message(NAME, "lr", expected, got, "use torch.tensor(0.01, device=...)"))
    else:
        check_number(NAME, "lr", lr, "pass a float or a 0-dim float32 tensor")
        if not 0.0 <= lr < math.inf:
            raise ValueError(message(NAME, "lr", "a finite number >= 0", str(lr), "correct it"))
    check_number(NAME, "momentum", momentum)
    check_number(NAME, "distance_weight", distance_weight)
    if not 0.0 <= momentum < 1.0:
        raise ValueError(message(NAME, "momentum", "a number in [0, 1)", str(momentum), "correct it"))
    if not 0.0 <= distance_weight < math.inf:
        raise ValueError(message(NAME, "distance_weight", "a finite number >= 0", str(distance_weight), "correct it"))
