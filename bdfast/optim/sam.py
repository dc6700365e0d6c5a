r"""Sharpness-aware minimisation around any torch optimizer, with plain or weight-adaptive perturbations.

With gradient :math:`g` at the weights :math:`w`, an optimizer takes its step from :math:`w` along the gradient at
:math:`w + \epsilon`, where

.. math::

    \epsilon = \rho\, \frac{T_w^2\, g}{\lVert T_w\, g \rVert_2}, \qquad
    T_w = I \;\text{(SAM)} \quad\text{or}\quad T_w = \mathrm{diag}(|w_1|, \ldots, |w_d|) \;\text{(adaptive)}

and the norm is over all parameters together. SAM: Foret et al., ICLR 2021, arXiv 2010.01412, eq. 2. Adaptive: Kwon et
al., ICML 2021, arXiv 2102.11600, in the form that FT-SAM uses (arXiv 2304.11823, eq. 2 and 4): every parameter, biases
too, and nothing is added to :math:`|w|`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from bdfast.errors import message

NAME = "SAM"
TINY = 1e-12  # added to the norm: a zero gradient perturbs nothing


class SAM(Optimizer):
    """Take the gradient at the worst point within reach, and the step from where the weights are.

    Keeping, perturbing and restoring are multi-tensor operations (``torch._foreach``): a few launches, not a few for
    every parameter, and nothing is read back to the host. Restoring copies: the weights are the very bits they were.

    Args:
        params: parameters, or parameter groups of ``base``.
        base: the optimizer that takes the step.
        rho: length of the perturbation, >= 0, in the metric of ``T_w``. 0.05 is usual for SAM, 0.5 to 2 for adaptive.
        adaptive: scale the perturbation of every weight by its size.
        options: of ``base``, such as ``lr`` and ``momentum``.

    Notes:
        * ``param_groups`` and ``state`` are those of ``base``: learning-rate schedules and ``state_dict`` work as ever.
        * A parameter whose ``grad`` is None is neither perturbed nor counted in the norm.
        * Batch norm in training mode sees two passes a step; see :func:`bdfast.defenses.ft_sam` for leaving one out.

    Raises:
        ValueError: rho out of range.
        RuntimeError: :meth:`step` without a closure while weights are perturbed, or nested perturbations.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(4, 2)
        >>> optimizer = SAM(layer.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)
        >>> x, before = torch.ones(1, 4), layer.weight.detach().clone()
        >>> layer(x).square().sum().backward()
        >>> with optimizer.perturbed():
        ...     moved = bool((layer.weight != before).any())
        ...     optimizer.zero_grad()
        ...     layer(x).square().sum().backward()
        >>> moved, bool((layer.weight == before).all())
        (True, True)
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        base: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(rho, bool) or not isinstance(rho, (int, float)) or not 0.0 <= rho < math.inf:
            raise ValueError(message(NAME, "rho", "a finite number >= 0", repr(rho), "pass 0.05, or 2 with adaptive"))
        self.base = base(params, **options)
        self.rho, self.adaptive = float(rho), adaptive
        self._kept: list[Tensor] = []  # copies of the weights; the memory is kept from step to step
        self._inside: list[Tensor] | None = None  # the parameters that are perturbed at present
        super().__init__(self.base.param_groups, self.base.defaults)
        self._share()

    def _share(self) -> None:
        self.param_groups = self.base.param_groups
        self.state = self.base.state

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Weights at ``w + epsilon`` inside, for the gradients there are; at ``w``, bit for bit, on leaving it."""
        if self._inside is not None:
            raise RuntimeError(message(NAME, "perturbed", "weights in their place", "perturbed ones", "leave it first"))
        self._perturb_()
        try:
            yield
        finally:
            self._restore_()

    @torch.no_grad()
    def _perturb_(self) -> None:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise RuntimeError(
                message(NAME, "params", "dense gradients", "a sparse one", "use Embedding(sparse=False)")
            )
        grads = [p.grad for p in params]
        if not self._matches(params):
            self._kept = [torch.empty_like(p) for p in params]
        self._inside = params
        if not params:
            return
        torch._foreach_copy_(self._kept, params)
        if self.adaptive:
            sizes = torch._foreach_abs(params)
            steps = torch._foreach_mul(grads, sizes)
        else:
            steps = torch._foreach_mul(grads, 1.0)  # a copy: torch 2.10 has no _foreach_clone
        device = params[0].device
        norms = torch.stack([norm.to(device, torch.float64) for norm in torch._foreach_norm(steps)])
        scale = self.rho / (torch.linalg.vector_norm(norms) + TINY)
        if self.adaptive:
            torch._foreach_mul_(steps, sizes)
        for p_device in dict.fromkeys(p.device for p in params):
            some = [step for step in steps if step.device == p_device]
            torch._foreach_mul_(some, scale.to(p_device))
        torch._foreach_add_(params, steps)

    def _matches(self, params: list[Tensor]) -> bool:
        return len(self._kept) == len(params) and all(
            kept.shape == p.shape and kept.dtype == p.dtype and kept.device == p.device and kept.stride() == p.stride()
            for kept, p in zip(self._kept, params, strict=True)
        )

    @torch.no_grad()
    def _restore_(self) -> None:
        params, self._inside = self._inside, None
        if params:
            torch._foreach_copy_(params, self._kept)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """The step of ``base``, with the gradients as they are.

        With a ``closure`` (which zeroes gradients, computes the loss, calls backward, returns it) both passes are made
        here; the loss returned is the one at the weights as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
                with self.perturbed():
                    closure()
        if self._inside is not None:
            remedy = "leave the block of perturbed() first"
            raise RuntimeError(message(NAME, "step", "weights in their place", "perturbed ones", remedy))
        self.base.step()
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``base``."""
        if getattr(self, "state", None) is self.base.state:  # after set-up
            self.base.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, bit for bit, from a :meth:`state_dict`, which is that of ``base``."""
        self.base.load_state_dict(state_dict)
        self._share()

    def state_dict(self) -> dict[str, Any]:
        """That of ``base``: rho and adaptive are the constructor's."""
        return self.base.state_dict()

    def __getstate__(self) -> dict[str, Any]:
        return {"base": self.base, "rho": self.rho, "adaptive": self.adaptive, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "param_groups": state["base"].param_groups, "state": state["base"].state})
        self._kept, self._inside = [], None
        self._share()
