"""The victim as calibrators ask it: the gradient of GIC's objective to the images, and nothing to the weights."""

from __future__ import annotations

import copy
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from bdfast.errors import message
from bdfast.ops import batch_norm_stat_distance
from bdfast.runtime.frozen import FrozenModel
from bdfast.runtime.outputs import logits_of
from bdfast.runtime.precision import Precision
from bdfast.training.workspace import Normalization


class Guide:
    r"""A frozen victim and the objective :math:`\frac1N \sum_i \mathrm{CE}(f(x_i), y_i) + w\, R_{bn}(x)`.

    :math:`R_{bn} = \sum_l \lVert \mu_l - \bar\mu_l \rVert^2 + \lVert \sigma^2_l - \bar\sigma^2_l \rVert^2` compares,
    for every batch norm l, mean and (biased) variance of its input over the batch with the running ones
    (:func:`bdfast.ops.batch_norm_stat_distance`).

    Args:
        model: the victim; it is copied.
        w_bn: w >= 0; a network without batch norms has to have 0.
        precision: of the victim's passes.
        normalize: ``(mean, std)`` of a model that does not normalise its own input.
        device: where to work; None is where the model is.

    Example:
        >>> guide = Guide(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        >>> losses, grad = guide.gradient(torch.rand(2, 1, 2, 2), torch.tensor([0, 2]))
        >>> losses.shape, grad.shape, guide.logits(torch.rand(2, 1, 2, 2)).shape
        (torch.Size([2]), torch.Size([2, 1, 2, 2]), torch.Size([2, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        w_bn: float = 0.0,
        precision: Precision = "fp32",
        normalize: Normalization | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self._w_bn = w_bn
        if w_bn > 0 and not any(_has_statistics(module) for module in model.modules()):
            expected, remedy = "0 for a model without running statistics", "leave it out"
            raise ValueError(message("gic", "w_bn", expected, str(w_bn), remedy))
        values = [value.detach().clone() for value in model.state_dict().values() if isinstance(value, Tensor)]
        self._state = (*values, torch.tensor(normalize or (), dtype=torch.float32))
        network = _WithStatistics(copy.deepcopy(model)) if w_bn > 0 else model
        self._frozen = FrozenModel(network, precision, normalize=normalize, fold=w_bn == 0, device=device, where="gic")
        self.device = self._frozen.device

    def logits(
        self,
        x: Tensor,  # [N, C, H, W] in [0, 1]
    ) -> Tensor:
        """Logits ``[N, K]``, float32."""
        return self._split(self._frozen.logits(x))[0]

    def gradient(
        self,
        x: Tensor,  # [N, C, H, W] in [0, 1]
        labels: Tensor,  # [N] int64
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of each image, float32 ``[N]``, and N times the gradient of the objective, like ``x``."""
        losses: list[Tensor] = []

        def objective(output: Tensor) -> Tensor:
            logits, distance = self._split(output)
            losses.append(cross_entropy(logits, labels, reduction="none"))
            return losses[0] if distance is None else losses[0] + self._w_bn * distance

        _, grad = self._frozen.input_gradient(x, objective)
        return losses[0].detach(), grad

    def fingerprint(self) -> tuple[Tensor, ...]:
        """What tells this victim from others."""
        return self._state

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        return (output[:, :-1], output[:, -1]) if self._w_bn > 0 else (output, None)


class _WithStatistics(nn.Module):
    """Logits and, in one more column, the same in every row, R_bn of the batch."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        distances: list[Tensor] = []

        def measure(module: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
            assert module.running_mean is not None
            assert module.running_var is not None
            distances.append(batch_norm_stat_distance(inputs[0], module.running_mean, module.running_var))

        norms = [m for m in self.network.modules() if _has_statistics(m)]
        handles = [norm.register_forward_pre_hook(measure) for norm in norms]
        try:
            logits = logits_of("gic", self.network(x), len(x)).float()
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat((logits, torch.stack(distances).sum().expand(len(x), 1)), 1)


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None
