"""patch.backdoorbench: what it finds, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import bdfast
from bdfast.integrations.backdoorbench import accelerated

SOURCE = """
from torch import nn

def CLP_prune(net, u):
    return "plain"

def compute_loss_value(args, poisoned_data, model_ascent, extra):
    return "plain"

def batch_entropy(x, step_size=0.2):
    return "plain"

given_dataloader_test = print

class AT(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def attention_map(self, fm, eps=1e-6):
        return "plain"

class abl:
    def eval_step(self, netC, clean_test_dataloader, bd_test_dataloader, args):
        return "plain"

class nab:
    def eval_step(self, model, clean_test_loader, bd_test_loader, args):
        return "plain"

class other:
    def eval_step(self, model):
        return "plain"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A module as a user would have imported it from a checkout."""
    path = tmp_path / "defense_fake.py"
    path.write_text(SOURCE)
    module = ModuleType("defense_fake")
    module.__file__ = str(path)
    exec(compile(SOURCE, str(path), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "defense_fake", module)
    return module


def test_replaces_what_fits_and_says_what_does_not(fake: ModuleType) -> None:
    before = dict(vars(fake))
    patch = bdfast.patch.backdoorbench(fake)
    assert patch.replaced == (
        "defense_fake.CLP_prune",
        "defense_fake.AT.attention_map",
        "defense_fake.abl.eval_step",
        "defense_fake.nab.eval_step",
    )
    assert fake.CLP_prune is accelerated.CLP_prune
    assert fake.abl.eval_step.__name__ == "eval_step"
    assert fake.nab.eval_step.__name__ == "eval_step_of_trainer"
    assert fake.AT is before["AT"]  # methods are replaced in the class, not the class
    assert patch.left["defense_fake.compute_loss_value"] == (
        "its signature is (args, poisoned_data, model_ascent, extra), not (args, poisoned_data, model_ascent)"
    )
    assert "step_size=0.2" in patch.left["defense_fake.batch_entropy"]
    assert "not a plain function" in patch.left["defense_fake.given_dataloader_test"]
    assert "its signature is (self, model)" in patch.left["defense_fake.other.eval_step"]
    assert patch.left["defense_fake.EP_defense"] == "not in this module"
    report = str(patch)
    assert "replaced  defense_fake.CLP_prune" in report
    assert "left      defense_fake.compute_loss_value: its signature" in report
    assert report.splitlines()[-1] == (
        "not found LGALoss.forward, FloodingLoss.forward, EP_defense, Shared_PGD.attack, Shared_PGD.projection, "
        "NPD.projection, NPD.get_perturbed_image"
    )
    patch.undo()
    patch.undo()  # nothing left to do
    assert vars(fake) == before
    assert fake.AT(2).attention_map(None) == "plain"
    assert fake.abl().eval_step(*[None] * 4) == "plain"


def test_as_a_context_manager_it_undoes_itself_when_the_block_raises(fake: ModuleType) -> None:
    plain = fake.CLP_prune

    def failing() -> None:
        with bdfast.patch.backdoorbench(fake):
            assert fake.CLP_prune is not plain
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert fake.CLP_prune is plain


def test_a_second_patch_finds_its_work_done(fake: ModuleType) -> None:
    with bdfast.patch.backdoorbench(fake):
        with bdfast.patch.backdoorbench(fake) as second:
            assert second.replaced == ()
            assert second.left["defense_fake.CLP_prune"] == "already replaced"
            assert second.left["defense_fake.abl.eval_step"] == "already replaced"
        assert fake.CLP_prune is accelerated.CLP_prune


def test_undo_keeps_what_came_later_and_says_so(fake: ModuleType) -> None:
    patch = bdfast.patch.backdoorbench(fake)
    fake.CLP_prune = later = lambda net, u: "later"
    with pytest.raises(RuntimeError, match=r"something else in defense_fake.CLP_prune; undo later patches first"):
        patch.undo()
    assert fake.CLP_prune is later
    assert fake.AT(2).attention_map(None) == "plain"


def test_only_some_names(fake: ModuleType) -> None:
    with bdfast.patch.backdoorbench(fake, only=["AT.attention_map"]) as patch:
        assert patch.replaced == ("defense_fake.AT.attention_map",)
        assert patch.left == {}
    with pytest.raises(ValueError, match=r"`only` expected some of compute_loss_value, .*, got 'CLP'; correct"):
        bdfast.patch.backdoorbench(fake, only=["CLP"])


def test_a_checkout_by_its_folder(fake: ModuleType, tmp_path: Path) -> None:
    with bdfast.patch.backdoorbench(tmp_path) as patch:
        assert "defense_fake.CLP_prune" in patch.replaced
    other = ModuleType("other")
    exec("def EP_defense(net, u, mixture_data_loader, args): ...", other.__dict__)
    with bdfast.patch.backdoorbench(tmp_path, other) as patch:  # found in one of the modules is found
        assert "EP_defense" not in str(patch).splitlines()[-1]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"0 imported modules and none of the names; import the defenses first"):
        bdfast.patch.backdoorbench(empty)
    with pytest.raises(FileNotFoundError, match=r"patch.backdoorbench: `modules` expected a folder"):
        bdfast.patch.backdoorbench(tmp_path / "absent")


def test_a_module_without_any_of_the_names_is_an_error_and_nothing_is_replaced(fake: ModuleType) -> None:
    plain = fake.CLP_prune
    expected = (
        r"`modules` expected a module with one of compute_loss_value, .*CLP_prune.*eval_step, got `sys` with none"
    )
    with pytest.raises(ValueError, match=expected):
        bdfast.patch.backdoorbench(fake, sys)
    assert fake.CLP_prune is plain


@pytest.mark.parametrize(("arguments", "got"), [((), "none"), ((3,), "int")])
def test_wrong_arguments(arguments: tuple[object, ...], got: str) -> None:
    with pytest.raises(TypeError, match=f"patch.backdoorbench: `modules` expected .*, got {got};"):
        bdfast.patch.backdoorbench(*arguments)  # type: ignore[arg-type]


def test_a_method_of_a_class_from_elsewhere_is_left(fake: ModuleType) -> None:
    user = ModuleType("user")
    user.AT = fake.AT  # type: ignore[attr-defined]
    patch = bdfast.patch.backdoorbench(user)
    assert patch.left["user.AT.attention_map"] == "its class is defined in `defense_fake`; patch that module"
    assert patch.replaced == ()


def test_a_keyword_that_only_the_replacement_has_is_no_difference() -> None:
    module = ModuleType("ep")
    exec("def batch_entropy(x, step_size=0.1): ...", module.__dict__)
    with bdfast.patch.backdoorbench(module) as patch:
        assert patch.replaced == ("ep.batch_entropy",)
