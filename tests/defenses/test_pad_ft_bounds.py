"""The rewritten network of step 2 computes what the clipped one does, and reaches its bounds alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bdfast
from bdfast.defenses.pad_ft.bounds import frozen_copy
from bdfast.nn import clip_activations, normalized
from bdfast.runtime.folding import fold


def clipped_network(arch: str, sites: Any, *, fuse: bool) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A network whose batch norms are no identities, with bounds that bind."""
    model = bdfast.models.build(arch, num_classes=4, image_size=32, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
        images = torch.rand(3, 3, 32, 32)
    for p in model.parameters():
        p.requires_grad_(False)
    clipped = clip_activations(model.eval(), sites, bound=0.4, fuse=fuse)
    bounds: dict[str, Tensor] = {name: z.requires_grad_() for name, z in clipped.bounds.items()}
    return clipped, bounds, images


def logits_and_gradients(network: nn.Module, bounds: dict[str, Tensor], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = network(images)
    return logits.detach(), list(torch.autograd.grad(logits.square().sum(), list(bounds.values())))


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize(
    ("arch", "sites"),
    [
        ("preact_resnet18", "stage-relu"),
        ("resnet18", "stage-relu"),
        ("mobilenet_v2", "all-relu"),
        ("vgg19_bn", "all-relu"),
    ],
)
def test_a_frozen_copy_is_the_same_function_of_images_and_bounds(arch: str, sites: str, fuse: bool) -> None:
    clipped, bounds, images = clipped_network(arch, sites, fuse=fuse)
    expected, expected_gradients = logits_and_gradients(clipped, bounds, images)
    with torch.no_grad():
        loose = {name: z.detach().clone() for name, z in bounds.items()}
        for z in bounds.values():
            z.fill_(1e6)
        assert not torch.allclose(clipped(images), expected)  # the bounds did bind
        frozen = frozen_copy(clipped, bounds, images[:2])  # ... and are found though they do not while it is made
        for name, z in bounds.items():
            z.copy_(loose[name])
    logits, gradients = logits_and_gradients(frozen, bounds, images)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()) + 1e-7)
    assert {id(p) for p in frozen.parameters()} & {id(p) for p in clipped.parameters()} == {
        id(z) for z in bounds.values()
    }


def test_batch_norms_are_folded_behind_clips_that_take_one() -> None:
    clipped, _, images = clipped_network("preact_resnet18", "stage-relu", fuse=True)
    _, report = fold(nn.Sequential(normalized(clipped, (0.5,) * 3, (0.25,) * 3)).eval(), images)
    assert report.method == "graph"
    assert len(report.folded) == 8
    assert len(report.fused) == 5
