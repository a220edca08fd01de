"""The memory that a piece of work takes at its highest, and the memory that is free."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from qexp.runner.device import synchronize


class Peak:
    """The high-water mark of memory from here on: `peak = Peak(device); work(); peak.rise()`.

    On a GPU that of torch's allocator; on the CPU that of the process's resident memory, which
    only Linux starts anew when asked. A process has one mark: a new `Peak` ends the one before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self._before: int | None = torch.cuda.memory_allocated(device)
        else:
            self._before = _restart_mark()

    def rise(self) -> int | None:
        """Bytes above what was in use at the start; None where the system cannot tell."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return max(0, _status("VmHWM") - self._before)  # the kernel's counts are a little behind


def _restart_mark() -> int | None:
    """Resident bytes now, from which on the high-water mark counts; None if not Linux, glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back, so that all of it is seen again
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields[name].split()[0]) * 1024  # kB


# ---------------------------------------------------------------------------------------------
# What is free


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, in main memory for the CPU; None if unknown.

    Of main memory what Linux calls available, within the limits of the process's control groups
    (of version 2: containers, job schedulers).
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        machine = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024  # kB
    except (OSError, ValueError):
        return None
    return min([machine, *_group_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _group_bytes(groups: Path, root: Path) -> Iterator[int]:
    """What the process's control group and those around it still allow.

    Args:
        groups: the file that names its group, as a line `0::/path`.
        root: the folder of all groups.
    """
    with suppress(OSError, ValueError):
        line = next((x for x in groups.read_text().splitlines() if x.startswith("0::")), "0::/")
        group = root / line[3:].lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" is no limit
                limit = int((folder / "memory.max").read_text())
                # Pages of files that are not in use are given back when memory is short.
                spare = _field(folder / "memory.stat", "inactive_file")
                yield max(0, limit - int((folder / "memory.current").read_text()) + spare)


def _field(path: Path, name: str) -> int:
    """The number behind a name in a table of two columns."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name} "):
            return int(line.split()[1])
    raise ValueError(name)
