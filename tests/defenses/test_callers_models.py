"""What a caller may bring: hooks, normalisation in any form, images and models that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bdfast import metrics
from bdfast.attacks import KLScoreConfig, kl_scores
from bdfast.defenses import (
    AdvrBDConfig,
    D3Config,
    FineTuneConfig,
    FTSAMConfig,
    GICConfig,
    PadFTConfig,
    advrbd,
    d3,
    fine_tune,
    ft_sam,
    gic,
    pad_ft,
)

Split = tuple[Tensor, Tensor]
Call = Callable[..., Any]
QUICK = AdvrBDConfig(warm_up_epochs=1, rounds=1, enhance_epochs=1, epochs=1, steps=1)

CALLS: dict[str, Call] = {
    "d3": lambda model, data, **more: d3(model, data, D3Config(epochs=2), **more),
    "fine_tune": lambda model, data, **more: fine_tune(model, data, FineTuneConfig(epochs=2), **more),
    "ft_sam": lambda model, data, **more: ft_sam(model, data, FTSAMConfig(epochs=2), **more),
    "pad_ft": lambda model, data, **more: pad_ft(model, data, PadFTConfig(k=9, clip_epochs=1, epochs=1), **more),
    "gic": lambda model, data, **more: gic(model, data, GICConfig(steps=2), **more),
    "kl_scores": lambda model, data, **more: kl_scores(model, data, KLScoreConfig(steps=1), **more),
}
FACTORIES: dict[str, Call] = {
    **CALLS,
    "advrbd": lambda model, data, **more: advrbd(lambda: type(model)(*model.children()), data, QUICK, **more),
}
pytestmark = pytest.mark.filterwarnings("ignore:pad_ft. clipping lost", "ignore:gic. `imprint`")


@pytest.mark.parametrize("name", CALLS)
def test_a_hook_that_watches_sees_the_set_up_alone(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    """Else it would keep the activations of every step."""
    rows: list[int] = []
    mlp[1].register_forward_hook(lambda module, x, y: rows.append(len(y)))
    mlp[1].register_full_backward_hook(lambda *_: rows.append(1000))
    result = CALLS[name](mlp, tiny)
    assert sum(rows) <= 10  # a few passes of two images
    assert len(mlp[1]._forward_hooks) == len(mlp[1]._backward_hooks) == 1
    if hasattr(result, "model"):
        assert sum(len(module._forward_hooks) for module in result.model.modules()) == 1


def test_a_hook_that_is_part_of_the_model_works_on_in_the_result(mlp: nn.Sequential, tiny: Split) -> None:
    mlp[5].register_forward_hook(lambda module, x, y: y.clamp(max=0.0))
    assert bool((d3(mlp, tiny, D3Config(epochs=1)).model(tiny[0]) <= 0).all())


@pytest.mark.parametrize(
    "given",
    [
        (0.5, 0.25),
        [[0.5], [0.25]],
        (torch.tensor([0.5]), torch.tensor([[[0.25]]])),
        (np.array([0.5]), np.float64(0.25)),
    ],
    ids=["numbers", "lists", "tensors", "arrays"],
)
@pytest.mark.parametrize("name", [*CALLS, "evaluate"])
def test_normalisation_comes_in_any_form(name: str, given: Any, mlp: nn.Sequential, tiny: Split) -> None:
    def run(normalize: Any) -> Any:
        if name == "evaluate":
            return metrics.evaluate(mlp, tiny, (*tiny, tiny[1].roll(1)), normalize=normalize)
        result = CALLS[name](mlp, tiny, normalize=normalize)
        if name == "gic":
            return result.data[0].tolist()
        return result.scores.tolist() if name == "kl_scores" else [p.tolist() for p in result.model.parameters()]

    assert run(given) == run(((0.5,), (0.25,)))


@pytest.mark.parametrize("name", FACTORIES)
def test_normalisation_that_is_none_is_refused(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    with pytest.raises(TypeError, match=rf"{name}: `normalize` expected a pair \(mean, std\).*, got 'cifar10'; see"):
        FACTORIES[name](mlp, tiny, normalize="cifar10")
    with pytest.raises(TypeError, match=rf"{name}: `normalize: std` expected numbers, got 'x'; pass one per channel"):
        FACTORIES[name](mlp, tiny, normalize=(0.5, "x"))


@pytest.mark.parametrize("name", FACTORIES)
def test_images_that_do_not_fit_the_model_are_named(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    images = tiny[0].expand(-1, 3, -1, -1).contiguous()
    with pytest.raises(
        ValueError, match=rf"{name}: `images` expected what the model takes, got float32 \[2, 3, 3, 4\] \("
    ):
        FACTORIES[name](mlp, (images, tiny[1]))


@pytest.mark.parametrize("name", FACTORIES)
def test_the_function_that_was_called_speaks_of_the_output(name: str, tiny: Split) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=rf"{name}: `model` expected an output of logits \[2, K\]|{name}: `model` exp"):
        FACTORIES[name](model, tiny)


@pytest.mark.parametrize("name", ["d3", "pad_ft"])
def test_a_network_without_a_head_is_refused_by_name(name: str, tiny: Split) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, (3, 4)), nn.Flatten())
    with pytest.raises(ValueError, match=rf"{name}: `model` expected a model that ends in nn.Linear, got Conv2d"):
        CALLS[name](model, tiny)


def test_a_head_that_is_not_called_is_told(tiny: Split) -> None:
    class Bypassed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3]

    with pytest.raises(ValueError, match="pad_ft: `model` expected a network that calls its last linear layer"):
        pad_ft(Bypassed(nn.Linear(12, 3)), tiny)


@pytest.mark.parametrize("name", CALLS)
def test_clipped_models_of_any_dtype(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    """What PAD-FT made of a model in float64: bounds stay in float32, and images are float64 all the same."""
    result = CALLS["pad_ft"](mlp.double(), tiny)
    CALLS[name](result.model.remove() if name == "pad_ft" else result.model, tiny)


@pytest.mark.parametrize("name", CALLS)
def test_weights_without_values_are_named(name: str, mlp: nn.Sequential, tiny: Split) -> None:
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    for model, first in ((lazy, "1.weight"), (mlp.to("meta"), "1.weight")):
        with pytest.raises(ValueError, match=rf"{name}: `model` expected weights with values, got none in `{first}`"):
            CALLS[name](model, tiny)


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_traced_model_is_trained(mlp: nn.Sequential, tiny: Split) -> None:
    result = fine_tune(torch.jit.trace(mlp, tiny[0][:2]), tiny, FineTuneConfig(epochs=1))
    assert len(result.history) == 1
