"""D3: removal on digits, the equations against an independent loop, and the edges of its specification."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bdfast
from bdfast.defenses import D3Config, D3Result, FineTuneConfig, d3, fine_tune
from bdfast.errors import LabelRangeError
from bdfast.runtime import Augment, ResidentData
from bdfast.training.loop import epoch_seed
from tests.defenses.conftest import Split, Victim
from tests.models.test_classifier import Distilled, NormLinear

QUICK = D3Config(epochs=3, batch_size=8, augment="none")


def quick(**changes: Any) -> D3Config:
    return D3Config(**{**asdict(QUICK), **changes})


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same bits, modes and flags."""
    values = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    flags = [[m.training for m in x.modules()] + [p.requires_grad for p in x.parameters()] for x in (a, b)]
    return all(torch.equal(p, q) for p, q in values) and flags[0] == flags[1]


# --- what it is for --------------------------------------------------------------------------------------------------


def test_badnets_on_digits_is_removed(victim: Victim) -> None:
    before = victim.evaluate(victim.model)
    assert before.asr > 0.9
    result = d3(victim.model, victim.reserve(160, seed=7), D3Config.for_digits())
    after = victim.evaluate(result.model)
    assert after.asr < 0.1
    assert before.acc - after.acc <= 0.04
    assert victim.evaluate(victim.model) == before
    final = result.history[-1]
    assert final["distance"]["linear"] == pytest.approx(2**0.5 * final["norm"]["linear"], rel=0.2)


def test_fine_tuning_alone_leaves_the_backdoor(victim: Victim) -> None:
    result = fine_tune(victim.model, victim.reserve(160, seed=7), FineTuneConfig(epochs=30))
    assert victim.evaluate(result.model).asr > 0.5


# --- the algorithm ---------------------------------------------------------------------------------------------------


def plain_d3(model: nn.Sequential, data: Split, config: D3Config, c: float, start: Tensor) -> list[Tensor]:
    """D3 from autograd of the whole objective, torch.optim.SGD, a closed-form cosine and an explicit projection.

    Returns the selected weight after every step.
    """
    w = model[-1].weight
    w0 = w.detach().clone()
    w.data.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    resident = ResidentData(*data)
    steps = []
    for epoch in range(1, config.epochs + 1):
        optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * (epoch - 1) / config.epochs)) / 2
        for x, y, _ in resident.batches(config.batch_size, shuffle=True, epoch_seed=epoch_seed(config.seed, epoch)):
            ce = nn.functional.cross_entropy(model(x), y, reduction="none")
            hinge = (ce - config.eps).clamp(min=0).mean()
            if config.hinge == "batch":
                hinge = (ce.mean() - config.eps).clamp(min=0)
            optimizer.zero_grad()
            (c * (config.lam * hinge - (w - w0).norm())).backward()
            optimizer.step()
            w.data.mul_(w0.norm() / w.norm())
            steps.append(w.detach().clone())
    return steps


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("hinge", ["sample", "batch"])
@pytest.mark.parametrize(("lam", "c"), [(10.0, 1 / 11), (1.0, 1.0), (0.5, 1.0)])
def test_a_linear_model_follows_the_plain_loop_step_by_step(
    tiny: Split, monkeypatch: pytest.MonkeyPatch, backend: Any, hinge: Any, lam: float, c: float
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    config = D3Config(lam=lam, hinge=hinge, epochs=4, batch_size=7, warm_up="far", augment="none", seed=5)
    expected = plain_d3(copy.deepcopy(model), tiny, config, c, start=-model[-1].weight.detach())
    seen: list[Tensor] = []

    class Recording(bdfast.optim.ProjectedSGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            seen.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setitem(d3.__globals__, "ProjectedSGD", Recording)
    with bdfast.backend(backend):
        result = d3(model, tiny, config)
    assert len(seen) == len(expected) == 4 * 5  # the last batch of 2 counts
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert result.history[1]["lr"] == pytest.approx(0.01 * (1 + math.cos(math.pi / 4)) / 2)


def test_backends_agree_on_a_network(mlp: nn.Sequential, tiny: Split) -> None:
    results = []
    for backend in ("reference", "auto"):
        with bdfast.backend(backend):  # type: ignore[arg-type]
            results.append(d3(mlp, tiny, quick(epochs=5)))
    for p, q in zip(*(r.model.parameters() for r in results), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_history_adds_up(mlp: nn.Sequential, tiny: Split) -> None:
    result = d3(mlp, tiny, quick(layers=["1", "5"], lam=4.0))
    assert result.layers == ("1", "5")
    for epoch, record in enumerate(result.history, start=1):
        assert (record["epoch"], record["epochs"]) == (epoch, 3)
        distances, norms = record["distance"], record["norm"]
        assert record["loss"] == pytest.approx(0.2 * (4 * record["hinge"] - sum(distances.values())))
        for name in ("1", "5"):
            w0 = mlp.get_submodule(name).weight
            assert norms[name] == pytest.approx(w0.norm().item(), rel=1e-6)
        assert 0 <= record["accuracy"] <= 1
    moved = (result.model[5].weight - mlp[5].weight).norm().item()
    assert result.history[-1]["distance"]["5"] == pytest.approx(moved, rel=1e-5)


def test_distance_falls_as_lambda_rises(mlp: nn.Sequential, tiny: Split) -> None:
    distances = []
    for lam in (0.0, 3.0, 300.0):
        result = d3(mlp, tiny, quick(epochs=60, lam=lam, loss_scale=0.1, lr=0.1))
        distances.append(result.history[-1]["distance"]["5"])
    assert distances[0] > distances[1] > distances[2]
    norm = mlp[5].weight.norm().item()
    assert distances[0] == pytest.approx(2 * norm, rel=0.01)  # nothing holds it: the antipode


def test_hinge_lets_the_weights_go_once_the_loss_is_tolerated(mlp: nn.Sequential, tiny: Split) -> None:
    result = d3(mlp, tiny, quick(epochs=60, eps=50.0, lr=0.1, loss_scale=0.2))
    assert result.history[-1]["hinge"] == 0
    assert result.history[-1]["distance"]["5"] == pytest.approx(2 * mlp[5].weight.norm().item(), rel=0.01)


@pytest.mark.parametrize("warm_up", ["random", "far", "noise", "near"])
def test_warm_ups_start_where_they_say(mlp: nn.Sequential, tiny: Split, warm_up: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = quick(epochs=1, warm_up=warm_up, lr=1e-9, batch_size=30)
        result = d3(mlp, tiny, config)
    w, w0 = result.model[5].weight.detach(), mlp[5].weight.detach()
    assert w.norm() == pytest.approx(w0.norm().item(), rel=1e-6)
    distance = (w - w0).norm().item() / w0.norm().item()
    low, high = {"random": (0.9, 1.9), "far": (2, 2), "noise": (0.3, 1.6), "near": (0, 0)}[warm_up]
    assert low - 1e-5 <= distance <= high + 1e-5


# --- edges of the specification --------------------------------------------------------------------------------------


def test_near_stands_still_without_noise(mlp: nn.Sequential, tiny: Split) -> None:
    at_rest = {"warm_up": "near", "eps": 50.0, "lr": 0.1, "epochs": 20}
    with pytest.warns(UserWarning, match="the distance has no gradient at W0"):
        still = d3(mlp, tiny, quick(**at_rest))
    torch.testing.assert_close(still.model[5].weight, mlp[5].weight, rtol=1e-6, atol=1e-7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = d3(mlp, tiny, quick(**at_rest, near_noise=1e-3))
    assert moved.history[-1]["distance"]["5"] > 0.5


def test_middle_waits_for_a_direction(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.warns(UserWarning, match="0 has no direction to project along") as told:
        result = d3(mlp, tiny, quick(warm_up="middle"))
    assert told[0].filename == __file__
    assert result.history[-1]["norm"]["5"] == pytest.approx(mlp[5].weight.norm().item(), rel=1e-6)


def test_a_layer_without_norm_is_refused_by_name(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[5].weight.data.zero_()
    with pytest.raises(ValueError, match=r"d3: `layers` expected layers with a norm above 0, got 0 in `5`"):
        d3(mlp, tiny, QUICK)


def test_weights_that_are_not_finite_are_refused(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[2].running_var[3] = math.nan
    with pytest.raises(ValueError, match=r"expected finite weights, got NaN or infinity in `2.running_var`"):
        d3(mlp, tiny, QUICK)


@pytest.mark.parametrize("inplace", [False, True])
def test_divergence_is_noticed_and_the_weights_are_kept(mlp: nn.Sequential, tiny: Split, inplace: bool) -> None:
    before = copy.deepcopy(mlp)
    with pytest.raises(FloatingPointError, match="in epoch 1; lower lr"):
        d3(mlp, tiny, quick(lr=1e38, momentum=0.0), inplace=inplace)
    assert same(mlp, before)


def test_a_missing_class_warns(mlp: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny
    kept = labels != 1
    with pytest.warns(UserWarning, match=r"expected samples of every class, got none of class \[1\]") as told:
        d3(mlp, (images[kept], labels[kept]), QUICK)
    assert told[0].filename == __file__


def test_wrong_data_is_refused_before_any_work(mlp: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny
    epochs: list[Any] = []
    with pytest.raises(LabelRangeError, match=r"`clean_data: labels` expected classes in \[0, 3\), got 3 at index 4"):
        d3(mlp, (images, labels.index_fill(0, torch.tensor([4]), 3)), QUICK, callback=epochs.append)
    with pytest.raises(ValueError, match="finite pixels in"):
        d3(mlp, (images * 255, labels), QUICK, callback=epochs.append)
    with pytest.raises(TypeError, match="`clean_data` expected a tuple"):
        d3(mlp, 3, QUICK, callback=epochs.append)
    with pytest.raises(TypeError, match=r"`model` expected a torch\.nn\.Module, got str"):
        d3("net", tiny, QUICK, callback=epochs.append)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`config` expected a D3Config, got dict"):
        d3(mlp, tiny, {"lam": 1}, callback=epochs.append)  # type: ignore[arg-type]
    assert epochs == []


def test_lambda_of_one_is_not_scaled() -> None:
    assert D3Config(lam=1.0).scale == 1.0
    assert D3Config(lam=1.01).scale == pytest.approx(1 / 2.01)
    assert D3Config().scale == pytest.approx(1 / 11)
    assert D3Config(preset="release").scale == 1.0
    assert D3Config(loss_scale=0.3).scale == 0.3


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layers_by_name_take_what_is_inside(tiny: Split) -> None:
    body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(48, 3))
    result = d3(model, tiny, quick(layers=["2", "0"]))
    assert result.layers == ("0.0", "0.2", "2")
    for name in result.layers:
        w, w0 = result.model.get_submodule(name).weight, model.get_submodule(name).weight
        torch.testing.assert_close(w.norm(), w0.norm(), rtol=1e-6, atol=0)
        assert (w - w0).norm() > 0.5 * w0.norm()
    assert not torch.equal(result.model[2].bias, model[2].bias)


@pytest.mark.parametrize("head", [lambda: NormLinear(4, 3), lambda: nn.Linear(4, 3)])
def test_both_heads_of_a_distilled_model_move(tiny: Split, head: Callable[[], nn.Module]) -> None:
    """One that stayed would keep half of the backdoor's logits."""
    model = Distilled(head, head).eval()
    result = d3(model, tiny, quick(warm_up="far"))
    before, after = model.state_dict(), result.model.state_dict()
    assert {name.split(".")[0] for name in result.layers} == {"head", "head_dist"}
    for name in result.layers:
        distance, norm = (result.history[-1][key][name] for key in ("distance", "norm"))
        assert norm == pytest.approx(float(before[f"{name}.weight"].norm()), rel=1e-5)
        assert distance == pytest.approx(float((after[f"{name}.weight"] - before[f"{name}.weight"]).norm()), rel=1e-4)
        assert distance > norm


def test_wrong_layers(mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(ValueError, match=r"`layers` expected names of modules of the model, got 'linear'"):
        d3(mlp, tiny, quick(layers=["linear"]))
    with pytest.raises(ValueError, match=r"`layers` expected modules that hold a Linear or Conv2d, got '3'"):
        d3(mlp, tiny, quick(layers=["3"]))
    torch.nn.utils.parametrizations.weight_norm(mlp[5])
    with pytest.raises(ValueError, match="got a computed weight in `5`"):
        d3(mlp, tiny, quick(layers=["5"]))
    with pytest.raises(ValueError, match=r'name the layers in the config: layers=\["conv5"\]'):
        d3(nn.Sequential(nn.Conv2d(1, 3, (3, 4)), nn.Flatten()), tiny, QUICK)


def test_shared_weights_count_once(tiny: Split) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    model[3].weight = model[1].weight
    assert d3(model, tiny, QUICK).layers == ("1", "5")


# --- the caller's world ----------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [None, Stop, KeyboardInterrupt])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_callers_model_is_as_before(
    mlp: nn.Sequential, tiny: Split, error: type[BaseException] | None, inplace: bool
) -> None:
    mlp[5].weight.grad = torch.ones_like(mlp[5].weight)
    mlp[2].train()  # a mixed mode
    calls: list[int] = []
    handle = mlp[5].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(mlp)

    def callback(record: dict[str, Any]) -> None:
        if record["epoch"] == 2 and error is not None:
            raise error

    if error is None:
        result = d3(mlp, tiny, QUICK, callback=callback, inplace=inplace)
        assert (result.model is mlp) == inplace
        assert same(mlp, before) == (not inplace)
        assert [m.training for m in result.model.modules()] == [m.training for m in before.modules()]
        assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in before.parameters()]
        assert not torch.equal(result.model[2].bias, before[2].bias)  # frozen by the caller, trained all the same
    else:
        with pytest.raises(error):
            d3(mlp, tiny, QUICK, callback=callback, inplace=inplace)
        assert same(mlp, before)
    assert torch.equal(mlp[5].weight.grad, torch.ones_like(mlp[5].weight))
    assert list(mlp[5]._forward_hooks) == [handle.id]
    assert calls


def test_random_state_is_untouched_and_does_not_matter(mlp: nn.Sequential, tiny: Split) -> None:
    import random

    import numpy as np

    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    first = d3(mlp, tiny, QUICK)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(99)
        second = d3(mlp, tiny, QUICK)
    other = d3(mlp, tiny, quick(seed=1))
    assert same(first.model, second.model)
    assert not same(first.model, other.model)


def test_runs_under_no_grad_and_inference_mode(mlp: nn.Sequential, tiny: Split) -> None:
    expected = d3(mlp, tiny, QUICK).model
    with torch.no_grad():
        assert same(d3(mlp, tiny, QUICK).model, expected)
    with torch.inference_mode():
        assert same(d3(mlp, tiny, QUICK).model, expected)


def test_kinds_of_data_and_models_agree(mlp: nn.Sequential, tiny: Split) -> None:
    expected = d3(mlp, tiny, QUICK).model
    dataset = TensorDataset(*tiny)
    assert same(d3(mlp, dataset, QUICK).model, expected)
    assert same(d3(mlp, DataLoader(dataset, batch_size=4, shuffle=True), QUICK).model, expected)

    class WithLogits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp

        def forward(self, x: Tensor) -> Any:
            return type("Output", (), {"logits": self.net(x)})()

    assert same(d3(WithLogits().eval(), tiny, quick(layers=["net.5"])).model.net, expected)
    images = (tiny[0] * 255).round().to(torch.uint8)
    as_bytes, as_floats = (d3(mlp, (x, tiny[1]), QUICK).model for x in (images, images / 255))
    assert same(as_bytes, as_floats)


def test_normalization_outside_equals_inside(mlp: nn.Sequential, tiny: Split) -> None:
    outside = d3(mlp, tiny, QUICK, normalize=([0.5], [0.25]))
    inside = d3(bdfast.nn.normalized(copy.deepcopy(mlp), 0.5, 0.25), tiny, QUICK)
    assert isinstance(outside.model, nn.Sequential)
    for p, q in zip(outside.model.parameters(), inside.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_device_is_checked(mlp: nn.Sequential, tiny: Split) -> None:
    assert same(d3(mlp, tiny, QUICK, device="cpu").model, d3(mlp, tiny, QUICK).model)
    with pytest.raises(ValueError, match="`device` expected a device of this machine, got cuda:99"):
        d3(mlp, tiny, QUICK, device="cuda:99")


def test_models_that_cannot_be_copied_can_be_trained_in_place(mlp: nn.Sequential, tiny: Split) -> None:
    mlp.cache = mlp[5].weight * 2  # type: ignore[assignment]  # a tensor of a graph: deepcopy refuses it
    with pytest.raises(ValueError, match=r"expected a model that copy\.deepcopy can copy.*pass inplace=True"):
        d3(mlp, tiny, QUICK)
    assert d3(mlp, tiny, QUICK, inplace=True).model is mlp


# --- options ---------------------------------------------------------------------------------------------------------


def test_frozen_batch_norm_keeps_its_statistics(mlp: nn.Sequential, tiny: Split) -> None:
    frozen, trained = (d3(mlp, tiny, quick(bn=bn)).model for bn in ("frozen", "train"))
    assert torch.equal(frozen[2].running_mean, mlp[2].running_mean)
    assert not torch.equal(trained[2].running_mean, mlp[2].running_mean)
    assert not torch.equal(frozen[2].weight, mlp[2].weight)


def test_bfloat16(mlp: nn.Sequential, tiny: Split) -> None:
    autocast = d3(mlp, tiny, quick(precision="bf16"))
    assert autocast.model[5].weight.dtype == torch.float32
    exact = d3(mlp, tiny, QUICK)
    torch.testing.assert_close(autocast.model[5].weight, exact.model[5].weight, rtol=0.1, atol=0.1)
    assert not torch.equal(autocast.model[5].weight, exact.model[5].weight)
    half = d3(copy.deepcopy(mlp).bfloat16(), tiny, QUICK)
    assert half.model[5].weight.dtype == torch.bfloat16
    assert half.history[-1]["norm"]["5"] == pytest.approx(mlp[5].weight.norm().item(), rel=0.01)


@pytest.mark.parametrize("method", ["d3", "ft"])
def test_channels_last_changes_the_memory_alone(method: str, tiny: Split) -> None:
    torch.manual_seed(0)
    channels = tiny[0].shape[1]
    conv = nn.Conv2d(channels, 4, 3, padding=1)
    net = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    models = []
    for channels_last in (False, True):
        if method == "d3":
            models.append(d3(net, tiny, quick(channels_last=channels_last, layers=("0", "5"))).model)
        else:
            config = FineTuneConfig(epochs=3, batch_size=8, augment="none", channels_last=channels_last)
            models.append(fine_tune(net, tiny, config).model)
    plain, last = (list(model.parameters()) for model in models)
    assert any(p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last) for p in last)
    for p, q in zip(plain, last, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_float64_runs_in_float64(mlp: nn.Sequential, tiny: Split) -> None:
    exact, rounded = d3(copy.deepcopy(mlp).double(), tiny, QUICK), d3(mlp, tiny, QUICK)
    assert exact.model[5].weight.dtype == torch.float64
    torch.testing.assert_close(exact.model[5].weight.float(), rounded.model[5].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_checkpoint_resumes_bit_identically(mlp: nn.Sequential, tiny: Split, tmp_path: Path, stop_after: int) -> None:
    path = tmp_path / "d3.pt"
    straight = d3(mlp, tiny, QUICK)

    def interrupt(record: dict[str, Any]) -> None:
        if record["epoch"] == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        d3(mlp, tiny, QUICK, callback=interrupt, checkpoint=path)
    seen: list[int] = []
    resumed = d3(mlp, tiny, QUICK, callback=lambda record: seen.append(record["epoch"]), checkpoint=path)
    assert seen == list(range(stop_after + 1, 4))
    assert same(resumed.model, straight.model)
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in straight.history]
    assert list(tmp_path.iterdir()) == [path]

    with pytest.raises(ValueError, match="one of another function, config, model or data"):
        d3(mlp, tiny, quick(lam=2.0), checkpoint=path)
    with pytest.raises(ValueError, match="one of another function, config, model or data"):
        d3(mlp, (tiny[0].flip(0), tiny[1]), QUICK, checkpoint=path)
    path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="a file that cannot be read"):
        d3(mlp, tiny, QUICK, checkpoint=path)


def test_result_as_json(mlp: nn.Sequential, tiny: Split) -> None:
    result = d3(mlp, tiny, quick(augment=Augment(crop_padding=1, flip=False)))
    assert isinstance(result, D3Result)
    told = json.loads(result.to_json())
    assert set(told) == {"history", "timings", "config", "layers"}
    assert told["config"]["lam"] == 10.0
    assert told["config"]["augment"] == {"crop_padding": 1, "flip": False}
    assert told["layers"] == ["5"]
    assert told["history"] == result.history
    assert set(told["timings"]) == {"setup", "train"}
    assert all(seconds > 0 for seconds in told["timings"].values())


def test_defenses_are_functions_first_time_and_every_time() -> None:
    import importlib

    module = importlib.import_module("bdfast.defenses.d3")
    assert bdfast.defenses.d3 is module.d3
    assert callable(bdfast.defenses.d3)
    assert callable(bdfast.defenses.fine_tune)


def test_presets_and_frozen_config() -> None:
    assert (D3Config().lam, D3Config(preset="release").lam) == (10.0, 0.5)
    assert D3Config(preset="release", lam=3.0).lam == 3.0
    assert D3Config(layers=["a", "b", "a"]).layers == ("a", "b")
    with pytest.raises(FrozenInstanceError):
        D3Config().lam = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"preset": "best"}, "`preset` expected one of paper, release, got 'best'"),
        ({"lam": -1.0}, "`lam` expected a finite number >= 0, got -1.0"),
        ({"lam": "2"}, "`lam` expected a number >= 0, got '2'"),
        ({"eps": math.nan}, "`eps` expected a finite number >= 0, got nan"),
        ({"epochs": 0}, "`epochs` expected a whole number, at least 1, got 0"),
        ({"batch_size": 2.5}, "`batch_size` expected a whole number, at least 1, got 2.5"),
        ({"lr": 0.0}, "`lr` expected a finite number > 0, got 0.0"),
        ({"momentum": 1.0}, "`momentum` expected a finite number >= 0 and < 1, got 1.0"),
        ({"warm_up": "warm"}, "`warm_up` expected one of random, far, middle, noise, near, got 'warm'"),
        ({"hinge": "row"}, "`hinge` expected one of sample, batch, got 'row'"),
        ({"layers": "linear"}, "`layers` expected \"classifier\", or a list of module names, got 'linear'"),
        ({"layers": []}, '`layers` expected "classifier", or a list of module names'),
        ({"loss_scale": 0.0}, "`loss_scale` expected a finite number > 0, got 0.0"),
        ({"bn": "eval"}, "`bn` expected one of train, frozen, got 'eval'"),
        ({"augment": "flip"}, "`augment` expected one of auto, crop.flip, crop, none, or a bdfast.runtime.Augment"),
        ({"seed": -1}, r"`seed` expected a whole number in \[0, 2\^32\), got -1"),
        ({"precision": "fp16"}, "`precision` expected one of fp32, bf16, got 'fp16'"),
        ({"deterministic": 1}, "`deterministic` expected True or False, got 1"),
        ({"near_noise": -1.0}, "`near_noise` expected a finite number >= 0, got -1.0"),
    ],
)
def test_wrong_options(changes: dict[str, Any], text: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"D3Config: {text}"):
        D3Config(**changes)
