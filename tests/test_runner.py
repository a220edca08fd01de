"""A run's life: folder, status, files that are never half written, what is put back."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import compose
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from qexp import config, schema
from qexp.errors import CheckpointError, ConfigError, RunError
from qexp.runner import atomic, checkpoint, environment
from qexp.runner.device import compiler_available, pick_device, seed_everything
from qexp.runner.folder import (
    claim,
    find_done,
    find_runs,
    find_unfinished,
    identity,
    owner,
    read_json,
    read_status,
)
from qexp.runner.guards import os_errors
from qexp.runner.idle import crowded, idle_cores
from qexp.runner.run import open_run


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    return OmegaConf.create({"bits": 4, "seed": 7, "out": str(tmp_path), "double": "${bits}"})


def status_of(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())


# Folders


def test_runs_that_ask_for_one_folder_at_once_each_get_their_own(tmp_path: Path) -> None:
    barrier, got = threading.Barrier(8), []

    def ask() -> None:
        barrier.wait()
        got.append(claim(tmp_path / "run", {"state": "running"}))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(got)) == 8
    assert tmp_path / "run" in got


def test_the_current_folder_may_be_claimed_and_another_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert claim(Path("."), {}) == tmp_path / "here"
    assert claim(Path("."), {}) == tmp_path / "here-2"


def test_a_finished_run_leaves_every_file_of_the_design(tmp_path: Path, cfg: DictConfig) -> None:
    with open_run(tmp_path / "run", cfg) as run:
        run.event("epoch", epoch=1, loss=float("nan"))
        lines = (run.dir / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1])["loss"] is None  # flushed, and valid JSON
        assert status_of(run.dir)["state"] == "running"
        run.info("half way")
        run.finish({"top1": 91.5})
    files = {p.name for p in run.dir.iterdir()}
    assert files == {
        "config.yaml",
        ".hydra",
        "env.json",
        "status.json",
        "metrics.jsonl",
        "train.log",
        "result.json",
    }
    assert status_of(run.dir)["state"] == "done"
    assert OmegaConf.load(run.dir / "config.yaml").double == 4
    assert "${bits}" in (run.dir / ".hydra" / "config.yaml").read_text()
    assert "half way" in (run.dir / "train.log").read_text()
    result = read_json(run.dir / "result.json")
    assert result["top1"] == 91.5
    assert result["seed"] == 7
    assert {"commit", "dirty", "wall_s", "overrides"} <= set(result)
    assert torch.__version__.startswith(result["versions"]["torch"])


def test_a_failed_run_has_its_traceback_and_no_result(tmp_path: Path, cfg: DictConfig) -> None:
    with pytest.raises(ZeroDivisionError) as caught, open_run(tmp_path / "run", cfg):
        raise ZeroDivisionError("boo")
    folder = tmp_path / "run"
    assert caught.value.run_folder == folder  # type: ignore[attr-defined]
    assert status_of(folder)["state"] == "failed"
    assert status_of(folder)["error"] == "ZeroDivisionError: boo"
    assert "Traceback" in (folder / "train.log").read_text()
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (
            {"batch_size": 4, "accumulate": 1},
            "Set saved=blocks, raise recipe.accumulate or lower recipe.batch_size; in a sweep, "
            "sweep.jobs_per_gpu.",
        ),
        (
            {"batch_size": 4, "minibatch": 2},
            "Lower recipe.batch_size or recipe.minibatch; in a sweep, sweep.jobs_per_gpu.",
        ),
    ],
)
def test_a_gpu_without_memory_is_one_line(
    tmp_path: Path, cfg: DictConfig, keys: dict[str, int], advice: str
) -> None:
    cfg = OmegaConf.merge(cfg, {"recipe": keys})  # type: ignore[assignment]
    with pytest.raises(RunError) as caught, open_run(tmp_path / "run", cfg):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
    line = f"run: the GPU is out of memory. {advice}"
    assert str(caught.value) == status_of(tmp_path / "run")["error"] == line
    assert "Tried to allocate 2.00 GiB" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_without_a_result_is_no_success(tmp_path: Path, cfg: DictConfig) -> None:
    with pytest.raises(RunError, match="without a result"), open_run(tmp_path / "run", cfg):
        pass
    assert status_of(tmp_path / "run")["state"] == "failed"


@pytest.mark.parametrize(("name", "resumable"), [("_write_hydra", False), ("write_json", True)])
def test_an_interrupted_run_is_named_only_where_a_resume_finds_its_config(
    tmp_path: Path, cfg: DictConfig, monkeypatch: pytest.MonkeyPatch, name: str, resumable: bool
) -> None:
    def stop(*given: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(f"qexp.runner.run.{name}", stop)
    with pytest.raises(KeyboardInterrupt) as error, open_run(tmp_path / "run", cfg):
        pass
    assert hasattr(error.value, "run_folder") == resumable
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file() == resumable


def test_sigterm_interrupts_a_run_and_is_given_back(tmp_path: Path, cfg: DictConfig) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run", cfg):
        os.kill(os.getpid(), signal.SIGTERM)
    assert status_of(tmp_path / "run")["state"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_whose_process_is_gone_reads_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    folder = claim(tmp_path / "run", {"state": "running", **owner(), "pid": process.pid})
    assert read_status(folder)["state"] == "dead"


def test_a_pid_given_to_another_process_reads_dead(tmp_path: Path) -> None:
    if owner()["pid_started"] is None:
        pytest.skip("no /proc here")
    folder = claim(tmp_path / "a", {"state": "running", **owner()})
    assert read_status(folder)["state"] == "running"
    folder = claim(tmp_path / "b", {"state": "running", **owner(), "pid_started": 1})
    assert read_status(folder)["state"] == "dead"


def test_a_run_on_another_machine_is_never_called_dead(tmp_path: Path) -> None:
    status = {"state": "running", **owner(), "pid": 2**22 + 1, "host": "elsewhere"}
    assert read_status(claim(tmp_path / "run", status))["state"] == "running"


def test_resume_continues_in_the_folder_and_adds_the_time(tmp_path: Path, cfg: DictConfig) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), open_run(folder, cfg):
        raise KeyboardInterrupt
    before = (folder / ".hydra" / "config.yaml").read_text()
    atomic.write_json(folder / "status.json", {**status_of(folder), "wall_s": 100.0})
    cfg.bits = 3
    with open_run(folder, cfg, resume=True) as run:
        assert run.resumed
        assert run.dir == folder
        run.finish({"top1": 1.0})
    assert read_json(folder / "result.json")["wall_s"] >= 100
    assert "error" not in status_of(folder)
    assert OmegaConf.load(folder / "config.yaml").bits == 3
    assert (folder / ".hydra" / "config.yaml").read_text() == before
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events == ["start", "resume"]


def test_the_first_event_after_a_kill_is_a_line_of_its_own(tmp_path: Path, cfg: DictConfig) -> None:
    with open_run(tmp_path / "run", cfg) as run:
        run.event("epoch", epoch=1)
        run.finish({})
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "run" / "result.json").unlink()
    with open_run(tmp_path / "run", cfg, resume=True) as run:
        run.event("epoch", epoch=2)
        run.finish({})
    events = [json.loads(line) for line in path.read_text().splitlines()[2:]]
    assert [e["event"] for e in events] == ["resume", "epoch"]
    assert events[1]["epoch"] == 2


def test_a_resume_by_another_commit_or_with_other_threads_is_told_and_kept(
    tmp_path: Path,
    cfg: DictConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cfg.threads = 1
    parts = [("a", True, 1), ("b", False, 1), ("b", False, 2)]
    for commit, dirty, threads in parts:
        monkeypatch.setattr(environment, "source_version", lambda c=commit, d=dirty: (c, d))
        cfg.threads = threads
        with (
            pytest.raises(KeyboardInterrupt),
            open_run(tmp_path / "run", cfg, resume=commit == "b"),
        ):
            raise KeyboardInterrupt
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "warning: this run was begun by commit a (dirty), it goes on with b"
    assert said[1].startswith("warning: threads=2, before 1: sums in another order")
    assert len(said) == 2
    with open_run(tmp_path / "run", cfg, resume=True) as run:
        result = run.finish({})
    assert (result["commit"], result["dirty"]) == ("b", True)
    assert result["commits"] == read_json(tmp_path / "run" / "env.json")["commits"]
    assert result["commits"] == ["a (dirty)", "b"]


def test_a_running_run_cannot_be_resumed(tmp_path: Path, cfg: DictConfig) -> None:
    with open_run(tmp_path / "run", cfg) as run:
        with (
            pytest.raises(RunError, match="still running"),
            open_run(run.dir, cfg, resume=True),
        ):
            pass
        run.finish({})
    assert status_of(run.dir)["state"] == "done"


def test_tensorboard_is_opened_only_when_used(tmp_path: Path, cfg: DictConfig) -> None:
    with open_run(tmp_path / "run", cfg) as run:
        assert not list(run.dir.glob("events.*"))
        run.scalar("loss", 0.5, 1)
        run.histogram("w", torch.randn(4, 4), 1)
        assert list(run.dir.glob("events.*"))
        run.finish({})


# What a run may not leave behind


def test_torch_global_state_is_put_back(tmp_path: Path, cfg: DictConfig) -> None:
    with open_run(tmp_path / "outer", cfg) as outer:
        with open_run(tmp_path / "inner", cfg) as run:
            torch.set_default_dtype(torch.float64)
            torch.use_deterministic_algorithms(True)
            torch.set_float32_matmul_precision("medium")
            torch.backends.cudnn.benchmark = True
            run.finish({})
        assert torch.get_default_dtype() is torch.float32
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.benchmark
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # the outer run's own
        outer.finish({})
    assert (
        status_of(tmp_path / "outer")["state"] == status_of(tmp_path / "inner")["state"] == "done"
    )


# Disk


def _save_to(folder: Path, fsync: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os, "fsync", fsync)
    checkpoint.save(folder / "last.pt", {"a": torch.zeros(4)})


def _save_small_then_large(folder: Path) -> None:
    for numbers in (4, 10**6):
        checkpoint.save(folder / "last.pt", {"a": torch.zeros(numbers)})


def test_a_full_disk_is_one_line(
    tmp_path: Path, cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(RunError, match=r"no space left\. Free some"),
        open_run(tmp_path / "run", cfg) as run,
    ):
        _save_to(run.dir, full, monkeypatch)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (errno.EDQUOT, "disk quota exceeded. Free some space or set out=..."),
        (errno.EFBIG, "the file would be larger than is allowed there (ulimit -f). Set out=..."),
        (errno.EIO, "the disk fails to read or write. Check it, or set out=... on another"),
        (errno.EACCES, "no permission to write. Set out=... to a folder of yours"),
        (errno.EPERM, "no permission to write. Set out=... to a folder of yours"),
        (errno.EROFS, "the file system is read-only. Set out=..."),
        (errno.ENOTDIR, "a part of the path is a file. Set out=..."),
        (errno.ENOENT, "nothing can be written there. Set out=... to a folder of yours"),
        (errno.EEXIST, "a file is in the way. Set out=..."),
    ],
)
def test_what_a_disk_refuses_is_one_line_with_advice(
    tmp_path: Path, code: int, advice: str
) -> None:
    line = f"run: {tmp_path / 'last.pt'}: {advice}, then start or resume the run."
    with pytest.raises(RunError, match=f"^{re.escape(line)}$"), os_errors(tmp_path):
        raise OSError(code, os.strerror(code), str(tmp_path / "last.pt"))
    elsewhere = OSError(code, os.strerror(code), "/somewhere/else")  # no write of the run
    with pytest.raises(OSError, match="somewhere/else") as caught, os_errors(tmp_path):
        raise elsewhere
    assert caught.value is elsewhere


def test_a_small_disk_fills_up_in_one_line(tmp_path: Path, cfg: DictConfig) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs root and mount to make a small disk")
    try:
        with pytest.raises(RunError, match="no space left"), open_run(disk / "run", cfg) as run:
            _save_small_then_large(run.dir)
        assert checkpoint.load(disk / "run" / "last.pt")["a"].numel() == 4  # the earlier one
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_under_tensorboard_is_one_line(
    tmp_path: Path, cfg: DictConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading, "excepthook", seen.append)
        with pytest.raises(RunError, match="larger than is allowed"):
            _write_too_much(tmp_path / "run", cfg)
        patch.undo()
    assert not seen
    assert capfd.readouterr().err == ""


def _write_too_much(folder: Path, cfg: DictConfig) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then raises EFBIG
    try:
        with open_run(folder, cfg) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
            for step in range(10**6):
                run.scalar("loss", 0.0, step)
                if step % 1000 == 999:
                    run._tensorboard().flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_no_permission_is_one_line(
    tmp_path: Path, cfg: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(RunError, match=r"no permission to write\. Set out="),
        open_run(tmp_path / "run", cfg),
    ):
        pass


def test_a_file_in_the_way_is_one_line(tmp_path: Path, cfg: DictConfig) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunError, match=r"part of the path is a file\. Set out="),
        open_run(tmp_path / "file" / "run", cfg),
    ):
        pass


@pytest.mark.parametrize("kind", [bytes, int])
def test_a_file_known_by_bytes_or_by_a_number_is_one_line_too(
    tmp_path: Path, cfg: DictConfig, kind: type
) -> None:
    folder = tmp_path / "run"
    name = os.fsencode(folder / "events") if kind is bytes else 3
    line = re.escape(f"run: {folder}{'/events' if kind is bytes else ''}: nothing can be written")
    with pytest.raises(RunError, match=line), open_run(folder, cfg):
        raise FileNotFoundError(errno.ENOENT, "gone", name)


def test_an_unreadable_file_elsewhere_is_not_blamed_on_the_run(
    tmp_path: Path, cfg: DictConfig
) -> None:
    with pytest.raises(PermissionError), open_run(tmp_path / "run", cfg):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/images/1.png")


# Checkpoints


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_during_a_save_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"epoch": 1})

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, step, killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"epoch": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"epoch": 1}
    checkpoint.save(path, {"epoch": 2})
    assert checkpoint.load(path) == {"epoch": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("kept", [0, 1, 100, 1000, -1, -200])
def test_a_truncated_checkpoint_is_one_line(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"w": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["bits: 4\nseed: 0\n", "", "a"])
def test_a_text_is_no_checkpoint_and_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoint: '.*config.yaml' is "):
        checkpoint.load(tmp_path / "config.yaml")


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": torch.nn.Linear(2, 2)}, path)
    with pytest.raises(CheckpointError, match="plain data"):
        checkpoint.load(path)


def test_a_missing_checkpoint_and_one_that_is_no_dict(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file"):
        checkpoint.load(tmp_path / "nix.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="holds a list"):
        checkpoint.load(tmp_path / "list.pt")


def test_random_state_survives_a_checkpoint(tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float, float]:
        return random.random(), random.gauss(0, 1), float(np.random.randn()), float(torch.rand(()))

    seed_everything(3)
    draw()
    checkpoint.save(tmp_path / "rng.pt", {"rng": checkpoint.rng_state()})
    expected = [draw(), draw()]
    checkpoint.set_rng_state(checkpoint.load(tmp_path / "rng.pt")["rng"])
    assert [draw(), draw()] == expected
    seed_everything(3)
    first = draw()
    seed_everything(3)
    assert draw() == first


# Identity


def test_identity_tells_what_is_computed_not_where(cfg: DictConfig) -> None:
    same = OmegaConf.merge(cfg, {"out": "x", "device": "cuda", "compile": "off", "folder": "y"})
    assert identity(cfg) == identity(same)  # type: ignore[arg-type]
    other = OmegaConf.merge(cfg, {"bits": 3})
    assert identity(cfg) != identity(other)  # type: ignore[arg-type]
    cfg = OmegaConf.merge(cfg, {"recipe": {"plots": True}, "dataset": {"workers": 8}})  # type: ignore[assignment]
    for group, key, value in (
        ("recipe", "plots", False), ("recipe", "save_every", 5), ("recipe", "cache_gb", 1.0),
        ("dataset", "workers", 0), ("dataset", "download", True),
    ):  # fmt: skip
        assert identity(cfg) == identity(OmegaConf.merge(cfg, {group: {key: value}}))  # type: ignore[arg-type]
    assert identity(cfg) != identity(OmegaConf.merge(cfg, {"recipe": {"epochs": 9}}))  # type: ignore[arg-type]


def test_what_is_the_same_run_however_it_is_written(tmp_path: Path) -> None:
    def of(*words: str) -> str:
        made = compose.tiny(tmp_path, *words)
        config.check(made, schema.Train)
        return identity(made)

    distilled = ("recipe.distill.weight=0", "recipe.warmup_epochs=0")
    assert of(*distilled) == of("recipe.distill.weight=0.0", "recipe.warmup_epochs=0.0")
    control = ("quantizer=fp32", "recipe=qat")
    assert of(*control, "bits=4") == of(*control, "bits=2", "bitwidth.act=3")
    assert of("quantizer=lsq", "bits=4") != of("quantizer=lsq", "bits=2")
    table = tmp_path / "bits.yaml"
    words = ("bitwidth=pattern", f"bitwidth.file={table}")
    found = set()
    for bits in (2, 3, 2):
        table.write_text(f"layer1.0.conv1: {{weight: {bits}, act: {bits}}}\n")
        found.add(of(*words))
    assert len(found) == 2


def test_find_done_wants_a_done_run_of_the_same_config(tmp_path: Path, cfg: DictConfig) -> None:
    with pytest.raises(ZeroDivisionError), open_run(tmp_path / "a" / "1", cfg):
        raise ZeroDivisionError
    assert find_done(tmp_path, identity(cfg)) is None
    with open_run(tmp_path / "a" / "2", cfg) as run:
        run.finish({"top1": 1.0})
    assert find_done(tmp_path, identity(cfg)) == run.dir
    assert find_done(tmp_path, "other") is None
    assert find_done(tmp_path, identity(cfg), processes=2) is None  # another batch
    status = {**read_status(run.dir), "processes": 2}
    (run.dir / "status.json").write_text(json.dumps(status))
    assert find_done(tmp_path, identity(cfg)) is None
    assert find_done(tmp_path, identity(cfg), processes=2) == run.dir
    assert find_runs(tmp_path) == [tmp_path / "a" / "1", tmp_path / "a" / "2"]


# Machine


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "", "cuda:99", "cpu:0"])
def test_a_device_that_is_not_there_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match="config: device"):
        pick_device(name)


def test_auto_is_a_device_that_works() -> None:
    assert torch.zeros(1, device=pick_device("auto")).item() == 0
    assert pick_device("cpu").type == "cpu"


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    works, reason = compiler_available()
    assert not works
    assert "no-such-compiler" in reason


def test_an_installed_package_reports_its_version_as_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.qexp, "__file__", str(tmp_path / "qexp" / "__init__.py"))
    assert environment.source_version() == (environment.qexp.__version__, False)


def test_a_checkout_reports_its_commit_and_what_is_not_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "qexp" / "__init__.py"
    file.parent.mkdir()
    file.touch()
    monkeypatch.setattr(environment.qexp, "__file__", str(file))
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "a")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    (tmp_path / "untracked.txt").touch()
    commit, dirty = environment.source_version()
    assert (len(commit), dirty) == (40, False)
    file.write_text("changed = True")
    assert environment.source_version() == (commit, True)
    (tmp_path / ".git" / "HEAD").write_text("damaged")
    assert environment.source_version() == (environment.qexp.__version__, False)


@pytest.mark.parametrize(
    "before",
    [
        "pass",
        "torch.backends.cudnn.allow_tf32 = False",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    ],
)
def test_tf32_is_left_as_the_program_had_it_in_either_of_torchs_ways(before: str) -> None:
    code = f"""
import torch
from qexp.runner.device import tf32
from qexp.runner.guards import global_state

def state():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found = [
        place.fp32_precision
        for place in (cudnn.conv, cudnn.rnn, matmul, torch.backends.mkldnn.matmul)
    ]
    for old in (lambda: cudnn.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(old())
        except RuntimeError:
            found.append("not to be read in the old way")
    return found

{before}
kept = state()
for allowed in (False, True):
    with tf32(allowed):
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == allowed
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") == allowed
    assert state() == kept, (state(), kept)
with global_state():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
assert state() == kept, (state(), kept)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_auto_is_never_a_device_that_nothing_was_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=mps, but this torch has no MPS"):
        pick_device("mps")


# Threads beside other processes


def test_idle_cores_are_those_of_this_process_over_the_probe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = tmp_path / "stat"

    def written(*cores: tuple[int, int, int]) -> None:
        rows = [
            f"cpu{i} {user} 0 0 {idle} {io} 0 0 0 9 9" for i, (user, idle, io) in enumerate(cores)
        ]
        stat.write_text("\n".join(["cpu  1 1 1 1 1 1 1 1 1 1", *rows, "intr 5 0", ""]))

    monkeypatch.setattr("qexp.runner.idle.STAT", stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 10}, raising=False)
    written(*[(100, 500, 0)] * 11)
    later = [(100, 520, 10), (130, 500, 0), (115, 515, 0), *[(130, 500, 0)] * 7, (100, 530, 0)]
    monkeypatch.setattr("time.sleep", lambda seconds: written(*later))
    assert idle_cores() == pytest.approx(2.5)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert idle_cores() is None  # no tick went by
    stat.unlink()
    assert idle_cores() is None


@pytest.mark.parametrize(
    ("threads", "idle", "better"),
    [(2, 1.4, 1), (2, 0.0, 1), (8, 5.6, 6), (2, 1.6, None), (2, None, None), (1, 0.0, None)],
)
def test_threads_without_idle_cores_are_said(
    threads: int, idle: float | None, better: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexp.runner.idle.idle_cores", lambda: idle)
    line = crowded(threads)
    assert (f"threads={better} may" in line) if better else not line


def test_of_several_runs_of_a_config_the_newest_is_found(tmp_path: Path) -> None:
    for state, find in (("interrupted", find_unfinished), ("done", find_done)):
        for name in ("r1", "r2", "r3"):
            (tmp_path / state / name).mkdir(parents=True)
            status = {"state": state, "identity": "mine" if name != "r3" else "other"}
            (tmp_path / state / name / "status.json").write_text(json.dumps(status))
            (tmp_path / state / name / "result.json").write_text('{"top1": 1}')
        assert find(tmp_path / state, "mine") == tmp_path / state / "r2"
