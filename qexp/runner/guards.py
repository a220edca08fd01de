"""What surrounds a run: a disk that refuses a write, a full GPU, SIGTERM, torch's global state."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qexp.errors import RunError
from qexp.runner.device import float32_precision_kept

ADVICE = {
    errno.ENOSPC: "no space left. Free some or set out=...",
    errno.EDQUOT: "disk quota exceeded. Free some space or set out=...",
    errno.EFBIG: "the file would be larger than is allowed there (ulimit -f). Set out=...",
    errno.EIO: "the disk fails to read or write. Check it, or set out=... on another",
    errno.EACCES: "no permission to write. Set out=... to a folder of yours",
    errno.EPERM: "no permission to write. Set out=... to a folder of yours",
    errno.EROFS: "the file system is read-only. Set out=...",
    errno.ENOTDIR: "a part of the path is a file. Set out=...",
    errno.ENOENT: "nothing can be written there. Set out=... to a folder of yours",
    errno.EEXIST: "a file is in the way. Set out=...",
}


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does."""


@contextmanager
def os_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk may refuse, at any write to `folder` in the block, into one line.

    TensorBoard's thread meets a full disk too: it hands its error to the run, which tells it.
    """
    before = threading.excepthook

    def told(args: threading.ExceptHookArgs) -> None:
        if getattr(args.exc_value, "errno", None) not in ADVICE:
            before(args)

    threading.excepthook = told
    try:
        yield
    except OSError as error:
        name = error.filename  # bytes from TensorBoard's writer, a number from os.fdopen
        where = Path(os.fsdecode(name)) if name and isinstance(name, (str, bytes)) else folder
        ours = where == folder or where in folder.parents or folder in where.parents
        if error.errno not in ADVICE or not ours:
            raise
        failure = RunError(f"run: {where}: {ADVICE[error.errno]}, then start or resume the run.")
        failure.run_folder = getattr(error, "run_folder", None)  # type: ignore[attr-defined]
        raise failure from error
    finally:
        threading.excepthook = before


@contextmanager
def gpu_memory(recipe: Container[str]) -> Iterator[None]:
    """Turn a GPU that has no memory for what the block asks of it into one line.

    Args:
        recipe: its keys.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        trains = "accumulate" in recipe
        less = "Set saved=blocks, raise recipe.accumulate or lower" if trains else "Lower"
        raise RunError(
            f"run: the GPU is out of memory. {less} recipe.batch_size"
            f"{'' if trains else ' or recipe.minibatch'}; in a sweep, sweep.jobs_per_gpu."
        ) from error


@contextmanager
def sigterm() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside the block (main thread only: elsewhere it cannot)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def global_state() -> Iterator[None]:
    """Put torch's global switches back afterwards; free the GPU's memory and its statistics.

    The jobs of a sweep share a process, and so may a float baseline and its QAT run.
    """
    cudnn = torch.backends.cudnn
    dtype = torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    benchmark, cudnn_deterministic = cudnn.benchmark, cudnn.deterministic
    try:
        with float32_precision_kept():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_num_threads(threads)
        cudnn.benchmark, cudnn.deterministic = benchmark, cudnn_deterministic
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
