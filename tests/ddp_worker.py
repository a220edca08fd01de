"""What the processes of `test_distributed` run: each function in two of them, over gloo."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qexp.recipes.evaluate import evaluate
from qexp.runner import distributed


def launch(rank: int, size: int, folder: str, work: str) -> None:
    """Be process `rank` of `size`, as torchrun would start it; `work` names a function below."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=Path(folder, "port").read_text(),
    )
    with distributed.together("cpu") as world:
        globals()[work](world, Path(folder))
    # A group that something still holds keeps its threads, which abort the process at its exit.
    assert not [name for name in threads() if "gloo" in name]


def threads() -> list[str]:
    """Names of this process's threads, those of C++ too; empty where the system has no /proc."""
    return [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]


def messages(world: distributed.World, folder: Path) -> None:
    """Every verb of `distributed`, with what it must give."""
    assert distributed.world() == world == distributed.World(world.rank, 2, world.rank)
    assert distributed.told({"from": world.rank}) == {"from": 0}
    assert distributed.led(lambda: (world.rank, distributed.world().size)) == (0, 1)
    a, b = torch.full((2, 3), float(world.rank)), torch.tensor([10.0 * world.rank])
    distributed.average_([a, b])
    assert a.tolist() == [[0.5] * 3] * 2
    assert b.item() == 5
    assert distributed.total(torch.tensor([1 + world.rank])).item() == 3
    torch.manual_seed(world.rank)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    first = distributed.told({k: v.clone() for k, v in net.state_dict().items()})
    distributed.share_(net)
    for key, value in net.state_dict().items():
        assert torch.equal(value, first[key]), key
    distributed.own_random_numbers(seed=0, step=5)
    drawn = distributed.total(torch.rand(()) * (1 - 2 * world.rank))
    assert drawn.item() != 0  # process 1 draws other numbers than process 0


def scores(world: distributed.World, folder: Path) -> None:
    """Each process scores its share; both have all answers, in the order of the split."""
    x, y = torch.arange(14.0).view(7, 2), torch.tensor([0, 1, 1, 1, 0, 1, 0])
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        net.bias.copy_(torch.tensor([0.0, -1.0 + 2 * world.rank]))  # process 0 answers 0, 1 says 1
    part = slice(world.rank, None, world.size)
    score = evaluate(net, [(x[part][:2], y[part][:2]), (x[part][2:], y[part][2:])])
    assert score.answers is not None
    assert score.answers.tolist() == [[0, 1, 0, 1, 0, 1, 0], y.tolist()]
    assert score.top1 == 100 * 6 / 7


def batch_norm(world: distributed.World, folder: Path) -> None:
    """SyncBN on half the batch, against batch norm on all of it, saved by the test."""
    saved = torch.load(folder / "norm.pt", weights_only=True)
    net = nn.Sequential(nn.BatchNorm2d(4))
    net.load_state_dict(saved["before"])
    assert distributed.sync_bn_(net) == 1
    part = slice(world.rank * 3, world.rank * 3 + 3)
    x = saved["x"][part].requires_grad_()
    y = net(x)
    y.backward(saved["e"][part])
    torch.testing.assert_close(y, saved["y"][part], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, saved["dx"][part], rtol=1e-4, atol=1e-5)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    summed = [distributed.total(g) for g in grads]
    for got, expected in zip(summed, saved["grads"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, saved["after"][key], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dist.get_world_size(), 2)
