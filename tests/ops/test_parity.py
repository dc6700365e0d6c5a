"""Every backend of every op against the reference in float64, on every case."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import bdfast
from bdfast.backends import find
from bdfast.testing import Case, OpSuite, Outputs, compare, parity, suites, upcast
from tests.ops.backends import combinations, skip_unless_runnable


def run(suite: OpSuite, case: Case, backend: str, device: torch.device, dtype: torch.dtype) -> Outputs:
    return {name: value.clone() for name, value in suite.run(suite.inputs(case, device, dtype), backend).items()}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(("suite", "case", "backend", "dtype"), combinations())
def test_matches_float64_reference(
    suite: OpSuite, case: Case, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    skip_unless_runnable(suite, case, backend, device, dtype)
    mismatches = parity(suite, case, backend, device, dtype)
    assert not mismatches, "\n".join(map(str, mismatches))


@pytest.mark.parametrize(("suite", "case", "backend", "dtype"), combinations(benchmark_cases=False))
def test_reruns_are_bit_identical(
    suite: OpSuite, case: Case, backend: str, dtype: torch.dtype, device: torch.device
) -> None:
    skip_unless_runnable(suite, case, backend, device, dtype)
    first, second = (run(suite, case, backend, device, dtype) for _ in range(2))
    for name in first:
        assert torch.equal(first[name].nan_to_num(), second[name].nan_to_num()), name


@pytest.fixture
def with_threads() -> Iterator[Callable[[Callable[[], Outputs]], list[Outputs]]]:
    """Runs something with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()

    def repeated(action: Callable[[], Outputs]) -> list[Outputs]:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(action())
        return found

    yield repeated
    torch.set_num_threads(threads)


def same_bits(first: Outputs, *others: Outputs) -> bool:
    return all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_thread_count_does_not_change_a_bit(with_threads: Callable[[Callable[[], Outputs]], list[Outputs]]) -> None:
    for suite in suites().values():
        reasons = find(suite.name).reasons(torch.empty(0))
        if "cpp" not in reasons:
            continue
        if reasons["cpp"] is not None:
            pytest.skip("the compiled extension is not built")
        for case in (c for c in suite.cases if c.benchmark and not c.large and "4096x4096" not in c.name):
            results = with_threads(partial(run, suite, case, "cpp", torch.device("cpu"), torch.float32))
            assert same_bits(*results), case.name


def total_loss(op: str, dtype: torch.dtype, options: dict[str, Any]) -> Outputs:
    """Sum of a loss over rows that PyTorch shares among threads, and the gradient."""
    generator = torch.Generator().manual_seed(0)
    z = (8 * torch.randn(100_001, 4, generator=generator)).to(dtype).requires_grad_()
    second = z.detach().flip(0) if op == "kl_divergence" else torch.randint(0, 4, (len(z),), generator=generator)
    loss = getattr(bdfast.ops, op)(z, second, **options, backend="reference")
    loss.sum().backward()
    return {"loss": loss.detach(), "grad": z.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("sce_loss", {}),
        ("sce_loss", {"reduction": "sum"}),
        ("kl_divergence", {"reduction": "sum"}),
        ("hinge_cross_entropy", {"margin": 0.1}),
        ("bounded_ascent_cross_entropy", {"num_descend": 40_000, "mu": 0.5, "tau": 3.0}),
    ],
)
def test_thread_count_does_not_change_a_bit_of_the_references(
    op: str, options: dict[str, Any], dtype: torch.dtype, with_threads: Callable[[Callable[[], Outputs]], list[Outputs]]
) -> None:
    """float64 has no other backend."""
    assert same_bits(*with_threads(partial(total_loss, op, dtype, options)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thread_count_does_not_change_a_bit_of_other_long_sums(
    dtype: torch.dtype, with_threads: Callable[[Callable[[], Outputs]], list[Outputs]]
) -> None:
    """The gradient of one bound, the norms of a layer."""

    def act() -> Outputs:
        generator = torch.Generator().manual_seed(0)
        x, g, v = torch.randn(3, 7, 3, 80, 80, generator=generator, dtype=dtype)
        bound = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        (bdfast.ops.clipped_relu(x, bound, backend="reference") * g).sum(dim=(1, 2, 3)).sum().backward()
        w, w0 = x.clone(), x + 0.01 * v
        norms = torch.tensor([30.0], dtype=dtype)
        bdfast.ops.projected_sgd_step_(
            [w], [w0], [g], [v], lr=0.1, momentum=0.9, distance_weight=10.0, norms=norms, backend="reference"
        )
        return {"bound": bound.grad, "w": w, "v": v}  # type: ignore[dict-item]

    assert same_bits(*with_threads(act))


@pytest.mark.parametrize("suite", suites().values(), ids=suites().keys())
def test_usual_pytorch_form_computes_the_same(suite: OpSuite) -> None:
    """The benchmark's baseline is the same function: otherwise its timing means nothing."""
    for case in suite.cases:
        if case.benchmark and not case.large and "4096" not in case.name:
            eager = suite.eager(suite.inputs(case))
            mismatches = compare(eager, suite.run(suite.inputs(case), "reference"), suite)
            assert all(m.excess < 20 for m in mismatches), "\n".join(map(str, mismatches))


@pytest.mark.parametrize("suite", suites().values(), ids=suites().keys())
def test_a_wrong_result_is_found(suite: OpSuite) -> None:
    """The comparison itself can fail: one element off by 1e-4 of its size, or NaN, is reported with its place."""
    case = next(c for c in suite.cases if c.benchmark)
    for wrong in (1.0001, float("nan")):
        got = run(suite, case, "reference", torch.device("cpu"), torch.float32)
        expected = {name: value.clone() for name, value in got.items()}
        name = max(got, key=lambda n: got[n].numel())
        flat = got[name].view(-1)
        position = int(flat.abs().argmax())
        flat[position] *= wrong
        (mismatch,) = compare(got, expected, suite)
        assert mismatch.output == name
        assert torch.tensor(mismatch.worst).tolist() == [
            int(i) for i in torch.unravel_index(torch.tensor(position), got[name].shape)
        ]


@pytest.mark.parametrize("suite", suites().values(), ids=suites().keys())
def test_opcheck(suite: OpSuite) -> None:
    for case in suite.cases:
        if case.benchmark or case.large:
            continue
        if any(
            value.isnan().any() for value in run(suite, case, "reference", torch.device("cpu"), torch.float32).values()
        ):
            continue  # opcheck takes NaN for a difference
        for op, arguments in suite.opcheck_arguments(suite.inputs(case)):
            torch.library.opcheck(op, arguments)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 80),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 10.0, 300.0]),
    margin=st.sampled_from([0.0, 0.1, 3.0]),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_hinge_cross_entropy_any_shape(
    rows: int, classes: int, scale: float, margin: float, reduction: str, dtype: torch.dtype
) -> None:
    """Within the bounds that float32 arithmetic has, whatever is drawn.

    A row's CE is ``(m - z_y) + log s`` with ``s >= 1``: each part errs by a few roundings of itself, and log s by those
    of s too, which log passes on as an absolute error. The hinge subtracts the margin, and with it what the error was
    relative to, but enlarges no error: it and the mean are 1-Lipschitz. A gradient errs as a probability does.
    """
    suite = suites()["hinge_cross_entropy"]
    options = {"shape": (rows, classes), "scale": scale, "margin": margin, "reduction": reduction}
    inputs = suite.inputs(Case("drawn", "", options), "cpu", dtype)
    got, exact = suite.run(inputs, "auto"), suite.run(upcast(inputs), "reference")
    if rows == 0:
        assert torch.equal(got["loss"].nan_to_num(), exact["loss"].float().nan_to_num())
        return
    ce = F.cross_entropy(inputs["logits"].double(), inputs["target"], reduction="none")
    error = 1e-6 * (1.0 + ce)
    weight = inputs["grad"].abs().double() / (rows if reduction == "mean" else 1)
    total = error if reduction == "none" else error.sum() / (rows if reduction == "mean" else 1)
    assert ((got["loss"].double() - exact["loss"]).abs() <= total + 1e-7 * exact["loss"].abs()).all()
    decided = (ce - margin).abs() > error  # whether a row at the margin counts is up to rounding
    rounding = (
        2 * torch.finfo(dtype).eps * exact["grad"].abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )
    allowed = 1e-6 * weight.expand(rows)[:, None] + rounding
    assert ((got["grad"].double() - exact["grad"]).abs() <= allowed)[decided].all()


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple),
    carried=st.sampled_from(["", "known", "unknown"]),
    start=st.sampled_from(["random", "far", "close"]),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_projected_sgd_step_any_shapes(
    shapes: tuple[tuple[int, ...], ...], carried: str, start: str, momentum: float
) -> None:
    suite = suites()["projected_sgd_step_"]
    options = {"shapes": shapes, "carried": carried, "start": start, "momentum": momentum}
    # Drawn layers of a few weights may lie close to their anchor, where W - W0 cancels.
    assert not parity(suite, Case("drawn", "", options, conditioning=1e3), "auto", "cpu", torch.float32)
