"""GIC: what it returns, against a plain loop, and what it leaves alone."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bdfast.defenses import GICConfig, gic
from bdfast.errors import LabelRangeError
from bdfast.nn import normalized
from tests.defenses.conftest import Split, Victim


def plain_loop(model: nn.Module, x: Tensor, y: Tensor, *, steps: int, size: float, delta: float, p: str) -> Tensor:
    """Projected descent as one would write it."""
    d = torch.zeros_like(x)
    for _ in range(steps):
        d.requires_grad_()
        loss = nn.functional.cross_entropy(model(x + d), y, reduction="sum")
        (g,) = torch.autograd.grad(loss, d)
        with torch.no_grad():
            if p == "inf":
                d = (d - size * g.sign()).clamp(-delta, delta)
            else:
                d = d - size * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                d = d * (delta / d.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(max=1)
            d = (x + d).clamp(0, 1) - x
    return x + d


@pytest.mark.parametrize(("p", "delta"), [("inf", 0.1), (2, 0.4)])
@pytest.mark.parametrize("outside", [False, True])
def test_sample_mode_is_projected_descent(mlp: nn.Sequential, tiny: Split, p: Any, delta: float, outside: bool) -> None:
    images, labels = tiny
    inside = normalized(mlp, 0.3, 0.5)
    model, normalize = (mlp, ((0.3,), (0.5,))) if outside else (inside, None)
    config = GICConfig(p=p, delta=delta, steps=6, batch_size=13)
    result = gic(model, tiny, config, normalize=normalize)
    expected = plain_loop(inside.eval(), images, labels, steps=6, size=delta / 8, delta=delta, p=str(p))
    torch.testing.assert_close(result.data[0], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(result.data[1], labels)
    assert result.ids.tolist() == list(range(30))
    assert result.imprint.loss[1] < result.imprint.loss[0]
    assert 0 < result.distance[0] <= result.distance[1] <= delta * (1 + 1e-5)
    assert float(result.data[0].min()) >= 0
    assert float(result.data[0].max()) <= 1


def test_images_do_not_depend_on_the_batch_they_are_in(mlp: nn.Sequential, tiny: Split) -> None:
    one, two = (gic(mlp, tiny, GICConfig(batch_size=size)).data[0] for size in (4, 30))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_saturated_images_stay_as_they_are(tiny: Split) -> None:
    sure = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(sure[1].weight)  # the loss does not depend on the image
    for p in ("inf", 2):
        result = gic(sure, tiny, GICConfig(p=p))  # type: ignore[arg-type]
        assert torch.equal(result.data[0], tiny[0])
        assert result.counts["unchanged"] == 30


class Fragile(nn.Module):
    """NaN for images whose first pixel is above 0.9."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        broken = torch.where(x[:, 0, 0, 0] > 0.9, float("nan"), 0.0)
        return self.model(x) + broken[:, None]


@pytest.mark.parametrize("mode", ["sample", "prompt", "network"])
def test_loss_that_is_not_finite_leaves_the_image_alone(mlp: nn.Sequential, tiny: Split, mode: Any) -> None:
    images, labels = tiny[0].clone(), tiny[1]
    images[[4, 7], 0, 0, 0] = 1.0
    with pytest.warns(
        UserWarning, match="`auxiliary_data` expected images with a finite loss, got 2 others, the first"
    ):
        result = gic(Fragile(mlp), (images, labels), GICConfig(mode=mode, epochs=2, delta=0.05))
    assert result.counts["nonfinite"] == 2
    assert torch.equal(result.data[0][[4, 7]], images[[4, 7]])
    assert result.counts["unchanged"] == 2
    assert bool(result.data[0].isfinite().all())


def test_early_exit_stops_where_the_victim_is_confident(mlp: nn.Sequential, tiny: Split) -> None:
    straight = gic(mlp, tiny, GICConfig(delta=0.3, steps=30))
    stopped = gic(mlp, tiny, GICConfig(delta=0.3, steps=30, conf=0.5))
    with torch.no_grad():
        at_first, at_last = (mlp(x).softmax(1).gather(1, tiny[1][:, None])[:, 0] for x in (tiny[0], stopped.data[0]))
        unstopped = mlp(straight.data[0]).softmax(1).gather(1, tiny[1][:, None])[:, 0]
    assert torch.equal(stopped.data[0][at_first >= 0.5], tiny[0][at_first >= 0.5])
    assert 0 < stopped.counts["early"] == int((at_last >= 0.5).sum())
    assert float(at_last.mean()) < float(unstopped.mean())
    assert gic(mlp, tiny, GICConfig(conf=1.0)).counts["early"] == 0


def test_pseudo_labels_are_the_victims(mlp: nn.Sequential, tiny: Split) -> None:
    wrong = torch.full_like(tiny[1], 77)  # not looked at
    with torch.no_grad():
        mlp[5].bias -= mlp(tiny[0]).mean(0)
        guessed = mlp(tiny[0]).argmax(1)
    assert set(guessed.tolist()) == {0, 1, 2}
    result = gic(mlp, (tiny[0], wrong), GICConfig(labels="pseudo"))
    assert torch.equal(result.data[1], guessed)
    assert torch.equal(result.data[0], gic(mlp, (tiny[0], guessed)).data[0])
    with pytest.raises(LabelRangeError, match=r"gic: `auxiliary_data: labels` expected classes in \[0, 3\), got 77"):
        gic(mlp, (tiny[0], wrong))


def test_mix_adds_originals(mlp: nn.Sequential, tiny: Split) -> None:
    result = gic(mlp, tiny, GICConfig(mix=0.5))
    images, labels = result.data
    assert len(images) == len(labels) == len(result.ids) == 45
    added = result.ids[30:]
    assert len(set(added.tolist())) == 15 == result.counts["mixed"]
    assert torch.equal(images[30:], tiny[0][added])
    assert torch.equal(labels, tiny[1][result.ids])
    assert not torch.equal(result.ids, gic(mlp, tiny, GICConfig(mix=0.5, seed=1)).ids)


@pytest.mark.parametrize("mode", ["sample", "prompt", "network"])
def test_the_callers_world_is_as_before(mlp: nn.Sequential, tiny: Split, mode: Any) -> None:
    mlp.train()
    state = {name: value.clone() for name, value in mlp.state_dict().items()}
    flags = [p.requires_grad for p in mlp.parameters()]
    kept, rng = tiny[0].clone(), torch.get_rng_state()
    with torch.no_grad():
        one = gic(mlp, tiny, GICConfig(mode=mode, epochs=2, w_bn=0.01))
    two = gic(mlp, tiny, GICConfig(mode=mode, epochs=2, w_bn=0.01))
    assert torch.equal(one.data[0], two.data[0])
    assert torch.equal(torch.get_rng_state(), rng)
    assert mlp.training
    assert [p.requires_grad for p in mlp.parameters()] == flags
    assert all(p.grad is None for p in mlp.parameters())
    assert all(torch.equal(value, state[name]) for name, value in mlp.state_dict().items())
    assert not any(module._forward_pre_hooks for module in mlp.modules())
    assert torch.equal(tiny[0], kept)


@pytest.mark.parametrize("mode", ["sample", "prompt", "network"])
def test_a_killed_run_goes_on_bit_for_bit(mlp: nn.Sequential, tiny: Split, mode: Any, tmp_path: Path) -> None:
    config = GICConfig(mode=mode, epochs=4, batch_size=10)
    calls: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        calls.append(record["epoch"])
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gic(mlp, tiny, config, callback=stop, checkpoint=tmp_path / "run")
    resumed = gic(mlp, tiny, config, callback=lambda record: calls.append(record["epoch"]), checkpoint=tmp_path / "run")
    assert torch.equal(resumed.data[0], gic(mlp, tiny, config).data[0])
    assert calls[2:] in ([2, 3], [3, 4])  # batches are kept when they are told of, or after it; epochs before
    with pytest.raises(ValueError, match="of this very run"):
        gic(mlp, tiny, GICConfig(mode=mode, epochs=4, batch_size=10, delta=0.1), checkpoint=tmp_path / "run")


def test_what_a_data_set_draws_comes_from_the_seed(mlp: nn.Sequential, tiny: Split) -> None:
    class Augmented(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(tiny[1])

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return tiny[0][index] * torch.rand(()), int(tiny[1][index])

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = gic(mlp, Augmented(), GICConfig(steps=2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(gic(mlp, Augmented(), GICConfig(steps=2)).data[0], first.data[0])


def test_to_json_and_classes_without_images(mlp: nn.Sequential, tiny: Split) -> None:
    some = tiny[1] != 2
    with pytest.warns(UserWarning, match=r"expected images of every class, got none of class \[2\]"):
        result = gic(mlp, (tiny[0][some], tiny[1][some]), GICConfig(steps=2))
    content = json.loads(result.to_json())
    assert content["config"]["p"] == "inf"
    assert content["counts"]["images"] == 20
    assert content["imprint"]["transfer"][2] is None
    assert content["imprint"]["drift"] >= 0
    assert "data" not in content


def test_bytes_and_bfloat16(mlp: nn.Sequential) -> None:
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randint(0, 256, (30, 1, 3, 4), dtype=torch.uint8, generator=g), torch.arange(30) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, half = (gic(mlp, (images, labels), GICConfig(precision=p)) for p in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert plain.data[0].dtype == half.data[0].dtype == torch.float32
    assert float((plain.data[0] - images / 255).abs().max()) <= 8 / 255 + 1e-6
    assert half.imprint.loss[1] < half.imprint.loss[0]


def test_it_brings_images_to_where_the_victim_is_confident(victim: Victim) -> None:
    result = gic(victim.model, victim.reserve(140, seed=0), GICConfig())
    assert result.imprint.loss[1] < 0.5 * result.imprint.loss[0]
    assert result.imprint.accuracy[1] >= result.imprint.accuracy[0]
    assert result.imprint.drifted == []


def test_wrong_arguments(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(TypeError, match="gic: `config` expected a GICConfig, got dict"):
        gic(mlp, tiny, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"gic: `model` expected a torch.nn.Module, got function"):
        gic(lambda x: x, tiny)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gic: `w_bn` expected 0 for a model without running statistics"):
        gic(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), tiny, GICConfig(w_bn=0.1))
    with torch.no_grad():
        mlp[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="gic: `model` expected finite weights"):
        gic(mlp, tiny)
