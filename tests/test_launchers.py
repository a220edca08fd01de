"""Sweeps by other launchers: the same runs as one after the other, folder for folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compose import TINY, tiny
from conftest import Qexp
from hydra import compose, initialize_config_dir

from qexp import sweep
from qexp.config import configs_dir
from qexp.gpu_slots import gpu_of_job, jobs_at_once
from qexp.runner.folder import find_runs, identity, read_json

# What a run says that depends on when and where it ran, not on what it computed.
CIRCUMSTANCE = {"wall_s", "images_per_s", "overrides", "commit", "dirty"}
SWEEP = ("quantizer=lsq,asq", "bits=2,4", "seed=0,1,2")  # 12 jobs


def results(out: Path) -> dict[str, tuple[dict[str, Any], list[float]]]:
    """By identity: where the run is (its time left out), its result, its losses."""
    found = {}
    for run in find_runs(out):
        if "quantizer" in run.parts or run.parent.name == "fp32":
            continue
        status, result = read_json(run / "status.json"), read_json(run / "result.json")
        assert status["state"] == "done", run
        kept = {k: v for k, v in result.items() if k not in CIRCUMSTANCE}
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if line["event"] == "epoch"]
        place = str(run.relative_to(out).parent)
        found[status["identity"]] = ({**kept, "place": place}, losses)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("launch", "plugin"),
    [("parallel", "hydra_joblib_launcher"), ("local", "hydra_submitit_launcher")],
)
def test_a_sweep_of_twelve_jobs_gives_the_same_runs_folder_for_folder(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launch: str, plugin: str
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    words = ("train", "-m", *TINY, *SWEEP, "recipe.epochs=1", "model.checkpoint=none", "threads=1")
    many = ("hydra.launcher.n_jobs=2",) if launch == "parallel" else ()
    assert qexp(*words, "out=serial").code == 0
    done = qexp(*words, f"launch={launch}", "out=other", *many)
    assert done.code == 0, done.err
    serial, other = results(tmp_path / "serial"), results(tmp_path / "other")
    assert len(serial) == 12
    assert serial == other


def test_submitits_controllers_write_to_a_file_of_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from submitit.local import local

    def start(folder: Path, command: str) -> int:
        return subprocess.run([sys.executable, "-c", command], check=False).returncode

    monkeypatch.setattr(local, "start_controller", start)
    monkeypatch.setattr(sweep, "_folder", None)
    cfg = launched("launch=local", f"hydra.sweep.dir={tmp_path}")
    for _ in range(2):  # a process may start several sweeps
        sweep.Launched().on_multirun_start(cfg)
        assert local.start_controller(tmp_path, "raise KeyboardInterrupt") != 0
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "after\n"
    assert (tmp_path / "controllers.log").read_text().count("Traceback") == 2


def launched(*overrides: str) -> Any:
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return compose("train", [*overrides], return_hydra_config=True)


def test_several_jobs_share_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    cfg = launched("launch=gpus", "sweep.gpus=3", "sweep.jobs_per_gpu=4")
    assert cfg.hydra.launcher.n_jobs == 12
    assert gpu_of_job(3, 4) == "auto"  # no sweep: a run that is resumed alone
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert jobs_at_once(None, 2) == 10
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert jobs_at_once(None, 2) == 2


def test_no_gpu_gets_more_processes_than_asked(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from qexp.gpu_slots import take_slot; f = pathlib.Path(sys.argv[1])\n"
        "print(take_slot(f, 4), take_slot(f, 4), flush=True); sys.stdin.read()"
    )

    def begin() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", code, str(tmp_path)]
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert child.stdout is not None
        return child, child.stdout.readline().strip()

    children = [begin() for _ in range(5)]
    assert [said for _, said in children] == ["0 0", "1 1", "2 2", "3 3", "None None"]
    gone, _ = children[1]
    gone.communicate("")
    late, said = begin()
    assert said == "1 1"  # the place of the one that ended, whatever its job's number
    for child, _ in (children[0], *children[2:], (late, said)):
        child.communicate("")


@pytest.mark.slow
def test_a_sweep_over_gpus_fills_each_with_as_many_jobs_as_asked(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    words = ("launch=gpus", "sweep.gpus=2", "sweep.jobs_per_gpu=2", "seed=0,1,2,3,4,5,6,7")
    done = qexp("train", "-m", *(w for w in TINY if not w.startswith("device=")), *words)
    assert done.code == 1  # there is no GPU here; each job names the one it was given
    (jobs,) = Path().glob("**/jobs.jsonl")
    errors = [json.loads(line).get("error", "") for line in jobs.read_text().splitlines()]
    named = re.findall(r"device=cuda:(\d)", " ".join(errors))
    assert len(named) == 8
    assert set(named) <= {"0", "1"}
    assert not list(Path().glob("**/slots/4"))


@pytest.mark.parametrize(
    "how", ["saved=inputs", "sync_bn=true", "sweep.jobs_per_gpu=4", "compile=kernels", "threads=3"]
)
def test_how_a_run_is_computed_is_not_what_it_is(tmp_path: Path, how: str) -> None:
    assert identity(tiny(tmp_path, how)) == identity(tiny(tmp_path))


def test_every_launch_preset_composes() -> None:
    names = sorted(p.stem for p in (configs_dir() / "launch").glob("*.yaml"))
    assert {"gpus", "local", "parallel", "slurm"} <= set(names)
    plugins = {"local": "hydra_submitit_launcher", "slurm": "hydra_submitit_launcher"}
    for name in names:
        pytest.importorskip(f"hydra_plugins.{plugins.get(name, 'hydra_joblib_launcher')}")
        assert "_target_" in launched(f"launch={name}").hydra.launcher
