"""What a resumed run may change, and that the change stays visible."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compose import TINY, TINY_PTQ, stopped_in_epoch, tiny
from conftest import Qexp
from omegaconf import DictConfig, OmegaConf, open_dict

from qexp.errors import ConfigError
from qexp.models.resnet import ResNet
from qexp.recipes import outcome
from qexp.recipes import qat as qat_module
from qexp.recipes.qat import qat
from qexp.runner import checkpoint
from qexp.runner.folder import find_done, identity, read_json
from qexp.runner.resuming import next_segments
from qexp.runner.run import Run, open_run


def train(cfg: DictConfig, *, resume: bool = False) -> dict[str, Any]:
    with open_run(Path(cfg.folder), cfg, resume=resume, label="dorefa+lsq") as run:
        run.finish(qat(cfg, run))
    return read_json(run.dir / "result.json")


START = ("model.checkpoint=none", "recipe.epochs=1")


@pytest.mark.parametrize(
    "change",
    ["bits=2", "seed=7", "recipe.batch_size=8", "recipe.optimizer=adamw", "recipe.ema=0.9",
     "bitwidth.first_last=fp32", "max_steps=1", "model.width=0.5", "quantizer=lsq"],
)  # fmt: skip
def test_what_is_settled_cannot_change_and_nothing_is_lost(tmp_path: Path, change: str) -> None:
    train(tiny(tmp_path, *START))
    folder = tmp_path / "run"
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match=r"resume: .* cannot change from .* Start a new run"):
        train(tiny(tmp_path, *START, change), resume=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


@pytest.mark.parametrize(
    ("words", "change", "may"),
    [
        (TINY, "recipe.batch_size=8", "epochs, recipe.lr, recipe.quantizer_lr, recipe.grad_clip"),
        ((*TINY_PTQ, "quantizer=qdrop"), "recipe.lr.scale=0.5", "plots, recipe.cache_gb"),
    ],
    ids=["qat", "ptq"],
)
def test_a_refusal_names_what_the_runs_own_recipe_may_change(
    tmp_path: Path, words: tuple[str, ...], change: str, may: str
) -> None:
    OmegaConf.save(tiny(tmp_path, base=words), tmp_path / "config.yaml")
    (tmp_path / "last.pt").touch()
    line = rf"{change.partition('=')[0]} cannot .*\(What may change: recipe\.{may}\.\)"
    with pytest.raises(ConfigError, match=line):
        next_segments(tmp_path, tiny(tmp_path, change, base=words), {})
    allowed = tiny(tmp_path, f"recipe.{may.split(', ')[0]}=1", base=words)
    assert len(next_segments(tmp_path, allowed, {})) == (words == TINY)  # told, or free


def test_a_longer_training_is_told_from_an_uninterrupted_one(tmp_path: Path) -> None:
    train(tiny(tmp_path, *START))
    longer = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    resumed = train(longer, resume=True)
    changed = {"from": {"recipe.epochs": 1}, "to": {"recipe.epochs": 2}}
    assert resumed["protocol"]["segments"] == [changed]
    assert resumed["epochs"] == 2
    whole = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    whole.folder = str(tmp_path / "whole")
    assert train(whole)["protocol_hash"] != resumed["protocol_hash"]
    assert find_done(tmp_path, identity(whole)) == tmp_path / "whole"
    again = train(tiny(tmp_path, *START[:1], "recipe.epochs=3"), resume=True)
    assert [s["to"]["recipe.epochs"] for s in again["protocol"]["segments"]] == [2, 3]


def test_a_longer_training_that_would_widen_the_bits_again_is_refused(tmp_path: Path) -> None:
    stages = "bitwidth.stages=[{until: 0.4, bits: 8}, {bits: 2}]"
    words = ("bitwidth=progressive", stages, "bits=2", "model.checkpoint=none", "quantizer=lsq")
    train(tiny(tmp_path, *words, "recipe.epochs=3"))
    before = read_json(tmp_path / "run" / "result.json")
    with pytest.raises(ConfigError, match=r"would go back from \(2, 2\) to \(8, 8\) bits"):
        train(tiny(tmp_path, *words, "recipe.epochs=10"), resume=True)
    assert read_json(tmp_path / "run" / "result.json") == before
    assert train(tiny(tmp_path, *words, "recipe.epochs=5"), resume=True)["epochs"] == 5


def test_a_done_run_without_its_checkpoint_is_not_begun_anew(qexp: Qexp, tmp_path: Path) -> None:
    assert qexp("train", *TINY, *START, "folder=run").code == 0
    run = tmp_path / "run"
    (run / "last.pt").unlink()
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    said = qexp("resume", "run", "recipe.epochs=2")
    assert said.err == (
        "resume: run is done, and its last.pt is gone: there is nothing to go on from. "
        "Start a new run.\n"
    )
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before


def test_without_its_config_a_run_goes_on_as_it_was_or_not_at_all(
    qexp: Qexp, tmp_path: Path
) -> None:
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *START[:1], "recipe.epochs=2"))
    write_hydra(tmp_path)
    (tmp_path / "run" / "config.yaml").unlink()
    said = qexp("resume", "run", "seed=7")
    assert "config.yaml is missing, so what seed=7 changes cannot be told" in said.err
    assert said.code == 2
    assert qexp("resume", "run").code == 0
    assert read_json(tmp_path / "run" / "result.json")["epochs"] == 2


def test_a_resumed_run_knows_all_that_was_typed(qexp: Qexp, tmp_path: Path) -> None:
    assert qexp("train", *TINY, *START, "folder=run").code == 0
    first = read_json(tmp_path / "run" / "result.json")["overrides"]
    assert qexp("resume", "run", "recipe.epochs=2").code == 0
    assert qexp("resume", "run", "recipe.epochs=3", "recipe.lr=0.01").code == 0
    result = read_json(tmp_path / "run" / "result.json")
    later = ["recipe.epochs=2", "recipe.epochs=3", "recipe.lr=0.01"]
    assert result["overrides"] == [*first, *later]
    assert len(read_json(tmp_path / "run" / "env.json")["commands"]) == 3


def test_where_and_how_may_change_and_leave_no_mark(tmp_path: Path) -> None:
    first = train(tiny(tmp_path, *START))
    options = ("recipe.save_every=2", "threads=1", "float.epochs=9")
    again = train(tiny(tmp_path, *START, *options), resume=True)
    assert again["protocol_hash"] == first["protocol_hash"]
    assert again["method"] == first["method"] == "dorefa+lsq"  # the label, resumed or not


def test_a_resume_that_fails_before_it_trains_leaves_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tiny(tmp_path, *START))

    def broken(*given: Any) -> Any:
        raise OSError("no data")

    folder = tmp_path / "run"
    config = (folder / "config.yaml").read_bytes()
    cfg = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr("qexp.recipes.build.make_dataset", broken)
        with pytest.raises(OSError, match="no data"):
            train(cfg, resume=True)
    assert json.loads((folder / "result.json").read_text()) == first
    assert read_json(folder / "status.json")["state"] == "done"
    assert (folder / "config.yaml").read_bytes() == config
    resumed = train(cfg, resume=True)
    assert resumed["epochs"] == 2
    assert len(resumed["protocol"]["segments"]) == 1


def test_a_new_rate_is_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = (*START[:1], "recipe.schedule=constant", "recipe.lr=0.01")
    train(tiny(tmp_path, *constant, "recipe.epochs=1"))
    used: list[list[float]] = []
    real = qat_module.set_lr

    def spy(optimizer: Any, factor: float) -> float:
        rate = real(optimizer, factor)
        used.append([group["lr"] for group in optimizer.param_groups])
        return rate

    monkeypatch.setattr(qat_module, "set_lr", spy)
    changes = ("recipe.epochs=2", "recipe.lr=0.003", "recipe.quantizer_lr=0.0001")
    train(tiny(tmp_path, *constant, *changes), resume=True)
    assert used == [[0.003, 0.0001]] * 3


def files(folder: Path) -> dict[str, bytes]:
    """What a run's folder holds, but for its log."""
    logs = ("train.log", "metrics.jsonl")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in logs}


@pytest.mark.parametrize("change", ["recipe.lr=0.5", "recipe.epochs=1"])
def test_a_resume_with_nothing_left_to_train_relabels_nothing(tmp_path: Path, change: str) -> None:
    train(tiny(tmp_path, *START[:1], "recipe.epochs=2"))
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"nothing left to train, 2 .* Add recipe\.epochs=3"):
        train(tiny(tmp_path, *START[:1], "recipe.epochs=2", change), resume=True)
    assert files(tmp_path / "run") == before


def test_another_number_of_processes_is_refused_with_the_command(
    tmp_path: Path,
) -> None:
    train(tiny(tmp_path, *START))
    folder = tmp_path / "run"
    status = read_json(folder / "status.json")
    assert status["processes"] == 1
    (folder / "status.json").write_text(json.dumps({**status, "processes": 4}))
    before = files(folder)
    line = rf"begun by 4 processes, not 1\. Type: torchrun --nproc-per-node=4 .* resume {folder}"
    with pytest.raises(ConfigError, match=line):
        train(tiny(tmp_path, *START[:1], "recipe.epochs=2"), resume=True)
    assert files(folder) == before
    with pytest.raises(ConfigError, match="sync_bn cannot change"):
        next_segments(folder, tiny(tmp_path, *START, "sync_bn=true"), {"processes": 4}, 4)
    assert next_segments(folder, tiny(tmp_path, *START, "sync_bn=true"), {"processes": 1}) == []


def test_a_refused_resume_leaves_an_interrupted_run_as_it_was(
    tmp_path: Path,
) -> None:
    options = (*START[:1], "recipe.epochs=2")
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *options))
    before = files(tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing left to train"):
        train(tiny(tmp_path, *options, "recipe.epochs=1"), resume=True)
    assert files(tmp_path / "run") == before


def test_a_killed_run_knows_the_time_up_to_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Run, "wall_s", lambda run: 100.0)
    logged = outcome.log_epoch

    def look(*given: Any, **more: Any) -> bool:
        seen.append(read_json(tmp_path / "run" / "status.json").get("wall_s", 0.0))
        return logged(*given, **more)

    monkeypatch.setattr(outcome, "log_epoch", look)
    train(tiny(tmp_path, *START[:1], "recipe.epochs=2"))
    assert seen == [0.0, 100.0]


KILLED = """
import os, sys
from qexp.cli import main
from qexp.recipes import outcome
logged, last = outcome.log_epoch, int(sys.argv[1])
def log_epoch(*given, **more):
    if given[2]["epoch"] == last:
        os.kill(os.getpid(), 9)
    return logged(*given, **more)
outcome.log_epoch = log_epoch
main(sys.argv[2:])
"""


def killed_in_epoch(epoch: int, *argv: str) -> None:
    """`qexp` with these words, killed before the checkpoint of this epoch (kill -9)."""
    command = [sys.executable, "-c", KILLED, str(epoch), *argv]
    assert subprocess.run(command, capture_output=True).returncode == -9


def test_values_given_to_a_resume_outlive_its_kill_and_so_does_the_earlier_result(
    qexp: Qexp, tmp_path: Path
) -> None:
    assert qexp("train", *TINY, *START, "recipe.lr=0.01", "folder=run").code == 0
    first, run = read_json(tmp_path / "run" / "result.json"), tmp_path / "run"
    killed_in_epoch(3, "resume", "run", "recipe.epochs=3", "recipe.lr=0.002")
    assert not (run / "result.json").exists()
    assert read_json(run / "result.before.json") == first
    row = qexp("ls", ".").out.splitlines()[1].split()
    assert row[1:4] == ["dead", "-", "2"]  # state, top-1 of the earlier result, epoch

    killed_in_epoch(3, "resume", "run", "recipe.lr=0.002")  # the same command, started again
    noted = OmegaConf.load(run / ".hydra" / "resumed.yaml")
    assert noted == ["recipe.epochs=3", "recipe.lr=0.002"]
    assert qexp("resume", "run").code == 0
    resumed = read_json(run / "result.json")
    assert resumed["epochs"] == 3
    change = {"recipe.epochs": 3, "recipe.lr": 0.002}
    assert [s["to"] for s in resumed["protocol"]["segments"]] == [change]
    assert not (run / "result.before.json").exists()


def test_a_kill_between_a_segment_and_its_config_notes_it_once(tmp_path: Path) -> None:
    train(tiny(tmp_path, *START))
    folder = tmp_path / "run"
    longer = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    noted = next_segments(folder, longer, read_json(folder / "status.json"))
    assert len(noted) == 1
    assert next_segments(folder, longer, {"segments": noted}) == noted


def test_a_refused_resume_forgets_its_values(qexp: Qexp, tmp_path: Path) -> None:
    assert qexp("train", *TINY, *START, "folder=run").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.[jy]*") if p.is_file()}
    said = qexp("resume", "run", "recipe.lr=0.002")  # as long as before: nothing left to train
    assert "nothing left to train" in said.err
    now = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*.[jy]*") if p.is_file()}
    before.pop(tmp_path / "run" / "metrics.jsonl"), now.pop(tmp_path / "run" / "metrics.jsonl")
    assert now == before


def test_a_damaged_checkpoint_says_that_the_run_can_start_over(qexp: Qexp, tmp_path: Path) -> None:
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *START[:1], "recipe.epochs=2"))
    write_hydra(tmp_path)
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:2000])
    said = qexp("resume", "run")
    assert said.err == (
        "resume: run/last.pt is truncated or damaged (2000 bytes). best.pt has the best epoch's "
        "network. Delete it and the run starts over: rm run/last.pt; qexp resume run\n"
    )
    assert said.code == 1
    assert "or take the best epoch's: run/best.pt" in qexp("eval", "run=run", "device=cpu").err
    torch.save({"conv1.weight": torch.zeros(1)}, last)
    said = qexp("resume", "run")
    foreign = "run/last.pt is no checkpoint of a run. Delete it and the run starts over."
    assert (said.code, foreign in said.err) == (1, True)
    last.unlink()
    assert qexp("resume", "run").code == 0
    assert read_json(tmp_path / "run" / "result.json")["epochs"] == 2


TAUGHT = (
    "recipe.epochs=2", "recipe.distill.weight=0.9", "float.epochs=1", "float.warmup_epochs=0"
)  # fmt: skip


def weights_of(tmp_path: Path, seed: int) -> bytes:
    """A file of float weights for the tiny network."""
    torch.manual_seed(seed)
    path = tmp_path / f"seed{seed}.pt"
    torch.save(ResNet(8, 4, width=0.25).state_dict(), path)
    return path.read_bytes()


@pytest.mark.parametrize("teacher", ["float", "file"])
def test_a_resumed_distillation_is_refused_another_teacher(tmp_path: Path, teacher: str) -> None:
    mine, other, path = weights_of(tmp_path, 0), weights_of(tmp_path, 1), tmp_path / "w.pt"
    path.write_bytes(mine)
    words = ["recipe.epochs=2", "recipe.distill.weight=0.9"]
    words += (
        [f"model.checkpoint={path}"]
        if teacher == "float"
        else [*START[:1], f"recipe.distill.teacher={path}"]
    )
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *words))
    before = files(tmp_path / "run")
    for content in (other, None):
        path.write_bytes(content) if content else path.unlink()
        if content or teacher == "float":  # a file that is gone is refused earlier, by precheck
            with pytest.raises(ConfigError, match=r"w\.pt is no longer the file this run began"):
                train(tiny(tmp_path, *words), resume=True)
        assert files(tmp_path / "run") == before
    path.write_bytes(mine)
    protocol = train(tiny(tmp_path, *words), resume=True)["protocol"]
    known = protocol["float_sha256"] if teacher == "float" else protocol["distill"]["teacher"]
    assert known == hashlib.sha256(mine).hexdigest()


def test_a_resume_elsewhere_finds_the_float_network_that_teaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    cfg = tiny(Path("out"), *TAUGHT)
    with stopped_in_epoch(2):
        train(cfg)
    monkeypatch.chdir(tmp_path / "away")
    cfg.folder = str(tmp_path / "home" / "out" / "run")
    train(cfg, resume=True)
    assert not list((tmp_path / "away").iterdir())


def test_a_checkpoint_of_an_earlier_version_knows_its_teacher_by_the_hash_of_the_file(
    tmp_path: Path,
) -> None:
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *TAUGHT))
    last = tmp_path / "run" / "last.pt"
    saved = checkpoint.load(last)
    digest = hashlib.sha256(Path(saved["start"]["source"]).read_bytes()).hexdigest()
    assert saved["start"]["sha256"] != digest
    kept = {k: saved["start"][k] for k in ("top1", "source")}
    checkpoint.save(last, {**saved, "start": {**kept, "sha256": digest}})
    assert train(tiny(tmp_path, *TAUGHT), resume=True)["protocol"]["float_sha256"] == digest


def write_hydra(tmp_path: Path) -> None:
    """What a run of the command line has beside that of `train`."""
    cfg = tiny(tmp_path, *START[:1], "recipe.epochs=2")
    (tmp_path / "run" / ".hydra").mkdir(exist_ok=True)
    (tmp_path / "run" / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(cfg))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("config.yaml", "Delete it: a resume writes it again."),
        (".hydra/config.yaml", "Start a new run."),
        (".hydra/resumed.yaml", "Delete it and give them again."),
    ],
)
def test_a_damaged_config_of_a_run_is_one_line(
    qexp: Qexp, tmp_path: Path, name: str, advice: str
) -> None:
    with stopped_in_epoch(2):
        train(tiny(tmp_path, *START[:1], "recipe.epochs=2"))
    write_hydra(tmp_path)
    (tmp_path / "run" / name).write_text('bits: 4\nout: "a')
    said = qexp("resume", "run")
    assert said.err.startswith(f"resume: run/{name} is damaged")
    assert said.err.endswith(f"{advice}\n")
    assert len(said.err.splitlines()) == 1
    assert said.code == 2


def test_a_done_run_whose_result_is_damaged_is_not_done(qexp: Qexp, tmp_path: Path) -> None:
    words = ("train", *TINY, *START, "out=outputs")
    assert qexp(*words, "folder=outputs/run").code == 0
    result = tmp_path / "outputs" / "run" / "result.json"
    top1 = read_json(result)["top1"]
    assert "skipped" in qexp(*words, "-m", "seed=0").out
    result.write_bytes(result.read_bytes()[:100])
    assert "skipped" not in qexp(*words, "-m", "seed=0").out
    assert qexp("resume", "outputs/run").code == 0
    assert read_json(result)["top1"] == top1


@pytest.mark.parametrize("key", ["model.checkpoint", "recipe.distill.teacher"])
def test_a_run_from_a_file_that_has_changed_since_is_not_done(
    qexp: Qexp, tmp_path: Path, key: str
) -> None:
    file = tmp_path / "float.pt"

    def write(shift: float) -> None:
        torch.manual_seed(0)
        state = ResNet(8, width=0.25, num_classes=4).state_dict()
        torch.save({name: value + shift for name, value in state.items()}, file)

    write(0.0)
    first = ("model.checkpoint=float.pt", f"{key}=float.pt", "recipe.epochs=1")
    more = ("recipe.distill.weight=0.5",) if "teacher" in key else ()
    words = ("train", *TINY, *dict.fromkeys(first), *more, "out=outputs", "-m", "seed=0")
    assert "skipped" not in qexp(*words).out
    assert qexp(*words).out.startswith("skipped")
    write(1.0)
    said = qexp(*words)
    assert said.code == 0
    assert said.out.startswith("not skipped: float.pt has changed since outputs/")
    file.unlink()
    assert qexp(*words).out.startswith("skipped: ")


@pytest.mark.parametrize("key", ["dataset.root", "dataset.workers"])
def test_where_the_images_lie_and_who_decodes_them_is_free(tmp_path: Path, key: str) -> None:
    cfg = tiny(tmp_path)
    with open_dict(cfg):
        OmegaConf.update(cfg, key, 1, force_add=True)
        OmegaConf.save(cfg, tmp_path / "config.yaml")
        OmegaConf.update(cfg, key, 2)
    (tmp_path / "last.pt").touch()
    assert next_segments(tmp_path, cfg, {}) == []
