"""Sweeps: skip what is done, go on after a failure, say at the end how each job ended.

The jobs of a sweep live where single runs live, so that `ls` and `report` read one tree. The
sweep's own folder (`hydra.sweep.dir`) holds `multirun.yaml` (the command) and `jobs.jsonl`, one
line when a job begins and one when it ends: overrides, status, top1, seconds, folder, error. Each
job appends its lines itself, so they are there whatever launcher ran it.

A job is skipped when a finished run of the identical config exists under `out`: identity is a hash
of the resolved config without the keys that say where and how it is computed (runner/folder.py).
Neither the job's number nor its folder's name plays a part, so a sweep may be repeated, enlarged
or reordered. The commit plays none either: after a change of the code, `force=true` runs all.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from qexp.errors import ConfigError, QexpError, RunError, one_line
from qexp.messages import COMPOSITION
from qexp.runner.atomic import append_line
from qexp.runner.folder import find_done, identity, read_json
from qexp.runner.overrides import task_overrides

JOBS = "jobs.jsonl"

_folder: Path | None = None  # of the sweep that this process launches
_earlier = 0  # bytes that its jobs.jsonl had before: of another sweep in the same folder
_needs_slurm = False  # whether its jobs go to SLURM
_new = False  # whether this sweep makes that folder


class Launched(Callback):
    """Tells this process where the sweep's folder is (`hydra.callbacks` in the primary config)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra once, before the first job."""
        global _folder, _earlier, _new, _needs_slurm
        _folder = Path(config.hydra.sweep.dir)
        _new = not _folder.exists()
        with suppress(OSError):
            _earlier = (_folder / JOBS).stat().st_size
        _needs_slurm = config.hydra.launcher._target_.endswith("submitit_launcher.SlurmLauncher")
        if config.hydra.launcher._target_.endswith("submitit_launcher.LocalLauncher"):
            _send_controllers_to(_folder / "controllers.log")


def _send_controllers_to(path: Path) -> None:
    """What submitit's controllers, a process a job, say: to a file instead of the terminal.

    Ctrl-C reaches them too, and each would print a traceback of its own.
    """
    from submitit.local import local

    start = getattr(local.start_controller, "__wrapped__", local.start_controller)

    @wraps(start)
    def quietly(*args: Any, **options: Any) -> Any:
        terminal = os.dup(2)  # a process that is started has this one's stderr
        try:
            with path.open("a") as log:
                os.dup2(log.fileno(), 2)
            return start(*args, **options)
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)

    local.start_controller = quietly


def is_sweep() -> bool:
    """Whether the current job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


@contextmanager
def folder_for(*, dry: bool) -> Iterator[list[str]]:
    """The override that sends a dry run's sweep folder, which Hydra insists on, into oblivion."""
    if not dry:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="qexp-dry-run-") as folder:
        yield [f"hydra.sweep.dir={folder}"]


@contextmanager
def place_errors() -> Iterator[None]:
    """Turn what the disk may refuse where the sweep's own folder is made into one line.

    A SIGTERM between or beside its jobs ends it as Ctrl-C does. What a launcher raises (a process
    of its that was killed) gets the commands that go on with the sweep.

    Raises:
        ConfigError: the sweep has no jobs.
    """

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if main else None
    try:
        yield
        if _folder is not None and not read_jobs(_folder, _earlier):
            raise ConfigError(
                "sweep: there are no jobs. A list of values on the command line is empty (range, "
                "glob)."
            )
    except OSError:
        if _folder is None:
            raise
        from qexp.runner.guards import os_errors

        with os_errors(_folder):
            raise
    except (QexpError, ValueError, *COMPOSITION):
        raise
    except Exception as error:
        if _folder is None:
            raise
        if _needs_slurm and shutil.which("sbatch") is None:
            raise ConfigError(
                "sweep: launch=slurm needs SLURM's commands, which are not on this machine's PATH. "
                "Use launch=local or launch=parallel."
            ) from error
        raise RunError(
            f"sweep: {one_line(error).rstrip('.')}. Continue with: {'; '.join(to_continue())}"
        ) from error
    finally:
        _tidy()
        if main:
            signal.signal(signal.SIGTERM, before)


def _tidy() -> None:
    """Take away the folder of a sweep that was refused before its first job."""
    if _new and _folder is not None and _folder.is_dir():
        with suppress(OSError):
            if {path.name for path in _folder.iterdir()} <= {"multirun.yaml"}:
                shutil.rmtree(_folder)
                _folder.parent.rmdir()  # `sweeps`, where it was the first


def run_job(task: Callable[[DictConfig], dict[str, Any]], cfg: DictConfig) -> float | None:
    """Run one job; its end goes to jobs.jsonl, its error to stderr.

    Returns its top-1 (percent), which a sweeper that searches maximises.
    """
    line: dict[str, Any] = {"overrides": task_overrides()}
    try:
        line.update(task(cfg))
    except BaseException as error:
        stopped = isinstance(error, (KeyboardInterrupt, SystemExit))  # a launcher may exit so
        if os.environ.get("QEXP_TRACEBACK") and not stopped:
            traceback.print_exception(error)
        line.update(status="interrupted" if stopped else "failed", error=one_line(error))
        line["folder"] = getattr(error, "run_folder", None)
        if stopped:
            raise
        log = f" (traceback in {line['folder']}/train.log)" if line["folder"] else ""
        _say_failed(f"job {' '.join(line['overrides'])} failed: {line['error']}{log}")
    finally:
        _append(_jobs(), line)
    return line.get("top1")


def done(cfg: DictConfig) -> dict[str, Any] | None:
    """In a sweep, the finished run of the identical config, said in one line; None if none is."""
    if not is_sweep() or cfg.force:
        return None
    folder = find_done(Path(cfg.out), identity(cfg)) if Path(cfg.out).is_dir() else None
    if folder is None:
        return None
    result = read_json(folder / "result.json")
    from qexp.recipes.same_images import replaced_images
    from qexp.recipes.start import replaced_file

    protocol = result.get("protocol") or {}
    if file := replaced_file(cfg, protocol) or replaced_images(cfg, protocol):
        print(f"not skipped: {file} has changed since {folder} was done", flush=True)
        return None
    print(f"skipped: {' '.join(task_overrides())} is done in {folder}", flush=True)
    return {"status": "skipped", "top1": result.get("top1"), "seconds": 0.0, "folder": folder}


def _jobs() -> Path:
    """The sweep's jobs.jsonl, wherever `hydra.sweep.subdir` puts each job."""
    hydra = HydraConfig.get()
    return Path(hydra.runtime.cwd) / hydra.sweep.dir / JOBS


def _append(path: Path, line: dict[str, Any]) -> None:
    append_line(path, json.dumps(line, default=str))


def _say_failed(text: str) -> None:
    red = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[31m{text}\033[0m" if red else text, file=sys.stderr, flush=True)


def read_jobs(folder: Path, start: int = 0) -> list[dict[str, Any]]:
    """What a sweep's jobs.jsonl says of each job last; empty when it has none.

    A line that a kill cut short is left out, and so is what is before byte `start`.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    try:
        text = (folder / JOBS).read_bytes()[start:].decode(errors="replace")
    except OSError:
        return []
    for line in text.splitlines():
        with suppress(ValueError, KeyError, TypeError):
            job = json.loads(line)
            found[tuple(job["overrides"])] = job
    return list(found.values())


def began(folder: Path) -> None:
    """Note the folder of the job that begins: should it be killed, the sweep still knows it."""
    if is_sweep():
        line = {"overrides": task_overrides(), "status": "began"}
        _append(_jobs(), {**line, "folder": folder})


def forget() -> None:
    """Start anew: the next summary is of the next sweep."""
    global _folder, _earlier, _new, _needs_slurm
    _folder, _earlier, _new, _needs_slurm = None, 0, False, False


def to_continue() -> list[str]:
    """The commands that go on with the sweep that this process launched; none if it did not.

    `qexp resume` takes up the runs that were stopped; the command itself, which skips what is
    done, the jobs that never began.
    """
    if _folder is None:
        return []
    stopped = ("began", "interrupted")
    begun = any(
        job["status"] in stopped and job.get("folder") for job in read_jobs(_folder, _earlier)
    )
    resume = f"qexp resume {shlex.quote(str(_folder))}"
    return [*([resume] if begun else []), os.environ["QEXP_COMMAND"]]


def summary() -> str:
    """Print the table of the sweep that just ended; returns a line naming the failed jobs."""
    jobs = read_jobs(_folder, _earlier) if _folder is not None else []
    jobs = [job for job in jobs if job["status"] != "planned"]
    if not jobs:
        return ""
    with suppress(BrokenPipeError):  # `| head`: what failed is returned all the same
        print(table(jobs), flush=True)
    names = zip(jobs, varying(jobs), strict=True)
    failed = [name for job, name in names if job["status"] == "failed"]
    if not failed:
        return ""
    return f"sweep: {len(failed)} of {len(jobs)} jobs failed: {'; '.join(failed)}. See {_folder}."


def table(jobs: list[dict[str, Any]]) -> str:
    """Job, status, top-1 (percent), seconds and folder, in columns."""
    rows = [("job", "status", "top-1", "seconds", "folder")]
    for job, name in zip(jobs, varying(jobs), strict=True):
        top1, seconds = job.get("top1"), job.get("seconds")
        rows.append(
            (
                name,
                job["status"],
                "-" if top1 is None else f"{top1:.2f}",
                "-" if seconds is None else f"{seconds:.0f}",
                str(job.get("folder") or job.get("error") or "-"),
            )
        )
    return columns(rows)


def varying(jobs: list[dict[str, Any]]) -> list[str]:
    """Each job by the overrides that not all of them share."""
    shared = set.intersection(*(set(job["overrides"]) for job in jobs))
    own = [[o for o in job["overrides"] if o not in shared] for job in jobs]
    return [" ".join(o or job["overrides"]) or "-" for o, job in zip(own, jobs, strict=True)]


def columns(rows: list[tuple[str, ...]]) -> str:
    """Left-aligned text columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
