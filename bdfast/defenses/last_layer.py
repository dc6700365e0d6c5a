"""The features of a network: what goes into its last linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bdfast.errors import message


class LastLayer:
    """Reads what goes into a network's last linear layer; a context, since it hangs a hook on it.

    Raises:
        ValueError: when called, a network that does not call that layer.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with LastLayer(net, net[3]) as features:
        ...     hidden, logits = features(torch.rand(5, 1, 2, 2))
        >>> hidden.shape, logits.shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """

    def __init__(self, forward: nn.Module, layer: nn.Linear, where: str = "pad_ft") -> None:
        self._forward, self._layer, self._where = forward, layer, where

    def __enter__(self) -> LastLayer:
        self._handle = self._layer.register_forward_pre_hook(self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def __call__(
        self,
        images: Tensor,  # [B, C, H, W] in [0, 1]
    ) -> tuple[Tensor, Tensor]:
        self._hidden: Tensor | None = None
        output = self._forward(images)
        logits: Tensor = getattr(output, "logits", output)
        if self._hidden is None:
            expected, got = "a network that calls its last linear layer", "one that does not, or a compiled one"
            raise ValueError(message(self._where, "model", expected, got, "pass the module itself, not a compiled one"))
        return self._hidden, logits

    @torch.no_grad()
    def hidden(
        self,
        images: Tensor,  # [B, C, H, W] in [0, 1]
    ) -> Tensor:
        """The features alone, without gradients."""
        return self(images)[0]

    def _catch(self, layer: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0].to(layer.weight.dtype)  # of lower precision under autocast
