from __future__ import annotations

import json
import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bdfast.attacks import poison
from bdfast.metrics import (
    Metrics,
    accuracy,
    attack_success_rate,
    defense_effectiveness_rating,
    evaluate,
    predict,
    robust_accuracy,
    robust_improvement_rating,
)
from bdfast.nn import clip_activations

fractions = st.floats(0, 1)


def classes(*values: int) -> Tensor:
    return torch.tensor(values)


class Table(nn.Module):
    """Logits read from the pixels: class c of image i is its pixel c."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : self.count]


def images_for(predictions: Tensor, count: int) -> Tensor:
    """Images [N, 1, 1, count] that ``Table`` classifies as ``predictions``."""
    return torch.nn.functional.one_hot(predictions, count).float()[:, None, None]


# --- rates ------------------------------------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    true, wanted = classes(0, 1, 2, 3, 4), classes(0, 0, 0, 0, 0)
    predictions = classes(0, 0, 2, 0, 1)
    assert accuracy(predictions, true) == 2 / 5
    assert attack_success_rate(predictions, wanted, true) == 2 / 4
    assert attack_success_rate(predictions, wanted, true, include_target=True) == 3 / 5
    assert robust_accuracy(predictions, wanted, true) == 1 / 4


def test_logits_are_classified_with_ties_to_the_lowest_class() -> None:
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    assert accuracy(logits, classes(0, 1, 0)) == 1.0
    assert attack_success_rate(logits, classes(1, 1, 1), classes(2, 2, 2)) == 1 / 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_count_as_wrong(bad: float) -> None:
    logits = torch.tensor([[1.0, bad], [bad, 1.0], [1.0, 0.0]])
    assert accuracy(logits, classes(0, 1, 0)) == 1 / 3
    assert accuracy(logits, classes(1, 0, 1)) == 0
    assert attack_success_rate(logits, classes(0, 0, 0), classes(1, 1, 1)) == 1 / 3
    assert robust_accuracy(logits, classes(0, 0, 0), classes(1, 1, 1)) == 0


def test_nothing_to_count_is_nan_with_a_warning() -> None:
    empty = torch.zeros(0, dtype=torch.long)
    with pytest.warns(RuntimeWarning, match="accuracy: no image counts"):
        assert math.isnan(accuracy(empty, empty))
    same = classes(1, 1)
    with pytest.warns(RuntimeWarning, match="attack_success_rate: no image counts"):
        assert math.isnan(attack_success_rate(same, same, same))
    with pytest.warns(RuntimeWarning, match="robust_accuracy: no image counts"):
        assert math.isnan(robust_accuracy(same, same, same))
    assert attack_success_rate(same, same, same, include_target=True) == 1.0


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_rates_are_fractions_and_asr_and_ra_exclude_each_other(rows: list[tuple[int, int, int]]) -> None:
    predictions, wanted, true = torch.tensor(rows, dtype=torch.long).reshape(-1, 3).unbind(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        acc = accuracy(predictions, true)
        asr, ra = attack_success_rate(predictions, wanted, true), robust_accuracy(predictions, wanted, true)
    assert math.isnan(acc) == (len(rows) == 0)
    assert math.isnan(asr) == math.isnan(ra) == all(w == t for _, w, t in rows)
    counted = [(p, w, t) for p, w, t in rows if w != t]
    if counted:
        assert asr == sum(p == w for p, w, _ in counted) / len(counted)
        assert ra == sum(p == t for p, _, t in counted) / len(counted)
        assert asr + ra <= 1 + 1e-12


def test_rate_errors() -> None:
    good = classes(0, 1, 2)
    with pytest.raises(TypeError, match=r"accuracy: `predictions` expected integer classes \[N\].*got list"):
        accuracy([0, 1, 2], good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"accuracy: `predictions`.*got torch.float32 \[3\]"):
        accuracy(good.float(), good)
    with pytest.raises(ValueError, match=r"accuracy: `predictions`.*got torch.float32 \[3, 0\]"):
        accuracy(torch.zeros(3, 0), good)
    with pytest.raises(ValueError, match=r"accuracy: `labels` expected an integer tensor \[3\], got torch.int64 \[2\]"):
        accuracy(good, good[:2])
    with pytest.raises(TypeError, match="attack_success_rate: `attack_labels`"):
        attack_success_rate(good, good.float(), good)
    with pytest.raises(ValueError, match="attack_success_rate: `original_labels`"):
        attack_success_rate(good, good, good[:1])
    with pytest.raises(ValueError, match="robust_accuracy: `original_labels`"):
        robust_accuracy(good, good, good[:1])


# --- ratings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("acc0", "asr0", "acc1", "asr1", "expected"),
    [
        (0.9, 1.0, 0.9, 0.0, 1.0),  # perfect
        (0.9, 1.0, 0.9, 1.0, 0.5),  # nothing changed
        (0.9, 1.0, 0.8, 0.0, 0.95),  # accuracy lost: subtracted, not added
        (0.9, 0.5, 0.95, 0.9, 0.5),  # both worse or better in the direction that does not count
        (1.0, 0.0, 0.0, 1.0, 0.0),  # only destroyed
        (1.0, 1.0, 0.0, 0.0, 0.5),  # both gone
    ],
)
def test_der_by_hand(acc0: float, asr0: float, acc1: float, asr1: float, expected: float) -> None:
    assert defense_effectiveness_rating(acc0, asr0, acc1, asr1) == pytest.approx(expected, abs=1e-15)
    before, after = Metrics(acc=acc0, asr=asr0), Metrics(acc=acc1, asr=asr1)
    assert defense_effectiveness_rating(before, after) == defense_effectiveness_rating(
        acc0=acc0, asr0=asr0, acc1=acc1, asr1=asr1
    )


def test_der_of_a_published_row() -> None:
    """ACC/ASR 91.32/95.03 before a defence, 91.00/1.00 after: (0.9403 - 0.0032 + 1) / 2."""
    assert defense_effectiveness_rating(0.9132, 0.9503, 0.91, 0.01) == pytest.approx(0.96855)


def test_rir_by_hand() -> None:
    assert robust_improvement_rating(0.9, 0.1, 0.8, 0.7) == pytest.approx((0.6 - 0.1 + 1) / 2)
    assert robust_improvement_rating(0.9, 0.7, 0.9, 0.1) == 0.5
    before, after = Metrics(acc=0.9, asr=1.0, ra=0.1), Metrics(acc=0.8, asr=0.0, ra=0.7)
    assert robust_improvement_rating(before, after) == robust_improvement_rating(0.9, 0.1, 0.8, 0.7)


@settings(max_examples=60, deadline=None)
@given(acc0=fractions, asr0=fractions, acc1=fractions, asr1=fractions)
def test_ratings_are_fractions(acc0: float, asr0: float, acc1: float, asr1: float) -> None:
    assert 0 <= defense_effectiveness_rating(acc0, asr0, acc1, asr1) <= 1
    assert 0 <= robust_improvement_rating(acc0, asr0, acc1, asr1) <= 1


@pytest.mark.parametrize("position", range(4))
def test_a_nan_rate_gives_a_nan_rating(position: int) -> None:
    rates = [0.5] * 4
    rates[position] = math.nan
    assert math.isnan(defense_effectiveness_rating(*rates))
    assert math.isnan(robust_improvement_rating(*rates))


def test_rating_errors() -> None:
    with pytest.raises(ValueError, match=r"defense_effectiveness_rating: .*got 91.3; divide percentages by 100"):
        defense_effectiveness_rating(91.3, 95.0, 91.0, 1.0)
    with pytest.raises(TypeError, match="two Metrics, or four fractions"):
        defense_effectiveness_rating(0.9, 0.9)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"robust_improvement_rating.*two Metrics, or four fractions"):
        robust_improvement_rating(Metrics(acc=1, asr=1), 0.9)  # type: ignore[call-overload]


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 7, 512])
def test_predict_keeps_the_order_whatever_the_batch_size(batch_size: int) -> None:
    expected = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(0))
    found = predict(Table(5), images_for(expected, 5), batch_size=batch_size)
    assert torch.equal(found.classes, expected)
    assert found.classes.dtype == torch.int64
    assert found.finite.all()


def test_predict_reports_rows_that_are_not_finite() -> None:
    images = images_for(classes(1, 2, 0), 3)
    images[1, 0, 0, 0] = math.nan
    found = predict(Table(3), images)
    assert found.classes.tolist() == [1, -1, 0]
    assert found.finite.tolist() == [True, False, True]


def test_predict_gives_the_model_images_in_the_unit_range() -> None:
    seen: list[Tensor] = []

    class Spy(Table):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    images = torch.tensor([[[[0, 51, 255]], [[255, 51, 0]]]], dtype=torch.uint8)
    predict(Spy(3), images)
    predict(Spy(3), images.float() / 255)
    assert torch.equal(seen[0], images.float() / 255)
    assert torch.equal(seen[0], seen[1])
    predict(Spy(3), images, normalize=([0.2, 0.4], [0.5, 0.25]))
    torch.testing.assert_close(seen[2][0, :, 0, 1], torch.tensor([0.0, -0.8]))
    predict(Spy(3), images, normalize=([0.2], [0.5]))
    torch.testing.assert_close(seen[3][0, :, 0, 2], torch.tensor([1.6, -0.4]))


def test_predict_follows_the_model_s_dtype_and_output_wrapper() -> None:
    class Output(NamedTuple):
        loss: None
        logits: Tensor

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2).to(torch.bfloat16)

        def forward(self, x: Tensor) -> Output:
            return Output(None, self.linear(x.flatten(1)))

    model = Wrapped()
    images = torch.rand(5, 1, 2, 2)
    expected = model.linear(images.flatten(1).bfloat16()).argmax(1)
    assert torch.equal(predict(model, images).classes, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_predict_takes_clipped_models_of_any_dtype(dtype: torch.dtype) -> None:
    """Bounds stay in float32."""
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).to(dtype).eval()
    images = torch.rand(5, 1, 2, 2)
    expected = predict(model, images).classes
    assert torch.equal(predict(clip_activations(model, "all-relu"), images).classes, expected)


def test_predict_leaves_the_model_as_it_was() -> None:
    frozen = nn.BatchNorm2d(1)
    model = nn.Sequential(nn.BatchNorm2d(1), frozen, nn.Dropout(0.5), nn.Flatten(), nn.Linear(4, 3))
    model.train()
    frozen.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(9, 1, 2, 2)
    rng = torch.get_rng_state()
    first, second = predict(model, images), predict(model, images, batch_size=2)
    assert torch.equal(first.classes, second.classes)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_predict_restores_the_model_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("boom")

    model = nn.Sequential(Broken(), nn.Dropout())
    with pytest.raises(RuntimeError, match="boom"):
        predict(model, torch.rand(2, 1, 2, 2))
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_predict_nothing() -> None:
    found = predict(Table(3), torch.zeros(0, 1, 1, 3))
    assert found.classes.shape == found.finite.shape == (0,)


def test_predict_errors() -> None:
    images = torch.rand(2, 3, 4, 4)
    cases: list[tuple[type[Exception], str, tuple[Any, Any], dict[str, Any]]] = [
        (TypeError, "predict: `model` expected a torch.nn.Module, got function", (lambda x: x, images), {}),
        (TypeError, "predict: `images` expected a tensor", (Table(3), images.long()), {}),
        (ValueError, r"predict: `images`.*got torch.float32 \[3, 4, 4\]", (Table(3), images[0]), {}),
        (ValueError, "predict: `batch_size` expected a positive integer, got 0", (Table(3), images), {"batch_size": 0}),
        (
            ValueError,
            r"predict: `normalize: std` expected numbers above 0, got \(0.0,\)",
            (Table(3), images),
            {"normalize": (0.5, 0.0)},
        ),
        (ValueError, r"`normalize`.*got lengths \[2, 3\]", (Table(3), images), {"normalize": ([0, 0], [1, 1, 1])}),
        (ValueError, r"`model` expected an output of logits \[2, K\].*\[2, 3, 4, 4\]", (nn.Identity(), images), {}),
        (ValueError, r"`model` expected an output of logits", (Table(0), images), {}),
    ]
    for kind, text, args, kwargs in cases:
        with pytest.raises(kind, match=text):
            predict(*args, **kwargs)

    class Listed(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [x]

    with pytest.raises(TypeError, match=r"`model` expected an output of logits.*got list"):
        predict(Listed(), images)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def test_evaluate_by_hand() -> None:
    true = classes(0, 1, 2, 2)
    clean = images_for(classes(0, 1, 2, 0), 3)
    triggered_true, wanted = classes(0, 1, 2, 1, 2), torch.zeros(5, dtype=torch.long)
    triggered = images_for(classes(0, 0, 2, 2, 0), 3)
    triggered[4] = math.nan
    found = evaluate(Table(3), (clean, true), (triggered, wanted, triggered_true))
    assert found == Metrics(
        acc=3 / 4,
        asr=1 / 4,
        ra=1 / 4,
        asr_with_target=2 / 5,
        acc_without_target=2 / 3,
        n_clean=4,
        n_triggered=5,
        n_eligible=4,
        n_nonfinite=1,
    )


def test_evaluate_takes_the_rows_that_the_attack_counts() -> None:
    true, wanted = classes(1, 2, 1), classes(0, 0, 0)
    images = images_for(classes(0, 0, 1), 3)
    found = evaluate(Table(3), (images, true), (images, wanted, true, true == 1))
    assert (found.asr, found.ra, found.n_eligible) == (1 / 2, 1 / 2, 2)
    assert found.asr_with_target == 2 / 3
    assert found.asr_others == 1.0


def test_evaluate_all_to_all_has_no_single_target() -> None:
    true = torch.arange(6) % 3
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    triggered = poison(images, true, "badnets", mode="all-to-all").trigger(images, true)
    found = evaluate(Table(3), (images, true), triggered)
    assert found.acc == found.acc_without_target == 1 / 3  # every image is black: class 0
    assert (found.asr, found.n_eligible) == (1 / 3, 6)


def test_evaluate_equals_the_separate_metrics() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(50, 1, 8, 8, generator=generator), torch.arange(50) % 5
    triggered = poison(images, labels, "blended", target=2).trigger(images, labels)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    found = evaluate(model, (images, labels), triggered, batch_size=7, normalize=([0.5], [0.2]))
    on_clean = predict(model, images, normalize=([0.5], [0.2])).classes
    on_triggered = predict(model, triggered.images, normalize=([0.5], [0.2])).classes
    assert found.acc == accuracy(on_clean, labels)
    assert found.asr == attack_success_rate(on_triggered, triggered.labels, labels)
    assert found.ra == robust_accuracy(on_triggered, triggered.labels, labels)
    assert found.n_nonfinite == 0


@pytest.mark.filterwarnings("ignore:evaluate .*no image counts")
def test_evaluate_without_eligible_images_is_nan() -> None:
    images, target = images_for(classes(0, 0), 2), classes(0, 0)
    with pytest.warns(RuntimeWarning, match=r"evaluate \(asr\): no image counts"):
        found = evaluate(Table(2), (images, target), (images, target, target))
    assert math.isnan(found.asr)
    assert math.isnan(found.ra)
    assert math.isnan(found.acc_without_target)
    assert found.asr_with_target == 1.0
    assert json.loads(found.to_json())["asr"] is None


def test_json_holds_every_field() -> None:
    metrics = Metrics(acc=0.5, asr=0.25, ra=0.75, n_clean=4)
    values = json.loads(metrics.to_json())
    assert values.pop("asr_with_target") is None
    assert values.pop("asr_others") is None
    assert values.pop("acc_without_target") is None
    assert values == {
        "acc": 0.5, "asr": 0.25, "ra": 0.75, "n_clean": 4, "n_triggered": 0, "n_eligible": 0, "n_nonfinite": 0,
    }  # fmt: skip
    assert metrics.to_dict()["ra"] == 0.75


def test_evaluate_errors() -> None:
    images, labels = torch.rand(4, 1, 1, 3), classes(0, 1, 2, 0)
    good = (images, labels, labels)
    data = poison(images, labels, "sig", rate=0)
    cases: list[tuple[type[Exception], str, Any, Any]] = [
        (TypeError, r"evaluate: `clean` expected a tuple \(images, labels\), got Tensor|`clean`", images, good),
        (TypeError, "evaluate: `clean`", good, good),
        (TypeError, r"evaluate: `triggered` expected a tuple.*got PoisonedData; pass", (images, labels), data),
        (TypeError, "evaluate: `triggered`", (images, labels), (images, labels)),
        (ValueError, r"evaluate: `clean\[1\]` expected an integer tensor \[4\]", (images, labels[:2]), good),
        (ValueError, r"evaluate: `triggered\[2\]`", (images, labels), (images, labels, labels[:2])),
        (TypeError, r"evaluate: `triggered\[3\]` expected a bool tensor \[4\]", (images, labels), (*good, labels)),
        (TypeError, r"evaluate: `clean\[0\]` expected a tensor", (None, labels), good),
        (TypeError, r"evaluate: `clean\[1\]`.*got list; convert with torch.as_tensor", (images, [0, 1, 2, 0]), good),
    ]
    for kind, text, clean, triggered in cases:
        with pytest.raises(kind, match=text):
            evaluate(Table(3), clean, triggered)
    with pytest.raises(ValueError, match=r"^evaluate: `model` expected an output of logits \[4, K\]"):
        evaluate(nn.Identity(), (images, labels), good)


def test_pixels_outside_the_unit_interval_are_told() -> None:
    unit, labels = torch.linspace(0, 1, 12).reshape(4, 1, 1, 3), classes(0, 1, 2, 0)
    with pytest.warns(UserWarning, match=r"evaluate: `clean\[0\]`.*got values from -1 to 1; .*normalize="):
        evaluate(Table(3), (2 * unit - 1, labels), (unit, labels, labels))
    with pytest.warns(UserWarning, match=r"evaluate: `triggered\[0\]`.*got values from 0 to 255"):
        evaluate(Table(3), (unit, labels), (255 * unit, labels, labels))


def test_numpys_numbers_are_numbers() -> None:
    rating = defense_effectiveness_rating(np.float64(0.75), np.float32(1.0), np.float32(0.5), np.int64(0))
    assert rating == 0.875


def test_images_that_do_not_fit_the_model_are_named() -> None:
    images = torch.rand(3, 2, 4, 4)
    with pytest.raises(
        ValueError, match=r"predict: `images` expected what the model takes, got float32 \[3, 2, 4, 4\] \("
    ):
        predict(nn.Conv2d(1, 1, 3), images)
