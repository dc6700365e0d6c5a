"""The runner of CUDA sources on the CPU finds the faults it is there to find."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda_on_cpu.library import build

FAULTS = {
    "barrier_for_some": r"thread 0 waits at a barrier in line \d+, thread 16 has left the kernel",
    "shuffle_for_some": r"thread 0 waits at a shuffle in line \d+, thread 1 has left the kernel",
    "two_barriers": r"thread 0 waits at a barrier in line \d+, thread 1 waits at a barrier in line \d+",
}
SOUND = len(FAULTS)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    built = build("planted_faults", tmp_path_factory.mktemp("cuda_on_cpu"))
    built.run.restype = ctypes.c_char_p
    return built


def run(library: ctypes.CDLL, which: int) -> list[int]:
    out = (ctypes.c_int * 64)()
    if message := library.run(which, out):
        raise RuntimeError(message.decode())
    return list(out)


@pytest.mark.parametrize("which", range(SOUND), ids=list(FAULTS))
def test_a_planted_fault_is_reported(library: ctypes.CDLL, which: int) -> None:
    with pytest.raises(RuntimeError, match=f"divergence: {list(FAULTS.values())[which]}"):
        run(library, which)
    assert run(library, SOUND) == list(reversed(range(64)))  # the next launch is not to blame
