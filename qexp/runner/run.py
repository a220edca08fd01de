"""One run: `with open_run(folder, cfg) as run:` claims a folder and accounts for it.

    status.json     running, then done | failed | interrupted; pid, host, times, error
    config.yaml     resolved        .hydra/   what was composed, interpolations kept; for resume
    env.json        argv, commit, packages, hardware, seed
    metrics.jsonl   one event a line, flushed        train.log   what the console said, tracebacks
    result.json     written by `run.finish`, atomically, last
    result.before.json   the result of a done run while it is trained on: gone when it is done again

The status is written here and not by Hydra callbacks, which a Ctrl-C or a SIGTERM skips. Runs may
nest (a float baseline trained inside a QAT run) and follow each other in one process: whatever a
run changes in torch's global state is put back when it ends.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from qexp.errors import RunError, one_line
from qexp.runner import distributed
from qexp.runner.atomic import finite, torn, write_bytes, write_json
from qexp.runner.environment import describe, note_earlier_
from qexp.runner.folder import EARLIER, RESULT, RESUMED, STATUS, claim, identity, owner, read_json
from qexp.runner.guards import global_state, gpu_memory, os_errors, sigterm
from qexp.runner.overrides import all_overrides, task_overrides
from qexp.runner.resuming import Before, take

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Run:
    """An open run. Made by `open_run`.

    Attributes:
        dir: the run's folder.
        resumed: whether the folder held an earlier part of this run.
        segments: what changed when it was resumed (`resuming.py`).
        changed: whether this resume added one.
        label: `weight+act` where the command line replaced a part of the method, or None.
    """

    def __init__(self, folder: Path, cfg: DictConfig, resumed: bool) -> None:
        self.dir = folder
        self.resumed = resumed
        self.finished = False
        self._started = time.time()
        status = read_json(folder / STATUS)
        self.segments: list[dict[str, Any]] = status.get("segments", [])
        self.changed = False
        self.label: str | None = status.get("label")
        self._earlier_s = float(status.get("wall_s", 0.0))
        self._metrics: IO[str] = open(folder / "metrics.jsonl", "a")  # noqa: SIM115
        if torn(folder / "metrics.jsonl"):  # by a kill: the next event is a line of its own
            self._metrics.write("\n")
        self._log: IO[str] = open(folder / "train.log", "a")  # noqa: SIM115
        self._writer: SummaryWriter | None = None
        self._environment: dict[str, Any] = describe(cfg.get("seed"), cfg.get("threads"))
        before = read_json(folder / "env.json") if resumed else {}
        self._differences = note_earlier_(self._environment, before)
        self._overrides = all_overrides(folder, RESUMED) if resumed else task_overrides()

    # What happened

    def event(self, kind: str, **fields: Any) -> None:
        """Append one line to metrics.jsonl: `{"event": kind, "time": seconds, ...fields}`."""
        line = {"event": kind, "time": round(time.time(), 3), **finite(fields)}
        self._metrics.write(json.dumps(line, default=str) + "\n")
        self._metrics.flush()

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a TensorBoard curve."""
        self._tensorboard().add_scalar(tag, value, step)

    def histogram(self, tag: str, values: torch.Tensor, step: int) -> None:
        """One TensorBoard histogram; `values` of any shape, finite."""
        self._tensorboard().add_histogram(tag, values.detach().float().cpu().numpy(), step)

    def _tensorboard(self) -> SummaryWriter:
        if self._writer is None:  # importing it takes most of a second: only when it is used
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.dir))
        return self._writer

    def info(self, line: str) -> None:
        """Say one line on the console and in train.log."""
        self._say(line, sys.stdout)

    def warn(self, line: str) -> None:
        """Say one line on stderr and in train.log, marked as a warning."""
        self._say(f"warning: {line}", sys.stderr)

    def _say(self, line: str, stream: IO[str]) -> None:
        from tqdm import tqdm

        tqdm.write(line, file=stream)  # keeps a progress bar whole
        stream.flush()
        self.log(line)

    def log(self, text: str) -> None:
        """Write to train.log only."""
        self._log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")
        self._log.flush()

    # What came out

    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> None:
        """Write `name` into the run's folder, atomically."""
        write_json(self.dir / name, value)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json and mark the run done; returns what was written.

        `wall_s` (all parts of a resumed run together), `finished` (UTC), `commit`, `dirty`,
        `versions` and `overrides` are added where `result` lacks them, and `commits` of a run
        that was resumed with another.
        """
        commits = self._environment.get("commits", [])
        known = {
            "wall_s": round(self.wall_s(), 3),
            "finished": _now(),
            "seed": self._environment["seed"],
            "commit": self._environment["commit"],
            "dirty": self._environment["dirty"] or any(c.endswith("(dirty)") for c in commits),
            **({"commits": commits} if commits else {}),
            "versions": {
                "python": self._environment["python"],
                **self._environment["packages"],
                "cuda": self._environment["cuda"],
            },
            "overrides": self._overrides,
        }
        written = {**known, **result}
        self.write_json(RESULT, written)
        self.status("done", top1=result.get("top1"))
        (self.dir / EARLIER).unlink(missing_ok=True)
        self.finished = True
        return written

    def wall_s(self) -> float:
        """Seconds this run took so far, earlier parts of a resumed run included."""
        return self._earlier_s + time.time() - self._started

    def status(self, state: str, **fields: Any) -> None:
        """Write status.json."""
        status = read_json(self.dir / STATUS)
        status.update(state=state, updated=_now(), wall_s=round(self.wall_s(), 3), **fields)
        write_json(self.dir / STATUS, status)

    def describe_(self, cfg: DictConfig) -> None:
        """Write what this run is: .hydra/ the first time, config.yaml, env.json."""
        if not self.resumed:
            _write_hydra(self.dir / ".hydra", cfg)
        config = OmegaConf.to_yaml(cfg, resolve=True)
        write_bytes(self.dir / "config.yaml", config.encode())
        write_json(self.dir / "env.json", self._environment)

    def close(self) -> None:
        """Close the files; every line is on the disk already."""
        for file in (self._metrics, self._log, self._writer):
            if file is not None:
                with suppress(OSError):  # a full disk was reported where it happened
                    file.close()


class Follower(Run):
    """The run as a process that does not lead it sees it: nothing is written, nothing is said."""

    def __init__(self, folder: Path, resumed: bool) -> None:
        self.dir = folder
        self.resumed = resumed
        self.finished = False
        self.segments = []
        self.changed = False  # process 0 says it
        self.label = None

    def event(self, kind: str, **fields: Any) -> None: ...
    def scalar(self, tag: str, value: float, step: int) -> None: ...
    def histogram(self, tag: str, values: torch.Tensor, step: int) -> None: ...
    def info(self, line: str) -> None: ...
    def warn(self, line: str) -> None: ...
    def log(self, text: str) -> None: ...
    def write_json(self, name: str, value: Mapping[str, Any] | list[Any]) -> None: ...
    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {}


@contextmanager
def open_run(
    folder: Path, cfg: DictConfig, *, resume: bool = False, label: str | None = None
) -> Iterator[Run]:
    """Claim a folder for a run of `cfg`, and leave it with a status that says how it ended.

    Args:
        folder: where; when it is taken, `folder-2`, ... is used (see `Run.dir`).
        resume: continue the run in `folder` instead.
        label: see `Run`.

    Raises:
        RunError: no permission, no space, or `folder` still runs elsewhere. Every other exception
            passes through, with `run_folder` set on it, its traceback in train.log.

    Where several processes train together, process 0 does this and the others get a `Follower`.
    """
    if not distributed.world().leads:
        place, resumed = distributed.told(("", False))
        with sigterm(), global_state(), gpu_memory(cfg.get("recipe", ())):
            yield Follower(Path(place), resumed)
        return
    with os_errors(folder):
        before = Before.of(folder) if resume else None
        known = len(read_json(folder / STATUS).get("segments", []))
        if resume:
            take(folder, cfg, distributed.world().size)
        else:
            folder = claim(folder, _first_status(cfg, label))
        run = Run(folder, cfg, resume)
        run.changed = resume and len(run.segments) > known
    distributed.told((str(folder), resume))
    with os_errors(folder), sigterm(), global_state():
        try:
            run.describe_(cfg)
            run.event("resume" if resume else "start", commit=run._environment["commit"])
            for line in run._differences:
                run.warn(line)
            with gpu_memory(cfg.get("recipe", ())):
                yield run
            if not run.finished:
                raise RunError(f"run: {folder} ended without a result. Call run.finish(result).")
        except BaseException as error:
            _record(run, error)
            if before is not None:
                before.put_back(folder, error)
            raise
        finally:
            run.close()


def _first_status(cfg: DictConfig, label: str | None) -> dict[str, Any]:
    known = {"state": "running", "identity": identity(cfg), "started": _now(), **owner()}
    known["processes"] = distributed.world().size
    return known | ({"label": label} if label else {})


def _record(run: Run, error: BaseException) -> None:
    """Traceback to train.log, end state to status.json."""
    if (run.dir / ".hydra" / "config.yaml").is_file():  # else there is nothing to resume from
        error.run_folder = run.dir  # type: ignore[attr-defined]  # read by cli.py
    interrupted = isinstance(error, KeyboardInterrupt)
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    # On a full disk these may fail too; the run then reads `dead`, and the first error is told.
    with suppress(OSError):
        run.status("interrupted" if interrupted else "failed", error=one_line(error))
    with suppress(OSError):
        run.log("".join(lines))


def _write_hydra(folder: Path, cfg: DictConfig) -> None:
    """What Hydra would have written had it known the folder: config, hydra, overrides."""
    from hydra.core.hydra_config import HydraConfig

    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(task_overrides()))
    if HydraConfig.initialized():
        hydra = OmegaConf.masked_copy(OmegaConf.create({"hydra": HydraConfig.get()}), ["hydra"])
        (folder / "hydra.yaml").write_text(OmegaConf.to_yaml(hydra))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
