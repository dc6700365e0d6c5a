r"""SGD that moves chosen weights away from an anchor, on the anchor's sphere: the solver of D3 as a torch optimizer.

For every projected parameter :math:`W` with anchor :math:`W_0`, data gradient :math:`G` and momentum :math:`V`:

.. math::

    V &\leftarrow \mu V + G - c\,(W - W_0) / \lVert W - W_0 \rVert_F \\
    W &\leftarrow \Pi(W - \eta V), \qquad \Pi(W) = W \, \lVert W_0 \rVert_F / \lVert W \rVert_F

which is momentum SGD on :math:`\text{loss} - c \sum_j \lVert W_j - W_{0,j} \rVert_F` followed by the projection (D3,
arXiv 2411.09585, eq. 4). Everything else takes plain momentum SGD steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.optim.sgd import sgd

from bdfast.errors import message
from bdfast.ops import projected_sgd_step_
from bdfast.ops.precision import norm_of
from bdfast.ops.validation import check_number

NAME = "ProjectedSGD"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)


@dataclass
class _Stack:
    """Projected parameters of one device and dtype, which one call of the op can update."""

    params: list[Tensor]
    norms: Tensor  # [L]
    distances: Tensor  # [L]; 0 where the op is to measure
    versions: list[int | None]  # of the parameters after our last step; None: not stepped since set-up or loading


class ProjectedSGD(Optimizer):
    """Momentum SGD that drives projected parameters away from their anchors and keeps their Frobenius norm.

    Args:
        params: parameters, or parameter groups. A group may set any of the options below, and ``anchors``: one tensor a
            parameter, the weights to move away from (by default a copy of the parameters as they are now). Groups with
            ``projected=False`` take the steps of ``torch.optim.SGD(lr, momentum)``, bit for bit.
        lr: learning rate, or a 0-dim float32 tensor on the parameters' device.
        momentum: mu, in [0, 1).
        distance_weight: c >= 0, the weight of the distance term. Its gradient has norm c whatever the layer's size.
        projected: whether the parameters of a group that does not say so are projected.
        capturable: keep the learning rate in a device tensor, so that a CUDA graph of :meth:`step` follows a schedule.
            Take one step before the capture, as with torch's own optimizers.

    Notes:
        * A parameter whose ``grad`` is None is left alone altogether, as in torch: it neither moves nor is projected.
          Zero gradients let it drift away from the anchor.
        * The first projection happens at the end of the first step.
        * ``state[p]`` holds ``anchor``, ``momentum_buffer``, ``norm`` and ``distance`` (0-dim, ``||W - W0||`` after
          the step), and ``master``, float32 weights, for float16 and bfloat16 parameters: the projection moves a weight
          by less than half precision can hold.
        * Weights that are changed in between by others (``load_state_dict``, ``copy_``) are noticed, and their distance
          is measured anew.

    Raises:
        ValueError: an option out of range, or a projected parameter whose anchor has norm 0, is not finite or does not
            match it.
        TypeError: a projected parameter that is not floating point.

    Example:
        >>> import torch, bdfast
        >>> head = torch.nn.Linear(4, 2)
        >>> optimizer = bdfast.optim.ProjectedSGD(
        ...     [{"params": [head.weight]}, {"params": [head.bias], "projected": False}], lr=0.1)
        >>> before = head.weight.norm().item()
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     head(torch.ones(1, 4)).square().sum().backward()
        ...     optimizer.step()
        >>> abs(head.weight.norm().item() - before) < 1e-6, optimizer.state[head.weight]["distance"].item() > 0.1
        (True, True)
    """

    _stacks: list[list[_Stack]]  # of each group

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float | Tensor = 0.01,
        momentum: float = 0.9,
        distance_weight: float = 1.0,
        projected: bool = True,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "distance_weight": distance_weight,
            "projected": projected,
            "capturable": capturable,
        }
        self._stacks = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; projected ones take their ``anchors``, or the weights as they are now, for the anchor."""
        group = dict(param_group)
        anchors = group.pop("anchors", None)
        super().add_param_group(group)
        try:
            _check_options(group)
            if group["capturable"] and not isinstance(group["lr"], Tensor):
                device = group["params"][0].device if group["params"] else None
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            if group["projected"]:
                states = _initial_states(group, anchors)
                self.state.update(zip(group["params"], states, strict=True))
            self._stacks.append(self._stacks_of(group))
        except BaseException:
            self.param_groups.pop()
            raise

    def _stacks_of(self, group: dict[str, Any]) -> list[_Stack]:
        """Gather norms and distances of the group's parameters, which become views, one tensor a device and dtype."""
        if not group["projected"]:
            return []
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in group["params"]:
            alike.setdefault((p.device, self.state[p]["anchor"].dtype), []).append(p)
        stacks = []
        for params in alike.values():
            norms, distances = (torch.stack([self.state[p][key] for p in params]) for key in ("norm", "distance"))
            for p, norm, distance in zip(params, norms, distances, strict=True):
                self.state[p].update(norm=norm, distance=distance)
            stacks.append(_Stack(params, norms, distances, [None] * len(params)))
        return stacks

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient; returns what ``closure``, if given, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            if group["projected"]:
                for stack in stacks:
                    self._step_projected(group, stack)
            else:
                self._step_plain(group)
        return loss

    def _step_projected(self, group: dict[str, Any], stack: _Stack) -> None:
        rows = [j for j, p in enumerate(stack.params) if p.grad is not None]
        if not rows:
            return
        params = [stack.params[j] for j in rows]
        states = [self.state[p] for p in params]
        self._notice_changes(stack, rows)
        weights = [state.get("master", p) for p, state in zip(params, states, strict=True)]
        norms, distances = stack.norms, stack.distances
        if len(rows) < len(stack.params):
            norms, distances = (torch.stack([state[key] for state in states]) for key in ("norm", "distance"))
        projected_sgd_step_(
            weights,
            [state["anchor"] for state in states],
            [_dense_grad(p).to(w.dtype) for p, w in zip(params, weights, strict=True)],
            [state["momentum_buffer"] for state in states],
            lr=group["lr"],
            momentum=group["momentum"],
            distance_weight=group["distance_weight"],
            norms=norms,
            distances=distances,
        )
        for row, p, w, state, distance in zip(rows, params, weights, states, distances, strict=True):
            if w is not p:
                p.copy_(w)
            if distances is not stack.distances:
                state["distance"].copy_(distance)
            stack.versions[row] = p._version

    def _notice_changes(self, stack: _Stack, rows: list[int]) -> None:
        """Carried distances and masters are worth nothing once someone else has written to a weight."""
        for row in rows:
            p = stack.params[row]
            if stack.versions[row] not in (None, p._version):
                stack.distances[row].zero_()
                if "master" in self.state[p]:
                    self.state[p]["master"].copy_(p)

    def _step_plain(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        buffers: list[Tensor | None] = []
        if group["momentum"] != 0:
            buffers = [self.state[p].get("momentum_buffer") for p in params]
        lr = group["lr"]
        sgd(
            params,
            [_dense_grad(p) for p in params],
            buffers,
            # The other kernels read a device's learning rate back to the host.
            fused=True if isinstance(lr, Tensor) and lr.is_cuda else None,
            weight_decay=0.0,
            momentum=group["momentum"],
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        for p, buffer in zip(params, buffers, strict=False):  # no buffers without momentum
            self.state[p]["momentum_buffer"] = buffer

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, bit for bit, from a :meth:`state_dict`."""
        _check_own(state_dict)
        super().load_state_dict(state_dict)
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for id_, p in zip(ids, params, strict=True):
            # torch has cast the state to the dtype of its parameter, which would round masters and anchors, and what it
            # did not cast is still the tensor that was given, whose owner may step on.
            for key, value in state_dict["state"].get(id_, {}).items():
                if isinstance(value, Tensor):
                    dtype = value.dtype if p.dtype in HALF else p.dtype
                    self.state[p][key] = value.to(p.device, dtype, copy=True)
        self._stacks = [self._stacks_of(group) for group in self.param_groups]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks = [self._stacks_of(group) for group in self.param_groups]


def _dense_grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise RuntimeError(message(NAME, "params", "dense gradients", "a sparse one", "use Embedding(sparse=False)"))
    return p.grad


def _initial_states(group: dict[str, Any], anchors: Sequence[Tensor] | None) -> list[dict[str, Tensor]]:
    """State of the projected parameters of a group before the first step."""
    params: list[Tensor] = group["params"]
    if anchors is not None and len(anchors) != len(params):
        expected = f"one tensor a parameter, {len(params)}"
        raise ValueError(message(NAME, "anchors", expected, str(len(anchors)), "pass lists of one length"))
    states = []
    for j, p in enumerate(params):
        anchor = p if anchors is None else anchors[j]
        _check_anchor(j, p, anchor)
        dtype = torch.float32 if p.dtype in HALF else p.dtype
        anchor = anchor.detach().to(p.device, dtype, copy=True)
        norm = norm_of(anchor).to(dtype)
        state = {
            "anchor": anchor,
            "momentum_buffer": torch.zeros_like(anchor),
            "norm": norm,
            "distance": torch.zeros_like(norm),
        }
        if p.dtype in HALF:
            state["master"] = p.detach().to(dtype, copy=True)
        states.append(state)
    _check_norms(states)
    return states


def _check_anchor(j: int, p: Tensor, anchor: Tensor) -> None:
    if p.dtype not in DTYPES:
        expected, remedy = "float32, float64, bfloat16 or float16", "set projected=False for its group"
        raise TypeError(message(NAME, f"params[{j}]", expected, str(p.dtype), remedy))
    if not isinstance(anchor, Tensor):
        got = type(anchor).__name__
        raise TypeError(message(NAME, f"anchors[{j}]", "a tensor", got, "pass the weights to start from"))
    if anchor.shape != p.shape:
        got = f"{list(anchor.shape)} for {list(p.shape)}"
        raise ValueError(message(NAME, f"anchors[{j}]", "the shape of its parameter", got, "pass matching lists"))


def _check_norms(states: list[dict[str, Tensor]]) -> None:
    for j, norm in enumerate([state["norm"].item() for state in states]):
        if not 0.0 < norm < math.inf:
            expected = "an anchor with a finite norm above 0"
            remedy = "leave it out: there is no sphere to project it on"
            raise ValueError(message(NAME, f"params[{j}]", expected, f"{norm}", remedy))


def _check_own(state_dict: dict[str, Any]) -> None:
    """Another optimizer's state has no anchors: torch would take it over first and miss them later."""
    for group in state_dict["param_groups"]:
        if "projected" not in group or (
            group["projected"] and any("anchor" not in state_dict["state"].get(id_, {}) for id_ in group["params"])
        ):
            expected, got = "that of a ProjectedSGD, with anchors", "that of another optimizer"
            raise ValueError(message(NAME, "state_dict", expected, got, "start a new ProjectedSGD from the weights"))


def _check_options(group: dict[str, Any]) -> None:
    lr, momentum, weight = group["lr"], group["momentum"], group["distance_weight"]
    if isinstance(lr, Tensor):
        devices = {p.device for p in group["params"]}
        if lr.dim() != 0 or lr.dtype != torch.float32 or (devices and devices != {lr.device}):
            expected = f"a number, or a 0-dim float32 tensor on {', '.join(map(str, devices))}"
            got = f"{lr.dtype} {list(lr.shape)} on {lr.device}"
            raise ValueError(message(NAME, "lr", expected, got, "use torch.tensor(0.01, device=...)"))
    else:
        check_number(NAME, "lr", lr, "pass 0.01, say")
    check_number(NAME, "momentum", momentum, "pass 0.9, say")
    check_number(NAME, "distance_weight", weight, "pass D3's c")
    if not isinstance(lr, Tensor) and not 0.0 <= lr < math.inf:
        raise ValueError(message(NAME, "lr", "a finite number >= 0", str(lr), "pass 0.01, say"))
    if not 0.0 <= momentum < 1.0:
        raise ValueError(message(NAME, "momentum", "a number in [0, 1)", str(momentum), "pass 0.9, say"))
    if not 0.0 <= weight < math.inf:
        raise ValueError(message(NAME, "distance_weight", "a finite number >= 0", str(weight), "pass D3's c"))
