"""Input-aware: generators that are trained when a set is poisoned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bdfast.attacks import InputAware, PoisonedData, Relabel, poison
from bdfast.attacks.generators import Generator, show

from .conftest import QUICK, make_set

OPTIONS = QUICK["input_aware"]


def test_every_image_has_its_own_pattern_and_covers_that_of_another() -> None:
    images, labels = make_set(100, (1, 8, 8))
    data = poison(images, labels, "input_aware", rate=0.1, target=3, seed=2, **OPTIONS)
    assert (len(data.poison_indices), len(data.cover_indices)) == (10, 10)
    assert isinstance(data.attack, InputAware)
    attack = data.attack
    assert attack.weights is not None
    assert attack.donors is not None
    assert attack.donors.shape == (16, 1, 8, 8)
    assert all((images == donor).flatten(1).all(1).any() for donor in attack.donors)
    residual = attack.apply(images).int() - images.int()
    assert len(residual.unique(dim=0)) > 90
    # A cover carries the pattern of one of the donors.
    cover = attack.apply(images[:1], "cover", seed=5)
    candidates = attack._show(images[:1].double().expand(16, -1, -1, -1), attack.donors.double())
    assert any(torch.equal(cover[0], (c + 1e-9).floor().to(torch.uint8)) for c in candidates)


def test_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    pair = torch.nn.ModuleList([Generator(3, 3), Generator(3, 1)])
    x, z = torch.rand(2, 2, 3, 9, 7, generator=generator)
    u = pair[1](z)
    assert u.shape == (2, 1, 9, 7)
    assert bool(((u >= 0) & (u <= 1)).all())
    expected = x + (pair[0](z) - x) * (torch.tanh(20 * u - 10) / (2 + 1e-7) + 0.5)
    torch.testing.assert_close(show(pair, x, z), expected)
    torch.testing.assert_close(pair[0](x)[:1], pair[0](x[:1]), rtol=1e-4, atol=1e-5)  # not the batch's business


def test_the_mask_learns_to_be_small() -> None:
    images, labels = make_set(48, (1, 8, 8))

    def shown(epochs: int) -> float:
        attack = InputAware(mask_epochs=epochs, generator_epochs=0, generator_batch=16, density=0.0, lambda_mask=1e4)
        trained = attack.trained(images, labels, Relabel(), 0)
        return (trained.apply(images) != images).double().mean().item()

    assert shown(6) < 0.8 * shown(0)


def test_training_once_is_enough_and_leaves_the_random_state() -> None:
    images, labels = make_set(40, (1, 8, 8))
    state = torch.get_rng_state()
    attack = InputAware(**OPTIONS).trained(images, labels, Relabel(), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert attack.trained(images, labels, Relabel(), 2) is attack
    assert poison(images, labels, attack, seed=9).attack == attack
    assert attack != InputAware(**OPTIONS).trained(images, labels, Relabel(), 2)
    with torch.no_grad():
        assert attack == InputAware(**OPTIONS).trained(images, labels, Relabel(), 1)


def test_tiny_sets(tmp_path: Path) -> None:
    images, labels = make_set(1, (3, 5, 4))
    data = poison(images, labels, "input_aware", rate=1.0, cover_rate=0.0)
    data.save(tmp_path / "x.npz")
    assert PoisonedData.load(tmp_path / "x.npz").attack == data.attack
    assert poison(images[:0], labels[:0], "input_aware").images.shape == (0, 3, 5, 4)


def test_errors() -> None:
    images, labels = make_set(20, (1, 8, 8))
    with pytest.raises(ValueError, match="input_aware: `weights` expected trained generators, got None"):
        InputAware().apply(images)
    attack = InputAware(**OPTIONS).trained(images, labels, Relabel(), 1)
    with pytest.raises(ValueError, match=r"input_aware: `images` expected images of \[1, 8, 8\]"):
        attack.apply(images[:, :, :4])
    with pytest.raises(ValueError, match="InputAware: `weights` expected weights and donors"):
        InputAware(weights=attack.weights)
    with pytest.raises(ValueError, match=r"InputAware: `weights` expected \d+ finite floats for 1 channels"):
        InputAware(weights=torch.zeros(3), donors=attack.donors)
    assert attack.weights is not None
    with pytest.raises(ValueError, match=r"InputAware: `weights` expected \d+ finite floats"):
        InputAware(weights=attack.weights * float("nan"), donors=attack.donors)
    with pytest.raises(ValueError, match="InputAware: `donors` expected images"):
        InputAware(weights=attack.weights, donors=torch.zeros(3))
    with pytest.raises(ValueError, match=r"InputAware: `train_ratio` expected a number in \[0, 0.5\]"):
        InputAware(train_ratio=0.6)
    with pytest.raises(ValueError, match="InputAware: `generator_batch`"):
        InputAware(generator_batch=1)
