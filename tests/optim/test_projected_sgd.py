"""ProjectedSGD against plain autograd, torch.optim.SGD and hand-computed steps."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bdfast
from bdfast.optim import ProjectedSGD

Step = Callable[[], None]


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.rand(8, 6, generator=g).to(dtype), torch.randint(0, 3, (8,), generator=g)) for _ in range(count)]


def groups(net: nn.Sequential) -> list[dict[str, object]]:
    heads = [net[0].weight, net[2].weight]
    return [{"params": heads}, {"params": [net[0].bias, net[2].bias], "projected": False}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()


def autograd_steps(
    net: nn.Sequential, anchors: list[Tensor], data: list[tuple[Tensor, Tensor]], lr: float, c: float
) -> None:
    """The same trajectory from autograd of the whole objective, torch.optim.SGD and an explicit projection."""
    weights = [net[0].weight, net[2].weight]
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        distance = sum(torch.linalg.vector_norm(w - w0) for w, w0 in zip(weights, anchors, strict=True))
        (nn.functional.cross_entropy(net(x), y) - c * distance).backward()
        optimizer.step()
        with torch.no_grad():
            for w, w0 in zip(weights, anchors, strict=True):
                w.mul_(w0.norm() / w.norm())


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_trajectory_is_that_of_autograd_sgd_and_projection(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    ours, plain = network(dtype=dtype), network(dtype=dtype)
    anchors = [ours[0].weight.detach().clone(), ours[2].weight.detach().clone()]
    for net in (ours, plain):  # start off the anchor: the distance has no gradient on it
        with torch.no_grad():
            net[0].weight.add_(0.1)
            net[2].weight.neg_()
    optimizer = ProjectedSGD(
        [{**groups(ours)[0], "anchors": anchors}, groups(ours)[1]], lr=0.05, momentum=0.9, distance_weight=0.3
    )
    with bdfast.backend(backend):  # type: ignore[arg-type]
        train(ours, optimizer, batches(40, dtype))
    autograd_steps(plain, anchors, batches(40, dtype), lr=0.05, c=0.3)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
    for w, w0 in zip((ours[0].weight, ours[2].weight), anchors, strict=True):
        state = optimizer.state[w]
        assert abs(w.norm() / w0.norm() - 1) < 1e-6
        torch.testing.assert_close(state["distance"], (w.detach() - w0).norm(), rtol=1e-5, atol=1e-6)


def test_one_step_by_hand() -> None:
    w = nn.Parameter(torch.tensor([4.0, 3.0]))
    optimizer = ProjectedSGD(
        [{"params": [w], "anchors": [torch.tensor([3.0, 4.0])]}], lr=0.1, momentum=0.9, distance_weight=2**0.5
    )
    w.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    # d = sqrt 2, V = (0, 1) - (1, -1) = (-1, 2), W - lr V = (4.1, 2.8), scaled to norm 5
    expected = torch.tensor([4.1, 2.8]) * 5 / (4.1**2 + 2.8**2) ** 0.5
    torch.testing.assert_close(w.detach(), expected)
    assert optimizer.state[w]["momentum_buffer"].tolist() == pytest.approx([-1.0, 2.0])


def test_plain_groups_are_torch_sgd_bit_for_bit() -> None:
    for momentum in (0.0, 0.9):
        ours, theirs = network(), network()
        train(ours, ProjectedSGD(ours.parameters(), lr=0.1, momentum=momentum, projected=False), batches(10))
        train(theirs, torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum), batches(10))
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("weights_first", [True, False])
def test_state_dict_resumes_bit_identically(dtype: torch.dtype, weights_first: bool) -> None:
    data = batches(12, dtype)
    straight = network(dtype=dtype)
    optimizer = ProjectedSGD(groups(straight), lr=0.05, distance_weight=0.5)
    train(straight, optimizer, data[:6])
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, data[6:])

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(seed=5, dtype=dtype)
    again = ProjectedSGD(groups(resumed), lr=1.0)  # the saved groups bring their own options
    if weights_first:
        resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    if not weights_first:
        resumed.load_state_dict(saved["model"])
    train(resumed, again, data[6:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == again.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert value.dtype == again.state[q][key].dtype
            assert torch.equal(value, again.state[q][key]), key


def test_a_state_that_was_loaded_is_a_copy() -> None:
    first = network()
    optimizer = ProjectedSGD(groups(first), lr=0.05)
    train(first, optimizer, batches(2))
    second = copy.deepcopy(first)
    again = ProjectedSGD(groups(second), lr=0.05)
    again.load_state_dict(optimizer.state_dict())
    train(first, optimizer, batches(2))
    train(second, again, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_deep_copies_step_alike_and_apart() -> None:
    net = network()
    optimizer = ProjectedSGD(groups(net), lr=0.05)
    train(net, optimizer, batches(3))
    twin, twin_optimizer = copy.deepcopy((net, optimizer))
    before = net[2].weight.detach().clone()
    train(twin, twin_optimizer, batches(3))
    assert torch.equal(net[2].weight, before)
    train(net, optimizer, batches(3))
    assert torch.equal(net[2].weight, twin[2].weight)


def test_half_precision_keeps_masters() -> None:
    net, exact = network(dtype=torch.bfloat16), network(dtype=torch.bfloat16).float()
    optimizer = ProjectedSGD(groups(net), lr=1e-4, distance_weight=0.0)
    for p, q in zip(net.parameters(), exact.parameters(), strict=True):
        p.grad, q.grad = torch.full_like(p, 0.5), torch.full_like(q, 0.5)
    exact_optimizer = ProjectedSGD(groups(exact), lr=1e-4, distance_weight=0.0)
    for _ in range(20):  # one such step rounds away in bfloat16
        optimizer.step()
        exact_optimizer.step()
    state = optimizer.state[net[2].weight]
    assert state["master"].dtype == state["anchor"].dtype == torch.float32
    torch.testing.assert_close(state["master"], exact[2].weight.detach())
    assert torch.equal(net[2].weight, state["master"].bfloat16())


def test_weights_changed_by_others_are_noticed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net, fresh = network(dtype=dtype), network(dtype=dtype)
        anchors = [net[0].weight.detach().clone(), net[2].weight.detach().clone()]
        optimizer = ProjectedSGD([{**groups(net)[0], "anchors": anchors}], lr=0.05, momentum=0.0)
        train(net, optimizer, batches(3, dtype))
        for target in (net, fresh):
            with torch.no_grad():
                for w, w0 in zip((target[0].weight, target[2].weight), anchors, strict=True):
                    w.copy_(-w0)
                target[0].bias.zero_()
                target[2].bias.zero_()
        reference = ProjectedSGD([{**groups(fresh)[0], "anchors": anchors}], lr=0.05, momentum=0.0)
        for a, b in ((net, optimizer), (fresh, reference)):
            train(a, b, batches(1, dtype))
        assert torch.equal(net[2].weight, fresh[2].weight)


def test_parameters_without_gradient_are_left_alone() -> None:
    net = network()
    optimizer = ProjectedSGD(groups(net), lr=0.05)
    train(net, optimizer, batches(2))
    before = net[0].weight.detach().clone()
    kept = optimizer.state[net[0].weight]["distance"].clone()
    moved = optimizer.state[net[2].weight]["distance"].clone()
    optimizer.zero_grad()
    net[2].weight.grad = torch.ones_like(net[2].weight)
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert optimizer.state[net[0].weight]["distance"] == kept
    assert optimizer.state[net[2].weight]["distance"] != moved
    assert optimizer._stacks[0][0].distances[1] == optimizer.state[net[2].weight]["distance"]


def test_zero_gradients_drift_to_the_antipode() -> None:
    anchor = torch.tensor([3.0, 4.0])
    w = nn.Parameter(torch.tensor([4.0, 3.0]))
    optimizer = ProjectedSGD([{"params": [w], "anchors": [anchor]}], lr=0.1)
    for _ in range(300):
        w.grad = torch.zeros(2)
        optimizer.step()
    torch.testing.assert_close(w.detach(), -anchor, rtol=1e-3, atol=1e-3)


def test_tangential_gradients_of_d3_and_fst_are_parallel() -> None:
    """FST minimises <W, W0>; on the sphere D3's distance gradient points the same way, weighted by 1 / d."""
    g = torch.Generator().manual_seed(0)
    w0, w = torch.randn(4, 7, generator=g), torch.randn(4, 7, generator=g)
    w *= w0.norm() / w.norm()
    parameter = nn.Parameter(w.clone())
    optimizer = ProjectedSGD([{"params": [parameter], "anchors": [w0]}], lr=1e-3, distance_weight=0.7)
    parameter.grad = torch.zeros_like(w)
    optimizer.step()
    d3, fst = optimizer.state[parameter]["momentum_buffer"], 0.7 * w0
    radial = w / w.norm()
    tangents = [t - (t * radial).sum() * radial for t in (d3, fst)]
    torch.testing.assert_close(tangents[0], tangents[1] / (w - w0).norm())
    torch.testing.assert_close(d3.norm(), torch.tensor(0.7))


def test_closure_scheduler_and_tensor_learning_rate() -> None:
    by_number, by_tensor = network(), network()
    plain = ProjectedSGD(groups(by_number), lr=0.1)
    capturable = ProjectedSGD(groups(by_tensor), lr=0.1, capturable=True)
    assert all(isinstance(group["lr"], Tensor) for group in capturable.param_groups)
    for net, optimizer in ((by_number, plain), (by_tensor, capturable)):
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        for x, y in batches(4):

            def closure(
                net: nn.Module = net, optimizer: ProjectedSGD = optimizer, x: Tensor = x, y: Tensor = y
            ) -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                loss.backward()
                return loss

            assert optimizer.step(closure) > 0  # type: ignore[arg-type, operator]
            schedule.step()
    for p, q in zip(by_number.parameters(), by_tensor.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert float(capturable.param_groups[0]["lr"]) == pytest.approx(0.0, abs=1e-8)


def test_groups_can_be_added_and_named() -> None:
    net = network()
    optimizer = ProjectedSGD([("head", net[2].weight)], lr=0.05)
    optimizer.add_param_group({"params": [("first", net[0].weight)], "distance_weight": 0.0})
    optimizer.add_param_group({"params": [("bias", net[0].bias)], "projected": False})
    train(net, optimizer, batches(2))
    assert set(optimizer.state[net[0].weight]) == {"anchor", "momentum_buffer", "norm", "distance"}
    assert set(optimizer.state[net[0].bias]) == {"momentum_buffer"}
    with pytest.raises(ValueError, match="norm above 0"):
        optimizer.add_param_group({"params": [("zero", nn.Parameter(torch.zeros(3)))]})
    assert len(optimizer.param_groups) == 3
    train(net, optimizer, batches(1))


def test_convolutions_in_channels_last() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(conv).to(memory_format=torch.contiguous_format)
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    for layer in (conv, twin):
        optimizer = ProjectedSGD([{"params": [layer.weight]}], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(conv.weight, twin.weight, rtol=1e-5, atol=1e-6)


def test_backward_through_old_weights_raises() -> None:
    w = nn.Parameter(torch.ones(2))
    loss = w.square().sum()
    optimizer = ProjectedSGD([w], lr=0.1)
    w.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -0.1}, "`lr` expected a finite number >= 0, got -0.1"),
        ({"lr": float("nan")}, "`lr` expected a finite number >= 0, got nan"),
        ({"lr": torch.tensor([0.1])}, "`lr` expected a number, or a 0-dim float32 tensor"),
        ({"lr": torch.tensor(0.1, dtype=torch.float64)}, "`lr` expected a number, or a 0-dim float32 tensor"),
        ({"momentum": 1.0}, r"`momentum` expected a number in \[0, 1\), got 1.0"),
        ({"distance_weight": -1.0}, "`distance_weight` expected a finite number >= 0, got -1.0"),
    ],
)
def test_wrong_options(options: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ProjectedSGD([nn.Parameter(torch.ones(2))], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["lr", "momentum", "distance_weight"])
@pytest.mark.parametrize("value", ["0.1", None])
def test_options_that_are_no_numbers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"ProjectedSGD: `{name}` expected a number, got {type(value).__name__}; pass"):
        ProjectedSGD([nn.Parameter(torch.ones(2))], **{name: value})  # type: ignore[arg-type]


def test_state_of_another_optimizer_changes_nothing() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    other, optimizer = torch.optim.SGD([w], lr=0.5, momentum=0.9), ProjectedSGD([w], lr=0.1)
    w.grad = torch.tensor([0.1, -0.2])
    other.step()
    with pytest.raises(ValueError, match="`state_dict` expected that of a ProjectedSGD, with anchors, got that of ano"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    optimizer.step()
    assert abs(w.detach().norm().item() - 5.0) < 1e-6


def test_wrong_parameters() -> None:
    w = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"`anchors\[0\]` expected the shape of its parameter, got \[2\] for \[2, 3\]"):
        ProjectedSGD([{"params": [w], "anchors": [torch.ones(2)]}])
    with pytest.raises(ValueError, match="`anchors` expected one tensor a parameter, 1, got 2"):
        ProjectedSGD([{"params": [w], "anchors": [w, w]}])
    with pytest.raises(TypeError, match=r"`anchors\[0\]` expected a tensor, got float"):
        ProjectedSGD([{"params": [w], "anchors": [1.0]}])
    with pytest.raises(ValueError, match=r"`params\[0\]` expected an anchor with a finite norm above 0, got 0.0"):
        ProjectedSGD([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"`params\[0\]` expected an anchor with a finite norm above 0, got nan"):
        ProjectedSGD([nn.Parameter(torch.full((2,), float("nan")))])
    with pytest.raises(TypeError, match=r"`params\[0\]` expected float32"):
        ProjectedSGD([torch.ones(2, dtype=torch.int64)])
    embedding = nn.Embedding(4, 2, sparse=True)
    for projected in (True, False):
        optimizer = ProjectedSGD(embedding.parameters(), projected=projected)
        embedding.zero_grad()
        embedding(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="dense gradients"):
            optimizer.step()
