"""Which backend runs: argument, context, environment; and what says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import bdfast
from bdfast.backends import find


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(raw op, backend) of every call of the raw ops of sce_loss."""
    made: list[tuple[str, str]] = []
    for op in ("sce_loss_fwd", "sce_loss_fwd_grad", "sce_loss_bwd"):
        found = find(op)

        def choose(wish: str, key: Any, op: str = op, chosen: Any = found.choose) -> Any:
            implementation = chosen(wish, key)
            made.append((op, implementation.backend))
            return implementation

        monkeypatch.setattr(found, "choose", choose)
    return made


def test_the_backward_stays_with_the_choice_of_the_forward(
    calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the environment, too, which is read when the op is called."""
    z = torch.randn(5, 4, requires_grad=True)
    monkeypatch.setenv("BDFAST_BACKEND", "reference")
    loss = bdfast.ops.sce_loss(z, torch.zeros(5, dtype=torch.int64)).sum()
    monkeypatch.delenv("BDFAST_BACKEND")
    loss.backward()  # type: ignore[no-untyped-call]
    with bdfast.backend("reference"):
        loss = bdfast.ops.sce_loss(z, torch.zeros(5, dtype=torch.int64)).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert calls == [("sce_loss_fwd", "reference"), ("sce_loss_bwd", "reference")] * 2


def test_argument_context_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDFAST_BACKEND", "triton")
    explain = bdfast.explain
    assert explain("sce_loss").requested == "triton"
    with bdfast.backend("reference"):
        assert explain("sce_loss").requested == "reference"
        assert explain("sce_loss", backend="cpp").requested == "cpp"
    monkeypatch.setenv("BDFAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"BDFAST_BACKEND: `backend` expected one of auto, .* got 'fastest'"):
        bdfast.ops.sce_loss(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))


def test_compiled_code_follows_the_environment_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BDFAST_BACKEND", raising=False)
    z, y = torch.randn(5, 4), torch.zeros(5, dtype=torch.int64)
    compiled = torch.compile(lambda x: bdfast.ops.sce_loss(x, y), fullgraph=True, backend="eager")
    compiled(z)
    monkeypatch.setenv("BDFAST_BACKEND", "cuda")
    with pytest.raises(bdfast.backends.BackendUnavailableError, match="'cuda' cannot run"):
        compiled(z)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((3,), {}, "explain: `op` expected one of .*, got '3'"),
        (("sce",), {}, "explain: `op` expected one of .*, got 'sce'"),
        (("sce_loss",), {"device": "gpu"}, "explain: `device` expected a device, got 'gpu'"),
    ],
)
def test_explain_names_what_is_wrong(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        bdfast.explain(*arguments, **options)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("op", ["sce_loss", "hinge_cross_entropy", "kl_divergence"])
def test_gradients_of_fake_tensors(op: str, reduction: str) -> None:
    """Shapes alone: nothing looks at a value."""
    options = {"margin": 0.1} if op == "hinge_cross_entropy" else {}
    with FakeTensorMode():
        z = torch.randn(5, 4, requires_grad=True)
        second = torch.randn(5, 4) if op == "kl_divergence" else torch.zeros(5, dtype=torch.int64)
        loss = getattr(bdfast.ops, op)(z, second, reduction=reduction, **options)
        loss.sum().backward()
    assert z.grad is not None
    assert (z.grad.shape, z.grad.dtype) == ((5, 4), torch.float32)


def test_sparse_images_are_refused() -> None:
    x = torch.zeros(2, 3, 4, 4).to_sparse()
    with pytest.raises(TypeError, match=r"clipped_relu: `x` expected a dense tensor, got torch\.sparse_coo"):
        bdfast.ops.clipped_relu(x, 1.0)
    with pytest.raises(TypeError, match=r"`x_adv` expected a dense tensor, got torch\.sparse_coo"):
        bdfast.ops.masked_pgd_step_(x, x, x, None, None, step_size=0.1, eps=0.1)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("which", ["weights", "momentum_buffers"])
def test_a_layer_without_memory_of_its_own_is_refused(which: str, backend: str) -> None:
    w, w0, g, v = torch.rand(4, 3, 4).unbind()
    given = {"weights": w, "momentum_buffers": v}[which][:1].expand(3, 4)
    layer = [given if which == "weights" else w, w0, g, given if which == "momentum_buffers" else v]
    before = [t.clone() for t in layer]
    with pytest.raises(ValueError, match=rf"`{which}\[0\]` expected memory of its own for every element"):
        bdfast.ops.projected_sgd_step_(
            *([t] for t in layer), lr=0.1, momentum=0.9, distance_weight=1.0, norms=torch.ones(1), backend=backend
        )
    assert all(torch.equal(a, b) for a, b in zip(layer, before, strict=True))


def test_a_checkout_without_links_says_what_to_do(tmp_path: Path) -> None:
    """Git leaves a file with the text of the link there."""
    package = Path(bdfast.__file__).parent
    copy = tmp_path / "bdfast"
    copy.mkdir()
    for item in package.iterdir():
        if item.name != "triton_kernels":
            (copy / item.name).symlink_to(item)
    (copy / "triton_kernels").write_text("../csrc/triton")
    (copy / "__init__.py").unlink()  # which is to be found here, not where the link leads
    (copy / "__init__.py").write_text((package / "__init__.py").read_text())
    told = subprocess.run(
        [sys.executable, "-c", "import bdfast"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "symbolic link to csrc/triton: on a checkout without links, enable them" in told.stderr
