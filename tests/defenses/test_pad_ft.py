"""PAD-FT end to end: what it reaches on digits, mechanics of its steps, edge cases, and what it leaves alone."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bdfast import attacks, metrics
from bdfast.data import load
from bdfast.defenses import PadFTConfig, PadFTResult, pad_ft
from bdfast.defenses.pad_ft.bounds import Suspects, fit_bounds, starting_bounds, unlikelihood
from bdfast.defenses.pad_ft.head import Draw
from bdfast.errors import LabelRangeError
from bdfast.runtime.resident import ResidentData
from tests.models.test_classifier import Distilled, NormLinear

from .conftest import Split, Victim

QUICK: dict[str, Any] = {"k": 5, "clip_epochs": 3, "epochs": 2, "clip_batch_size": 8, "batch_size": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Convolutions of 8x8 images are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def net() -> nn.Sequential:
    """Images [1, 3, 4] to 3 classes, through two ReLUs; in eval mode, one bias frozen."""
    g = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(48, 8), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.5)
    net[0].bias.requires_grad_(False)
    return net.eval()


def quick(net: nn.Module, data: object, **options: Any) -> PadFTResult:
    keep = {name: options.pop(name) for name in ("callback", "ground_truth", "trusted", "normalize") if name in options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pad_ft: clipping lost")
        return pad_ft(net, data, PadFTConfig(**{"sites": "all-relu", **QUICK, **options}), **keep)


# --- what it reaches -------------------------------------------------------------------------------------------------


def poison_of(victim: Victim) -> attacks.PoisonedData:
    return attacks.poison(*victim.train, "badnets", rate=0.1, target=0, seed=0)


def test_robust_removes_badnets_from_digits(victim: Victim) -> None:
    before = victim.evaluate(victim.model)
    poisoned = poison_of(victim)
    config = PadFTConfig.for_digits(preset="robust", clip_epochs=6)
    result = pad_ft(victim.model, poisoned, config)
    after = victim.evaluate(result.model)
    assert before.asr > 0.95
    assert after.asr < 0.2
    assert after.acc > before.acc - 0.08
    assert result.purity is not None
    assert result.purity["0"] > 0.95
    assert [record["class"] for record in result.split] == [0]
    assert float(poisoned.is_poisoned[result.suspects].float().mean()) > 0.9


def test_paper_selects_the_poison_of_badnets(victim: Victim) -> None:
    """The known weakness, reported: the lowest losses of the target class are the poisoned samples'."""
    result = pad_ft(victim.model, poison_of(victim), PadFTConfig(k=30, clip_epochs=1, epochs=1))
    assert result.purity is not None
    assert result.purity["0"] < 0.5
    assert result.purity["total"] >= 0.89
    assert result.purity["1"] == 1.0


def test_robust_leaves_clean_data_alone(victim: Victim) -> None:
    """The victim's clean samples as they are: no class stands out, and nothing is suspected."""
    poisoned = poison_of(victim)
    clean = ~poisoned.is_poisoned
    config = PadFTConfig.for_digits(preset="robust", clip_epochs=6)
    result = pad_ft(victim.model, (poisoned.images[clean], poisoned.labels[clean]), config)
    assert len(result.suspects) == 0
    assert result.split == []
    assert victim.evaluate(result.model).acc > victim.evaluate(victim.model).acc - 0.03


# --- 1. purification -------------------------------------------------------------------------------------------------


def test_short_classes_are_reported(net: nn.Module, tiny: Split) -> None:
    result = quick(net, tiny, k=20)
    assert result.short == {0: 10, 1: 10, 2: 10}
    assert sorted(result.selected.tolist()) == list(range(30))
    assert quick(net, tiny, k=10).short == {}


def test_an_empty_class_warns(net: nn.Module, tiny: Split) -> None:
    images, labels = tiny
    with pytest.warns(UserWarning, match=r"samples of every class, got none of class \[2\] to trust; expect it"):
        result = quick(net, (images[labels < 2], labels[labels < 2]))
    assert result.short == {2: 0}


def test_logits_that_are_not_finite_are_never_selected(net: nn.Sequential, tiny: Split) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bad = (x[:, 0, 0, 0] > 0.9)[:, None, None, None]
            return torch.where(bad, torch.full_like(x, math.nan), x)

    images, labels = tiny
    images = images.clone() * 0.8
    images[[3, 7], 0, 0, 0] = 1.0
    with pytest.warns(UserWarning, match="finite logits, got 2 samples without; they are not selected"):
        result = quick(nn.Sequential(Breaks(), *net), (images, labels), k=100)
    assert result.nonfinite == 2
    assert not {3, 7} & set(result.selected.tolist())
    assert result.scores[[3, 7]].tolist() == [math.inf, math.inf]
    assert len(result.selected) == 28


def test_external_indices_take_the_place_of_the_selection(net: nn.Module, tiny: Split) -> None:
    chosen = torch.tensor([2, 1, 0, 9, 12])
    result = quick(net, tiny, trusted=chosen, preset="robust")
    assert torch.equal(result.selected, chosen)
    assert len(result.suspects) == 0
    assert result.split == []


@pytest.mark.parametrize("wrong", [[30], [-1], [1, 1], [], [0.5]])
def test_wrong_external_indices(net: nn.Module, tiny: Split, wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"pad_ft: `trusted` expected int64 \[M\], distinct indices in \[0, 30\)"):
        quick(net, tiny, trusted=torch.tensor(wrong, dtype=torch.int64 if wrong != [0.5] else None))


def test_purity_is_counted_against_ground_truth(net: nn.Module, tiny: Split) -> None:
    truth = torch.zeros(30, dtype=torch.bool)
    assert quick(net, tiny).purity is None
    truth[tiny[1] == 1] = True
    purity = quick(net, tiny, ground_truth=truth).purity
    assert purity == {"total": pytest.approx(2 / 3), "0": 1.0, "1": 0.0, "2": 1.0}
    with pytest.raises(ValueError, match=r"`ground_truth` expected bool \[30\], got torch.bool \[29\]"):
        quick(net, tiny, ground_truth=truth[:29])


# --- 2. clipping -----------------------------------------------------------------------------------------------------


class Clip(nn.Module):
    """A linear map of min(x, z); pixels [N, C, 1, 1] to logits [N, C]."""

    def __init__(self, z: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.z, self.weight = z, weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x.flatten(1), self.z) @ self.weight.T


def pixels(*rows: list[float]) -> ResidentData:
    return ResidentData(torch.tensor(rows)[:, :, None, None], torch.tensor([row.index(max(row)) for row in rows]))


def fit(z: Tensor, data: ResidentData, **options: Any) -> list[dict[str, Any]]:
    identity = torch.eye(len(z))
    config = PadFTConfig(**{"clip_epochs": 1, "clip_batch_size": 8, **options})
    return list(fit_bounds(Clip(z, identity), {"site": z}, data, data.images.flatten(1), None, config))


def test_the_objective_by_hand() -> None:
    """x = (1, 0), (0, 0.5); z = (0.6, 1): the error is 0.4 in one of four entries, and lambda ||z|| is added."""
    z = torch.tensor([0.6, 1.0], requires_grad=True)
    record = fit(z, pixels([1.0, 0.0], [0.0, 0.5]), lam=0.5)[0]
    assert record["loss"] == pytest.approx(0.4**2 / 4 + 0.5 * math.hypot(0.6, 1.0), rel=1e-6)
    assert record["accuracy"] == 1.0
    # dL/dz = (-2 * 0.4 / 4 + 0.5 * 0.6 / ||z||, 0.5 / ||z||) = (0.057, 0.43): Adam's first step is -lr * sign
    assert z.tolist() == pytest.approx([0.5, 0.9], rel=1e-5)


def test_a_bound_that_does_not_bind_falls_and_never_below_zero() -> None:
    z = torch.tensor([5.0, 0.05], requires_grad=True)
    history = fit(z, pixels([0.5, 0.0]), lam=1.0, clip_epochs=5)
    assert 4.4 < z[0] < 4.6
    assert float(z.detach()[1]) == 0.0
    assert all(record["norm"]["site"] >= 0 for record in history)


def test_a_site_of_zeros_has_no_gradient() -> None:
    z = torch.zeros(2, requires_grad=True)
    assert math.isfinite(fit(z, pixels([0.0, 0.0]), lam=1.0)[0]["loss"])
    assert z.tolist() == [0.0, 0.0]


def test_lambda_follows_accuracy_at_20_30_and_40() -> None:
    z = torch.tensor([5.0, 5.0], requires_grad=True)
    lams = [record["lam"] for record in fit(z, pixels([1.0, 0.0], [0.0, 1.0]), lam=1e-6, clip_epochs=50)]
    assert lams[:21] == [1e-6] * 21
    assert lams[21:31] == pytest.approx([1.2e-6] * 10)
    assert lams[31] == pytest.approx(1.44e-6)
    assert lams[49] == pytest.approx(1e-6 * 1.2**3)
    down = fit(z, pixels([1.0, 0.0], [0.0, 1.0]), lam=1e-6, clip_epochs=4, lam_start=-1, lam_every=1, clip_lr=1e-9,
               target_accuracy=100.0)  # fmt: skip
    assert [r["lam"] for r in down] == pytest.approx([1e-6 * 1.2**e for e in range(4)])


def test_keeping_the_best_bounds_undoes_a_collapse() -> None:
    data = pixels([1.0, 0.0], [0.0, 1.0])
    last = torch.tensor([1.0, 1.0], requires_grad=True)
    fit(last, data, lam=50.0, clip_epochs=12)
    best = torch.tensor([1.0, 1.0], requires_grad=True)
    history = fit(best, data, lam=50.0, clip_epochs=12, keep="best")
    assert float(last.detach().max()) < 0.1
    assert min(record["kept_accuracy"] for record in history) < 0.95
    kept = torch.minimum(data.images.flatten(1), best.detach())
    assert kept.argmax(1).tolist() == [0, 1]
    assert 0 < float(best.detach().norm()) < math.sqrt(2)


def test_suspects_lower_the_bounds_that_carry_them() -> None:
    """Channel 0 carries the suspects' label beyond what the trusted samples use."""
    data = pixels([0.5, 0.0], [0.0, 0.5])
    suspects = Suspects(torch.tensor([[1.0, 0.2]])[:, :, None, None], torch.tensor([0]))
    z = torch.tensor([1.0, 1.0], requires_grad=True)
    config = PadFTConfig(clip_epochs=3, lam=0.0, suspect_weight=1.0, clip_lr=0.05)
    list(fit_bounds(Clip(z, torch.eye(2)), {"site": z}, data, data.images.flatten(1), suspects, config))
    assert float(z.detach()[0]) < 0.9
    assert float(z.detach()[1]) == 1.0


def test_unlikelihood_is_the_log_of_what_is_left() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    labels = torch.arange(6) % 4
    p = logits.double().softmax(1).gather(1, labels[:, None])
    assert float(unlikelihood(logits, labels)) == pytest.approx(float(-(1 - p).log().mean()), rel=1e-5)


def test_bounds_start_as_asked() -> None:
    observed = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([2.0])}
    assert starting_bounds(observed, "channel")["a"].tolist() == [1.0, 4.0]
    assert starting_bounds(observed, 8.0)["b"].tolist() == [8.0]
    assert starting_bounds(observed, 2000.0)["b"].tolist() == [2000.0]
    with pytest.raises(ValueError, match=r"pad_ft: `init` expected at most 1000 times .* of `b`, 2000, got 2001; pass"):
        starting_bounds(observed, 2001.0)


@pytest.mark.parametrize("init", ["observed", "channel"])
def test_clipping_starts_as_a_no_op(net: nn.Module, tiny: Split, init: Any) -> None:
    result = quick(net, tiny, init=init, k=10, clip_epochs=0)
    with torch.no_grad():
        assert torch.allclose(result.pad_model()(tiny[0]), net(tiny[0]), atol=1e-5)
    assert all(bool((z >= 0).all()) for z in result.bounds.values())
    assert len(result.bounds) == 2


def test_only_bounds_and_the_last_layer_change(net: nn.Sequential, tiny: Split) -> None:
    result = quick(net, tiny)
    trained = result.model.state_dict()
    for name, p in net.named_parameters():
        assert torch.equal(trained[name], p) == (not name.startswith("7."))
    pad = result.pad_model().state_dict()
    assert all(torch.equal(pad[name], p) for name, p in net.named_parameters())
    assert [z.shape for z in result.bounds.values()] == [(4,), (8,)]
    assert all(bool(z.isfinite().all() and (z >= 0).all()) for z in result.bounds.values())


def test_a_selection_that_is_all_misclassified(net: nn.Module, tiny: Split) -> None:
    images, _ = tiny
    with torch.no_grad():
        wrong = (net(images).argmax(1) + 1) % 3
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quick(net, (images, wrong))
    assert any("misclassifies all selected samples" in str(w.message) for w in caught)
    assert all(record["accuracy"] <= 1 for record in result.history)
    assert len(result.history) == 5


def test_clipping_that_loses_much_warns(net: nn.Sequential, tiny: Split) -> None:
    images, _ = tiny
    with torch.no_grad():
        net[7].bias.sub_(net(images).mean(0))  # all three classes are predicted, by what is to be clipped away
        labels = net(images).argmax(1)
    assert len(labels.unique()) == 3
    options = {"sites": "all-relu", "lam": 100.0, "clip_lr": 5.0, "clip_epochs": 20}
    with pytest.warns(UserWarning, match=r"clipping lost \d+ points of accuracy on the selected samples; lower lam"):
        pad_ft(net, (images, labels), PadFTConfig(**{**QUICK, **options}))


# --- 3. fine-tuning --------------------------------------------------------------------------------------------------


def test_cached_features_give_the_same_head(net: nn.Module, tiny: Split) -> None:
    options = {"draws": 2, "epochs": 5, "lr": 0.1, "flip": True}
    plain, cached = (quick(net, tiny, cache_features=flag, **options) for flag in (False, True))
    for name, p in plain.model.state_dict().items():
        assert torch.allclose(p, cached.model.state_dict()[name], atol=1e-6)
    losses = [[r["loss"] for r in result.history] for result in (plain, cached)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert quick(net, tiny, draws=None, **{k: v for k, v in options.items() if k != "draws"}).history[-1]["loss"] != (
        pytest.approx(losses[0][-1], rel=1e-6)
    )


def test_consistency_alone_by_hand(net: nn.Sequential, tiny: Split) -> None:
    """With a = b = 0 and one step, the gradient is that of beta E ||softmax(Wh + b) - softmax(Wh' + b)||^2."""
    options = {"a": 0.0, "b": 0.0, "beta": 3.0, "epochs": 1, "batch_size": 100, "lr": 0.5, "weight_decay": 0.0}
    config = {"clip_epochs": 0, "k": 10, "flip": True, **options}
    result = quick(net, tiny, **config)
    samples = ResidentData(tiny[0][result.selected], tiny[1][result.selected])
    draw = Draw(samples, PadFTConfig(flip=True), 0)
    head = copy.deepcopy(net[7])
    below = result.pad_model()
    caught: list[Tensor] = []
    next(m for m in reversed(list(below.modules())) if isinstance(m, nn.Linear)).register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0].detach())
    )
    below(samples.images), below(draw(samples.images, torch.arange(30)))
    loss = 3.0 * (head(caught[0]).softmax(1) - head(caught[1]).softmax(1)).square().sum(1).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    after = next(m for m in reversed(list(result.model.modules())) if isinstance(m, nn.Linear))
    assert torch.allclose(after.weight, head.weight - 0.5 * head.weight.grad, atol=1e-6)
    assert result.history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-4)


def test_augmentations_stay_in_range_and_differ_by_sample() -> None:
    images = torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    data = ResidentData(images, torch.zeros(16, dtype=torch.int64))
    index = torch.arange(16)
    out = Draw(data, PadFTConfig(), 0)(images, index)
    assert out.min() >= 0
    assert out.max() <= 1
    assert not torch.equal(out, images)
    assert torch.equal(out[[5, 2]], Draw(data, PadFTConfig(), 0)(images[[5, 2]], index[[5, 2]]))
    assert not torch.equal(out, Draw(data, PadFTConfig(), 1)(images, index))
    still = PadFTConfig(flip=False, brightness=0.0, contrast=0.0)
    assert torch.allclose(Draw(data, still, 0)(images, index), images, atol=1e-6)


# --- around it -------------------------------------------------------------------------------------------------------


def test_the_caller_s_world_is_as_before(net: nn.Sequential, tiny: Split) -> None:
    net.train()
    net[1].eval()
    state = copy.deepcopy(net.state_dict())
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    rng = torch.get_rng_state()
    result = quick(net, tiny)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), net.state_dict().values(), strict=True))
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(not module._forward_pre_hooks for module in (*net.modules(), *result.model.modules()))
    assert all(p.grad is None for p in result.model.parameters())
    assert result.model.training
    trained = result.model.state_dict(keep_vars=True)
    assert [trained[name].requires_grad for name, _ in net.named_parameters()] == flags


def test_the_same_seed_gives_the_same_result(net: nn.Module, tiny: Split) -> None:
    a, b, c = (quick(net, tiny, seed=seed, flip=True) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert any(not torch.equal(x, y) for x, y in zip(a.model.parameters(), c.model.parameters(), strict=True))


def test_records_and_json(net: nn.Module, tiny: Split) -> None:
    seen: list[dict[str, Any]] = []
    result = quick(net, tiny, callback=seen.append, keep="best")
    assert seen == result.history
    assert [(r["stage"], r["epoch"], r["epochs"]) for r in seen] == [
        ("clip", 1, 5), ("clip", 2, 5), ("clip", 3, 5), ("tune", 4, 5), ("tune", 5, 5),
    ]  # fmt: skip
    assert {"lam", "norm", "kept_accuracy"} <= set(seen[0])
    assert "consistency" in seen[4]
    content = json.loads(result.to_json())
    assert content["selected"] == result.selected.tolist()
    assert content["config"]["k"] == 5
    assert list(content["timings"]) == ["setup", "score", "select", "clip", "tune"]
    assert "model" not in content
    assert content["bounds"].keys() == result.bounds.keys()


def test_normalisation_outside_the_model(net: nn.Module, tiny: Split) -> None:
    from bdfast.nn import normalized

    inside = quick(normalized(net, 0.4, 0.5), tiny)
    outside = quick(net, tiny, normalize=([0.4], [0.5]))
    assert torch.allclose(inside.scores, outside.scores, atol=1e-5)
    assert torch.allclose(next(iter(inside.bounds.values())), next(iter(outside.bounds.values())), atol=1e-5)
    assert set(net.state_dict()) < set(outside.model.state_dict())


def test_what_is_refused(net: nn.Sequential, tiny: Split) -> None:
    images, labels = tiny
    with pytest.raises(TypeError, match="pad_ft: `config` expected a PadFTConfig, got dict"):
        pad_ft(net, tiny, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pad_ft: `model` expected a torch.nn.Module, got function"):
        pad_ft(lambda x: x, tiny)  # type: ignore[arg-type]
    with pytest.raises(LabelRangeError, match=r"classes in \[0, 3\), got 3 at index 4"):
        pad_ft(net, (images, torch.where(torch.arange(30) == 4, 3, labels)))
    with pytest.raises(
        ValueError, match=r"pad_ft: `model` expected a model that ends in nn\.Linear, got Conv2d.*; end it in"
    ):
        pad_ft(nn.Sequential(nn.Conv2d(1, 3, (3, 4)), nn.Flatten()), tiny, PadFTConfig(k=3))
    with pytest.raises(ValueError, match=r"logits that come straight from its last linear layer, got something else"):
        pad_ft(nn.Sequential(*net, nn.LogSoftmax(1)), tiny)
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[0].weight[0] = math.nan
    with pytest.raises(ValueError, match=r"pad_ft: `model` expected finite weights, got NaN or infinity in `0.weight`"):
        pad_ft(broken, tiny)


def test_a_step_too_large_is_an_error(net: nn.Sequential, tiny: Split) -> None:
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(FloatingPointError, match=r"pad_ft: .* in epoch \d+ of fine-tuning; lower lr"):
        quick(net, tiny, lr=1e38, epochs=10)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))


def test_digits_evaluate_under_bounds(victim: Victim) -> None:
    """The returned model goes through metrics.evaluate, deepcopy and state_dict like any other."""
    train, test, _ = load("digits", limit=(200, 50))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = pad_ft(victim.model, train, PadFTConfig(k=5, clip_epochs=1, epochs=1))
    twin = copy.deepcopy(result.model)
    assert torch.equal(metrics.predict(twin, test[0]).classes, metrics.predict(result.model, test[0]).classes)
    assert all(name in result.model.state_dict() for name in victim.model.state_dict())


def test_bfloat16_is_close_and_leaves_step_1_alone(victim: Victim) -> None:
    data = (victim.train[0][:300], victim.train[1][:300])
    short: Any = {"k": 10, "clip_epochs": 3, "epochs": 2}
    exact = pad_ft(victim.model, data, PadFTConfig(**short))
    half = pad_ft(victim.model, data, PadFTConfig(precision="bf16", **short))
    assert torch.equal(half.scores, exact.scores)
    assert torch.equal(half.selected, exact.selected)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    for name, z in exact.bounds.items():
        assert not torch.equal(half.bounds[name], z)
        torch.testing.assert_close(half.bounds[name], z, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="`precision` expected"):
        PadFTConfig(precision="fp16")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("head", "named"),
    [
        (lambda: NormLinear(4, 3), "`head.linear` and `head_dist.linear`"),
        (lambda: nn.Linear(4, 3), "`head` and `head_"),
    ],
)
def test_two_heads_are_refused_by_name(head: Callable[[], nn.Module], named: str) -> None:
    """Distilled networks average two: there is no one last layer to score and to tune."""
    data = torch.rand(6, 1, 3, 4), torch.arange(6) % 3
    with pytest.raises(ValueError, match=f"straight from its last linear layer, got what {named}.* take d3, which"):
        pad_ft(Distilled(head, head).eval(), data, PadFTConfig(k=1))
