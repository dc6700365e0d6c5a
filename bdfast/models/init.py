"""Weight initialisation: He, Zhang, Ren, Sun, "Delving Deep into Rectifiers", ICCV 2015."""

from __future__ import annotations

from torch import nn


def he_init_(model: nn.Module, linear_std: float | None = None) -> None:
    """Draw the convolutions from N(0, 2 / fan_out), in place; batch norms already start as the identity.

    Args:
        model: its convolutions are drawn again, their biases set to 0.
        linear_std: where given, linear layers are drawn from N(0, linear_std^2), their biases set to 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
