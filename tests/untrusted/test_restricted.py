"""Files of torch.save are read without running anything in them, and broken ones end in an error."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bdfast.integrations.backdoorbench import ArtefactError, Limits, RawImage, read_artefact
from bdfast.integrations.backdoorbench.torch_save import torch_save
from bdfast.untrusted.restricted import child
from bdfast.untrusted.restricted.container import read
from bdfast.untrusted.restricted.refused import Refused
from tests.untrusted.hostile import CASES, PROTO, array, name, pt, saved, storage, tensor, text


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Exception | None, Path, bool]]:
    """What reading each hostile file raises, the file, and whether its canary sings; a few processes at a time."""
    folder = tmp_path_factory.mktemp("hostile")

    def attempt(number: int) -> tuple[Exception | None, Path, bool]:
        case = list(CASES.values())[number]
        canary, file = folder / f"canary{number}", folder / f"case{number}.pt"
        file.write_bytes(case.build(str(canary)))
        try:
            read_artefact(file, limits=Limits(values=100_000))
        except Exception as error:
            return error, file, canary.exists()
        return None, file, canary.exists()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(CASES, pool.map(attempt, range(len(CASES))), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, refusals: dict[str, tuple[Exception | None, Path, bool]]) -> None:
    error, file, sings = refusals[name]
    assert isinstance(error, ArtefactError), error
    assert not sings
    text = str(error)
    assert text.startswith(f"read_artefact: `{file}: ")
    assert " expected " in text
    assert ", got " in text
    assert "; " in text
    assert CASES[name].says in text
    assert text.isprintable()


def test_corpus_is_large_and_its_gadgets_work(tmp_path: Path) -> None:
    """The gadgets do run where a file is unpickled: the canary would sing."""
    assert len(CASES) >= 100
    for title in ("global os.system", "global open", "global eval", "pickle's own, protocol 2"):
        canary, file = tmp_path / "canary", tmp_path / "x.pt"
        file.write_bytes(CASES[title].build(str(canary)))
        try:
            torch.load(file, weights_only=False)
        finally:
            assert canary.exists(), title
        canary.unlink()


def everything() -> dict[str, Any]:
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    return {
        "state": OrderedDict(torch.nn.BatchNorm2d(3).state_dict()),
        "parameter": torch.nn.Parameter(torch.tensor([1.5, -2.0])),
        "view": torch.arange(6, dtype=torch.int64).reshape(2, 3).T,
        "shared": [torch.arange(4.0)[1:3]] * 2,
        "half": torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        "empty": torch.empty(0, 3),
        "array": np.arange(6).reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "mask": np.array([True, False]),
        "scalars": [np.int64(-7), np.float32(2.5), np.bool_(True)],
        "images": {np.int64(3): (Image.fromarray(pixels), 1, 2), 5: (Image.fromarray(pixels[:, :, 0]), 0, 0)},
        "plain": [None, True, -5, 2**40, 0.25, "text", b"bytes", b"", (1, "two"), {"k": {}}],
        "nan": float("nan"),
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda", 1),
    }


def same(read: Any, saved: Any) -> bool:
    if isinstance(saved, torch.Tensor):
        return read.dtype == saved.dtype and torch.equal(read, saved.detach())
    if isinstance(saved, np.ndarray):
        return read.dtype == saved.dtype and np.array_equal(read, saved)
    if isinstance(saved, Image.Image):
        return isinstance(read, RawImage) and np.array_equal(read.pixels, np.atleast_3d(np.asarray(saved)))
    if isinstance(saved, dict):
        return list(read) == list(saved) and all(same(read[key], saved[key]) for key in saved)
    if isinstance(saved, (list, tuple)):
        return len(read) == len(saved) and all(map(same, read, saved))
    return read == saved or (saved != saved and read != read) or str(saved) == read


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 5}], ids=str)
def test_what_torch_saves_is_read(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.save(everything(), tmp_path / "x.pt", **options)
    artefact = read_artefact(tmp_path / "x.pt")
    assert artefact.kind == ("legacy" if "_use_new_zipfile_serialization" in options else "zip")
    assert same(artefact.value, everything())


def test_module_name_of_numpy_1(tmp_path: Path) -> None:
    torch_save(everything(), tmp_path / "x.pt")
    raw = (tmp_path / "x.pt").read_bytes()
    assert b"numpy.core.multiarray" in raw
    assert b"numpy._core" not in raw
    assert same(read_artefact(tmp_path / "x.pt").value, everything())
    unpickled = torch.load(tmp_path / "x.pt", weights_only=False)  # numpy 2 finds them under the old name too
    assert same(unpickled["array"], everything()["array"])


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "x.pt")
    tensor = read_artefact(tmp_path / "x.pt").value["a"]
    tensor += 1
    assert tensor.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(file=100), "1 to 100 bytes"),
        (Limits(pickle=10), "at most 10 bytes"),
        (Limits(blob=8), "at most 8 bytes"),
        (Limits(seconds=0), "within 0 s"),
    ],
    ids=str,
)
def test_limits(tmp_path: Path, limits: Limits, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(saved(tensor((4,), (1,))))
    with pytest.raises(ArtefactError, match=says) as caught:
        read_artefact(tmp_path / "x.pt", limits=limits)
    assert caught.value.kind == "limit"


def test_what_is_named_often_is_held_once(tmp_path: Path) -> None:
    """A file of a megabyte may name its arrays a million times; neither the blob nor this process grows with it."""
    numbers, raw = np.arange(1 << 17, dtype=">i8"), bytes(1 << 20)
    image = Image.new("1", (1024, 1024))
    torch.save([[numbers] * 50, [raw] * 50, [image] * 50], tmp_path / "x.pt")
    arrays, texts, images = read_artefact(tmp_path / "x.pt", limits=Limits(blob=5 << 19)).value
    assert np.array_equal(arrays[0], numbers)
    assert all(np.shares_memory(array, arrays[0]) for array in arrays)
    assert all(text is texts[0] for text in texts)
    assert all(np.shares_memory(one.pixels, images[0].pixels) for one in images)


def test_truth_values_are_zero_or_one(tmp_path: Path) -> None:
    truths = tensor((4,), (1,), store=storage(kind=name("torch.BoolStorage")))
    kind = name("numpy.dtype") + b"(" + text("b1") + b"\x89\x88tR"
    raw = bytes((255, 2, 1, 0))
    (tmp_path / "x.pt").write_bytes(saved(b"](" + truths + array(b"(K\x04t", raw, kind) + b"e", {"0": raw}))
    first, second = read_artefact(tmp_path / "x.pt").value["w"]
    assert first.view(torch.uint8).tolist() == second.view(np.uint8).tolist() == [1, 1, 1, 0]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """Text that names itself in the memo a million times takes little; a list of copies does not."""
    copies = b"](" + b"B" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    (tmp_path / "x.pt").write_bytes(pt(PROTO + copies * 64 + b"."))
    with pytest.raises(ArtefactError) as caught:
        read_artefact(tmp_path / "x.pt", limits=Limits(memory=64 << 20))
    assert caught.value.kind in ("limit", "damaged")


@pytest.mark.parametrize("stem", ["full_base_aug_seed=2333", "victim (2), lr 0.1 @ cifar10", "größe"])
def test_the_folder_in_the_zip_is_called_as_the_file_was(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.pt"
    torch.save({"w": torch.ones(2)}, path)
    assert torch.equal(read_artefact(path).value["w"], torch.ones(2))


@pytest.mark.parametrize("what", ["nothing", "folder"])
def test_no_file(tmp_path: Path, what: str) -> None:
    path = tmp_path if what == "folder" else tmp_path / "nowhere.pt"
    with pytest.raises(FileNotFoundError, match=r"a file of torch\.save"):
        read_artefact(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_escapes(data: st.DataObject) -> None:
    """Any change of a few bytes is either harmless or refused, by the reader itself and not by a crash."""
    whole = bytearray(saved(b"](" + tensor((2, 2), (2, 1)) + b"(K\x01" + b"}" + b"t" + b"e"))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(Refused):
        read(bytes(whole), 1 << 20)


def in_the_reader(program: str) -> subprocess.CompletedProcess[str]:
    """Run a few lines as the reader's process runs."""
    folder = str(Path(child.__file__).parent.parent)
    limits = {"memory": 1 << 30, "seconds": 10, "blob": 1 << 20}
    start = f"import sys; sys.path.append({folder!r}); from restricted.child import confine; limits = {limits}; "
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program], env={}, capture_output=True, text=True, check=False
    )


def test_the_reader_has_the_standard_library_alone() -> None:
    done = in_the_reader("print([m for m in ('torch', 'numpy', 'bdfast', 'pickle', 'socket') if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize(
    "attempt",
    [
        "import socket",
        "import os; confine(limits); os.system('echo out')",
        "confine(limits); eval('1')",
        "import pickle; confine(limits); pickle.loads(b'cos\\nsystem\\n.')",
    ],
)
def test_what_the_reader_may_never_do(attempt: str) -> None:
    """Should a file ever make it run something, the process ends at once."""
    done = in_the_reader(f"{'' if 'confine' in attempt else 'confine(limits); '}{attempt}; print('out')")
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
