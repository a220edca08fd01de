"""Which device, which seed, how many threads, and whether `torch.compile` can work here."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qexp.errors import ConfigError
from qexp.runner.distributed import launched

# Of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def pick_device(name: str) -> torch.device:
    """The device that `name` stands for: auto, cpu, cuda, cuda:N or mps.

    `auto` is cuda where there is one, else cpu; `cuda` is the GPU that torchrun gave this process,
    else the first. mps must be named: nothing has been run on it, and it has no float64.

    Raises:
        ConfigError: unknown name, or a device this machine has not.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("config: device=mps, but this torch has no MPS. Use device=auto.")
        return torch.device("mps")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise ConfigError(f"config: device '{name}' is none of auto, cpu, cuda, cuda:N, mps.")
    index, count = int(match[1] or launched().local), torch.cuda.device_count()
    if count == 0:
        raise ConfigError(
            f"config: device={name}, but torch sees no GPU here. Use device=auto or device=cpu."
        )
    if index >= count:
        raise ConfigError(
            f"config: device={name}, but there are {count} GPUs, cuda:0 to cuda:{count - 1}."
        )
    return torch.device("cuda", index)


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it runs by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def float32_precision_kept() -> Iterator[bool]:
    """Put back afterwards what torch may do to float32 operands, to the letter.

    A compiled function is compiled again where the precision has but another name ("ieee" for
    "none"). Gives whether it can be read in torch's old way (`allow_tf32`): not in a program that
    speaks of `fp32_precision`.
    """
    cudnn: Any = torch.backends.cudnn
    onednn: Any = torch.backends.mkldnn
    # What the old setters write too.
    places = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul, onednn.matmul)
    kept = [place.fp32_precision for place in places]
    try:
        old = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        old = None
    try:
        yield old is not None
    finally:
        if old is not None:
            cudnn.allow_tf32 = old[0]
            torch.set_float32_matmul_precision(old[1])
        for place, value in zip(places, kept, strict=True):
            place.fp32_precision = value


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether CUDA may take 10 bits of a float32's mantissa inside, as cuDNN does by default."""
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    with float32_precision_kept() as in_the_old_way:
        if in_the_old_way:
            cudnn.allow_tf32 = matmul.allow_tf32 = allowed
        else:
            cudnn.conv.fp32_precision = matmul.fp32_precision = "tf32" if allowed else "ieee"
        yield


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and every CUDA device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # numpy takes 32 bits
    torch.manual_seed(seed)


def set_threads(threads: int | None) -> int:
    """Use this many CPU threads (None: leave torch's choice); returns how many are used."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def compiler_available(device: torch.device | str = "cpu") -> tuple[bool, str]:
    """Whether `torch.compile` can build code for `device` here, and if not, why.

    Looks for the tools, without compiling: a C++ compiler and Python's headers, and Triton on
    a GPU. The compiler will not say that a CPU machine has no CUDA runtime: that is no news.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is None:
        return False, "the package triton is not installed"
    default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get("CXX", default)
    if shutil.which(compiler) is None:
        return False, f"no C++ compiler ('{compiler}' is not on the PATH; CXX names another)"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return False, f"no Python headers ({header}; install python3-dev)"
    return True, compiler


def keep_memory() -> bool:
    """Let freed memory stay with this process; returns whether the C library can be told (glibc).

    A training step frees and takes the same large tensors again and again. By default glibc hands
    each back to the system, which clears every page anew at its first touch; kept, it is reused.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    keep = 2**31 - 1  # bytes; the largest value mallopt takes
    return bool(mallopt(_M_MMAP_THRESHOLD, keep)) and bool(mallopt(_M_TRIM_THRESHOLD, keep))
