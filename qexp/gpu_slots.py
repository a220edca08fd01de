"""Which of a sweep's places on GPUs this process has.

A launcher hands the next job to whichever of its processes is free, so a job's number says nothing
about where there is room. Each process holds one place, a locked file in the sweep's folder, for as
long as it lives: `jobs_per_gpu` is a bound whatever the jobs' lengths.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from omegaconf import OmegaConf

from qexp.errors import ConfigError

_held: dict[Path, tuple[int, IO[str]]] = {}


def take_slot(folder: Path, slots: int) -> int | None:
    """The number of this process's place, the same each time; None when all are taken.

    Args:
        folder: of the sweep.
        slots: how many places there are.
    """
    folder = folder.absolute()
    if folder in _held:
        return _held[folder][0]
    (folder / "slots").mkdir(parents=True, exist_ok=True)
    for number in range(slots):
        file = open(folder / "slots" / str(number), "w")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held[folder] = number, file
        return number
    return None


def gpu_of_job(gpus: int | None, per_gpu: int = 1) -> str:
    """`cuda:N` for a process of a sweep: the resolver `${gpu_of_job:4,2}`; null: all GPUs.

    Outside a sweep, as when its run is resumed alone, `auto`.

    Raises:
        ConfigError: all GPUs were asked for, and there is none.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or OmegaConf.is_missing(hydra.job, "num"):
        return "auto"
    if gpus is None and _gpus() == 0:
        raise ConfigError("config: launch=gpus: torch sees no GPU here. Use launch=parallel.")
    count = jobs_at_once(gpus, 1)
    slot = take_slot(Path(hydra.sweep.dir), count * per_gpu)
    return f"cuda:{(hydra.job.num if slot is None else slot) % count}"


def jobs_at_once(gpus: int | None, per_gpu: int) -> int:
    """Jobs of a sweep that run side by side: the resolver `${jobs_at_once:4,2}`."""
    return (max(1, _gpus()) if gpus is None else gpus) * per_gpu


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
