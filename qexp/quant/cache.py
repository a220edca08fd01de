"""What a unit of the network sees and gives on the calibration images, in contiguous arrays.

Arrays up to `limit` bytes in all stay on the device; further ones are memory-mapped files that
exist only while they are open, so reconstruction of a large network needs disk, not memory.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from qexp.errors import RunError
from qexp.quant.trace import evaluated


class Store:
    """Hands out arrays, on the device until `limit` bytes are in use, then on disk.

    Args:
        device: where arrays live.
        limit: bytes.
        folder: where files go; None keeps everything on the device.
    """

    def __init__(self, device: torch.device, limit: float, folder: Path | None) -> None:
        self.device, self.limit, self.folder = device, limit, folder
        self.used = 0
        self.spilled = 0

    def array(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 array.

        Raises:
            RunError: the disk has no room for it.
        """
        size = 4 * int(torch.Size(shape).numel())
        if self.folder is None or self.used + size <= self.limit:
            self.used += size
            return torch.empty(shape, device=self.device)
        path = self.folder / f"cache-{self.spilled}.bin"
        self.spilled += size
        try:
            _reserve(path, size)
            flat = torch.from_file(str(path), shared=True, size=size // 4, dtype=torch.float32)
        finally:
            path.unlink(missing_ok=True)  # the mapping keeps the blocks until it is closed
        return flat.view(shape)

    def clear(self) -> None:
        """Count from zero again; the caller has dropped its arrays."""
        self.used = self.spilled = 0


def _reserve(path: Path, size: int) -> None:
    """Make a file that has all its blocks: a write to a mapping cannot say that the disk is full.

    It would end the process with SIGBUS, without a word.
    """
    room = shutil.disk_usage(path.parent).free >= size
    reserve = getattr(os, "posix_fallocate", None)  # macOS has none
    with path.open("wb") as file:
        try:
            if room and size and reserve:
                reserve(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                room = False
            elif error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot
                raise
    if not room:
        raise RunError(
            f"run: {path.parent}: no space left for {size / 1e9:.1f} GB of a unit's inputs and "
            "outputs. Free some, or set out=... or a larger recipe.cache_gb, then start or resume "
            "the run."
        )


class _StopForward(Exception):  # noqa: N818 - not an error
    """Ends a forward pass early: the unit has run."""


@torch.no_grad()
def record(
    model: nn.Module,
    unit: nn.Module,
    images: Tensor,
    batch_size: int,
    store: Store,
    *,
    output: bool,
) -> tuple[Tensor, Tensor | None]:
    """Input and (if asked) output of `unit` inside `model`, for all images.

    The pass ends after the unit. Shape: images [N, C, H, W]; results [N, ...].
    """
    arrays: dict[str, Tensor] = {}
    first = 0

    def keep(name: str, value: Tensor) -> None:
        if name not in arrays:
            arrays[name] = store.array((len(images), *value.shape[1:]))
        arrays[name][first : first + len(value)].copy_(value)

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        keep("input", inputs[0])  # now: the unit may work in place

    def after(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        if output:
            keep("output", y)
        raise _StopForward

    hooks = [unit.register_forward_pre_hook(before), unit.register_forward_hook(after)]
    with evaluated(model, hooks):
        for first in range(0, len(images), batch_size):
            try:
                model(images[first : first + batch_size])
            except _StopForward:
                continue
            raise ValueError(f"{type(unit).__name__} is not part of the network's forward pass")
    return arrays["input"], arrays.get("output")
