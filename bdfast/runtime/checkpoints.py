"""Weights on disk, read without running anything that the file says.

A ``.pt`` file is a pickle, and a pickle is a program. Nothing here unpickles one: torch's restricted reader
(``weights_only=True``) accepts tensors and plain containers and refuses the rest, safetensors holds no code at all,
and there is no way around either. Sizes are checked before the weights are read.
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from bdfast.errors import message, optional_import
from bdfast.files import atomic_write
from bdfast.untrusted.restricted.container import members_of
from bdfast.untrusted.restricted.refused import Refused

WRAPPERS = ("model", "state_dict", "model_state_dict", "net")  # where training scripts put weights among other things
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and of torch.compile
_ORDER = "bdfast.order"  # safetensors sorts its tensors; readers that match weights by position need their order
_ZIP_MAGIC = b"PK\x03\x04"
# What torch's restricted reader calls with any number or codec that a file names: a few bytes would fill the memory.
_UNBOUNDED = {b"\nbytearray\n": "bytearray", b"\nencode\n": "bytes"}
_FREE_BYTES = 64 << 20  # that tensors may declare whatever the file's size; beyond, each byte of it counts a few times
_SHARING = 8


@dataclass(frozen=True)
class Checkpoint:
    """What a file held: the weights on the CPU, in the file's order, and whatever else it said."""

    state: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def load_state(
    path: str | os.PathLike[str], *, max_bytes: int = 8 * 2**30, allow_nonfinite: bool = False
) -> Checkpoint:
    """Read weights from ``.safetensors``, or else from a file of ``torch.save`` (zip or legacy).

    A torch file holds a state dict, or a dict with one under ``model`` (the form of BackdoorBench, beside
    ``model_name`` and ``num_classes``), ``state_dict``, ``model_state_dict`` or ``net``; the other entries become the
    metadata. The prefixes of DataParallel (``module.``) and torch.compile (``_orig_mod.``) are taken off where every
    name has them.

    Args:
        path: the file.
        max_bytes: the most that the file, and the tensors that it declares, may take.
        allow_nonfinite: accept NaN and infinite weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is too large, damaged, a TorchScript archive, refers to code, or holds something else than
            dense tensors by name; or a weight is not finite.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(f"{folder}/net.pt", {"linear.weight": torch.eye(2)}, {"num_classes": 2})
        ...     checkpoint = load_state(f"{folder}/net.pt")
        >>> checkpoint.metadata, list(checkpoint.state)
        ({'num_classes': 2}, ['linear.weight'])
    """
    path = Path(path)
    _check_file(path, max_bytes)
    state, metadata = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path, max_bytes)
    state = _without_prefixes(state)
    if not allow_nonfinite:
        _check_finite(path, state)
    return Checkpoint(state, metadata)


def save_state(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write weights as safetensors where the suffix says so, else as ``torch.save({"model": state, **metadata})``.

    The file appears whole or not at all. The same state and metadata give the same bytes of safetensors. Tensors that
    share memory are written one by one, views without what surrounds them.

    Args:
        path: in a folder that exists.
        state: tensors by name, on any device.
        metadata: anything that JSON holds (tuples become lists).

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: ``state`` holds something else than dense tensors by name, or JSON cannot hold the metadata.
        ValueError: the metadata takes a reserved name.
    """
    path = Path(path)
    tensors = _independent(state)
    plain = _plain_metadata(metadata or {})
    with atomic_write(path, "wb") as file:
        if path.suffix == ".safetensors":
            safetensors = optional_import("safetensors.torch", extra="cli", purpose="to write .safetensors files")
            header = {key: json.dumps(value) for key, value in {**plain, _ORDER: list(tensors)}.items()}
            _write_sorted(file, safetensors.save(tensors, header))
        else:
            torch.save({"model": tensors, **plain}, file)


def _write_sorted(file: IO[bytes], data: bytes) -> None:
    """Write a safetensors file with its metadata in the order of their names, which the library leaves to chance."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    file.write(len(text).to_bytes(8, "little") + text)
    file.write(memoryview(data)[start:])


def load_into(model: nn.Module, state: Mapping[str, Tensor], where: str = "load_into") -> None:
    """Copy ``state`` into ``model`` if every name and shape agrees, else change nothing and say what does not.

    Weights are never renamed by position: two layers of one shape could trade places unnoticed.

    Args:
        model: on any device; values are converted to its dtypes.
        state: tensors by name.
        where: what the message speaks of, such as the file of the weights.

    Raises:
        ValueError: names are missing or unexpected, shapes differ, or floats meet integers.

    Example:
        >>> load_into(nn.Linear(2, 1), {"weight": torch.zeros(1, 2)})
        Traceback (most recent call last):
        ValueError: load_into: `state` expected the 2 tensors of Linear, got 1 missing (bias); ...
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    mismatched = [
        f"{key}: {_describe(state[key])} for {_describe(own[key])}"
        for key in own
        if key in state and not _fits(state[key], own[key])
    ]
    groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched))
    faults = [f"{len(keys)} {what} ({_first(keys)})" for what, keys in groups if keys]
    if not faults:
        model.load_state_dict(dict(state), strict=True)
        return
    remedy = "build the architecture, number of classes and channels that the weights were trained with"
    if not mismatched and len(own) == len(state) and all(map(_fits, state.values(), own.values())):
        remedy = (
            "only names differ, the shapes agree position by position: if the order is right, pass "
            "dict(zip(model.state_dict(), state.values()))"
        )
    expected = f"the {len(own)} tensors of {type(model).__name__}"
    raise ValueError(message(where, "state", expected, ", ".join(faults), remedy))


def _check_file(path: Path, max_bytes: int) -> None:
    if not path.exists():
        raise FileNotFoundError(message("load_state", str(path), "a file of weights", "nothing", "check the path"))
    if not path.is_file():
        raise ValueError(message("load_state", str(path), "a file of weights", "no regular file", "check the path"))
    size = path.stat().st_size
    if size == 0:
        raise _refused(path, "an empty file", "fetch or save it again")
    _check_size(path, size, max_bytes)


def _check_size(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise ValueError(
            message(
                "load_state", str(path), f"at most {max_bytes} bytes", str(size), "raise `max_bytes` if you trust it"
            )
        )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    safetensors = optional_import("safetensors", extra="cli", purpose="to read .safetensors files")
    try:  # the reader checks that the header's offsets tile the file before anything is allocated
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = {key: _from_json(text) for key, text in (file.metadata() or {}).items()}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise _refused(path, f"a damaged safetensors file ({_line(error)})", "fetch or save it again") from error
    order = metadata.pop(_ORDER, None)
    if isinstance(order, list) and sorted(map(str, order)) == sorted(state):
        state = {key: state[key] for key in order}
    return state, metadata


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:  # other programs write plain words, such as format: pt
        return text


def _read_torch(path: Path, max_bytes: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with path.open("rb") as file:
        _check_torch(path, file)
        # Shapes first, without memory: a few bytes can declare a tensor of any size.
        state, _ = _unwrap(path, _restricted_load(path, file, "meta"))
        if made := [key for key, value in state.items() if value.device.type != "meta"]:
            raise _refused(path, f"a tensor without numbers in the file under `{made[0]}`", "save a state dict")
        _check_size(path, sum(max(t.nbytes, t.untyped_storage().nbytes()) for t in state.values()), max_bytes)
        declared = sum(t.nbytes for t in state.values())  # not of storages, which tensors may share
        if declared > max(_FREE_BYTES, _SHARING * path.stat().st_size):
            got = f"tensors of {declared} bytes in a file of {path.stat().st_size}"
            raise _refused(path, got, "save contiguous tensors")
        state, metadata = _unwrap(path, _restricted_load(path, file, "cpu"))
    if hollow := [key for key, value in state.items() if value.device.type != "cpu"]:
        raise _refused(path, f"a tensor without values under `{hollow[0]}`", "save the model after loading its weights")
    return state, metadata


def load_plain(path: Path) -> Any:
    """What a file of torch.save holds, of tensors, numbers, text and plain containers.

    Raises:
        ValueError: the file is damaged, or holds something else.
    """
    with path.open("rb") as file:
        _check_torch(path, file)
        return _restricted_load(path, file, "cpu")


def _check_torch(path: Path, file: IO[bytes]) -> None:
    """Refuse what torch's own reader would take for more than it is, before it is called."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start, size = _check_zip(path, data) if data[: len(_ZIP_MAGIC)] == _ZIP_MAGIC else (0, len(data))
        for name, kind in _UNBOUNDED.items():
            if data.find(name, start, start + size) >= 0:
                remedy = "save numbers and strings, or use `bdfast convert`, which leaves the rest out"
                raise _refused(path, f"values of the type {kind} beside them", remedy)


def _check_zip(path: Path, data: mmap.mmap) -> tuple[int, int]:
    """First byte and length of the pickle in a zip that all readers understand alike, and that is not compressed."""
    try:
        found = members_of(data)
    except Refused as error:
        got = f"a damaged or compressed zip archive ({error.field}: {error.got})"
        raise _refused(path, got, "fetch or save it again") from error
    if any(name.endswith("/constants.pkl") for name in found):
        raise _refused(path, "a TorchScript archive, which holds a program", "save model.state_dict() instead")
    pickles = [span for name, span in found.items() if name.partition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise _refused(path, f"a zip archive with {len(pickles)} files data.pkl", "fetch or save it again")
    return pickles[0]


def _restricted_load(path: Path, file: IO[bytes], device: str) -> Any:
    file.seek(0)
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail in any way; torch's own advice, to run its code, is left out
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            got = f"a pickle that refers to `{code[1]}`, which may run code"
            raise _refused(path, got, "save model.state_dict() and plain numbers and strings instead") from None
        raise _refused(path, f"a file that torch cannot read ({_line(error)})", "fetch or save it again") from error


def _unwrap(path: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the rest of what a torch file held."""
    if not isinstance(content, dict):
        raise _refused(path, f"a {type(content).__name__}", "save a state dict")
    # dict's own methods: a file may put others under their names into an OrderedDict.
    entries: dict[Any, Any] = dict(dict.items(content))
    wrapper = next((key for key in WRAPPERS if isinstance(entries.get(key), dict)), None)
    tensors = entries if wrapper is None else dict(dict.items(entries[wrapper]))
    metadata = {} if wrapper is None else {str(key): value for key, value in entries.items() if key != wrapper}
    for key, value in tensors.items():
        if fault := _not_dense(key, value):
            raise _refused(path, fault, "save a state dict")
    return {key: Tensor.detach(value) for key, value in tensors.items()}, metadata


def _not_dense(key: Any, value: Any) -> str | None:
    """What keeps ``value`` from being a dense tensor with a name, in words."""
    if not isinstance(key, str):
        return f"the key {key!r:.80}"
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} under `{key}`"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return f"a sparse, nested or quantized tensor under `{key}`"
    return None


def _refused(path: Path, got: str, remedy: str) -> ValueError:
    return ValueError(message("load_state", str(path), "weights (dense tensors by name)", got, remedy))


def _line(error: Exception) -> str:
    """The first sentence: what torch writes after it advises to load the file with its code."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.split(". ")[0][:160]


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in _PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key[len(prefix) :]: value for key, value in state.items()}
    return state


def _check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        numbers = value.float() if value.itemsize == 1 else value  # torch.isfinite does not know 8-bit floats
        bad = int(value.numel() - torch.isfinite(numbers).sum())
        if bad:
            got = f"{bad} NaN or infinite of {value.numel()} numbers in `{key}`"
            remedy = "train it again, or pass allow_nonfinite=True to look into it"
            raise ValueError(message("load_state", str(path), "finite weights", got, remedy))


def _independent(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each alone in its memory."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if fault := _not_dense(key, value):
            raise TypeError(message("save_state", "state", "dense tensors by name", fault, "pass a state dict"))
        tensor = value.detach().cpu()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def _plain_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON and back: what is written can be read without unpickling, from both kinds of files alike."""
    if taken := sorted({*WRAPPERS, _ORDER} & set(metadata)):
        remedy = "rename it: the weights go there"
        raise ValueError(message("save_state", "metadata", "names that are free", repr(taken[0]), remedy))
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata)))
    except (TypeError, ValueError) as error:
        remedy = "convert arrays with .tolist() and numpy numbers with .item()"
        raise TypeError(message("save_state", "metadata", "what JSON can hold", _line(error), remedy)) from error
    return plain


def _fits(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and value.is_floating_point() == own.is_floating_point()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _first(keys: list[str], count: int = 4) -> str:
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
