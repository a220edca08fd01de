"""Run folders on the disk: claim one, read its status, find others. Imports no torch.

A folder is a run's when it holds `status.json`; whoever creates that file (exclusively) owns the
folder. States: running, done, failed, interrupted; a `running` whose process is gone reads `dead`.

Every run stores the `identity` of its config, so that a sweep can tell which of its jobs are
already done wherever their folders are.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qexp.errors import ConfigError, RunError, quoted
from qexp.runner.atomic import write_json

STATUS = "status.json"
RESULT = "result.json"
EARLIER = "result.before.json"  # of a done run that is trained on, until it is done again
RESUMED = (
    ".hydra/resumed.yaml"  # overrides that `qexp resume` commands gave; a later one keeps them
)

# Keys that say where and how a run is computed, not what. Numbers agree up to the order of sums,
# which `threads` and `device` change: training may carry that far.
NOT_IDENTITY = (
    "out", "folder", "dry_run", "force", "device", "compile", "threads", "saved", "sync_bn",
    "sweep", "recipe.plots", "recipe.save_every", "recipe.cache_gb", "dataset.download",
    "dataset.workers",
)  # fmt: skip


def identity(cfg: DictConfig, segments: Sequence[Any] = ()) -> str:
    """A hash of what the config computes: every resolved key except those in `NOT_IDENTITY`.

    Args:
        segments: changes on the way (`resuming.py`), which make it another run.
    """
    what = {key: _plain(cfg, key) for key in cfg if key not in NOT_IDENTITY}
    for key in NOT_IDENTITY:
        group, _, option = key.rpartition(".")
        node = what.get(group) if group else what
        if isinstance(node, dict):
            node.pop(option, None)
    quantizer, policy = what.get("quantizer"), what.get("bitwidth")
    if isinstance(quantizer, dict) and is_float_quantizer(quantizer):
        what.pop("bits", None)
        what.pop("bitwidth", None)
    elif isinstance(policy, dict) and (table := table_sha256(policy.get("file"))):
        what["bitwidth"] = {**policy, "file": table}
    if segments:
        what["segments"] = list(segments)
    text = json.dumps(what, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_float_quantizer(quantizer: Mapping[str, Any]) -> bool:
    """Whether `quantizer` of a config quantizes nothing: widths are those of no layer then."""
    return all(quantizer.get(part, 0) is None for part in ("weight", "act"))


def table_sha256(file: Any) -> str | None:
    """Hash of a table of bits: what is in it counts, not its place. None where there is none."""
    if not isinstance(file, str) or not Path(file).is_file():
        return None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def _plain(cfg: DictConfig, key: Any) -> Any:
    value = cfg[key]
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def claim(folder: Path, status: dict[str, Any]) -> Path:
    """Create a run folder that nobody else has: `folder`, or `folder-2`, `folder-3`, ...

    Two processes that ask for the same name at the same moment get two folders.
    """
    if folder.name in ("", ".."):  # `folder=.`
        folder = folder.resolve()
    attempt, number = folder, 1
    while True:
        attempt.mkdir(parents=True, exist_ok=True)
        try:
            with open(attempt / STATUS, "x") as file:
                file.write(json.dumps(status, indent=2) + "\n")
            return attempt
        except FileExistsError:
            number += 1
            attempt = folder.with_name(f"{folder.name}-{number}")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for a read-then-write of its status (milliseconds, never a whole run)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # closing releases the lock


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty when it is missing or unreadable."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_config(path: Path, advice: str, area: str = "resume") -> DictConfig:
    """A config file of a run.

    Raises:
        ConfigError: it is damaged; `advice` says what to do.
    """
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:  # yaml and OmegaConf raise their own kinds
        raise ConfigError(f"{area}: {path} is damaged. {advice}") from error
    if not isinstance(cfg, DictConfig) or not {"model", "dataset"} <= set(cfg):
        raise ConfigError(f"{area}: {path} is damaged. {advice}")
    return cfg


def run_config(folder: Path, area: str) -> DictConfig:
    """The resolved config of the run in `folder`; `area` is the command that asks.

    Raises:
        ConfigError: it is no run's folder, or the config is damaged.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{area}: '{folder}' is not a run folder. List runs with: qexp ls")
    how = f"Bring it back: {folder / '.hydra' / 'config.yaml'} has its values, not resolved."
    return read_config(path, how, area)


def is_done(folder: Path) -> bool:
    """Whether a run is done and its result can be read."""
    return read_json(folder / STATUS).get("state") == "done" and bool(read_json(folder / RESULT))


def read_status(folder: Path) -> dict[str, Any]:
    """`status.json` of a run, with `state` dead where its process is gone."""
    status = read_json(folder / STATUS)
    if status.get("state", "running") == "running" and not _alive(status):
        status["state"] = "dead"
    return status


def run_state(folder: Path) -> str:
    """`state` of a run; `done` of a folder without `status.json`, as copies of runs may be."""
    return str(read_status(folder).get("state")) if (folder / STATUS).is_file() else "done"


def refuse_running(folder: Path, status: dict[str, Any]) -> None:
    """Refuse to go on with a run whose process may be at work; `status` is of `read_status`.

    Raises:
        RunError: its process is at work, or may be, on another machine.
    """
    if status.get("state") != "running":
        return
    advice = "Wait for it, or stop it first."
    if _elsewhere(status):
        advice = f"If nothing runs there any more: qexp resume {quoted(folder)} --take-over"
    raise RunError(
        f"resume: {folder} is still running (pid {status.get('pid')} on {status.get('host')}). "
        + advice
    )


def give_up(folder: Path) -> None:
    """Mark a run that another machine began, and of which only the user knows, as interrupted."""
    with locked(folder):
        status = read_status(folder)
        if status.get("state") == "running" and _elsewhere(status):
            write_json(folder / STATUS, {**status, "state": "interrupted"})


def _elsewhere(status: dict[str, Any]) -> bool:
    return status.get("host", socket.gethostname()) != socket.gethostname()


def owner() -> dict[str, Any]:
    """The fields of a status that say which process this is."""
    pid = os.getpid()
    return {"pid": pid, "pid_started": _process_start(pid), "host": socket.gethostname()}


def _alive(status: dict[str, Any]) -> bool:
    """Whether the process that wrote `status` still runs; True when that cannot be known."""
    if "pid" not in status or status.get("host") != socket.gethostname():
        return bool(status)  # another machine, or a status being written
    try:
        os.kill(status["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it exists and is someone else's
    # The number may have been given to another process since, after a reboot for instance.
    return status.get("pid_started") == _process_start(status["pid"])


def _process_start(pid: int) -> int | None:
    """Start time in clock ticks since boot (Linux); None where /proc does not exist."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])  # field 22; the name before ) may hold spaces


def find_runs(root: Path) -> list[Path]:
    """Every run folder under `root` (or `root` itself), oldest name first."""
    return sorted({path.parent for path in root.rglob(STATUS)}, key=lambda path: (path.name, path))


def find_unfinished(root: Path, identity: str, processes: int = 1) -> Path | None:
    """The newest run under `root` that `_alike` finds and that ended without a result."""
    for folder in reversed(find_runs(root)):
        status = read_status(folder)
        ended = status.get("state") in ("dead", "failed", "interrupted")
        if ended and _alike(status, identity, processes):
            return folder
    return None


def find_done(root: Path, identity: str, processes: int = 1) -> Path | None:
    """The newest finished run under `root` that `_alike` finds."""
    for folder in reversed(find_runs(root)):
        if _alike(read_json(folder / STATUS), identity, processes) and is_done(folder):
            return folder
    return None


def _alike(status: Mapping[str, Any], identity: str, processes: int) -> bool:
    """Whether a run is of the config with this identity, trained by so many processes together:
    they make another batch."""
    return status.get("identity") == identity and status.get("processes", 1) == processes
