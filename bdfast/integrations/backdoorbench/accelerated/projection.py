r"""Perturbations back on a norm ball, a whole batch at once.

.. math::

    d_i \leftarrow d_i \min\Bigl(1, \frac{r}{\lVert d_i \rVert_p}\Bigr) \quad (p = 1, 2), \qquad
    d \leftarrow \min(\max(d, -r), r) \quad (p = \infty)

For p = 1 this scales, as the defenses do, and is not the Euclidean projection. The usual loop scales image by image and
waits for each norm.
"""

from __future__ import annotations

from torch import Tensor

from bdfast.errors import message
from bdfast.ops import scale_to_ball_

NORMS = ("L_inf", "L1", "L2", "Reg")


def project_(pert: Tensor, radius: float, norm: str, where: str) -> Tensor:
    """``pert`` ``[N, ...]``, changed in place; ``"Reg"`` leaves it as it is.

    Raises:
        ValueError: ``norm`` is none of ``"L_inf"``, ``"L1"``, ``"L2"``, ``"Reg"``.

    Example:
        >>> import torch
        >>> project_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, "L2", "example")
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    if norm not in NORMS:
        raise ValueError(message(where, "norm_type", f"one of {', '.join(NORMS)}", repr(norm), "correct it"))
    data = pert.detach()  # the caller's tensor may be a leaf that requires gradients
    if norm == "L_inf":
        data.clamp_(-radius, radius)
    elif norm != "Reg":
        scale_to_ball_(data, radius, 1 if norm == "L1" else 2)
    return pert


def plain_project_(pert: Tensor, radius: float, norm: str, where: str) -> Tensor:
    """The usual loop for the same."""
    if norm not in ("L1", "L2"):
        return project_(pert, radius, norm, where)
    data = pert.detach()
    flat = data.flatten(1)
    lengths = flat.abs().sum(dim=1) if norm == "L1" else flat.square().sum(dim=1).sqrt()
    for image, length in zip(data, lengths, strict=True):
        if length > radius:
            image.copy_(image * radius / length.item())
    return pert
