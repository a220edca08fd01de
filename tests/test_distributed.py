"""Several processes train one network: what they say, and that it is the same training."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ddp_worker
import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from conftest import Qexp
from PIL import Image
from torch import nn

from qexp.errors import ConfigError
from qexp.runner import checkpoint, distributed
from qexp.runner.device import pick_device
from qexp.runner.folder import find_runs, find_unfinished, read_json

TINY = (
    "dataset=synthetic",
    "dataset.train_images=96",
    "dataset.image_size=8",
    "dataset.test_images=40",
    "model.width=0.25",
    "model.checkpoint=none",
    "recipe.calibration_images=32",
    "recipe.plots=false",
    "quantizer=asq",
    "device=cpu",
    "compile=off",
    "threads=1",
)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def in_two_processes(work: str, folder: Path) -> None:
    (folder / "port").write_text(free_port())
    mp.spawn(ddp_worker.launch, args=(2, str(folder), work), nprocs=2)


def test_without_torchrun_every_verb_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.launched() == distributed.world() == distributed.World(0, 1, 0)
    assert distributed.restarts() == 0
    t = torch.tensor([1.0])
    distributed.average_([t])
    assert distributed.total(t) is t
    assert distributed.told("x") == "x"
    assert distributed.led(lambda: "y") == "y"


def test_two_processes_understand_each_other(tmp_path: Path) -> None:
    in_two_processes("messages", tmp_path)


def test_answers_of_two_processes_stand_in_the_order_of_the_split(tmp_path: Path) -> None:
    in_two_processes("scores", tmp_path)


def test_synchronised_batch_norm_is_that_of_the_whole_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(4))
    nn.init.normal_(net[0].weight)  # type: ignore[arg-type]
    x, e = torch.randn(6, 4, 5, 5) * 3 + 2, torch.randn(6, 4, 5, 5)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    v = x.clone().requires_grad_()
    y = net(v)
    y.backward(e)
    whole = {
        "before": before,
        "x": x,
        "e": e,
        "y": y.detach(),
        "dx": v.grad,
        "grads": [p.grad for p in net.parameters()],
        "after": net.state_dict(),
    }
    torch.save(whole, tmp_path / "norm.pt")
    in_two_processes("batch_norm", tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("train", "-m", "seed=0,1"), "qexp: a sweep starts its own processes."),
        (("train", "quantizer=adaround"), "qexp: recipe ptq runs in one process."),
    ],
)
def test_what_torchrun_cannot_do_is_refused_in_one_line(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], line: str
) -> None:
    for key, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(key, value)
    done = qexp(*words)
    assert done.code == 2
    assert done.err.startswith(line), done.err
    assert len(done.err.splitlines()) == 1


def test_a_restarted_command_finds_the_run_it_began(tmp_path: Path) -> None:
    for name, state, identity in (
        ("a", "interrupted", "mine"),
        ("b", "done", "mine"),
        ("c", "failed", "other"),
    ):
        (tmp_path / name).mkdir()
        status = {"state": state, "identity": identity}
        (tmp_path / name / "status.json").write_text(json.dumps(status))
    assert find_unfinished(tmp_path, "mine") == tmp_path / "a"
    assert find_unfinished(tmp_path, "none") is None
    assert find_unfinished(tmp_path, "mine", processes=2) is None  # begun by one


# ---------------------------------------------------------------------------------------------
# The command, under torchrun


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def torchrun(folder: Path, *words: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun --nproc-per-node=2 -m qexp WORDS`, started."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        f"--max-restarts={restarts}", "-m", "qexp", *words,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(folder),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def single(folder: Path, *words: str) -> None:
    command = [sys.executable, "-m", "qexp", *words]
    done = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def epochs(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "epoch"]


def only_run(folder: Path) -> Path:
    (run,) = find_runs(folder / "outputs")
    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_equal_one_at_the_same_global_batch(tmp_path: Path) -> None:
    words = ("train", *TINY, "recipe.epochs=2", "sync_bn=true")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    single(tmp_path / "one", *words, "recipe.batch_size=16")
    started = torchrun(tmp_path / "two", *words, "recipe.batch_size=8")
    said, _ = started.communicate(timeout=200)
    assert started.returncode == 0, said
    assert said.count("epoch 001/2") == 1  # one process speaks
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    for a, b in zip(epochs(one), epochs(two), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
        assert b["train_top1"] == pytest.approx(a["train_top1"], abs=2.1)
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=2e-2)
    assert read_json(two / "result.json")["epochs"] == 2
    words = (*words, "max_steps=1", "recipe.lr=1e-9", "recipe.epochs=1")
    single(tmp_path / "one", *words, "recipe.batch_size=16", "out=start")
    started = torchrun(tmp_path / "two", *words, "recipe.batch_size=8", "out=start")
    said, _ = started.communicate(timeout=200)
    (a,), (b,) = find_runs(tmp_path / "one" / "start"), find_runs(tmp_path / "two" / "start")
    mine, theirs = (checkpoint.load(run / "last.pt")["model"] for run in (a, b))
    steps = [key for key in mine if key.endswith("act_quantizer.scale")]
    assert len(steps) == 8
    for key in steps:  # the same calibration
        assert theirs[key].item() == pytest.approx(mine[key].item(), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_image_that_another_process_cannot_read_does_not_lose_the_epoch(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for i in range(8):
                noise = np.random.default_rng(i).integers(0, 255, (12, 12, 3), dtype=np.uint8)
                Image.fromarray(noise).save(tmp_path / "d" / part / name / f"{i}.png")
    (tmp_path / "d" / "val" / "cat" / "1.png").write_bytes(b"no image")  # process 1 scores it
    tiny = [word for word in TINY if not word.startswith("dataset")]
    data = ("dataset=imagefolder", "dataset.root=d", "dataset.crop=8", "dataset.resize=12")
    data = (*data, "recipe.calibration_images=16")
    words = (*tiny, *data, "dataset.workers=0", "recipe.epochs=1", "recipe.batch_size=4")
    said, _ = torchrun(tmp_path, "train", *words).communicate(timeout=200)
    assert "1.png cannot be read as an image" in said
    kept = checkpoint.load(only_run(tmp_path) / "last.pt")
    assert (kept["epoch"], kept["step"]) == (0, 2)  # all trained, not scored


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_training_goes_on_after_one_process_is_killed(tmp_path: Path) -> None:
    words = ("train", *TINY, "recipe.epochs=30", "recipe.batch_size=8")
    started = torchrun(tmp_path, *words, restarts=1)
    try:
        deadline = time.monotonic() + 150
        while not list((tmp_path / "outputs").rglob("last.pt")):
            assert time.monotonic() < deadline
            assert started.poll() is None, started.communicate()[0]
            time.sleep(0.2)
        victim = follower_of(only_run(tmp_path))
        os.kill(victim, signal.SIGKILL)
        said, _ = started.communicate(timeout=250)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, said
    run = only_run(tmp_path)  # the same folder
    assert "resumed after epoch" in (run / "train.log").read_text()
    assert [e["epoch"] for e in epochs(run)] == list(range(1, 31))
    assert read_json(run / "status.json")["state"] == "done"


def follower_of(run: Path) -> int:
    """The process id of the one that does not lead, a sibling of the one that does."""
    leader = read_json(run / "status.json")["pid"]

    def parent(pid: int) -> int:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return int(stat.rpartition(")")[2].split()[1])

    agent = parent(leader)
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    siblings = []
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if parent(pid) == agent and pid != leader and b"qexp" in command:
                siblings.append(pid)
        except OSError:
            continue  # it ended meanwhile
    (follower,) = siblings
    return follower


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Process 0 of two on a machine that seems to have two GPUs; what is asked of the group."""
    asked: list[str] = []
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: asked.append(f"gpu {index}"))
    monkeypatch.setattr(distributed, "rendezvous", lambda *a, **k: iter([(object(), 0, 2)]))
    monkeypatch.setattr(distributed, "PrefixStore", lambda prefix, store: store)
    group = distributed.dist
    monkeypatch.setattr(group, "init_process_group", lambda name, **k: asked.append(name))
    monkeypatch.setattr(group, "destroy_process_group", lambda: asked.append("destroyed"))
    monkeypatch.setattr(
        group.distributed_c10d, "_abort_process_group", lambda: asked.append("aborted")
    )
    return asked


def test_a_process_that_fails_does_not_wait_for_the_others_gpus(two_gpus: list[str]) -> None:
    with distributed.together("cuda"):
        assert distributed.world().size == 2
    with pytest.raises(MemoryError), distributed.together("auto"):
        raise MemoryError
    assert two_gpus == ["gpu 0", "nccl", "destroyed", "gpu 0", "nccl", "aborted"]
    assert distributed.world().size == 1


def test_more_processes_than_gpus(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    said = r"process 2 of this machine .* --nproc-per-node=2"
    with pytest.raises(ConfigError, match=said), distributed.together("auto"):
        pass
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        pick_device("auto")
    assert not two_gpus
