r"""NPD (Zhu et al., NeurIPS 2023, arXiv 2307.02934): perturbed images, and perturbations back on their norm ball.

Images are normalised, perturbations are in pixel units:

.. math::

    x' = \frac{\operatorname{clip}_{[0,1]}(x \sigma + \mu + d) - \mu}{\sigma}

With torchvision's transforms that is eleven passes over the batch, and each transform builds and checks its constants
anew; here it is two products, two sums and a clip, and a backward pass that reads one byte an element beside its
gradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bdfast.integrations.backdoorbench.accelerated.projection import plain_project_, project_
from bdfast.integrations.backdoorbench.accelerated.switch import switchable

_WHERE = "NPD.projection"


def plain_projection(self: Any, pert: Tensor, args: Any) -> Tensor:
    """The usual loop: image by image, with a wait for each norm."""
    return plain_project_(pert, args.trigger_norm, args.norm_type, _WHERE)


@switchable(plain_projection)
def projection(self: Any, pert: Tensor, args: Any) -> Tensor:
    """``pert`` ``[N, C, H, W]``, projected in place on the ball of ``args.norm_type`` and radius ``args.trigger_norm``.

    Agrees with the loop over images to one rounding of the scale. The norm is ``"L_inf"``, ``"L1"`` or ``"L2"``;
    ``"Reg"`` leaves it as it is.

    Raises:
        ValueError: another norm.

    Example:
        >>> from types import SimpleNamespace
        >>> args = SimpleNamespace(norm_type="L1", trigger_norm=1.0)
        >>> projection(None, torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), args).flatten()
        tensor([0.2500, 0.7500])
    """
    return project_(pert, args.trigger_norm, args.norm_type, _WHERE)


def plain_get_perturbed_image(self: Any, images: Tensor, pert: Tensor) -> Tensor:
    """The transforms one after the other."""
    return cast(Tensor, self.normalization((self.denormalization(images) + pert).clamp(0, 1)))


@switchable(plain_get_perturbed_image)
def get_perturbed_image(self: Any, images: Tensor, pert: Tensor) -> Tensor:
    """Normalised images ``[N, C, H, W]`` with a perturbation in pixel units, clipped to [0, 1]; differentiable in both.

    Agrees with ``self.denormalization``, sum, clip and ``self.normalization`` to 1e-6. Transforms other than
    normalisations (by ``mean`` and ``std``) and compositions of them (``transforms``) are called as they are.

    Example:
        >>> from types import SimpleNamespace
        >>> to_pixels = SimpleNamespace(mean=[-1.0], std=[2.0])  # (x + 1) / 2
        >>> from_pixels = SimpleNamespace(mean=[0.5], std=[0.5])
        >>> npd = SimpleNamespace(denormalization=to_pixels, normalization=from_pixels)
        >>> images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)
        >>> get_perturbed_image(npd, images, torch.full((1, 1, 1, 3), 0.25)).flatten()
        tensor([-0.5000,  0.5000,  1.0000])
    """
    to_pixels, from_pixels = _affine(self.denormalization), _affine(self.normalization)
    if to_pixels is None or from_pixels is None:
        return plain_get_perturbed_image(self, images, pert)
    constants = _columns((*to_pixels, *from_pixels), images.dtype, images.device)
    return cast(Tensor, cast(Any, _Perturbed).apply(images, pert, *constants))


@lru_cache(maxsize=8)
def _columns(rows: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """``[C, 1, 1]`` of each row; kept, because a copy to a GPU waits until it is there."""
    with torch.inference_mode(False):  # a later call may need gradients
        return tuple(torch.tensor(row, dtype=dtype, device=device)[:, None, None] for row in rows)


class _Perturbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, pert: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        pixels = torch.addcmul(b, images, a) + pert
        y = pixels.clamp(0.0, 1.0)
        ctx.save_for_backward(pixels == y, a, c)  # the gradient of a clip: 1 where it changes nothing
        return y.mul_(c).add_(d)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inside, a, c = ctx.saved_tensors
        grad_pert = grad * c * inside
        needs_images, needs_pert = ctx.needs_input_grad[:2]
        return grad_pert * a if needs_images else None, grad_pert if needs_pert else None, None, None, None, None


Affine = tuple[tuple[float, ...], tuple[float, ...]]


def _affine(transform: Any) -> Affine | None:
    """Scale and shift of each channel, or None where the transform is of another kind."""
    if hasattr(transform, "transforms"):
        parts = [_affine(part) for part in transform.transforms]
        found = [part for part in parts if part is not None]
        if not found or len(found) < len(parts):
            return None
        scale, shift = found[0]
        for next_scale, next_shift in found[1:]:
            shift = tuple(s * t + n for s, t, n in zip(next_scale, shift, next_shift, strict=True))
            scale = tuple(s * t for s, t in zip(next_scale, scale, strict=True))
        return scale, shift
    if not hasattr(transform, "mean") or not hasattr(transform, "std"):
        return None
    mean, std = ([float(v) for v in getattr(transform, name)] for name in ("mean", "std"))
    return tuple(1 / s for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
