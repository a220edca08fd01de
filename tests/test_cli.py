"""The real `qexp`: commands, folders, sweeps, resume, completion."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from compose import TINY, TINY_PTQ
from conftest import Qexp
from omegaconf import OmegaConf

from qexp import __version__, sweep, tools
from qexp.command_line import parse
from qexp.config import configs_dir
from qexp.runner.folder import find_runs, owner, read_json, read_status


def runs(*states: str) -> list[Path]:
    """Run folders under `outputs`, of these states or of all."""
    found = find_runs(Path("outputs"))
    return [run for run in found if not states or read_status(run)["state"] in states]


# Help, speed


def test_alone_it_lists_the_commands_and_two_examples(qexp: Qexp) -> None:
    said = qexp()
    assert said.code == 0
    for command in ("train", "eval", "export", "bench train", "resume", "ls", "report", "env"):
        assert f"\n  {command} " in said.out
    assert said.out.count("\n  qexp train") == 2
    assert qexp("--help") == said
    assert qexp("--version").out == f"qexp {__version__}\n"


def test_help_of_train_shows_groups_and_keys(qexp: Qexp) -> None:
    said = qexp("bench", "--help")
    assert said.code == 0
    assert said.out.startswith(
        "usage: qexp bench train [key=value ...]\nusage: qexp bench inference"
    )
    said = qexp("train", "--help", "bits=3")
    assert said.code == 0
    assert "bitwidth: " in said.out
    assert "\nbits: 3\n" in said.out
    assert "_target_: qexp.recipes.qat.qat" in said.out


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["train", "--help"], ["train", "--cfg", "job"], ["-sc", "query=bash"]],
    ids=" ".join,
)
def test_quick_answers_cost_under_half_a_second_and_no_torch(argv: list[str]) -> None:
    code = (
        "import sys; from qexp.cli import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    costs: list[float] = []
    while min(costs, default=1.0) >= 0.5 and len(costs) < 4:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", code, *argv],
            check=True,
            capture_output=True,
            env={**os.environ, "COMP_LINE": "qexp train quantizer=l"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: a busy machine stretches it too, by less than the clock's, now and then.
        costs.append(after.ru_utime - before.ru_utime)
    assert min(costs) < 0.5


# One run


def test_a_run_gets_a_folder_named_after_what_it_is(tiny: Qexp) -> None:
    assert tiny("bits=3").code == 0
    (run,) = runs("done")
    assert run.parent == Path("outputs/d-m/asq-w3a3")
    assert read_json(run / "result.json")["top1"] == 90.3
    overrides = (run / ".hydra" / "overrides.yaml").read_text()
    assert "bits=3" in overrides
    assert read_json(run / "env.json")["command"].startswith("qexp train --config-dir conf")


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["bitwidth.weight=2"], "asq-w2a4"),
        (["quantizer=fp32"], "fp32"),
        (["quantizer/weight=lsq_per_channel"], "lsq_per_channel+asq-w4a4"),
    ],
)
def test_the_folder_says_bits_and_parts(tiny: Qexp, overrides: list[str], name: str) -> None:
    assert tiny(*overrides).code == 0
    assert [run.parent.name for run in runs()] == [name]


def test_a_wrong_config_leaves_nothing_behind(tiny: Qexp, tmp_path: Path) -> None:
    assert tiny("recipe.lr=-1").code == 2
    assert tiny("bitz=1").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conf"]


@pytest.mark.parametrize("word", ["dry_run=true", "++dry_run=True"])
@pytest.mark.parametrize("more", [(), ("-m", "bits=2,3")], ids=["run", "sweep"])
def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tiny: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], word: str
) -> None:
    from qexp.recipes import plan

    monkeypatch.setattr(plan, "plan", lambda cfg: f"plan of W{cfg.bits}")
    said = tiny(word, *more)
    assert said.code == 0
    assert said.out.split("\n")[0] == ("plan of W2" if more else "plan of W4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["conf"]


def test_a_crash_is_one_line_and_its_traceback_is_in_the_log(tiny: Qexp) -> None:
    said = tiny("recipe.then=crash")
    (run,) = runs("failed")
    assert said.code == 1
    assert said.err == (
        f"run: ZeroDivisionError: division by zero (traceback in {run}/train.log)\n"
    )
    assert "Traceback" in (run / "train.log").read_text()
    assert read_status(run)["error"] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_an_interrupted_run_says_how_to_continue(tiny: Qexp, how: str) -> None:
    said = tiny(f"recipe.then={how}")
    (run,) = runs("interrupted")
    assert said.code == 130
    assert said.err == f"interrupted. Continue with: qexp resume {run}\n"


def test_threads_are_set_for_the_run_and_put_back(tiny: Qexp) -> None:
    before = torch.get_num_threads()
    assert tiny("threads=3").code == 0
    (run,) = runs("done")
    assert read_json(run / "result.json")["threads"] == 3
    assert read_json(run / "env.json")["threads"] == 3
    assert torch.get_num_threads() == before


def test_two_runs_in_one_process_do_not_share_a_folder(tiny: Qexp) -> None:
    place = "folder=outputs/d-m/x/same"
    assert tiny(place).code == 0
    assert tiny(place, "bits=3").code == 0
    assert [run.name for run in runs("done")] == ["same", "same-2"]


# Sweeps


def test_a_sweep_finishes_the_others_skips_what_is_done_and_names_the_failed(tiny: Qexp) -> None:
    sweep = ("-m", "bits=2,3,4", "recipe.then='bits=3'")
    said = tiny(*sweep)
    assert said.code == 1
    assert "failed: ZeroDivisionError: division by zero (traceback in " in said.err
    assert "sweep: 1 of 3 jobs failed: bits=3. See outputs/sweeps/" in said.err
    assert [read_json(run / "result.json")["top1"] for run in runs("done")] == [90.2, 90.4]
    assert len(runs("failed")) == 1
    rows = [row.split()[:3] for row in said.out.splitlines()[-4:]]
    assert rows[0] == ["job", "status", "top-1"]
    assert ["bits=2", "done", "90.20"] in rows
    assert ["bits=3", "failed", "-"] in rows

    again = tiny(*sweep)
    assert again.code == 1
    assert again.out.count("skipped: ") == 2
    assert len(runs("done")) == 2  # only the failed one was tried again
    assert len(runs("failed")) == 2

    assert tiny(*sweep, "force=true").out.count("skipped: ") == 0
    assert len(runs("done")) == 4


def test_a_sweep_in_folders_of_its_own_names_its_failed_jobs(tiny: Qexp) -> None:
    words = ("hydra.sweep.subdir=${hydra.job.num}", "hydra.sweep.dir=S", "recipe.then='bits=3'")
    said = tiny("-m", *words, "bits=2,3")
    assert said.code == 1
    assert "1 of 2 jobs failed: bits=3" in said.err
    assert len(sweep.read_jobs(Path("S"))) == 2


def test_a_sweep_folder_used_again_is_of_the_new_sweep(tiny: Qexp) -> None:
    assert tiny("-m", "hydra.sweep.dir=S", "bits=2,3", "recipe.then='bits=3'").code == 1
    said = tiny("-m", "hydra.sweep.dir=S", "bits=2,4")
    assert (said.code, said.err) == (0, "")
    assert len(sweep.read_jobs(Path("S"))) >= 3


def test_a_deletion_after_an_option_is_an_override(tiny: Qexp) -> None:
    said = tiny("-m", "bits=2,3", "~launch")
    assert (said.code, said.err) == (0, "")
    assert len(runs("done")) == 2
    assert {"~launch" in (run / ".hydra/overrides.yaml").read_text() for run in runs()} == {True}


def test_a_resume_decides_where_and_whether_itself(tiny: Qexp, qexp: Qexp) -> None:
    assert tiny("recipe.then=crash").code == 1
    (run,) = runs("failed")
    for word in ("dry_run=true", "folder=elsewhere"):
        said = qexp("resume", str(run), word)
        assert (said.code, f"{word.partition('=')[0]} is decided" in said.err) == (2, True)
    assert read_json(run / "status.json")["state"] == "failed"


def test_a_finished_single_run_counts_for_a_sweep_and_another_device_too(tiny: Qexp) -> None:
    tiny("bits=2", "device=cpu")
    said = tiny("-m", "bits=2", "seed=0,1")
    assert said.code == 0
    assert said.out.count("skipped: ") == 1
    assert len(runs("done")) == 2


def test_a_sweeper_is_given_the_top1_of_each_job(
    tiny: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float | None] = []
    run_job = sweep.run_job
    monkeypatch.setattr(sweep, "run_job", lambda *job: given.append(run_job(*job)))
    tiny("bits=3")
    tiny("-m", "bits=2,3,33")
    top1 = [read_json(run / "result.json")["top1"] for run in runs("done")]
    assert sorted(given[:2]) == sorted(top1)  # type: ignore[type-var]
    assert given[2] is None


def test_a_wrong_config_fails_its_job_alone(tiny: Qexp) -> None:
    said = tiny("-m", "bits=2,33")
    assert said.code == 1
    assert "bits=33 failed: config: bits must be an integer from 1 to 16" in said.err
    assert len(runs("done")) == 1


@pytest.mark.parametrize("word", ["out=null", "out=", "recipe.lr=${nope}"])
def test_what_every_job_refuses_is_one_line_a_job(tiny: Qexp, tmp_path: Path, word: str) -> None:
    said = tiny("-m", "bits=2,3", word)
    assert said.code == 1
    lines = said.err.splitlines()
    assert len(lines) == 3
    assert all(f"failed: config: {word.partition('=')[0]}" in line for line in lines[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"conf", "outputs"}
    assert not runs("done")


def test_a_key_that_one_job_lacks_is_told_with_that_jobs_keys(qexp: Qexp) -> None:
    said = qexp("train", "-m", "quantizer=post,lsq", "quantizer.weight.levels=full", "dry_run=true")
    assert said.code == 2
    assert said.err == (
        "config: no key 'quantizer.weight.levels' (lsq has: count, init, per_channel).\n"
    )


def test_a_method_that_reconstructs_keeps_its_name_when_a_part_of_it_is_replaced(
    qexp: Qexp,
) -> None:
    for method in ("brecq", "qdrop"):
        words = (*TINY_PTQ, f"quantizer={method}", "quantizer/act=lsq", "dry_run=true")
        assert f"/{method}+lsq-w4a4/" in qexp("train", *words).out
    words = (*TINY, "quantizer=asq", "quantizer/act=lsq", "dry_run=true")
    assert "/post+lsq-w4a4/" in qexp("train", *words).out


def test_ctrl_c_ends_the_sweep(tiny: Qexp) -> None:
    said = tiny("-m", "bits=2,3", "recipe.then=interrupt")
    assert said.code == 130
    assert len(runs("interrupted")) == 1
    (jobs,) = Path("outputs/sweeps").glob("*/jobs.jsonl")
    states = [json.loads(line)["status"] for line in jobs.read_text().splitlines()]
    assert states == ["began", "interrupted"]
    command = os.environ["QEXP_COMMAND"]
    assert said.err == f"interrupted. Continue with: qexp resume {jobs.parent}; {command}\n"


def test_ctrl_c_in_a_resumed_sweep_says_how_to_go_on_with_all_of_it(tiny: Qexp, qexp: Qexp) -> None:
    tiny("-m", "bits=2,3", "recipe.then=crash")
    (sweep,) = Path("outputs/sweeps").iterdir()
    said = qexp("resume", str(sweep), "recipe.then=interrupt")
    assert said.code == 130
    again = f"qexp resume {sweep} recipe.then=interrupt"  # the runs not yet taken lack it
    assert said.err == f"interrupted. Continue with: {again}\n"


def test_options_may_stand_anywhere(tiny: Qexp) -> None:
    assert tiny("bits=4", "-m", "seed=0,1").code == 0
    assert len(runs("done")) == 2


@pytest.mark.slow
def test_parallel_jobs_are_told_and_counted_alike(
    tiny: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    monkeypatch.setenv("PYTHONPATH", str(Path(standin.__file__).parent))
    said = tiny("-m", "launch=parallel", "bits=2,3", "recipe.then='bits=3'")
    assert said.code == 1
    assert "1 of 2 jobs failed: bits=3" in said.err
    assert len(runs("done")) == len(runs("failed")) == 1


@pytest.mark.slow
def test_a_killed_process_of_a_launcher_leaves_the_commands_to_go_on(
    qexp: Qexp, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    standin.write_configs(tmp_path / "conf")
    words = ("train", "--config-dir", "conf", *standin.TINY, "-m", "launch=parallel")
    # In a process of its own: joblib's workers stay where another test has begun them.
    said = subprocess.run(
        [sys.executable, "-m", "qexp", *words, "bits=2,3", "recipe.then=kill"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(standin.__file__).parent)},
    )
    assert said.returncode == 1
    (folder,) = Path("outputs/sweeps").iterdir()
    line = next(line for line in said.stderr.splitlines() if line.startswith("sweep: "))
    assert line.startswith("sweep: TerminatedWorkerError: ")
    assert f". Continue with: qexp resume {folder}; qexp train --config-dir conf" in line
    assert qexp("resume", str(folder), "recipe.then=done").code == 0
    assert runs("done") == runs()


def test_a_sweep_without_jobs_is_refused_and_leaves_nothing(tiny: Qexp, tmp_path: Path) -> None:
    for words in (["bits=range(5,2)"], ["bits=range(5,2)", "dry_run=true"], ["bits=2", "bitz=3"]):
        said = tiny("-m", *words)
        assert said.code == 2
        assert said.err.startswith(("sweep: there are no jobs. ", "config: no key 'bitz'"))
        assert not list(tmp_path.glob("outputs/*"))


def test_a_sweep_shows_its_tracebacks_when_asked(
    tiny: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QEXP_TRACEBACK", "1")
    said = tiny("-m", "bits=2", "recipe.then=crash")
    assert said.code == 1
    assert "in recipe\n    raise ZeroDivisionError" in said.err


# Configs of one's own


def test_a_config_of_the_users_is_not_passed_over_for_ours(
    tiny: Qexp, qexp: Qexp, tmp_path: Path
) -> None:
    mine = tmp_path / "conf" / "quantizer" / "lsq.yaml"
    mine.parent.mkdir()
    ours = (configs_dir() / "quantizer" / "lsq.yaml").read_text()
    mine.write_text(ours)  # the same: which of the two is taken does not matter
    assert tiny("quantizer=lsq").code == 0
    mine.write_text(f"{ours}# changed\n")
    for said in (tiny("quantizer=lsq"), qexp("train", "--config-dir", "conf", "--help")):
        assert said.code == 2
        assert said.err.startswith("config: conf/quantizer/lsq.yaml would be passed over: ")


def test_a_folder_of_configs_may_have_any_name(qexp: Qexp, tmp_path: Path) -> None:
    folder = "my,conf's"
    standin.write_configs(tmp_path / folder)
    words = ("train", "--config-dir", folder, "model=tiny")
    assert "\n  width: 3\n" in qexp(*words, "--help").out
    assert "config: no key 'bitz' (train has: " in qexp(*words, "bitz=3").err


def test_configs_that_replace_ours_are_looked_up_from_here(qexp: Qexp, tmp_path: Path) -> None:
    shutil.copytree(configs_dir(), tmp_path / "mine")
    (tmp_path / "mine/model/thin.yaml").write_text("name: thin\n")
    words = ("train", "--config-path", "mine", "model=thin")
    assert "\n  name: thin\n" in qexp(*words, "--help").out
    assert "config: no key 'bitz'" in qexp(*words, "bitz=3").err
    assert qexp(*words, "--cfg", "job").code == 0
    said = qexp("train", "--config-path", "nix")
    assert said == (
        2,
        "",
        "qexp: no folder 'nix' (--config-path). Try: qexp COMMAND --hydra-help\n",
    )


# Resume


def test_a_failed_run_continues_in_its_folder_from_its_own_config(
    tiny: Qexp, qexp: Qexp, tmp_path: Path
) -> None:
    tiny("recipe.then=crash")
    (run,) = runs("failed")
    frozen = {p.name: p.read_text() for p in (run / ".hydra").iterdir()}
    (tmp_path / "conf" / "recipe" / "tiny.yaml").write_text("edited: later\n")

    assert qexp("resume", str(run)).code == 1  # it crashes again
    assert qexp("resume", run.name[-6:], "recipe.then=done", "recipe.epochs=4").code == 0
    assert runs("done") == [run]
    assert standin.seen[-1].recipe.epochs == 4
    assert {name: (run / ".hydra" / name).read_text() for name in frozen} == frozen

    assert qexp("resume", str(run), "recipe.epochs=6").code == 0
    assert standin.seen[-1].recipe.then == "done"  # what the last resume changed holds


@pytest.mark.parametrize("name", ["it's", r"a\'b", "b\\", "a b,c=[d]"])
def test_a_folder_of_any_name_is_resumed(tiny: Qexp, qexp: Qexp, name: str) -> None:
    Path(name).mkdir()
    os.chdir(name)
    assert tiny("--config-dir", "../conf", "folder=run", "recipe.then=crash").code == 1
    os.chdir("..")
    assert qexp("resume", f"{name}/run", "recipe.then=done").code == 0
    assert read_status(Path(name, "run"))["state"] == "done"
    assert "recipe.then=done" in Path(name, "run/.hydra/resumed.yaml").read_text()


def test_a_refused_override_does_not_stick(tiny: Qexp, qexp: Qexp) -> None:
    tiny("recipe.then=crash")
    (run,) = runs()
    assert qexp("resume", str(run), "recipe.lr=-1").code == 2
    assert qexp("resume", str(run), "recipe.lrr=1").code == 2
    assert qexp("resume", str(run), "recipe.then=done").code == 0


def test_resume_refuses_what_is_done_or_still_running(tiny: Qexp, qexp: Qexp) -> None:
    tiny()
    (run,) = runs("done")
    assert qexp("resume", str(run)) == (
        2,
        "",
        f"resume: {run} is already done (top-1 90.40). Add recipe.epochs=... to train longer.\n",
    )
    shutil.copytree(run, "kept", ignore=shutil.ignore_patterns(".hydra"))
    Path("kept/status.json").write_text('{"state": "done"}')  # as collected results
    said = qexp("resume", "kept")
    assert "is already done (top-1 90.40). It is a collected result, without last.pt." in said.err
    said = qexp("eval", "run=kept")
    assert said.code == 2
    assert "It is no run's, or a collected result, which keeps no checkpoint." in said.err
    (run / "status.json").write_text(json.dumps({"state": "running", **owner()}))
    said = qexp("resume", str(run))
    assert said.code == 1
    assert said.err.startswith(f"resume: {run} is still running (pid {os.getpid()} on ")


def test_a_run_killed_on_another_machine_is_taken_over_by_a_word(tiny: Qexp, qexp: Qexp) -> None:
    tiny("recipe.then=crash")
    (run,) = runs("failed")
    status = json.loads((run / "status.json").read_text())
    status |= {"state": "running", "host": "elsewhere"}
    (run / "status.json").write_text(json.dumps(status))
    said = qexp("resume", str(run), "recipe.then=done")
    assert said.code == 1
    assert said.err.endswith(f"If nothing runs there any more: qexp resume {run} --take-over\n")
    assert read_status(run)["state"] == "running"
    assert qexp("resume", str(run), "recipe.then=done", "--take-over").code == 0
    (run / "status.json").write_text(json.dumps({"state": "running", **owner()}))
    said = qexp("resume", str(run), "--take-over")  # of this machine it is known
    assert said.code == 1
    assert said.err.endswith("Wait for it, or stop it first.\n")


def test_a_sweep_knows_a_job_that_was_killed(tiny: Qexp, qexp: Qexp) -> None:
    tiny("-m", "bits=2,3", "recipe.then='bits=3'")
    (sweep,) = Path("outputs/sweeps").iterdir()
    path = sweep / "jobs.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["began", "done", "began", "failed"]
    path.write_text("\n".join([*lines[:3], lines[3][:20]]))  # killed: its last line is cut short
    assert qexp("resume", str(sweep), "recipe.then=done").code == 0
    assert len(runs("done")) == 2


def test_a_line_after_one_that_was_cut_short_is_read(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"overrides": ["bits=2"], "sta')
    sweep._append(path, {"overrides": ["bits=3"], "status": "done"})
    sweep._append(path, {"overrides": ["bits=4"], "status": "done"})
    assert [job["overrides"] for job in sweep.read_jobs(tmp_path)] == [["bits=3"], ["bits=4"]]


def test_a_sweep_folder_resumes_its_unfinished_runs(tiny: Qexp, qexp: Qexp) -> None:
    tiny("-m", "bits=2,3,4", "recipe.then='bits=3'")
    (sweep,) = Path("outputs/sweeps").iterdir()
    assert qexp("resume", str(sweep), "recipe.then=done").code == 0
    assert len(runs("done")) == 3
    said = qexp("resume", str(sweep))
    assert said.code == 2
    assert "is done" in said.err


def test_a_resumed_sweep_goes_on_behind_a_run_that_fails_again(tiny: Qexp, qexp: Qexp) -> None:
    tiny("-m", "bits=2,3", "recipe.then=crash")
    (folder,) = Path("outputs/sweeps").iterdir()
    said = qexp("resume", str(folder), "recipe.then='bits=2'")
    assert said.code == 1
    (failed,), (done,) = runs("failed"), runs("done")
    assert said.err == f"resume: 1 of 2 failed: {failed}.\n"
    assert f"ZeroDivisionError: division by zero (traceback in {failed}/train.log)" in said.out
    assert read_json(done / "result.json")["top1"] == 90.3


def test_a_sweep_resumes_from_another_folder(
    tiny: Qexp, qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("-m", "bits=2,3,4", "recipe.then='bits=3'")
    (sweep,) = tmp_path.glob("outputs/sweeps/*")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert qexp("resume", str(sweep), "recipe.then=done").code == 0
    monkeypatch.chdir(tmp_path)
    assert len(runs("done")) == len(runs()) == 3


# ls, env, completion


def test_ls_tells_done_failed_and_dead(tiny: Qexp, qexp: Qexp) -> None:
    tiny("bits=2")
    tiny("bits=3", "recipe.then=crash")
    tiny("bits=4", "recipe.then=crash")
    process = subprocess.Popen(["true"])
    process.wait()
    killed = {"state": "running", **owner(), "pid": process.pid, "started": "2026-01-01T00:00:00Z"}
    (runs("failed")[-1] / "status.json").write_text(json.dumps(killed))
    rows = [line.split() for line in qexp("ls").out.splitlines()]
    assert rows[0] == ["name", "status", "top-1", "epoch", "age", "folder"]
    assert [row[:4] for row in rows[1:]] == [
        ["d-m/asq-w2a2", "done", "90.20", "2"],
        ["d-m/asq-w3a3", "failed", "-", "2"],
        ["d-m/asq-w4a4", "dead", "-", "2"],
    ]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ZeroDivisionError("a\nb"),
            1,
            "qexp: ZeroDivisionError: a b (QEXP_TRACEBACK=1 shows where)",
        ),
        (KeyboardInterrupt(), 130, "interrupted."),
        (SystemExit(3), 3, ""),
        (SystemExit("no"), 1, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_ends_a_command_outside_of_runs_is_one_line(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    def ends(argv: list[str]) -> int:
        raise error

    monkeypatch.setattr(tools, "ls", ends)
    assert qexp("ls") == (code, "", f"{line}\n" if line else "")
    monkeypatch.setenv("QEXP_TRACEBACK", "1")
    assert ("Traceback" in qexp("ls").err) == isinstance(error, Exception)


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_reads_no_further_is_no_error(
    buffered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "qexp", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", ["train bits=foo", "ls nowhere"])
def test_a_closed_pipe_does_not_change_what_a_command_came_to(words: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "qexp", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=writer)  # `2>&1 | true`
    os.close(writer)
    assert done.returncode == 2


def test_an_interruption_whose_line_nobody_reads_is_one(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`2>&1 | tee log`: Ctrl-C ends tee too."""

    def ends(argv: list[str]) -> int:
        raise KeyboardInterrupt

    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None:
            pass

        def isatty(self) -> bool:
            return False

    monkeypatch.setattr(tools, "ls", ends)
    monkeypatch.setattr(sys, "stderr", Closed())
    assert qexp("ls").code == 130


def test_a_sweep_whose_table_nobody_reads_names_its_failed_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"overrides": [f"seed={s}"], "status": "failed"} for s in (0, 1)]
    (tmp_path / sweep.JOBS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(sweep, "_folder", tmp_path)

    def closed(text: str, **more: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    assert sweep.summary().startswith("sweep: 2 of 2 jobs failed: seed=0; seed=1.")


def test_a_launcher_may_end_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As submitit does where a job is preempted: nobody may take it for done."""
    monkeypatch.setattr(sweep, "_jobs", lambda: tmp_path / sweep.JOBS)
    monkeypatch.setattr(sweep, "task_overrides", lambda: ["seed=0"])

    def task(cfg: Any) -> dict[str, Any]:
        raise SystemExit(-1)

    with pytest.raises(SystemExit):
        sweep.run_job(task, OmegaConf.create())
    assert [job["status"] for job in sweep.read_jobs(tmp_path)] == ["interrupted"]


def test_an_interrupted_resume_of_a_sweep_is_continued_with_its_words(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "S" / "run").mkdir(parents=True)
    job = {"overrides": ["seed=0"], "status": "interrupted", "folder": "S/run"}
    (tmp_path / "S" / sweep.JOBS).write_text(json.dumps(job) + "\n")

    def stop(folder: Path, overrides: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(tools, "_resume_run", stop)
    said = qexp("resume", "S", "recipe.epochs=40", "recipe.milestones=[0.1, 0.2]")
    again = "qexp resume S recipe.epochs=40 'recipe.milestones=[0.1, 0.2]'"
    assert (said.code, said.err) == (130, f"interrupted. Continue with: {again}\n")


def test_a_resume_finds_what_lies_in_the_working_folder(
    qexp: Qexp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    assert qexp("resume", "nowhere").code == 2
    assert str(tmp_path) in sys.path


def test_of_two_words_for_a_plan_the_last_counts() -> None:
    assert parse(["-m", "dry_run=false", "dry_run=true"]).is_dry
    assert not parse(["-m", "dry_run=true", "dry_run=false"]).is_dry


def test_errors_are_red_on_a_terminal_that_has_colors(
    qexp: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = "qexp: unknown command 'zzz'. Run qexp for the list."
    assert qexp("zzz").err == f"\033[31m{line}\033[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert qexp("zzz").err == f"{line}\n"


def test_an_age_is_in_its_largest_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = datetime(2026, 3, 4, 12, tzinfo=timezone.utc)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return now

    monkeypatch.setattr(tools, "datetime", Clock)
    ages = {5: "5s", 59: "59s", 60: "1m", 7200: "2h", 86400 * 12: "12d"}
    found = [tools.age((now - timedelta(seconds=s)).isoformat()) for s in ages]
    assert found == list(ages.values())
    assert [tools.age(odd) for odd in (None, "yesterday", 5)] == ["-"] * 3


def test_ls_takes_several_folders_and_lists_a_run_once(tiny: Qexp, qexp: Qexp) -> None:
    tiny("folder=a/x/1"), tiny("folder=b/x/2")
    rows = qexp("ls", "a", "b", "b/x").out.splitlines()[1:]
    assert [row.split()[-1] for row in rows] == ["a/x/1", "b/x/2"]
    Path("a/x/1/status.json").write_text('{"state": "done"}')  # as collected results
    assert qexp("ls", "a").out.splitlines()[1].split()[2] == rows[0].split()[2] != "-"
    assert qexp("ls", "a", "nix").err == "ls: no runs under 'nix'. Start one with: qexp train\n"


def test_env_names_versions_and_places(qexp: Qexp) -> None:
    said = qexp("env")
    assert said.code == 0
    first = {line.split()[0] for line in said.out.splitlines()}
    assert {"python", "torch", "commit", "gpus", "torch.compile", "configs", "data"} <= first


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qexp tr", "train"),
        ("qexp bench t", "train"),
        ("qexp train quantizer=lsqp", "quantizer=lsqplus"),
        ("qexp train model=resnet8 quantizer/weight=lsq_", "quantizer/weight=lsq_per_channel"),
        ("qexp eval ch", "checkpoint="),
        ("qexp nothing", ""),
    ],
)
def test_completion(qexp: Qexp, monkeypatch: pytest.MonkeyPatch, line: str, expected: str) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    assert qexp("-sc", "query=bash").out.strip() == expected


def test_completion_installs_for_the_name_qexp(qexp: Qexp) -> None:
    said = qexp("-sc", "install=bash")
    assert said.code == 0
    assert said.out.rstrip().endswith("hydra_bash_completion qexp")


def test_a_run_that_takes_all_cores_of_a_busy_machine_says_what_to_type(
    tiny: Qexp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qexp.runner.idle.idle_cores", lambda: 1.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        said = tiny("device=cpu")
        line = "warning: 2 threads, and other processes leave 1.0 cores idle: "
        assert said.code == 0, said.err
        assert line in said.err
        assert "threads=1 may be many times faster" in said.err
        assert line not in tiny("device=cpu", "threads=2", "seed=1").err  # it was chosen
    finally:
        torch.set_num_threads(before)
