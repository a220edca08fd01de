"""How much of this machine's CPU other processes leave to a run.

OpenMP gives each thread a share of every operation and waits for the last one. A thread whose core
another process uses comes late each time, so that a step takes many times as long: a float ResNet-8
trained at 100 images/s with two threads beside a busy process on two cores, at 2,700 with one (by
hand, not kept).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

STAT = Path("/proc/stat")
PROBE = 0.3  # seconds: 30 ticks of each core
SLACK = 0.5  # cores' worth of small tasks that any machine has


def crowded(threads: int) -> str:
    """A line for a run on the CPU whose threads have too few idle cores; else nothing.

    Sleeps `PROBE` seconds, unless there is one thread.
    """
    idle = idle_cores() if threads > 1 else None
    if idle is None or idle > threads - SLACK:
        return ""
    return (
        f"{threads} threads, and other processes leave {idle:.1f} cores idle: threads wait for "
        f"each other in every operation. threads={max(1, int(idle + SLACK))} may be many times "
        "faster"
    )


def idle_cores() -> float | None:
    """Idle cores among those this process may use, while it sleeps; None: the system says none."""
    before = _ticks()
    time.sleep(PROBE)
    after = _ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    cores = len(os.sched_getaffinity(0))
    return cores * (after[0] - before[0]) / (after[1] - before[1])


def _ticks() -> tuple[int, int] | None:
    """Idle and all ticks so far of the cores this process may use; None without /proc/stat."""
    try:
        lines = STAT.read_text().splitlines()
        allowed = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    except (OSError, AttributeError):  # no Linux
        return None
    rows = [line.split() for line in lines if line.partition(" ")[0] in allowed]
    # user nice system idle iowait irq softirq steal (proc(5)); guests are in user and nice
    ticks = [[int(value) for value in row[1:9]] for row in rows]
    return sum(t[3] + t[4] for t in ticks), sum(map(sum, ticks))
