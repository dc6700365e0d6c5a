"""Training on two processes: the batches of one, the same weights on both."""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bdfast.runtime import Augment, Ranks, ResidentData, torchrun
from bdfast.runtime.ranks import ALONE
from bdfast.training import TrainConfig, train_classifier

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

CONFIG = TrainConfig(epochs=3, batch_size=12, lr=0.05, augment=Augment(1, True))


def make_data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(61) % 3  # 12 five times, then 1: which no two ranks can share
    return (torch.rand(61, 1, 6, 6, generator=g) + labels[:, None, None, None]) / 4, labels


def make_net(norm: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


def train(norm: bool, seed: int = 0, **options: Any) -> dict[str, Any]:
    result = train_classifier(make_net(norm, seed), make_data(), options.pop("config", CONFIG), **options)
    return {"state": result.model.state_dict(), "history": result.history}


def raised(action: Any) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def work(rank: int, folder: str) -> None:
    """Everything that needs two processes, in one start of them."""
    torch.set_num_threads(1)
    path = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{path / 'meet'}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    found["plain"] = train(False, seed=rank)  # rank 1 starts elsewhere, and is brought to rank 0
    found["norm"] = train(True, distributed=True)
    found["alone"] = train(True, distributed=False)
    found["divided"] = train(False, config=CONFIG_14)

    calls: list[int] = []

    def stop(record: dict[str, Any]) -> None:
        calls.append(record["epoch"])
        if record["epoch"] == 2:
            raise RuntimeError("enough")

    net = make_net(True)
    before = copy.deepcopy(net.state_dict())
    found["stopped"] = raised(lambda: train_classifier(net, make_data(), CONFIG, stop, checkpoint=path / "run.pt"))
    found["calls"] = calls
    found["untouched"] = all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    found["resumed"] = train(True, checkpoint=path / "run.pt")

    images, labels = make_data()
    found["other data"] = raised(lambda: train_classifier(make_net(True), (images, labels.roll(rank)), CONFIG))
    dist.destroy_process_group()
    found["threads"] = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]
    torch.save(found, path / f"{rank}.pt")


CONFIG_14 = TrainConfig(epochs=2, batch_size=14, lr=0.05, augment="none", schedule="one_cycle")  # the last batch has 5


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("run", ["plain", "norm", "divided", "resumed"])
def test_ranks_end_with_the_same_model_and_history(both: list[dict[str, Any]], run: str) -> None:
    one, two = (found[run] for found in both)
    assert same(one["state"], two["state"])
    for a, b in zip(one["history"], two["history"], strict=True):
        assert (a["loss"], a["accuracy"], a["lr"]) == (b["loss"], b["accuracy"], b["lr"])


@pytest.mark.parametrize(("run", "config"), [("plain", CONFIG), ("divided", CONFIG_14)])
def test_without_batch_norm_two_do_what_one_does(both: list[dict[str, Any]], run: str, config: TrainConfig) -> None:
    alone, together = train(False, config=config), both[0][run]
    for key, value in alone["state"].items():
        torch.testing.assert_close(together["state"][key], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(alone["history"], together["history"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1 / 61 + 1e-9)


def test_batch_norm_takes_its_own_part(both: list[dict[str, Any]]) -> None:
    alone, together = train(True), both[0]["norm"]
    assert not same(alone["state"], together["state"])
    assert together["history"][-1]["loss"] < together["history"][0]["loss"]
    assert same(both[0]["alone"]["state"], both[1]["alone"]["state"])
    for key, value in alone["state"].items():  # in a process of a group, which here has another number of threads
        torch.testing.assert_close(both[0]["alone"]["state"][key], value, rtol=1e-4, atol=1e-5)


def test_a_callback_ends_all_ranks_and_the_checkpoint_goes_on(both: list[dict[str, Any]]) -> None:
    assert [found["calls"] for found in both] == [[1, 2], []]
    for found in both:
        assert found["stopped"] == "RuntimeError: enough"
        assert found["untouched"]
        assert same(found["resumed"]["state"], found["norm"]["state"])
        assert [record["epoch"] for record in found["resumed"]["history"]] == [1, 2, 3]


def test_all_ranks_need_the_same_data(both: list[dict[str, Any]]) -> None:
    for found in both:
        assert "`data` expected the same samples and config on every rank, got others on rank 1" in found["other data"]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads by name need /proc")
def test_the_group_ends_where_it_is_destroyed(both: list[dict[str, Any]]) -> None:
    # Threads of a group that outlives it may abort the process as the interpreter ends.
    for found in both:
        assert [name for name in found["threads"] if "gloo" in name] == []


def test_parts_make_up_the_batches() -> None:
    images, labels = make_data()
    data = ResidentData(images, labels, augment=Augment(1, True))
    whole = list(data.batches(16, shuffle=True, epoch_seed=5))
    parts = [list(data.batches(16, shuffle=True, epoch_seed=5, ranks=Ranks(rank, 3))) for rank in range(3)]
    for number, batch in enumerate(whole):
        pieces = zip(*(part[number] for part in parts), strict=True)
        assert all(torch.equal(torch.cat(piece), tensor) for piece, tensor in zip(pieces, batch, strict=True))
    assert [len(batch[0]) for batch in parts[0]] == [5, 5, 5, 4]
    assert data.sizes(16) == [16, 16, 16, 13]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 5, 15, 16, 128])
def test_shares(size: int, count: int) -> None:
    shares = [Ranks(rank, size).divide(count) for rank in range(size)]
    assert sum(share.weight for share in shares) == pytest.approx(1)
    rows = [list(range(count))[share.rows] for share in shares]
    if count < 2 * size:
        assert all(row == list(range(count)) for row in rows)
    else:
        assert [sample for row in rows for sample in row] == list(range(count))
        assert min(map(len, rows)) >= 2


def test_without_a_group() -> None:
    with torchrun() as ranks:
        assert ranks == ALONE
    with pytest.raises(RuntimeError, match="train_classifier: `distributed` expected an initialised torch"):
        train_classifier(make_net(True), make_data(), CONFIG, distributed=True)
