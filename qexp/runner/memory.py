"""The memory that a piece of work takes at its highest."""

from __future__ import annotations

import ctypes
import gc
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
