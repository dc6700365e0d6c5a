"""SSBA-like: small, specific to the sample, fixed by a seed."""

from __future__ import annotations

import pytest
import torch

from bdfast.attacks import SSBA

from .conftest import make_set


def test_every_pixel_moves_by_delta() -> None:
    images = make_set(20)[0].clamp(8, 247)
    residual = SSBA().apply(images).int() - images.int()
    assert residual.abs().unique().tolist() == [8]
    assert len(residual.unique(dim=0)) == 20
    share = (residual > 0).double().mean()
    assert 0.3 < share < 0.7
    assert SSBA(delta=2 / 255).apply(images).int().sub(images.int()).abs().unique().tolist() == [2]


def test_the_seed_of_the_pattern_decides() -> None:
    images = make_set(4)[0]
    assert torch.equal(SSBA().apply(images, seed=0), SSBA().apply(images, seed=9))
    assert not torch.equal(SSBA().apply(images), SSBA(pattern_seed=1).apply(images))
    code = SSBA().code()
    assert code.shape == (20,)
    assert set(code.tolist()) == {0, 1}


def test_single_images_and_batches_agree() -> None:
    images = make_set(70)[0]
    whole = SSBA().apply(images)
    assert torch.equal(torch.cat([SSBA().apply(image[None]) for image in images]), whole)


def test_errors() -> None:
    with pytest.raises(ValueError, match="SSBA: `pattern` expected 'ss-proc'"):
        SSBA(pattern="stega")
    with pytest.raises(ValueError, match="SSBA: `delta`"):
        SSBA(delta=8)
