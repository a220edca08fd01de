"""What a run ran on: argv, source commit, packages, hardware. Written to env.json."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import qexp

PACKAGES = ("torch", "torchvision", "hydra-core", "omegaconf", "numpy")
IF_USED = ("brevitas", "onnxruntime", "torchao")  # named where the process has imported them


def source_version() -> tuple[str, bool]:
    """`(commit, dirty)` of the qexp checkout; `(version, False)` when it is installed."""
    root = Path(qexp.__file__).parent.parent
    if not (root / ".git").exists():
        return qexp.__version__, False
    try:
        commit = _git(root, "rev-parse", "HEAD").strip()
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no").strip())
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout of another user
        return qexp.__version__, False
    return commit, dirty


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that numbers depend on; None where one is missing."""
    found: dict[str, str | None] = {"qexp": qexp.__version__}
    for name in (*PACKAGES, *(n for n in IF_USED if n in sys.modules)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_models() -> list[str]:
    """Names of the CUDA devices, in index order."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def describe(seed: int | None, threads: int | None = None) -> dict[str, Any]:
    """Everything env.json holds. `threads`: as the run will set them; None: as they are."""
    import torch

    commit, dirty = source_version()
    return {
        "command": os.environ.get("QEXP_COMMAND") or shlex.join(sys.argv),
        "cwd": os.getcwd(),
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "packages": package_versions(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": threads or torch.get_num_threads(),
        "gpus": gpu_models(),
        "cuda": torch.version.cuda,
        "seed": seed,
    }


def note_earlier_(now: dict[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Add the commits of a resumed run's earlier parts to what its new part runs on.

    Args:
        now: of `describe`; gets `commits`, oldest first, where they are not all one.
        before: the env.json of the part before; empty where it is not known. Its commands are
            added too, as `commands`.

    Returns:
        A line for each difference that numbers may depend on.
    """
    if not before:
        return []
    lines, known = [], [*before.get("commits", [_commit(before)])]
    commands = [*before.get("commands", [before.get("command")])]
    now["commands"] = [*commands, now["command"]]
    if _commit(now) != known[-1]:
        lines.append(f"this run was begun by commit {known[-1]}, it goes on with {_commit(now)}")
        known.append(_commit(now))
    if len(known) > 1:
        now["commits"] = known
    if before.get("threads") != now["threads"]:
        lines.append(
            f"threads={now['threads']}, before {before.get('threads')}: sums in another order, "
            "the numbers may differ from those of an uninterrupted run"
        )
    return lines


def _commit(about: Mapping[str, Any]) -> str:
    return f"{about.get('commit')}{' (dirty)' if about.get('dirty') else ''}"
