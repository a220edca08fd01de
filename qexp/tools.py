"""The commands that are no Hydra tasks: `qexp resume`, `qexp ls`, `qexp env`."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from omegaconf import OmegaConf

from qexp.command_line import Parser
from qexp.errors import CheckpointError, ConfigError, RunError
from qexp.job import Job
from qexp.runner.folder import (
    RESULT,
    RESUMED,
    STATUS,
    find_runs,
    give_up,
    is_done,
    read_config,
    read_json,
    read_status,
    refuse_running,
)
from qexp.runner.overrides import folder_override
from qexp.runner.resuming import CHECKPOINT, RESUME
from qexp.sweep import columns, read_jobs

QUIET = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    f"hydra.job.name={RESUME}",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


# ---------------------------------------------------------------------------------------------
# resume


def resume(argv: Sequence[str]) -> int:
    """`qexp resume RUN [key=value ...]`: continue a run from its last checkpoint.

    The config is composed from RUN/.hydra, so later edits of `configs/` do not reach it.
    """
    parser = Parser("qexp resume", description="Continue a run, or the unfinished ones of a sweep.")
    parser.add_argument("run", help="a run's folder, the end of its path, or a sweep's folder")
    parser.add_argument(
        "overrides", nargs="*", default=[], help="changes, for instance recipe.epochs=40"
    )
    parser.add_argument("--out", default="outputs", help="where runs are looked up (outputs)")
    parser.add_argument(
        "--take-over", action="store_true", help="also a run that is said to run on another machine"
    )
    args = parser.parse_intermixed_args(list(argv))
    for override in args.overrides:
        if (key := override.lstrip("+~").partition("=")[0]) in ("folder", "dry_run"):
            raise ConfigError(
                f"resume: {key} is decided: the run goes on where it is. Leave it out."
            )
    folder = locate(args.run, Path(args.out))
    if args.take_over:
        for run in _runs(folder):
            give_up(run)
    if not (folder / STATUS).is_file():
        return _resume_sweep(folder, args.overrides)
    return _resume_run(folder, args.overrides)


def locate(name: str, out: Path) -> Path:
    """The run or sweep folder that `name` is: a path, or the end of one under `out`."""
    path = Path(name)
    if (path / STATUS).is_file() or read_jobs(path):
        return path
    found = [run for run in find_runs(out) if str(run).endswith(name.strip("/"))]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"resume: '{name}' is the end of {len(found)} runs. Give more of it.")
    raise ConfigError(f"resume: no run '{name}' under '{out}'. List runs with: qexp ls {out}")


def _runs(folder: Path) -> list[Path]:
    """The run in `folder`, or those that the sweep in it began."""
    if (folder / STATUS).is_file():
        return [folder]
    runs = [_found(job["folder"], folder) for job in read_jobs(folder) if job.get("folder")]
    return list(dict.fromkeys(runs))


def _found(run: str, sweep: Path) -> Path:
    """A run's folder, which its sweep noted as seen from where it was started.

    From elsewhere, and where the tree was moved as one, it is found from above the sweep.
    """
    if Path(run).is_dir():
        return Path(run)
    above = (parent / run for parent in sweep.resolve().parents)
    return next((path for path in above if path.is_dir()), Path(run))


def _resume_run(folder: Path, overrides: Sequence[str]) -> int:
    from qexp.cli import hydra_main

    status = read_status(folder)
    if os.environ.get("RANK", "0") != "0":  # torchrun's process 0 decides and has the folder
        status = {}
    if is_done(folder) and status and not overrides:
        top1 = {**read_json(folder / RESULT), **status}.get("top1")
        score = f" (top-1 {top1:.2f})" if isinstance(top1, float) else ""
        raise ConfigError(f"resume: {folder} is already done{score}.{_to_go_on(folder)}")
    refuse_running(folder, status)
    if not (folder / ".hydra" / "config.yaml").is_file():
        raise ConfigError(f"resume: {folder} has no .hydra/config.yaml. Start a new run.")
    read_config(folder / ".hydra" / "config.yaml", "Start a new run.")
    every = [*(o for o in _earlier(folder / RESUMED) if o not in overrides), *overrides]
    arguments = [*QUIET, *every, folder_override(folder), "dry_run=false"]
    job = Job("train", resume=True)
    # An override that is refused must not refuse the next resume: `take` notes what is accepted.
    try:
        return hydra_main(job, (folder / ".hydra").resolve(), "config", arguments)
    except CheckpointError as error:
        last = folder / CHECKPOINT
        if f"'{last}'" not in str(error):
            raise
        kept = " best.pt has the best epoch's network." if (folder / "best.pt").is_file() else ""
        raise CheckpointError(
            f"resume: {last} is truncated or damaged ({last.stat().st_size} bytes).{kept} Delete "
            f"it and the run starts over: rm {shlex.quote(str(last))}; qexp resume "
            f"{shlex.quote(str(folder))}"
        ) from error


def _to_go_on(folder: Path) -> str:
    """What a done run can be trained on with; empty where it cannot."""
    path = folder / "config.yaml"
    if not ((folder / CHECKPOINT).is_file() or (folder / ".hydra").is_dir()):
        return f" It is a collected result, without {CHECKPOINT}."
    cfg = None
    with suppress(ConfigError):
        cfg = read_config(path, "") if path.is_file() else None
    if cfg is None:
        return " Add recipe.epochs=... to train longer."
    if not OmegaConf.select(cfg, "recipe.epochs"):
        return ""  # post-training
    if (steps := cfg.get("max_steps")) is not None:
        return f" It was cut by max_steps={steps}, which cannot change: start a new run."
    return " Add recipe.epochs=... to train longer."


def _earlier(path: Path) -> list[str]:
    """The overrides that earlier resumes gave."""
    try:
        return [str(o) for o in OmegaConf.load(path)] if path.is_file() else []
    except Exception as error:  # yaml and OmegaConf raise their own kinds
        raise ConfigError(
            f"resume: {path} is damaged: it holds the values that earlier resumes gave. Delete it "
            "and give them again."
        ) from error


def _resume_sweep(folder: Path, overrides: Sequence[str]) -> int:
    """Continue every run of a sweep that has begun and is not done."""
    unfinished = [run for run in _runs(folder) if not is_done(run)]
    if not unfinished:
        raise ConfigError(
            f"resume: every run that {folder} began is done. Repeat its command for those that "
            "never began."
        )
    failed = []
    for run in unfinished:
        try:
            _resume_run(run, overrides)
        except KeyboardInterrupt as error:
            error.run_folder = folder  # type: ignore[attr-defined]  # read by cli.py
            error.overrides = overrides  # type: ignore[attr-defined]  # runs not yet taken lack them
            raise
        except Exception as error:
            from qexp.cli import describe

            with suppress(BrokenPipeError):
                print(describe(error), flush=True)
            failed.append(str(run))
    if failed:
        raise RunError(f"resume: {len(failed)} of {len(unfinished)} failed: {'; '.join(failed)}.")
    return 0


# ---------------------------------------------------------------------------------------------
# ls


def ls(argv: Sequence[str]) -> int:
    """`qexp ls [FOLDER ...]`: a table of the runs below these folders."""
    parser = Parser("qexp ls", description="Table of runs, oldest first.")
    parser.add_argument("folder", nargs="*", default=["outputs"], help="where to look (outputs)")
    args = parser.parse_args(list(argv))
    runs: dict[Path, None] = {}
    for root in map(Path, args.folder):
        found = find_runs(root) if root.is_dir() else []
        if not found:
            raise ConfigError(f"ls: no runs under '{root}'. Start one with: qexp train")
        runs.update(dict.fromkeys(found))
    rows = [("name", "status", "top-1", "epoch", "age", "folder")]
    for run in runs:
        status = read_status(run)
        told = {**read_json(run / RESULT), **status}  # a collected run's status is short
        top1 = told.get("top1")
        rows.append(
            (
                f"{run.parent.parent.name}/{run.parent.name}",
                str(status.get("state", "?")),
                f"{top1:.2f}" if isinstance(top1, (int, float)) else "-",
                last_epoch(run),
                age(told.get("started", told.get("finished"))),
                str(run),
            )
        )
    print(columns(rows))
    return 0


def last_epoch(run: Path) -> str:
    """The last epoch that metrics.jsonl tells of, `-` if none."""
    try:
        lines = (run / "metrics.jsonl").read_text(errors="replace").splitlines()
    except OSError:
        return "-"
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if "epoch" in event:
            return str(event["epoch"])
    return "-"


def age(started: object) -> str:
    """Time since an ISO date, in its largest unit: 42s, 7m, 3h, 12d."""
    try:
        seconds = (
            datetime.now(timezone.utc) - datetime.fromisoformat(str(started))
        ).total_seconds()
    except (ValueError, TypeError):
        return "-"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


# ---------------------------------------------------------------------------------------------
# env


def env(argv: Sequence[str]) -> int:
    """`qexp env`: what a bug report needs."""
    from qexp.config import configs_dir

    Parser("qexp env", description="Versions, devices, and where things are.").parse_args(
        list(argv)
    )
    from qexp.runner.device import compiler_available
    from qexp.runner.environment import describe

    about = describe(None)
    works, reason = compiler_available("cuda" if about["gpus"] else "cpu")
    data = Path(os.environ.get("QEXP_DATA", "data"))
    rows = [
        ("python", about["python"]),
        *((name, version or "missing") for name, version in about["packages"].items()),
        ("commit", f"{about['commit']}{' (dirty)' if about['dirty'] else ''}"),
        ("platform", about["platform"]),
        ("cpu", f"{about['cpu']}, {about['cpu_count']} cores, {about['threads']} threads"),
        ("gpus", ", ".join(about["gpus"]) or "none"),
        ("torch.compile", f"yes ({reason})" if works else f"no: {reason}"),
        ("configs", str(configs_dir())),
        (
            "data",
            f"{data.resolve()}{'' if data.is_dir() else ' (absent; QEXP_DATA names another)'}",
        ),
    ]
    print(columns(rows))
    return 0
