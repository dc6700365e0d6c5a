"""Accelerated functions in the place of another project's: explicit, a module at a time, reversible, reported.

    import defense.abl as abl
    print(bdfast.patch.backdoorbench(abl))     # from here on, until .undo()

    with bdfast.patch.backdoorbench(abl):      # or for a block
        ...

What is replaced is found by name and checked by signature; nothing is imported or run for it. ``BDFAST_REFERENCE=1``
runs the plain form of every replacement, for comparison.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import Any

from bdfast.errors import message
from bdfast.integrations.backdoorbench.accelerated.replacements import EVALUATIONS, REPLACEMENTS

__all__ = ["Patch", "backdoorbench"]

_WHERE = "patch.backdoorbench"
_EVALUATION = "eval_step"
_NAMES = (*REPLACEMENTS, _EVALUATION)
_ABSENT = "not in this module"


@dataclass(frozen=True)
class _Change:
    """One attribute of a module or class."""

    label: str
    owner: Any
    attribute: str
    before: Any
    after: Callable[..., Any]


@dataclass
class Patch:
    """What was replaced, and the way back. As a context manager it undoes itself.

    Attributes:
        replaced: full names, such as ``"defense.abl.compute_loss_value"``.
        left: full names of what was looked for and not replaced, with the reason.
    """

    replaced: tuple[str, ...]
    left: dict[str, str]
    _changes: list[_Change] = field(repr=False, default_factory=list)

    def undo(self) -> None:
        """Put everything back; a second call does nothing.

        Raises:
            RuntimeError: somebody else has replaced one of the names since. That one stays, the others are put back.
        """
        foreign = []
        while self._changes:
            change = self._changes.pop()
            if vars(change.owner).get(change.attribute) is change.after:
                setattr(change.owner, change.attribute, change.before)
            else:
                foreign.append(change.label)
        if foreign:
            got = f"something else in {', '.join(foreign)}"
            raise RuntimeError(message("Patch.undo", "self", "its own replacements", got, "undo later patches first"))

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [f"replaced  {name}" for name in self.replaced]
        lines += [f"left      {name}: {reason}" for name, reason in self.left.items() if reason != _ABSENT]
        absent = [name for name in _NAMES if self._in_no_module(name)]
        if absent:
            lines.append(f"not found {', '.join(absent)}")
        return "\n".join(lines)

    def _in_no_module(self, name: str) -> bool:
        reasons = [reason for label, reason in self.left.items() if label.endswith(f".{name}")]
        return (
            bool(reasons)
            and all(reason == _ABSENT for reason in reasons)
            and not any(label.endswith(f".{name}") for label in self.replaced)
        )


def backdoorbench(*modules: ModuleType | str | os.PathLike[str], only: Collection[str] | None = None) -> Patch:
    """Put the accelerated functions into modules of BackdoorBench that are already imported.

    Args:
        modules: modules, such as ``defense.clp``; or the folder of a checkout, for every module imported from there.
        only: names to replace; None replaces all that are found. They are ``compute_loss_value``, ``CLP_prune``,
            ``batch_entropy``, ``EP_defense``, ``given_dataloader_test``, methods ``LGALoss.forward``,
            ``FloodingLoss.forward``, ``Shared_PGD.attack``, ``Shared_PGD.projection``, ``NPD.projection``,
            ``NPD.get_perturbed_image``, ``AT.attention_map``, and ``eval_step`` of any class.

    Returns:
        A :class:`Patch`: prints as a report, undoes itself at the end of a ``with`` block or by ``.undo()``. A name
        whose signature differs from the one that the replacement was written for is left alone, and reported.

    Raises:
        TypeError: an argument is neither a module nor a path.
        FileNotFoundError: a path is no folder.
        ValueError: a module has none of the names, nothing is imported from a folder, or ``only`` has an unknown name.
            Nothing is replaced then.

    Example:
        >>> from types import ModuleType
        >>> module = ModuleType("defense.clp")
        >>> exec("def CLP_prune(net, u): ...", module.__dict__)
        >>> with backdoorbench(module) as patch:
        ...     patch.replaced, module.CLP_prune.__module__
        (('defense.clp.CLP_prune',), 'bdfast.integrations.backdoorbench.accelerated.clp')
        >>> "bdfast" in (module.CLP_prune.__module__ or "")
        False
    """
    names = _names(only)
    changes: list[_Change] = []
    left: dict[str, str] = {}
    for module in _modules(modules, names):
        found, not_replaced = _plan(module, names)
        changes += found
        left |= not_replaced
    for change in changes:
        setattr(change.owner, change.attribute, change.after)
    return Patch(tuple(change.label for change in changes), left, changes)


# --- what to look for, and where -------------------------------------------------------------------------------------


def _names(only: Collection[str] | None) -> tuple[str, ...]:
    if only is None:
        return _NAMES
    wanted = (only,) if isinstance(only, str) else tuple(only)
    for name in wanted:
        if name not in _NAMES:
            raise ValueError(message(_WHERE, "only", f"some of {', '.join(_NAMES)}", repr(name), "correct the name"))
    return wanted


def _modules(arguments: tuple[Any, ...], names: tuple[str, ...]) -> list[ModuleType]:
    if not arguments:
        raise TypeError(message(_WHERE, "modules", "at least one module", "none", "pass e.g. defense.clp"))
    found: list[ModuleType] = []
    for argument in arguments:
        if isinstance(argument, ModuleType):
            if not any(_has(argument, name) for name in names):
                expected, remedy = f"a module with one of {', '.join(names)}", "pass the module that defines them"
                raise ValueError(message(_WHERE, "modules", expected, f"`{argument.__name__}` with none", remedy))
            found.append(argument)
        elif isinstance(argument, str | os.PathLike):
            found += _imported_from(Path(argument), names)
        else:
            expected, remedy = "modules or the folder of a checkout", "import the defense and pass its module"
            raise TypeError(message(_WHERE, "modules", expected, type(argument).__name__, remedy))
    return list(dict.fromkeys(found))


def _imported_from(folder: Path, names: tuple[str, ...]) -> list[ModuleType]:
    if not folder.is_dir():
        raise FileNotFoundError(message(_WHERE, "modules", "a folder", str(folder), "pass the checkout's root"))
    root = folder.resolve()
    inside = [m for m in list(sys.modules.values()) if isinstance(m, ModuleType) and _lies_in(m, root)]
    found = [module for module in inside if any(_has(module, name) for name in names)]
    if not found:
        expected = f"a folder with an imported module that has one of {', '.join(names)}"
        got = f"`{folder}` with {len(inside)} imported modules and none of the names"
        raise ValueError(message(_WHERE, "modules", expected, got, "import the defenses first, then patch"))
    return found


def _lies_in(module: ModuleType, root: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve().is_relative_to(root)


def _has(module: ModuleType, name: str) -> bool:
    if name == _EVALUATION:
        return any(True for _ in _classes_with_evaluation(module))
    owner, _, attribute = name.rpartition(".")
    if owner:
        return attribute in vars(getattr(module, owner, object))
    return name in vars(module)


def _classes_with_evaluation(module: ModuleType) -> Iterator[type]:
    for value in list(vars(module).values()):
        if inspect.isclass(value) and value.__module__ == module.__name__ and _EVALUATION in vars(value):
            yield value


# --- what to replace -------------------------------------------------------------------------------------------------


def _plan(module: ModuleType, names: tuple[str, ...]) -> tuple[list[_Change], dict[str, str]]:
    changes: list[_Change] = []
    left: dict[str, str] = {}
    for name in names:
        if not _has(module, name):
            left[f"{module.__name__}.{name}"] = _ABSENT
        elif name == _EVALUATION:
            for cls in _classes_with_evaluation(module):
                _consider(module, cls, _EVALUATION, EVALUATIONS, changes, left)
        else:
            parent, _, attribute = name.rpartition(".")
            owner = getattr(module, parent) if parent else module
            _consider(module, owner, attribute, (REPLACEMENTS[name],), changes, left)
    return changes, left


def _consider(
    module: ModuleType,
    owner: Any,
    attribute: str,
    candidates: tuple[Callable[..., Any], ...],
    changes: list[_Change],
    left: dict[str, str],
) -> None:
    """Add the first candidate whose signature fits to ``changes``, or the reason against the last to ``left``."""
    before = vars(owner)[attribute]
    label = f"{module.__name__}.{attribute}"
    if inspect.isclass(owner):
        label = f"{module.__name__}.{owner.__name__}.{attribute}"
        if owner.__module__ != module.__name__:
            left[label] = f"its class is defined in `{owner.__module__}`; patch that module"
            return
    if not isinstance(before, FunctionType):
        left[label] = f"it is {type(before).__name__}, not a plain function"
        return
    reason: str | None = None
    for after in candidates:
        reason = "already replaced" if before is after else _difference(before, after)
        if reason is None:
            changes.append(_Change(label, owner, attribute, before, after))
            return
        if before is after:
            break
    left[label] = str(reason)


def _difference(before: FunctionType, after: Callable[..., Any]) -> str | None:
    """How the signatures differ, or None; the replacement may take more keywords than the original."""
    theirs, ours = (list(inspect.signature(function).parameters.values()) for function in (before, after))
    ours = [p for p in ours if p.kind is not p.KEYWORD_ONLY or p.name in {q.name for q in theirs}]
    plain = [[(p.name, p.kind, p.default) for p in parameters] for parameters in (theirs, ours)]
    if plain[0] == plain[1]:
        return None
    shown = [", ".join(str(p.replace(annotation=p.empty)) for p in parameters) for parameters in (theirs, ours)]
    return f"its signature is ({shown[0]}), not ({shown[1]})"
